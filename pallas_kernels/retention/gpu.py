"""Retention on Hopper: one Mosaic GPU kernel, which is the forward and three times the backward.

The kernel goes over a sequence chunk by chunk with a tile of the state in registers. README.md
shows why the gradients are the same sweep over other operands, against the sequence for two.

A decay enters the kernel as exponents alone, sums of the gates that `gates.py` keeps finite.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float, Int

from pallas_kernels import mosaic_gpu
from pallas_kernels.common import vary_alike
from pallas_kernels.mosaic_gpu import LOG2E, WARPGROUP_ROWS, plgpu
from pallas_kernels.retention import reference
from pallas_kernels.retention.blocks import GPU_CHUNK as CHUNK
from pallas_kernels.retention.blocks import GpuBlocks, GpuTile
from pallas_kernels.retention.gates import RESET, finite_gates
from pallas_kernels.retention.segments import entering_states

_COPIED_ROWS = 8  # The copy engine's tile; beyond the last it reads zeros, and writes nothing.
_DTYPES = (jnp.bfloat16, jnp.float16)
_NEVER = -1e30  # An exponent, whose power is 0.


def chunkwise(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B T N"],
  initial_state: Float[Array, "B N H V"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int | None = None,
  *,
  blocks: GpuBlocks | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """Eq. 7 with the state in registers; `api.retention` explains the arguments.

  Args:
    q: See there.
    k: See there.
    v: See there.
    log_decay: See there.
    initial_state: See there.
    lengths: See there.
    segment_ids: See there.
    chunk_size: Always 64.
    blocks: Block sizes; chosen from shapes and card if `None`.
  """
  del chunk_size
  mosaic_gpu.refuse_unless_supported()
  _refuse_inputs(q, k, v)
  (batch, length, heads, head_dim), value_dim = q.shape, v.shape[-1]
  blocks = blocks or GpuBlocks.for_sizes(batch * heads, length, head_dim, value_dim)
  blocks.check(head_dim, value_dim)

  valid = None if lengths is None else reference.valid_tokens(lengths, length)
  gates = jnp.broadcast_to(log_decay, (batch, length, heads))
  starts = None if segment_ids is None else reference.document_starts(segment_ids, valid)
  gates = finite_gates(gates, starts, valid)
  if valid is not None:  # What a padded token holds is not ours to trust, and may be a NaN.
    k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
  if initial_state is None:  # Nothing enters, as at a document's start; its gradient is zero, then.
    gates = gates.at[:, 0].set(RESET)
  state = () if initial_state is None else (initial_state.astype(jnp.float32),)
  segments = blocks.segments
  if padding := -length % (_COPIED_ROWS if segments == 1 else segments * CHUNK):
    q, k, v, gates = (
      jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, gates)
    )
  q, k, v, gates, *state = vary_alike(q, k, v, gates, *state)
  if segments > 1:  # Which are rows of a larger batch.
    cut = lambda x: x.reshape(batch, segments, -1, *x.shape[2:])
    entering = entering_states(cut(k), cut(v), cut(gates), *state)
    q, k, v, gates = (x.reshape(batch * segments, -1, *x.shape[2:]) for x in (q, k, v, gates))
    state = [entering.reshape(-1, *entering.shape[2:])]
  out, last = _chunkwise(blocks, q, k, v, gates, tuple(state))
  out = out.reshape(batch, -1, heads, value_dim)[:, :length]
  return out, last.reshape(batch, segments, *last.shape[1:])[:, -1]


def _refuse_inputs(q, k, v):
  if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
    raise NotImplementedError(
      f"The tensor cores multiply bfloat16 or float16, and one of them: "
      f"{q.dtype=} {k.dtype=} {v.dtype=}."
    )
  if not q.size or not v.size:
    raise NotImplementedError(f"An empty array has no block: {q.shape=}, {v.shape=}.")
  head_dim, value_dim = q.shape[-1], v.shape[-1]
  if head_dim % WARPGROUP_ROWS or head_dim > 256 or value_dim % WARPGROUP_ROWS or value_dim > 512:
    raise NotImplementedError(
      f"Tiles are multiples of {WARPGROUP_ROWS}, of at most 256 by 512 in a state; "
      f"{head_dim=} {value_dim=}."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunkwise(blocks, q, k, v, gates, initial):
  state = initial[0] if initial else None
  out, last = _sweep("retention_chunkwise_fwd", blocks.fwd, q, k, v, gates, state)
  return out.astype(v.dtype), last


def _chunkwise_fwd(blocks, q, k, v, gates, initial):
  learned = gates.perturbed
  q, k, v, gates, initial = jax.tree.map(
    lambda x: x.value, (q, k, v, gates, initial), is_leaf=lambda x: hasattr(x, "perturbed")
  )
  out, last = _chunkwise(blocks, q, k, v, gates, initial)
  # Without a decay to learn, the backward does not need the last state.
  return (out, last), (q, k, v, gates, initial, last if learned else None)


def _chunkwise_bwd(blocks, residuals, cotangents):
  q, k, v, gates, initial, last = residuals
  dout, dlast = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
  dout = jnp.zeros((*q.shape[:3], v.shape[-1]), v.dtype) if dout is None else dout
  q, k, v, gates, dout = vary_alike(q, k, v, gates, dout)
  transposed = lambda state: None if state is None else state.swapaxes(2, 3)
  states = (initial[0] if initial else None, dlast)
  into, out_of = (transposed(state) for state in states)

  # The gradient of a gate is a small difference of sums over both: keep them unrounded for it.
  terms = 1 if last is None else 2
  dq, _ = _sweep("retention_chunkwise_bwd_dq", blocks.bwd_dq, dout, v, k, gates, into, terms=terms)
  back = functools.partial(_sweep, gates=gates, reverse=True)
  dk, _ = back("retention_chunkwise_bwd_dk", blocks.bwd_dk, v, dout, q, state=out_of, terms=terms)
  dv, dinitial = back("retention_chunkwise_bwd_dv", blocks.bwd_dv, k, q, dout, state=dlast)

  dinitial = (jnp.exp(gates[:, 0])[..., None, None] * dinitial,) if initial else ()
  dgates = jnp.zeros_like(gates)
  if last is not None:
    # What a gate scales is all that crosses it, whose gradient is the sum over what lies behind.
    float32 = lambda x: x.astype(jnp.float32)
    of_queries = jnp.sum(float32(q) * dq, -1)
    of_keys = jnp.sum(jnp.repeat(float32(k), q.shape[2] // k.shape[2], 2) * dk, -1)
    differences = of_queries - of_keys
    if dlast is not None:
      differences = differences.at[:, -1].add(jnp.sum(last * dlast, (2, 3)))
    dgates = _sums_behind(differences, gates <= RESET)
  dk, dv = (
    x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]).sum(3, dtype=jnp.float32) for x in (dk, dv)
  )
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dgates, dinitial


_chunkwise.defvjp(_chunkwise_fwd, _chunkwise_bwd, symbolic_zeros=True)


def _sums_behind(
  terms: Float[Array, "B T N"], forgets: Bool[Array, "B T N"]
) -> Float[Array, "B T N"]:
  """Sums of the terms from each token to the end of its run: until one that forgets what was.

  Nothing crosses the start of a run, unless a state enters the first of them, so the sum over a
  whole run is zero: what it is instead is what rounding added up to, and is taken out evenly.
  """
  length = terms.shape[1]
  at = jnp.arange(length)[:, None]
  start = jax.lax.cummax(jnp.where(forgets, at, 0), axis=1)
  end = jax.lax.cummin(jnp.where(forgets, at, length), axis=1, reverse=True)
  end = jnp.pad(end[:, 1:], ((0, 0), (0, 1), (0, 0)), constant_values=length)
  sums = jnp.pad(jax.lax.cumsum(terms, axis=1, reverse=True), ((0, 0), (0, 1), (0, 0)))
  behind = jnp.take_along_axis(sums, end, axis=1)
  rounding = (jnp.take_along_axis(sums, start, axis=1) - behind) * (end - at) / (end - start)
  rounding = jnp.where((start == 0) & ~forgets[:, :1], 0, rounding)
  return sums[:, :-1] - behind - rounding


def _exponents(gates: Float[Array, "B T N"], reverse: bool) -> Float[Array, "B N M C"]:
  """Base two: from the state that enters a chunk to each token, along the sweep.

  Against the sequence, a token's gate is its successor's: what stands in between.
  """
  batch, length, heads = gates.shape
  if reverse:
    gates = jnp.pad(gates[:, 1:], ((0, 0), (0, 1), (0, 0)))
  gates = jnp.pad(gates * LOG2E, ((0, 0), (0, -length % CHUNK), (0, 0)))
  gates = gates.swapaxes(1, 2).reshape(batch, heads, -1, CHUNK)
  return jax.lax.cumsum(gates, axis=3, reverse=reverse)


def _sweep(
  name: str,
  tile: GpuTile,
  q: Float[Array, "B T Nq H"],
  k: Float[Array, "B T Nk H"],
  v: Float[Array, "B T Nv V"],
  gates: Float[Array, "B T N"],
  state: Float[Array, "B N H V"] | None,
  *,
  reverse: bool = False,
  terms: int = 1,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """Runs the kernel: retention along the sequence, or against it with each token's gate behind it.

  A block has `tile.rows` of the state's rows, and 64 of its columns in each warpgroup. Where the
  rows are in several blocks, the outputs are sums of theirs.

  Args:
    name: The kernel's.
    tile: What a block takes in.
    q: Queries; heads of theirs, of keys and of values are shared as they divide.
    k: Keys.
    v: Values.
    gates: Log decays.
    state: Before the sweep; zeros if `None`.
    reverse: Which way.
    terms: Two for outputs in float32, as sums of two numbers of the operands' dtype.
  """
  (batch, length, _, head_dim), (_, _, heads), value_dim = q.shape, gates.shape, v.shape[-1]
  dtype, layout = q.dtype, plgpu.Layout.WGMMA
  rows, columns, warpgroups, stages = tile.rows, WARPGROUP_ROWS, tile.warpgroups, tile.stages
  parts, num_chunks = head_dim // rows, pl.cdiv(length, CHUNK)
  square = (CHUNK, CHUNK)

  def kernel(*refs, q_smem, k_smem, v_smem, exponents_smem, scratch_smem, filled, emptied):
    *inputs, out_ref, last_ref = refs
    q_ref, k_ref, v_ref, exponents_ref, *state_ref = inputs
    row, head, tile_index = (jax.lax.axis_index(x) for x in ("batch", "head", "tile"))
    warpgroup = jax.lax.axis_index("warpgroup")
    part, group = jax.lax.rem(tile_index, parts), jax.lax.div(tile_index, parts)
    state_rows = pl.ds(part * rows, rows)
    state_columns = lambda warpgroup: pl.ds((group * warpgroups + warpgroup) * columns, columns)
    tokens = lambda step: pl.ds((num_chunks - 1 - step if reverse else step) * CHUNK, CHUNK)

    def fill(step):
      """Starts to copy the operands of a chunk, in the order of their use."""
      slot, where = jax.lax.rem(step, stages), tokens(step)
      of = lambda ref: (row, where, jax.lax.div(head, heads // ref.shape[2]))
      done = filled.at[slot]
      plgpu.copy_gmem_to_smem(q_ref.at[*of(q_ref), state_rows], q_smem.at[slot], done)
      plgpu.copy_gmem_to_smem(k_ref.at[*of(k_ref), state_rows], k_smem.at[slot], done)
      chunk = jax.lax.div(where.start, CHUNK)
      plgpu.copy_gmem_to_smem(exponents_ref.at[row, head, chunk], exponents_smem.at[slot], done)
      for i in range(warpgroups):
        plgpu.copy_gmem_to_smem(v_ref.at[*of(v_ref), state_columns(i)], v_smem.at[slot, i], done)

    def step(i, state):
      slot = jax.lax.rem(i, stages)
      ahead = i + stages - 1

      @pl.when((warpgroup == 0) & (ahead < num_chunks))
      def _():
        @pl.when(i > 0)
        def _():
          plgpu.barrier_wait(emptied.at[jax.lax.rem(ahead, stages)])

        fill(ahead)

      plgpu.barrier_wait(filled.at[slot])
      queries, keys, values = q_smem.at[slot], k_smem.at[slot], v_smem.at[slot, warpgroup]
      exponents = exponents_smem.at[slot]
      enter = plgpu.load(exponents, layout=layout.reduce(1), optimized=False)
      enter_across = plgpu.load(exponents, layout=layout.reduce(0), optimized=False)
      total = exponents[0 if reverse else CHUNK - 1]
      down = lambda x: jax.lax.broadcast_in_dim(x, square, [0])
      where, scores_smem, values_smem = tokens(i), scratch.at[0], scratch.at[1]

      def multiply_keys(acc):
        plgpu.wgmma(acc, queries, keys.transpose((1, 0)))
        leaving = plgpu.load(values, layout=layout).astype(jnp.float32)  # While that runs.
        values_smem[...] = (leaving * down(jnp.exp2(total - enter))).astype(dtype)
        return acc[...]

      scores = pl.run_scoped(multiply_keys, plgpu.ACC(square, jnp.float32))
      # Positions in the sequence: from those in the chunk, which do not change, the compiler would
      # make the mask once and keep it in registers.
      of_query, of_key = (
        plgpu.broadcasted_iota(jnp.int32, square, axis, layout=layout) + where.start
        for axis in (0, 1)
      )
      seen = of_query <= of_key if reverse else of_query >= of_key
      gap = down(enter) - jax.lax.broadcast_in_dim(enter_across, square, [1])
      scores *= jnp.exp2(jnp.where(seen, gap, _NEVER))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # The outputs of the chunk before.
      scores_smem[...] = scores.astype(dtype)

      def read_state(acc):
        for j in range(rows // WARPGROUP_ROWS):
          part_smem, start = scratch.at[2 + j % 2], j * WARPGROUP_ROWS
          if j >= 2:
            plgpu.wgmma_wait(1)  # The product that reads the same memory.
          part_smem[...] = state[start : start + WARPGROUP_ROWS].astype(dtype)
          plgpu.commit_smem()
          plgpu.wgmma(acc, queries.at[:, pl.ds(start, WARPGROUP_ROWS)], part_smem)
        return acc[...]

      out = pl.run_scoped(read_state, plgpu.ACC((CHUNK, columns), jnp.float32))
      out = mosaic_gpu.mma(out * down(jnp.exp2(enter)), scores_smem, values)
      for j in range(terms):
        rounded = out.astype(dtype)
        out_smem = scratch.at[2 * j]  # Whose scores, or part of the state, was read.
        out_smem[...] = rounded
        plgpu.commit_smem()
        start = (part * terms + j) * value_dim + state_columns(warpgroup).start
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, where, head, pl.ds(start, columns)])
        out -= rounded.astype(jnp.float32)
      state = mosaic_gpu.mma(state * jnp.exp2(total), keys.transpose((1, 0)), values_smem)
      plgpu.barrier_arrive(emptied.at[slot])
      return state

    @pl.when(warpgroup == 0)
    def _():
      for i in range(min(stages - 1, num_chunks)):
        fill(jnp.int32(i))

    scratch = scratch_smem.at[warpgroup]
    where = (row, head, state_rows, state_columns(warpgroup))
    if state_ref:
      carry = plgpu.load(state_ref[0].at[*where], layout=layout, optimized=False)
    else:
      carry = plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), layout)
    last_ref[where] = jax.lax.fori_loop(0, num_chunks, step, carry)
    plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 0)
    def _():  # Each arrival is waited for, those of chunks that none takes the place of too.
      for i in range(max(0, num_chunks - stages), num_chunks):
        plgpu.barrier_wait(emptied.at[i % stages])

  tokens = batch * heads * num_chunks * CHUNK
  out, last = mosaic_gpu.call(
    kernel,
    *(q, k, v, _exponents(gates, reverse)),
    *(() if state is None else (state,)),
    name=name,
    out_shape=(
      jax.ShapeDtypeStruct((batch, length, heads, parts * terms * value_dim), dtype),
      jax.ShapeDtypeStruct((batch, heads, head_dim, value_dim), jnp.float32),
    ),
    grid={"tile": parts * value_dim // (warpgroups * columns), "head": heads, "batch": batch},
    num_warpgroups=warpgroups,
    scratch=dict(
      q_smem=mosaic_gpu.tiled((stages, CHUNK, rows), dtype),
      k_smem=mosaic_gpu.tiled((stages, CHUNK, rows), dtype),
      v_smem=mosaic_gpu.tiled((stages, warpgroups, CHUNK, columns), dtype),
      exponents_smem=plgpu.SMEM((stages, CHUNK), jnp.float32),
      scratch_smem=mosaic_gpu.tiled((warpgroups, 4, *square), dtype),
      filled=plgpu.Barrier(num_arrivals=3 + warpgroups, num_barriers=stages),
      emptied=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    ),
    flops=tokens * (2 * CHUNK * (head_dim + value_dim) + 4 * head_dim * value_dim),
    transcendentals=tokens * CHUNK,
    approx_math=True,
  )
  if parts * terms > 1:
    out = out.reshape(*out.shape[:3], parts * terms, value_dim).sum(3, dtype=jnp.float32)
  return out, last
