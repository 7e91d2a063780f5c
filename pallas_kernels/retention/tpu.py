"""Retention on a TPU, in Mosaic TPU: what the kernels take and give, and the decay's gradient.

A grid step takes one chunk of a few heads; the grid's last axis runs along the sequence in order,
and each head's state stays in vector memory until its sequence ends. `tpu_forward` and
`tpu_backward` have the kernels, `tpu_walk` their way over the arrays; README.md derives the sweeps.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, Int

from pallas_kernels.common import vary_alike
from pallas_kernels.retention import reference
from pallas_kernels.retention.blocks import Sizes, TpuBlocks
from pallas_kernels.retention.gates import finite_gates
from pallas_kernels.retention.tpu_backward import backward_dkv, backward_dq
from pallas_kernels.retention.tpu_forward import forward

DTYPES = (jnp.bfloat16, jnp.float32)  # Of the matrix units; the latter in several passes.


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
  if dtype not in DTYPES:
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
  starts = None if segment_ids is None else reference.document_starts(segment_ids, valid)
  gates = finite_gates(log_decay, starts, valid)

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
  return forward(sizes, blocks.fwd, q, k, v, gates, **optional)


def _chunkwise_fwd(sizes, blocks, q, k, v, gates, optional):
  learned = gates.perturbed
  q, k, v, gates, optional = jax.tree.map(
    lambda x: x.value, (q, k, v, gates, optional), is_leaf=lambda x: hasattr(x, "perturbed")
  )
  out, state = forward(sizes, blocks.fwd, q, k, v, gates, **optional)
  # Without a decay to learn, the backward needs neither the last state nor the rows' sums.
  return (out, state), (q, k, v, gates, optional, state if learned else None)


def _chunkwise_bwd(sizes, blocks, residuals, cotangents):
  q, k, v, gates, optional, last = residuals
  dout, dlast = cotangents
  dlast = None if isinstance(dlast, SymbolicZero) else dlast
  dout = jnp.zeros(dout.shape, dout.dtype) if isinstance(dout, SymbolicZero) else dout
  learned = last is not None
  q, k, v, gates, dout = vary_alike(q, k, v, gates, dout)

  dq, q_sums = backward_dq(sizes, blocks.bwd_dq, q, k, v, dout, gates, learned, **optional)
  dk, dv, dinitial, k_sums = backward_dkv(
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
