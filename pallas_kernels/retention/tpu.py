"""Retention on a TPU: Mosaic kernels for the forward, the two sweeps of the backward, and decoding.

A grid step takes one chunk of a few heads; the grid's last axis runs along the sequence in order,
and each head's state stays in vector memory until its sequence ends. README.md derives the sweeps.

A decay enters the kernels as exponents alone. What forgets everything, the start of a document or
a gate of `-inf`, is a log decay of `RESET`, so that sums of log decays stay finite.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels import mosaic_tpu
from pallas_kernels.common import vary_alike
from pallas_kernels.mosaic_tpu import LANES, PARALLEL, SEQUENTIAL, SUBLANES
from pallas_kernels.retention import reference
from pallas_kernels.retention.blocks import Sizes, TpuBlocks, TpuTile, decode_heads

RESET = -128.0  # Its exp is 0 in float32.

_DTYPES = (jnp.bfloat16, jnp.float32)


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
  blocks: TpuBlocks | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """Eq. 7 with the state on chip; `api.retention` explains the arguments.

  Args:
    q: See there.
    k: See there.
    v: See there.
    log_decay: See there.
    initial_state: See there.
    lengths: See there.
    segment_ids: See there.
    chunk_size: Rounded up to a multiple of 128, or of 16 where one chunk takes in everything.
    blocks: Block sizes; chosen from shapes and chip if `None`.
  """
  dtype, v_dtype = jnp.result_type(q, k, v), v.dtype
  if dtype not in _DTYPES:
    raise NotImplementedError(f"Mosaic TPU multiplies bfloat16 and float32, and no {dtype.name}.")
  (batch, length, heads, head_dim), (kv_heads, value_dim) = q.shape, v.shape[2:]
  if not q.size or not v.size:
    raise NotImplementedError(f"An empty array has no block: {q.shape=}, {v.shape=}.")
  if value_dim == 1:
    raise NotImplementedError("One value column would fill one of 128 lanes.")
  sizes = Sizes(batch, length, heads, kv_heads, head_dim, value_dim, dtype.itemsize)
  blocks = blocks or TpuBlocks.for_sizes(sizes, chunk_size)
  blocks.check(sizes)

  valid = None if lengths is None else reference.valid_tokens(lengths, length)
  gates = jnp.maximum(log_decay.astype(jnp.float32), RESET)
  if segment_ids is not None:
    starts = reference.document_starts(segment_ids, valid)[..., None]
    gates = jnp.where(starts, RESET, jnp.broadcast_to(gates, (batch, length, heads)))
  if valid is not None and gates.ndim == 3:
    gates = jnp.where(valid[..., None], gates, 0)

  optional = {} if lengths is None else {"lengths": jnp.minimum(lengths, length)}
  if initial_state is not None:
    optional["initial"] = initial_state.astype(jnp.float32)
  arrays = [q.astype(dtype), k.astype(dtype), v.astype(dtype), gates, *optional.values()]
  q, k, v, gates, *rest = vary_alike(*arrays)
  optional = dict(zip(optional, rest, strict=True))
  out, state = _chunkwise(sizes, blocks, q, k, v, gates, optional)
  return out.astype(v_dtype), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunkwise(sizes, blocks, q, k, v, gates, optional):
  return _forward(sizes, blocks.fwd, q, k, v, gates, **optional)


def _chunkwise_fwd(sizes, blocks, q, k, v, gates, optional):
  learned = gates.perturbed
  q, k, v, gates, optional = jax.tree.map(
    lambda x: x.value, (q, k, v, gates, optional), is_leaf=lambda x: hasattr(x, "perturbed")
  )
  out, state = _forward(sizes, blocks.fwd, q, k, v, gates, **optional)
  # Without a decay to learn, the backward needs neither the last state nor the rows' sums.
  return (out, state), (q, k, v, gates, optional, state if learned else None)


def _chunkwise_bwd(sizes, blocks, residuals, cotangents):
  q, k, v, gates, optional, last = residuals
  dout, dlast = cotangents
  dlast = None if isinstance(dlast, SymbolicZero) else dlast
  dout = jnp.zeros(dout.shape, dout.dtype) if isinstance(dout, SymbolicZero) else dout
  learned = last is not None
  q, k, v, gates, dout = vary_alike(q, k, v, gates, dout)

  dq, q_sums = _backward_dq(sizes, blocks.bwd_dq, q, k, v, dout, gates, learned, **optional)
  dk, dv, dinitial, k_sums = _backward_dkv(
    sizes, blocks.bwd_dkv, q, k, v, dout, gates, learned, dlast, **optional
  )
  dgates = jnp.zeros_like(gates)
  if learned:
    crossing = 0 if dlast is None else jnp.sum(last * dlast, (2, 3))[:, None]
    dgates = _decay_gradient(gates, q_sums - k_sums, crossing, optional.get("lengths"))
  doptional = {}
  if "lengths" in optional:
    doptional["lengths"] = None
  if "initial" in optional:
    doptional["initial"] = dinitial
  return dq, dk, dv, dgates, doptional


_chunkwise.defvjp(_chunkwise_fwd, _chunkwise_bwd, symbolic_zeros=True)


def _decay_gradient(gates, sums, crossing, lengths):
  """From row sums `<q, dq> - <k, dk>`, `B T N`, and `<S, dS>` of the last state.

  What a gate scales is all that crosses it, whose gradient is the sum over what lies behind it.
  """
  length = sums.shape[1]
  if gates.ndim == 3:
    return jax.lax.cumsum(sums, axis=1, reverse=True) + crossing
  # A fixed decay is the gate of each valid token; the sum over gates comes first.
  lengths = jnp.full(sums.shape[0], length) if lengths is None else lengths
  before = jnp.minimum(jnp.arange(length) + 1, lengths[:, None])[..., None]  # Gates up to each.
  total = jnp.sum(before * sums, 1, keepdims=True) + lengths[:, None, None] * crossing
  return jnp.sum(total, (0, 1))


@dataclasses.dataclass(frozen=True)
class _Walk:
  """How a kernel goes over its arrays, chunk by chunk: the grid, and each operand's blocks.

  Where a head is a multiple of 128 wide, heads lie side by side in the lanes of `B T (N H)`,
  which is how a projection made them; others are put before the length, by a copy.
  """

  sizes: Sizes
  tile: TpuTile
  reverse: bool = False

  @property
  def num_chunks(self) -> int:
    return pl.cdiv(self.sizes.length, self.tile.chunk)

  @property
  def ragged(self) -> bool:
    """Whether the last chunk hangs over the end, where memory holds anything."""
    return self.sizes.length % self.tile.chunk != 0

  @property
  def kv_heads(self) -> int:
    """Key heads per step."""
    return max(1, self.tile.heads // self.sizes.groups)

  @property
  def groups(self) -> int:
    """Query heads of a step that share a key head."""
    return self.tile.heads // self.kv_heads

  @property
  def steps_per_key(self) -> int:
    """Steps that read the same key head, where each has part of its group."""
    return max(1, self.sizes.groups // self.tile.heads)

  @property
  def steps(self) -> int:
    """Steps that the heads take."""
    return self.sizes.heads // self.tile.heads

  @property
  def grid(self) -> tuple[int, int, int]:
    return self.sizes.batch, self.steps, self.num_chunks

  def chunk_index(self, step: Any) -> Any:
    return self.num_chunks - 1 - step if self.reverse else step

  def tokens(self, dim: int, heads: int, *, shared: int = 1) -> pl.BlockSpec:
    """Of `side_by_side`'s view, `heads` a step, the same ones for `shared` steps."""
    chunk = self.tile.chunk
    if dim % LANES == 0:
      index = lambda b, n, c, *_: (b, self.chunk_index(c), n // shared)
      return pl.BlockSpec((None, chunk, heads * dim), index)
    index = lambda b, n, c, *_: (b, n // shared, self.chunk_index(c), 0)
    return pl.BlockSpec((None, heads, chunk, dim), index)

  def queries(self, dim: int) -> pl.BlockSpec:
    return self.tokens(dim, self.tile.heads)

  def keys(self, dim: int) -> pl.BlockSpec:
    return self.tokens(dim, self.kv_heads, shared=self.steps_per_key)

  def rows(self, count: int) -> pl.BlockSpec:
    """Of `B steps count T`: numbers of a token, whose tokens fill the lanes."""
    index = lambda b, n, c, *_: (b, n, 0, self.chunk_index(c))
    return pl.BlockSpec((None, None, count, self.tile.chunk), index)

  def states(self) -> pl.BlockSpec:
    block = (None, self.tile.heads, self.sizes.head_dim, self.sizes.value_dim)
    return pl.BlockSpec(block, lambda b, n, c, *_: (b, n, 0, 0))

  def padded_length(self) -> int:
    return self.num_chunks * self.tile.chunk


def _side_by_side(x: Array) -> Array:
  """`B T N D` as the kernels read it."""
  batch, length, _, dim = x.shape
  return x.reshape(batch, length, -1) if dim % LANES == 0 else x.swapaxes(1, 2)


def _apart(x: Array, dim: int) -> Array:
  """`B T N D` from what a kernel wrote."""
  return x.reshape(*x.shape[:2], -1, dim) if dim % LANES == 0 else x.swapaxes(1, 2)


def _head(i: int, dim: int) -> tuple[Any, ...]:
  """Where the step's `i`th head lies in a block of tokens."""
  return (slice(None), pl.ds(i * dim, dim)) if dim % LANES == 0 else (i,)


def _decay_operands(walk, gates):
  """A kernel's scalars and inputs that hold the decays: `gamma`s exponents, or sums of gates.

  Within a chunk an exponent is a difference of two sums from its start. Sums reach `RESET` times
  the chunk, so each gate is split in two: multiples of a step that makes sums exact, and a rest
  whose sums are small. Differences of the two lose nothing, whatever came before.
  """
  if gates.ndim == 1:
    return {"log_decay": gates}, {}
  (batch, length, _), chunk, heads = gates.shape, walk.tile.chunk, walk.tile.heads
  step = 2.0 ** (math.ceil(math.log2(-RESET * chunk)) - 23)
  coarse = jnp.round(gates / step) * step
  both = jnp.stack([coarse, gates - coarse], 1)  # B 2 T N
  both = jnp.pad(both, ((0, 0), (0, 0), (0, walk.padded_length() - length), (0, 0)))
  sums = jnp.cumsum(both.reshape(batch, 2, walk.num_chunks, chunk, -1), 3)
  sums = sums.reshape(batch, 2, walk.padded_length(), walk.steps, heads)
  sums = sums.transpose(0, 3, 1, 4, 2).reshape(batch, walk.steps, 2 * heads, -1)
  rows = _row_count(2 * heads)
  sums = jnp.pad(sums, ((0, 0), (0, 0), (0, rows - 2 * heads), (0, 0)))
  return {}, {"sums": (sums, walk.rows(rows))}


def _row_count(count: int) -> int:
  return pl.cdiv(count, SUBLANES) * SUBLANES


class _Decays(NamedTuple):
  """Of one head over one chunk, all at most 1.

  Attributes:
    inner: From token j to token i, zero for j after i; `i j`, or `j i` if transposed.
    enter: From the entering state to each token.
    leave: From each token to the leaving state.
    carry: From the one state to the other.
  """

  inner: Float[Array, "C C"]
  enter: Float[Array, "C 1"]
  leave: Float[Array, "C 1"]
  carry: Float[Array, "1 1"]


def _decays(walk, count, log_decay, sums, *, transposed: bool = False) -> Callable[[int], _Decays]:
  """Makes the function from one of the step's heads to its decays.

  Args:
    walk: The kernel's.
    count: How many of the chunk's tokens are valid, or `None` for all.
    log_decay: Reference to one per head, or `None`.
    sums: Reference to what `_decay_operands` made, or `None`.
    transposed: How `inner` is laid out.
  """
  chunk, heads = walk.tile.chunk, walk.tile.heads
  row, column = _iota((chunk, 1)), _iota((1, chunk))
  seen = row <= column if transposed else column <= row
  between = (lambda x, y: y - x) if transposed else (lambda x, y: x - y)

  if sums is None:  # A fixed decay acts once per token, and no more after the last valid one.
    count = chunk if count is None else count
    row, column = (jnp.minimum(x + 1, count).astype(jnp.float32) for x in (row, column))
    last = jnp.full((1, 1), count, jnp.int32).astype(jnp.float32)
    gap = between(row, column)

    def fixed(i):
      g = log_decay[pl.program_id(1) * heads + i]
      inner = jnp.exp(jnp.where(seen, g * gap, RESET))
      return _Decays(inner, jnp.exp(g * row), jnp.exp(g * (last - row)), jnp.exp(g * last))

    return fixed

  # Exponentials of rows fill the lanes; one transpose makes columns of them all.
  coarse, fine = sums[:heads], sums[heads : 2 * heads]
  enter = jnp.exp(coarse + fine)
  leave = jnp.exp((coarse[:, chunk - 1 :] - coarse) + (fine[:, chunk - 1 :] - fine))
  columns = jnp.concatenate([coarse, fine, enter, leave]).T

  def per_token(i):
    coarse_i, fine_i, enter_i, leave_i = (columns[:, j : j + 1] for j in range(i, 4 * heads, heads))
    gap = between(coarse_i, coarse[i : i + 1]) + between(fine_i, fine[i : i + 1])
    inner = jnp.exp(jnp.where(seen, gap, RESET))
    return _Decays(inner, enter_i, leave_i, enter[i : i + 1, chunk - 1 :])

  return per_token


def _iota(shape: tuple[int, int]) -> Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))


