"""The two sweeps of retention's backward on a TPU; README.md derives them.

`bwd_dq` rebuilds the states along the sequence, `bwd_dkv` carries their gradients against it.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.mosaic_tpu import dot
from pallas_kernels.retention.blocks import Sizes, TpuTile
from pallas_kernels.retention.tpu_chunk import (
  as_rows,
  clean,
  dot_state,
  row_dot,
  scale,
  start,
  valid_count,
)
from pallas_kernels.retention.tpu_decays import decay_operands, decays
from pallas_kernels.retention.tpu_walk import Walk, run
from pallas_kernels.tpu_layout import apart, head


def backward_dq(
  sizes: Sizes,
  tile: TpuTile,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  dout: Float[Array, "B T N V"],
  gates: Float[Array, "N"] | Float[Array, "B T N"],
  learned: bool,
  lengths: Int[Array, "B"] | None = None,
  initial: Float[Array, "B N H V"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None]:
  """`dq`, from the states that enter chunks; and `<q, dq>` per token, if decays are learned."""
  walk = Walk(sizes, tile)
  scalars, inputs = decay_operands(walk, gates)
  if lengths is not None:
    scalars["lengths"] = lengths
  if initial is not None:
    inputs["initial"] = walk.states(initial)
  inputs |= dict(k=walk.keys(k), v=walk.keys(v), dout=walk.queries(dout))
  head_dim, value_dim = sizes.head_dim, sizes.value_dim
  outputs = dict(dq=walk.query_results(head_dim, q.dtype))
  if learned:
    inputs["q"] = walk.queries(q)
    outputs["row_sums"] = walk.row_results(tile.heads)
  scratch = dict(state=walk.state_scratch())
  flops = 2 * tile.chunk * (head_dim + value_dim) + 4 * head_dim * value_dim
  name = "retention_chunkwise_bwd_dq"
  result = run(walk, _dq_kernel, name, scalars, inputs, outputs, scratch, flops)
  return apart(result["dq"], head_dim), _row_sums(walk, result.get("row_sums"))


def backward_dkv(
  sizes: Sizes,
  tile: TpuTile,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  dout: Float[Array, "B T N V"],
  gates: Float[Array, "N"] | Float[Array, "B T N"],
  learned: bool,
  dlast: Float[Array, "B N H V"] | None,
  lengths: Int[Array, "B"] | None = None,
  initial: Float[Array, "B N H V"] | None = None,
) -> tuple[
  Float[Array, "B T K H"],
  Float[Array, "B T K V"],
  Float[Array, "B N H V"] | None,
  Float[Array, "B T N"] | None,
]:
  """`dk` and `dv`, from the gradients of the states that leave chunks.

  Also the gradient of the initial state, if there is one; and `<k, dk>` per token and query head,
  if decays are learned.
  """
  walk = Walk(sizes, tile, reverse=True)
  scalars, inputs = decay_operands(walk, gates)
  if lengths is not None:
    scalars["lengths"] = lengths
  if dlast is not None:
    inputs["initial"] = walk.states(dlast)
  inputs |= dict(q=walk.queries(q), k=walk.keys(k), v=walk.keys(v), dout=walk.queries(dout))
  head_dim, value_dim = sizes.head_dim, sizes.value_dim
  # What XLA still has to sum, parts of a group of heads, it is given in float32.
  parted = walk.key_parts != sizes.kv_heads
  dtype = jnp.float32 if parted else k.dtype
  outputs = dict(dk=walk.key_results(head_dim, dtype), dv=walk.key_results(value_dim, dtype))
  scratch = {}
  if initial is None:
    scratch["state"] = walk.state_scratch()
  else:
    outputs["state"] = walk.state_results()
  if learned:
    outputs["row_sums"] = walk.row_results(tile.heads)
  flops = 4 * tile.chunk * (head_dim + value_dim) + 6 * head_dim * value_dim
  name = "retention_chunkwise_bwd_dkv"
  result = run(walk, _dkv_kernel, name, scalars, inputs, outputs, scratch, flops)

  def whole(x, dim):
    x = apart(x, dim)
    if parted:
      x = x.reshape(*x.shape[:2], sizes.kv_heads, -1, dim).sum(3)
    return x.astype(k.dtype)

  dk, dv = whole(result["dk"], head_dim), whole(result["dv"], value_dim)
  return dk, dv, result.get("state"), _row_sums(walk, result.get("row_sums"))


def _row_sums(walk, rows):
  """`B T N` from what kernels wrote as `row_results`."""
  if rows is None:
    return None
  rows = rows[:, :, : walk.tile.heads, : walk.sizes.length]
  return rows.reshape(walk.sizes.batch, walk.sizes.heads, -1).swapaxes(1, 2)


def _dq_kernel(
  walk: Walk,
  *,
  k: Any,
  v: Any,
  dout: Any,
  dq: Any,
  state: Any,
  q: Any = None,
  row_sums: Any = None,
  log_decay: Any = None,
  sums: Any = None,
  lengths: Any = None,
  initial: Any = None,
) -> None:
  head_dim, value_dim = walk.sizes.head_dim, walk.sizes.value_dim
  start(state, initial)
  count = valid_count(walk, lengths)
  decay_of = decays(walk, count, log_decay, sums)
  q_dq = []
  for i in range(walk.tile.heads):
    decay, shared = decay_of(i), i // walk.groups
    k_i = clean(k[head(shared, head_dim)], count)
    v_i = clean(v[head(shared, value_dim)], count)
    dout_i = dout[head(i, value_dim)]
    dscores = dot(dout_i, v_i, (1, 1)) * decay.inner
    inner = dot(dscores.astype(k_i.dtype), k_i)
    across = dot_state(dout_i, state[i], (1, 1), whole=row_sums is not None)
    dq[head(i, head_dim)] = (inner + decay.enter * across).astype(dq.dtype)
    state[i] = decay.carry * state[i] + dot(scale(k_i, decay.leave), v_i, (0, 0))
    if row_sums is not None:
      q_i = q[head(i, head_dim)]
      q_dq.append(row_dot(q_i, inner) + row_dot(scale(q_i, decay.enter), across))
  if row_sums is not None:
    row_sums[...] = as_rows(q_dq, row_sums.shape)


def _dkv_kernel(
  walk: Walk,
  *,
  q: Any,
  k: Any,
  v: Any,
  dout: Any,
  dk: Any,
  dv: Any,
  state: Any,
  row_sums: Any = None,
  log_decay: Any = None,
  sums: Any = None,
  lengths: Any = None,
  initial: Any = None,
) -> None:
  """Scores are transposed from the start, and `state` holds the gradient of the leaving state."""
  head_dim, value_dim = walk.sizes.head_dim, walk.sizes.value_dim
  start(state, initial)
  count = valid_count(walk, lengths)
  inside = valid_count(walk, None)  # What lies beyond the array must not be summed over.
  decay_of = decays(walk, count, log_decay, sums, transposed=True)
  k_dk = []
  for shared in range(walk.kv_heads):
    k_i = clean(k[head(shared, head_dim)], count)
    v_i = clean(v[head(shared, value_dim)], count)
    dk_i, dv_i = 0, 0
    for i in range(shared * walk.groups, (shared + 1) * walk.groups):
      decay = decay_of(i)
      q_i = clean(q[head(i, head_dim)], inside)
      dout_i = clean(dout[head(i, value_dim)], inside)
      leaving = state[i]
      scores = dot(k_i, q_i, (1, 1)) * decay.inner
      dscores = dot(v_i, dout_i, (1, 1)) * decay.inner
      inner = dot(dscores.astype(q_i.dtype), q_i)
      across = dot_state(v_i, leaving, (1, 1), whole=row_sums is not None)
      dv_i += dot(scores.astype(dout_i.dtype), dout_i) + decay.leave * dot_state(k_i, leaving)
      dk_i += inner + decay.leave * across
      state[i] = decay.carry * leaving + dot(scale(q_i, decay.enter), dout_i, (0, 0))
      if row_sums is not None:
        k_dk.append(row_dot(k_i, inner) + row_dot(scale(k_i, decay.leave), across))
    dk[head(shared, head_dim)] = dk_i.astype(dk.dtype)
    dv[head(shared, value_dim)] = dv_i.astype(dv.dtype)
  if row_sums is not None:
    row_sums[...] = as_rows(k_dk, row_sums.shape)
