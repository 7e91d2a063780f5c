"""The backward of differential attention on a TPU: `dO V^T` once, and one product for `dV`.

Scores are laid out with keys along the rows, so that what is known of a query lies in lanes, and
the products for keys and values take them as they are.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_layout
from pallas_kernels.diff_attention import tpu_tiles
from pallas_kernels.diff_attention.blocks import TpuBlocks
from pallas_kernels.diff_attention.reference import HIDDEN
from pallas_kernels.diff_attention.tpu_tiles import LN2, Call, Walk, heads_of, maps
from pallas_kernels.mosaic_tpu import dot

ROW_TERMS = 5  # Per query: both log-sum-exps in powers of two, both row terms, and lambda.


def backward(
  call: Call,
  blocks: TpuBlocks,
  operands: dict[str, Array],
  d_out: Array,
  rows: Array,
  bounds: dict[str, Array],
) -> tuple[Array, Array, Array]:
  """Runs the kernel that makes all three gradients, or one for the queries' and one for the others.

  Args:
    call: The call.
    blocks: Block sizes.
    operands: `q`, `k` and `v`.
    d_out: Gradient of the difference, `B T N V`.
    rows: What is known of each query, `B T N 5`; see `ROW_TERMS`.
    bounds: See `tpu_tiles.run`.
  """
  if blocks.bwd is not None:
    walk = Walk(call, blocks.bwd, by_keys=True)
    grads = _run(walk, "diff_attention_bwd", ("q", "k", "v"), operands, d_out, rows, bounds)
  else:
    walk = Walk(call, blocks.bwd_dq)
    grads = _run(walk, "diff_attention_bwd_dq", ("q",), operands, d_out, rows, bounds)
    walk = Walk(call, blocks.bwd_dkv, by_keys=True)
    grads |= _run(walk, "diff_attention_bwd_dkv", ("k", "v"), operands, d_out, rows, bounds)
  return tuple(grads[x].reshape(operands[x].shape).astype(operands[x].dtype) for x in "qkv")


def _run(walk, name, wanted, operands, d_out, rows, bounds):
  call, tile = walk.call, walk.tile
  q, k, v = (operands[x] for x in "qkv")
  dims = {"q": 2 * call.head_dim, "k": call.key_dim, "v": call.value_dim}
  rows = tpu_tiles.pad_length(rows.transpose(0, 2, 3, 1), tile.queries, axis=3)
  inputs = {
    "q": (heads_of(q, dims["q"], tile.queries), walk.queries(dims["q"])),
    "k": (heads_of(k, dims["k"], tile.keys), walk.keys(dims["k"])),
    "v": (heads_of(v, dims["v"], tile.keys), walk.keys(dims["v"])),
    "d_out": (heads_of(d_out, dims["v"], tile.queries), walk.queries(dims["v"])),
    "rows": (rows, walk.rows(ROW_TERMS)),
  }
  # Query heads that share a key head each write their part, in float32.
  groups = call.heads // call.kv_heads
  q_length, kv_length = walk.q_tiles * tile.queries, walk.kv_tiles * tile.keys
  outputs, scratch = {}, {}
  for x in wanted:
    length = q_length if x == "q" else kv_length
    dtype = operands[x].dtype if x == "q" or groups == 1 else jnp.float32
    struct = tpu_layout.struct(call.batch, length, call.heads, dims[x], dtype)
    if x != "q":
      spec = walk.keys(dims[x], shared=False)
    else:
      spec = walk.all_queries(dims[x]) if walk.by_keys else walk.queries(dims[x])
    outputs[f"d_{x}"] = struct, spec
    count = tile.keys if x != "q" else q_length if walk.by_keys else tile.queries
    scratch[f"{x}_sums"] = pltpu.VMEM((count, dims[x]), jnp.float32)
  flops = 4 * call.head_dim + 2 * call.value_dim
  flops += sum(
    {"q": 4 * call.head_dim, "k": 4 * call.head_dim, "v": 2 * call.value_dim}[x] for x in wanted
  )
  outs = tpu_tiles.run(walk, _kernel, name, inputs, outputs, scratch, bounds, flops)

  def whole(x):
    grad = tpu_layout.apart(outs[f"d_{x}"], dims[x])[:, : operands[x].shape[1]]
    if x != "q" and groups > 1:
      grad = grad.reshape(*grad.shape[:2], call.kv_heads, groups, -1).sum(axis=3)
    return grad

  return {x: whole(x) for x in wanted}


def _kernel(
  step: tpu_tiles.Step,
  *,
  q: Any,
  k: Any,
  v: Any,
  d_out: Any,
  rows: Any,
  d_q: Any = None,
  d_k: Any = None,
  d_v: Any = None,
  q_sums: Any = None,
  k_sums: Any = None,
  v_sums: Any = None,
  ids: Any = None,
  kv_ids: Any = None,
) -> None:
  walk, call, tile = step.walk, step.walk.call, step.walk.tile
  dim, options = call.head_dim, call.options
  whole = walk.by_keys  # The queries' sums are those of the whole sequence.
  index, steps = pl.program_id(2), len(walk.pairs())
  q_rows = pl.ds(step.q_tile * tile.queries if whole else 0, tile.queries)
  if whole:
    q_rows = pl.ds(pl.multiple_of(step.q_tile * tile.queries, tile.queries), tile.queries)

  def clear(condition, *sums):
    @pl.when(condition)
    def _():
      for ref in sums:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)

  if q_sums is not None:
    clear((index == 0) if whole else step.first, q_sums)
  if k_sums is not None:
    clear(step.first, k_sums, v_sums)

  def visit(mask):
    q_maps, d_rows = maps(q[...], dim), d_out[...]
    lse, terms, lam = rows[0:2], rows[2:4], rows[4:5]
    for start in range(0, tile.keys, tile.compute):
      part = pl.ds(start, tile.compute)
      k_maps = maps(k[part], dim)
      seen = None if mask is None else mask(start, tile.compute, q_axis=1)
      weights = []
      for m in range(2):
        scores = dot(k_maps[m], q_maps[m], (1, 1)) * (options.scale / LN2)
        if seen is not None:
          scores = jnp.where(seen, scores, HIDDEN)
        weights.append(jnp.exp2(scores - lse[m : m + 1]))
      d_weights = dot(v[part], d_rows, (1, 1))
      if v_sums is not None:
        v_sums[part] += dot((weights[0] - lam * weights[1]).astype(d_rows.dtype), d_rows)
      d_scores = [
        (weights[0] * (d_weights - terms[0:1])).astype(q_maps[0].dtype),
        (weights[1] * (-lam * d_weights - terms[1:2])).astype(q_maps[1].dtype),
      ]
      for m in range(2):
        columns = pl.ds(m * dim, dim)
        if k_sums is not None:
          shared = pl.ds(0, dim) if call.shared_keys else columns
          k_sums[part, shared] += dot(d_scores[m], q_maps[m])
        if q_sums is not None:
          q_sums[q_rows, columns] += dot(d_scores[m], k_maps[m], (0, 0))

  step.run(visit, ids, kv_ids)

  if q_sums is not None:

    @pl.when((index == steps - 1) if whole else step.last)
    def _():
      d_q[...] = (q_sums[...] * options.scale).astype(d_q.dtype)

  if k_sums is not None:

    @pl.when(step.last)
    def _():
      d_k[...] = (k_sums[...] * options.scale).astype(d_k.dtype)
      d_v[...] = v_sums[...].astype(d_v.dtype)