def _run(
  walk: _Walk,
  kernel: Callable[..., None],
  name: str,
  scalars: dict[str, Array],
  inputs: dict[str, tuple[Array, pl.BlockSpec]],
  outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
  scratch: dict[str, Any],
  flops: int,
) -> dict[str, Array]:
  """Calls a chunkwise kernel, whose references have the operands' names."""
  names = (*scalars, *inputs, *outputs, *scratch)
  args = [*scalars.values(), *(x for x, _ in inputs.values())]
  out_shape = [x for x, _ in outputs.values()]
  sizes = walk.sizes
  tokens = sizes.batch * sizes.length * sizes.heads
  out = mosaic_tpu.call(
    lambda *refs: kernel(walk, **dict(zip(names, refs, strict=True))),
    *args,
    name=name,
    out_shape=out_shape,
    grid=walk.grid,
    in_specs=[spec for _, spec in inputs.values()],
    out_specs=[spec for _, spec in outputs.values()],
    semantics=(PARALLEL, PARALLEL, SEQUENTIAL),
    cost=mosaic_tpu.cost_estimate(
      args, out_shape, flops=flops * tokens, transcendentals=walk.tile.chunk * tokens
    ),
    scratch_shapes=list(scratch.values()),
    num_scalar_prefetch=len(scalars),
  )
  return dict(zip(outputs, out, strict=True))


