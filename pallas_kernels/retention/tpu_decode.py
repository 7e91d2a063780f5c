"""Decoding with retention on a TPU: each state is read once, and written in place."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from pallas_kernels import mosaic_tpu
from pallas_kernels.common import vary_alike
from pallas_kernels.mosaic_tpu import PARALLEL
from pallas_kernels.retention import reference
from pallas_kernels.retention.blocks import Sizes, TpuTile, decode_heads
from pallas_kernels.retention.tpu import DTYPES
from pallas_kernels.retention.tpu_walk import Walk


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
  if dtype not in DTYPES:
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
  walk = Walk(sizes, TpuTile(16, decode_heads(sizes)))

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
