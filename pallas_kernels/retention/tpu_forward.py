"""The forward of retention on a TPU: chunk by chunk, the state in vector memory all along."""

from typing import Any

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.mosaic_tpu import dot
from pallas_kernels.retention.blocks import Sizes, TpuTile
from pallas_kernels.retention.tpu_chunk import clean, dot_state, scale, start, valid_count
from pallas_kernels.retention.tpu_decays import decay_operands, decays
from pallas_kernels.retention.tpu_walk import Walk, run
from pallas_kernels.tpu_layout import apart, head


def forward(
  sizes: Sizes,
  tile: TpuTile,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  gates: Float[Array, "N"] | Float[Array, "B T N"],
  lengths: Int[Array, "B"] | None = None,
  initial: Float[Array, "B N H V"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """The outputs, and the state after the last valid token."""
  walk = Walk(sizes, tile)
  scalars, inputs = decay_operands(walk, gates)
  if lengths is not None:
    scalars["lengths"] = lengths
  if initial is not None:
    inputs["initial"] = walk.states(initial)
  inputs |= dict(q=walk.queries(q), k=walk.keys(k), v=walk.keys(v))
  head_dim, value_dim = sizes.head_dim, sizes.value_dim
  outputs = dict(out=walk.query_results(value_dim, v.dtype), state=walk.state_results())
  flops = 2 * tile.chunk * (head_dim + value_dim) + 4 * head_dim * value_dim
  name = "retention_chunkwise_fwd"
  result = run(walk, _kernel, name, scalars, inputs, outputs, {}, flops)
  return apart(result["out"], value_dim), result["state"]


def _kernel(
  walk: Walk,
  *,
  q: Any,
  k: Any,
  v: Any,
  out: Any,
  state: Any,
  log_decay: Any = None,
  sums: Any = None,
  lengths: Any = None,
  initial: Any = None,
) -> None:
  head_dim, value_dim = walk.sizes.head_dim, walk.sizes.value_dim
  start(state, initial)
  count = valid_count(walk, lengths)
  decay_of = decays(walk, count, log_decay, sums)
  for i in range(walk.tile.heads):
    decay, shared = decay_of(i), i // walk.groups
    q_i = q[head(i, head_dim)]
    k_i = clean(k[head(shared, head_dim)], count)
    v_i = clean(v[head(shared, value_dim)], count)
    scores = dot(q_i, k_i, (1, 1)) * decay.inner
    inner = dot(scores.astype(v_i.dtype), v_i)
    inner += decay.enter * dot_state(q_i, state[i])
    out[head(i, value_dim)] = inner.astype(out.dtype)
    state[i] = decay.carry * state[i] + dot(scale(k_i, decay.leave), v_i, (0, 0))