def _forward(sizes, tile, q, k, v, gates, lengths=None, initial=None):
  walk = _Walk(sizes, tile)
  scalars, inputs = _operands(walk, gates, lengths, initial)
  heads, head_dim, value_dim = sizes.heads, sizes.head_dim, sizes.value_dim
  inputs |= {
    "q": (_side_by_side(q), walk.queries(head_dim)),
    "k": (_side_by_side(k), walk.keys(head_dim)),
    "v": (_side_by_side(v), walk.keys(value_dim)),
  }
  outputs = {
    "out": (_tokens_struct(walk, heads, value_dim, v.dtype), walk.queries(value_dim)),
    "state": (_states_struct(sizes), walk.states()),
  }
  flops = 2 * tile.chunk * (head_dim + value_dim) + 4 * head_dim * value_dim
  result = _run(walk, _fwd_kernel, "retention_chunkwise_fwd", scalars, inputs, outputs, {}, flops)
  return _apart(result["out"], value_dim), result["state"]


def _backward_dq(sizes, tile, q, k, v, dout, gates, learned, lengths=None, initial=None):
  """The sweep along the sequence, which needs the entering states alone: `dq`, and `<q, dq>`."""
  walk = _Walk(sizes, tile)
  scalars, inputs = _operands(walk, gates, lengths, initial)
  heads, head_dim, value_dim = sizes.heads, sizes.head_dim, sizes.value_dim
  inputs |= {
    "k": (_side_by_side(k), walk.keys(head_dim)),
    "v": (_side_by_side(v), walk.keys(value_dim)),
    "dout": (_side_by_side(dout), walk.queries(value_dim)),
  }
  outputs = {"dq": (_tokens_struct(walk, heads, head_dim, q.dtype), walk.queries(head_dim))}
  if learned:
    inputs["q"] = (_side_by_side(q), walk.queries(head_dim))
    outputs["row_sums"] = _row_sums_output(walk)
  scratch = {"state": pltpu.VMEM((tile.heads, head_dim, value_dim), jnp.float32)}
  flops = 2 * tile.chunk * (head_dim + value_dim) + 4 * head_dim * value_dim
  name = "retention_chunkwise_bwd_dq"
  result = _run(walk, _bwd_dq_kernel, name, scalars, inputs, outputs, scratch, flops)
  return _apart(result["dq"], head_dim), _row_sums(walk, result.get("row_sums"))


