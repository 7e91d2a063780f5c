"""Decoding with retention on a GPU: one Mosaic kernel that moves each state once, and in place."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from pallas_kernels import mosaic_gpu
from pallas_kernels.common import vary_alike
from pallas_kernels.mosaic_gpu import WARPGROUP_ROWS, plgpu
from pallas_kernels.retention import reference

_WARPGROUPS = 4  # Of a block, which share a state's rows.
_LANES = 128  # Threads of a warpgroup, which share a row.
_ROWS_AT_ONCE = 8  # Loads on their way in each thread.

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def decode(
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B N"],
  state: Float[Array, "B N H V"],
  gate: Float[Array, "B N V"] | None = None,
  norm_eps: float | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B N H V"]]:
  """One token of eq. 6 with its norm and gate; products are sums in float32, and exact.

  Args:
    q: See `api.retention_decode`.
    k: See there.
    v: See there.
    log_decay: See there.
    state: See there.
    gate: See there.
    norm_eps: See there.
  """
  mosaic_gpu.refuse_unless_supported()
  if any(x.dtype not in _DTYPES for x in (q, k, v)):
    raise NotImplementedError(f"No kernel reads these: {q.dtype=} {k.dtype=} {v.dtype=}.")
  rows, columns = q.shape[-1], v.shape[-1]
  if not q.size or not v.size:
    raise NotImplementedError(f"An empty array has no block: {q.shape=}, {v.shape=}.")
  if rows % (_WARPGROUPS * _ROWS_AT_ONCE) or columns not in (128, 256, 512):
    raise NotImplementedError(
      f"A block takes rows of 128, 256 or 512, and a multiple of "
      f"{_WARPGROUPS * _ROWS_AT_ONCE} of them: head_dim={rows} value_dim={columns}."
    )
  log_decay = jnp.broadcast_to(log_decay.astype(jnp.float32), q.shape[:2])
  arrays = [q, k, v, log_decay, state.astype(jnp.float32), *([] if gate is None else [gate])]
  return _decode(norm_eps, *vary_alike(*arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(norm_eps, q, k, v, log_decay, state, gate=None):
  (batch, heads, head_dim), (kv_heads, value_dim) = q.shape, v.shape[1:]
  layout = plgpu.Layout.WG_STRIDED((value_dim,), vec_size=value_dim // _LANES)
  by_rows = plgpu.Layout.WGMMA
  rows_each = head_dim // _WARPGROUPS

  def kernel(*refs, parts, sums, written):
    q_ref, k_ref, v_ref, decay_ref, *gate_ref, out_ref, state_ref = refs
    row, head = jax.lax.axis_index("batch"), jax.lax.axis_index("head")
    warpgroup = jax.lax.axis_index("warpgroup")
    kv_head = jax.lax.div(head, heads // kv_heads)
    load = lambda ref: plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
    decay, values = decay_ref[row, head], load(v_ref.at[row, kv_head])

    def some_rows(i, out):
      first = warpgroup * rows_each + i * _ROWS_AT_ONCE
      at = [first + j for j in range(_ROWS_AT_ONCE)]
      # All loads before the first store, which those behind it would wait for.
      states = [load(state_ref.at[row, head, j]) for j in at]
      keys = [k_ref[row, kv_head, j].astype(jnp.float32) for j in at]
      queries = [q_ref[row, head, j].astype(jnp.float32) for j in at]
      states = [decay * old + k * values for old, k in zip(states, keys, strict=True)]
      for j, q, new in zip(at, queries, states, strict=True):
        state_ref[row, head, j] = new
        out += q * new
      return out

    zeros = plgpu.layout_cast(jnp.zeros(value_dim, jnp.float32), layout)
    out = jax.lax.fori_loop(0, rows_each // _ROWS_AT_ONCE, some_rows, zeros)
    parts[warpgroup] = out
    plgpu.barrier_arrive(written)
    plgpu.barrier_wait(written)

    @pl.when(warpgroup == 0)
    def _():
      out = sum(load(parts.at[i]) for i in range(_WARPGROUPS))
      if norm_eps is not None:
        # No sum goes over all of a warpgroup's threads: each quarter of a warp sums a row of all.
        parts[0] = out * out
        squares = plgpu.load(parts.at[0], layout=by_rows.reduce(0), optimized=False)
        table = (WARPGROUP_ROWS, value_dim)
        sums[...] = jnp.sum(jax.lax.broadcast_in_dim(squares, table, [1]), 1)
        out *= jax.lax.rsqrt(sums[0] / value_dim + norm_eps)
      if gate_ref:
        gate = load(gate_ref[0].at[row, head])
        out *= gate / (1 + jnp.exp(-gate))
      out_ref[row, head] = out.astype(out_ref.dtype)

  out, state = mosaic_gpu.call(
    kernel,
    *(q, k, v, jnp.exp(log_decay)),
    *([] if gate is None else [gate]),
    name="retention_decode",
    out_shape=[jax.ShapeDtypeStruct((batch, heads, value_dim), v.dtype)],
    in_place=[state],
    grid={"head": heads, "batch": batch},
    num_warpgroups=_WARPGROUPS,
    scratch=dict(
      parts=plgpu.SMEM((_WARPGROUPS, value_dim), jnp.float32),
      sums=plgpu.SMEM((WARPGROUP_ROWS,), jnp.float32),
      written=plgpu.Barrier(num_arrivals=_WARPGROUPS),
    ),
    flops=5 * state.size,
  )
  return out, state


def _decode_fwd(norm_eps, *args):
  return _decode(norm_eps, *args), args


def _decode_bwd(norm_eps, args, cotangents):
  decode = functools.partial(reference.decode, norm_eps=norm_eps)
  return jax.vjp(decode, *args)[1](cotangents)


_decode.defvjp(_decode_fwd, _decode_bwd)