def _backward_dkv(sizes, tile, q, k, v, dout, gates, learned, dlast, lengths=None, initial=None):
  """The sweep back, which needs the states' gradients alone: `dk`, `dv`, `dinitial`, `<k, dk>`."""
  walk = _Walk(sizes, tile, reverse=True)
  scalars, inputs = _operands(walk, gates, lengths, dlast)
  head_dim, value_dim = sizes.head_dim, sizes.value_dim
  inputs |= {
    "q": (_side_by_side(q), walk.queries(head_dim)),
    "k": (_side_by_side(k), walk.keys(head_dim)),
    "v": (_side_by_side(v), walk.keys(value_dim)),
    "dout": (_side_by_side(dout), walk.queries(value_dim)),
  }
  # Where several steps make up a group of heads, each writes its part, in float32.
  parts = walk.steps * walk.kv_heads
  dtype = k.dtype if parts == sizes.kv_heads else jnp.float32
  outputs = {
    "dk": (_tokens_struct(walk, parts, head_dim, dtype), walk.tokens(head_dim, walk.kv_heads)),
    "dv": (_tokens_struct(walk, parts, value_dim, dtype), walk.tokens(value_dim, walk.kv_heads)),
  }
  scratch = {}
  if initial is None:
    scratch["state"] = pltpu.VMEM((tile.heads, head_dim, value_dim), jnp.float32)
  else:
    outputs["state"] = (_states_struct(sizes), walk.states())
  if learned:
    outputs["row_sums"] = _row_sums_output(walk)
  flops = 4 * tile.chunk * (head_dim + value_dim) + 6 * head_dim * value_dim
  name = "retention_chunkwise_bwd_dkv"
  result = _run(walk, _bwd_dkv_kernel, name, scalars, inputs, outputs, scratch, flops)

  def sum_parts(x, dim):
    x = _apart(x, dim)
    if parts != sizes.kv_heads:
      x = x.reshape(*x.shape[:2], sizes.kv_heads, -1, dim).sum(3)
    return x.astype(k.dtype)

  dk, dv = sum_parts(result["dk"], head_dim), sum_parts(result["dv"], value_dim)
  return dk, dv, result.get("state"), _row_sums(walk, result.get("row_sums"))


def _operands(walk, gates, lengths, initial):
  scalars, inputs = _decay_operands(walk, gates)
  if lengths is not None:
    scalars["lengths"] = lengths
  if initial is not None:
    inputs["initial"] = (initial, walk.states())
  return scalars, inputs


def _tokens_struct(walk, heads, dim, dtype):
  batch, length = walk.sizes.batch, walk.sizes.length
  shape = (batch, length, heads * dim) if dim % LANES == 0 else (batch, heads, length, dim)
  return jax.ShapeDtypeStruct(shape, dtype)


def _states_struct(sizes):
  shape = (sizes.batch, sizes.heads, sizes.head_dim, sizes.value_dim)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _row_sums_output(walk):
  rows = _row_count(walk.tile.heads)
  shape = (walk.sizes.batch, walk.steps, rows, walk.padded_length())
  return jax.ShapeDtypeStruct(shape, jnp.float32), walk.rows(rows)


def _row_sums(walk, rows):
  """`B T N` from what `_row_sums_output` describes."""
  if rows is None:
    return None
  rows = rows[:, :, : walk.tile.heads, : walk.sizes.length]
  return rows.reshape(walk.sizes.batch, walk.sizes.heads, -1).swapaxes(1, 2)


def _fwd_kernel(
  walk, *, q, k, v, out, state, log_decay=None, sums=None, lengths=None, initial=None
):
  head_dim, value_dim = walk.sizes.head_dim, walk.sizes.value_dim
  _start(state, initial)
  count = _count(walk, lengths)
  decays = _decays(walk, count, log_decay, sums)
  for i in range(walk.tile.heads):
    decay, shared = decays(i), i // walk.groups
    q_i = q[_head(i, head_dim)]
    k_i = _clean(k[_head(shared, head_dim)], count)
    v_i = _clean(v[_head(shared, value_dim)], count)
    scores = _dot(q_i, k_i, (1, 1)) * decay.inner
    inner = _dot(scores.astype(v_i.dtype), v_i)
    inner += decay.enter * _dot_state(q_i, state[i])
    out[_head(i, value_dim)] = inner.astype(out.dtype)
    state[i] = decay.carry * state[i] + _dot(_scale(k_i, decay.leave), v_i, (0, 0))


def _bwd_dq_kernel(
  walk,
  *,
  k,
  v,
  dout,
  dq,
  state,
  q=None,
  row_sums=None,
  log_decay=None,
  sums=None,
  lengths=None,
  initial=None,
):
  head_dim, value_dim = walk.sizes.head_dim, walk.sizes.value_dim
  _start(state, initial)
  count = _count(walk, lengths)
  decays = _decays(walk, count, log_decay, sums)
  q_dq = []
  for i in range(walk.tile.heads):
    decay, shared = decays(i), i // walk.groups
    k_i = _clean(k[_head(shared, head_dim)], count)
    v_i = _clean(v[_head(shared, value_dim)], count)
    dout_i = dout[_head(i, value_dim)]
    dscores = _dot(dout_i, v_i, (1, 1)) * decay.inner
    inner = _dot(dscores.astype(k_i.dtype), k_i)
    across = _dot_state(dout_i, state[i], (1, 1), whole=row_sums is not None)
    dq[_head(i, head_dim)] = (inner + decay.enter * across).astype(dq.dtype)
    state[i] = decay.carry * state[i] + _dot(_scale(k_i, decay.leave), v_i, (0, 0))
    if row_sums is not None:
      q_i = q[_head(i, head_dim)]
      q_dq.append(_row_dot(q_i, inner) + _row_dot(_scale(q_i, decay.enter), across))
  if row_sums is not None:
    row_sums[...] = _as_rows(q_dq, row_sums.shape)


def _bwd_dkv_kernel(
  walk,
  *,
  q,
  k,
  v,
  dout,
  dk,
  dv,
  state,
  row_sums=None,
  log_decay=None,
  sums=None,
  lengths=None,
  initial=None,
):
  """Scores are transposed from the start, and `state` holds the gradient of the leaving state."""
  head_dim, value_dim = walk.sizes.head_dim, walk.sizes.value_dim
  _start(state, initial)
  count = _count(walk, lengths)
  inside = _count(walk, None)  # What lies beyond the array must not be summed over.
  decays = _decays(walk, count, log_decay, sums, transposed=True)
  k_dk = []
  for shared in range(walk.kv_heads):
    k_i = _clean(k[_head(shared, head_dim)], count)
    v_i = _clean(v[_head(shared, value_dim)], count)
    dk_i, dv_i = 0, 0
    for i in range(shared * walk.groups, (shared + 1) * walk.groups):
      decay = decays(i)
      q_i = _clean(q[_head(i, head_dim)], inside)
      dout_i = _clean(dout[_head(i, value_dim)], inside)
      leaving = state[i]
      scores = _dot(k_i, q_i, (1, 1)) * decay.inner
      dscores = _dot(v_i, dout_i, (1, 1)) * decay.inner
      inner = _dot(dscores.astype(q_i.dtype), q_i)
      across = _dot_state(v_i, leaving, (1, 1), whole=row_sums is not None)
      dv_i += _dot(scores.astype(dout_i.dtype), dout_i) + decay.leave * _dot_state(k_i, leaving)
      dk_i += inner + decay.leave * across
      state[i] = decay.carry * leaving + _dot(_scale(q_i, decay.enter), dout_i, (0, 0))
      if row_sums is not None:
        k_dk.append(_row_dot(k_i, inner) + _row_dot(_scale(k_i, decay.leave), across))
    dk[_head(shared, head_dim)] = dk_i.astype(dk.dtype)
    dv[_head(shared, value_dim)] = dv_i.astype(dv.dtype)
  if row_sums is not None:
    row_sums[...] = _as_rows(k_dk, row_sums.shape)


def _start(state, initial):
  """The state at the beginning of the walk."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    state[...] = jnp.zeros(state.shape, jnp.float32) if initial is None else initial[...]


def _count(walk, lengths):
  """How many tokens of the chunk are valid; `None` if all of every chunk are."""
  if lengths is None and not walk.ragged:
    return None
  end = walk.sizes.length if lengths is None else lengths[pl.program_id(0)]
  start = walk.chunk_index(pl.program_id(2)) * walk.tile.chunk
  return jnp.clip(end - start, 0, walk.tile.chunk)


def _clean(x, count):
  """Zero after the valid tokens: what lies there may be a NaN."""
  return x if count is None else jnp.where(_iota((x.shape[0], 1)) < count, x, 0)


def _scale(x, rows):
  """Each row by its own factor, rounded to what a product takes."""
  return mosaic_tpu.rounded(x.astype(jnp.float32) * rows, x.dtype).astype(x.dtype)


def _dot(x, y, contract=(1, 0)):
  dims = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _dot_state(x, state, contract=(1, 0), *, whole=False):
  """A product with a float32 state: with as much of it as `x`'s dtype holds, or with the `whole`.

  The gradient of a decay is a long sum of differences, where what rounding takes from a state
  would pile up.
  """
  high = mosaic_tpu.rounded(state, x.dtype)
  out = _dot(x, high.astype(x.dtype), contract)
  if whole and x.dtype != state.dtype:
    out += _dot(x, (state - high).astype(x.dtype), contract)
  return out


def _row_dot(x, y):
  return jnp.sum(x.astype(jnp.float32) * y, 1, keepdims=True)


def _as_rows(columns, shape):
  """Columns, one number per token, as the first rows of an array of `shape`."""
  lane = _iota((1, shape[0]))
  return sum(jnp.where(lane == i, x, 0) for i, x in enumerate(columns)).T


def decode(
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B N"],
  state: Float[Array, "B N H V"],
  gate: Float[Array, "B N V"] | None = None,
  norm_eps: float | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B N H V"]]:
  """One token of eq. 6 with its norm and gate: each state is read once, and written in place.

  It moves so much more than it computes that products are sums in float32, and exact.

  Args:
    q: See `api.retention_decode`.
    k: See there.
    v: See there.
    log_decay: See there.
    state: See there.
    gate: See there.
    norm_eps: See there.
  """
  dtype = jnp.result_type(q, k, v)
  if dtype not in _DTYPES:
    raise NotImplementedError(f"Mosaic TPU has bfloat16 and float32, and no {dtype.name}.")
  if not q.size or not v.size:
    raise NotImplementedError(f"An empty array has no block: {q.shape=}, {v.shape=}.")
  log_decay = jnp.broadcast_to(log_decay.astype(jnp.float32), q.shape[:2])
  arrays = [q, k, v, log_decay, state.astype(jnp.float32), *([] if gate is None else [gate])]
  return _decode(norm_eps, *vary_alike(*arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(norm_eps, q, k, v, log_decay, state, gate=None):
  (batch, heads, head_dim), (kv_heads, value_dim) = q.shape, v.shape[1:]
  sizes = Sizes(batch, 1, heads, kv_heads, head_dim, value_dim, q.dtype.itemsize)
  walk = _Walk(sizes, TpuTile(16, decode_heads(sizes)))

  # `B steps heads D`, whose last two axes a block has whole.
  split = lambda x, heads: x.reshape(batch, -1, heads, x.shape[-1])

  def spec(heads, dim, shared=1):
    return pl.BlockSpec((None, None, heads, dim), lambda b, n, *_: (b, n // shared, 0, 0))

  block = (None, walk.tile.heads, head_dim, value_dim)
  states = pl.BlockSpec(block, lambda b, n, *_: (b, n, 0, 0))
  values = spec(walk.tile.heads, value_dim)
  inputs = {
    "q": (split(q, walk.tile.heads), spec(walk.tile.heads, head_dim)),
    "k": (split(k, walk.kv_heads), spec(walk.kv_heads, head_dim, walk.steps_per_key)),
    "v": (split(v, walk.kv_heads), spec(walk.kv_heads, value_dim, walk.steps_per_key)),
  }
  if gate is not None:
    inputs["gate"] = split(gate, walk.tile.heads), values
  inputs["state"] = state, states
  arrays = [jnp.exp(log_decay).reshape(-1), *(x for x, _ in inputs.values())]
  out_shape = [
    jax.ShapeDtypeStruct((batch, walk.steps, walk.tile.heads, value_dim), v.dtype),
    jax.ShapeDtypeStruct(state.shape, state.dtype),
  ]
  names = ("decay", *inputs, "out", "new_state")

  def kernel(*refs):
    _decode_kernel(walk, norm_eps, **dict(zip(names, refs, strict=True)))

  out, state = mosaic_tpu.call(
    kernel,
    *arrays,
    name="retention_decode",
    out_shape=out_shape,
    grid=(batch, walk.steps),
    in_specs=[spec for _, spec in inputs.values()],
    out_specs=[values, states],
    semantics=(PARALLEL, PARALLEL),
    cost=mosaic_tpu.cost_estimate(arrays, out_shape, flops=5 * state.size),
    num_scalar_prefetch=1,
    input_output_aliases={len(arrays) - 1: 1},
  )
  return out.reshape(batch, heads, value_dim), state


def _decode_fwd(norm_eps, *args):
  return _decode(norm_eps, *args), args


def _decode_bwd(norm_eps, args, cotangents):
  return jax.vjp(functools.partial(_decode_reference, norm_eps), *args)[1](cotangents)


def _decode_reference(norm_eps, q, k, v, log_decay, state, gate=None):
  return reference.decode(q, k, v, log_decay, state, gate, norm_eps)


_decode.defvjp(_decode_fwd, _decode_bwd)


def _decode_kernel(walk, norm_eps, *, decay, q, k, v, state, out, new_state, gate=None):
  heads = walk.tile.heads
  first = pl.program_id(0) * walk.sizes.heads + pl.program_id(1) * heads
  # Columns scale the rows of a state.
  q_columns, k_columns = (x[...].astype(jnp.float32).T for x in (q, k))
  v_rows = v[...].astype(jnp.float32)
  rows = []
  for i in range(heads):
    shared = i // walk.groups
    update = k_columns[:, shared : shared + 1] * v_rows[shared : shared + 1]
    new = decay[first + i] * state[i] + update
    new_state[i] = new
    rows.append(jnp.sum(q_columns[:, i : i + 1] * new, 0, keepdims=True))
  result = jnp.concatenate(rows, 0)
  if norm_eps is not None:
    result *= jax.lax.rsqrt(jnp.mean(jnp.square(result), 1, keepdims=True) + norm_eps)
  if gate is not None:
    result *= jax.nn.silu(gate[...].astype(jnp.float32))
  out[...] = result.astype(out.dtype)
