"""The forward of differential attention on a TPU: both maps in one pass over keys and values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_layout
from pallas_kernels.diff_attention import reference, tpu_tiles
from pallas_kernels.diff_attention.blocks import TpuTile
from pallas_kernels.diff_attention.reference import HIDDEN
from pallas_kernels.diff_attention.tpu_tiles import LN2, Call, Walk, column, heads_of, maps
from pallas_kernels.mosaic_tpu import LANES, dot

# Where the running maximum starts: hidden scores lie so far below it that they weigh nothing.
_LOWEST = HIDDEN / 2


def forward(
  call: Call,
  tile: TpuTile,
  operands: dict[str, Array],
  bounds: dict[str, Array],
  *,
  save: bool,
) -> dict[str, Array]:
  """Runs the kernel.

  Args:
    call: The call.
    tile: Tokens of a step.
    operands: `q`, `k`, `v`, `lam` per token, and the `gain` of a norm.
    bounds: See `tpu_tiles.run`.
    save: Whether the backward follows.

  Returns:
    `out`; the log-sum-exps `lse`, `B T N 2`, if saved or asked for; if saved, in float32, `out2` of
    the second map, and the `difference` before the norm where that is not `out`.
  """
  walk = Walk(call, tile)
  q, k, v = (operands[x] for x in ("q", "k", "v"))
  length, heads, value_dim, dtype = call.length, call.heads, call.value_dim, v.dtype
  padded = walk.q_tiles * tile.queries
  lam = tpu_tiles.pad_length(operands["lam"].swapaxes(1, 2)[:, :, None], tile.queries, axis=3)
  inputs = {
    "q": (heads_of(q, 2 * call.head_dim, tile.queries), walk.queries(2 * call.head_dim)),
    "k": (heads_of(k, call.key_dim, tile.keys), walk.keys(call.key_dim)),
    "v": (heads_of(v, value_dim, tile.keys), walk.keys(value_dim)),
    "lam": (lam, walk.rows(1)),
  }
  norm = call.options.eps is not None
  if norm:
    inputs["gain"] = operands["gain"][None], walk.whole(1, value_dim)
  saved = []
  if save:
    # In float32: row terms of a query that sees few keys nearly cancel what they are taken from.
    saved = ["out2", *(["difference"] if norm or dtype != jnp.float32 else [])]
  outputs = {}
  for name in ("out", *saved):
    wide = dtype if name == "out" else jnp.float32
    tokens = tpu_layout.struct(call.batch, padded, heads, value_dim, wide)
    outputs[name] = tokens, walk.queries(value_dim)
  if save or call.options.return_lse:
    struct = jax.ShapeDtypeStruct((call.batch, heads, 2, padded), jnp.float32)
    outputs["lse"] = struct, walk.rows(2)
  scratch = {
    # A number per row in all lanes: one in a single lane would be spread at each use.
    "top": pltpu.VMEM((2, tile.queries, LANES), jnp.float32),
    "total": pltpu.VMEM((2, tile.queries, LANES), jnp.float32),
    "sums": pltpu.VMEM((2, tile.queries, value_dim), jnp.float32),
  }
  flops = 4 * call.head_dim + 4 * value_dim
  name = "diff_attention_fwd"
  outs = tpu_tiles.run(walk, _kernel, name, inputs, outputs, scratch, bounds, flops)
  outs = {
    name: x.transpose(0, 3, 1, 2)[:, :length]
    if name == "lse"
    else tpu_layout.apart(x, value_dim)[:, :length]
    for name, x in outs.items()
  }
  return outs


def _kernel(
  step: tpu_tiles.Step,
  *,
  q: Any,
  k: Any,
  v: Any,
  lam: Any,
  out: Any,
  top: Any,
  total: Any,
  sums: Any,
  gain: Any = None,
  out2: Any = None,
  difference: Any = None,
  lse: Any = None,
  ids: Any = None,
  kv_ids: Any = None,
) -> None:
  call, tile = step.walk.call, step.walk.tile
  options = call.options

  @pl.when(step.first)
  def _():
    clear(top, total, sums)

  def visit(mask):
    q_maps = maps(q[...], call.head_dim)
    for start in range(0, tile.keys, tile.compute):
      part = pl.ds(start, tile.compute)
      k_maps, values = maps(k[part], call.head_dim), v[part]
      seen = None if mask is None else mask(start, tile.compute, q_axis=0)
      for m in range(2):
        # In powers of two, whose scale is one with the scores'.
        scores = dot(q_maps[m], k_maps[m], (1, 1)) * (options.scale / LN2)
        if seen is not None:
          scores = jnp.where(seen, scores, HIDDEN)
        absorb(m, scores, values, top, total, sums)

  step.run(visit, ids, kv_ids)

  @pl.when(step.last)
  def _():
    totals = [jnp.sum(total[m], axis=1, keepdims=True) for m in range(2)]
    seen = [x > 0 for x in totals]
    totals = [jnp.where(s, x, 1) for s, x in zip(seen, totals, strict=True)]
    outs = [sums[m] * (1 / totals[m]) for m in range(2)]
    result = outs[0] - column(lam[...]) * outs[1]
    if difference is not None:
      difference[...] = result.astype(difference.dtype)
    if out2 is not None:
      out2[...] = outs[1].astype(out2.dtype)
    if gain is not None:
      result = reference.headwise_norm(options, result, gain[...])
    out[...] = result.astype(out.dtype)
    if lse is not None:
      for m in range(2):
        logs = jnp.where(seen[m], (top[m] + jnp.log2(totals[m])) * LN2, -jnp.inf)
        lse[m : m + 1] = logs.T[:1]


def clear(top: Any, total: Any, sums: Any) -> None:
  """Begins the sums of both maps; see `absorb`."""
  top[...] = jnp.full(top.shape, _LOWEST, jnp.float32)
  total[...] = jnp.zeros(total.shape, jnp.float32)
  sums[...] = jnp.zeros(sums.shape, jnp.float32)


def absorb(m: int, scores: Array, values: Array, top: Any, total: Any, sums: Any) -> None:
  """Takes more keys into map `m`'s sums.

  Args:
    m: The map.
    scores: Rows of scores, in powers of two.
    values: Values of the keys.
    top: Reference to the rows' maxima, in all lanes.
    total: Reference to the sums of the weights, to be summed over lanes.
    sums: Reference to the weighed sums of the values.
  """
  old = top[m]
  new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
  weights = jnp.exp2(scores - _across(new, scores.shape[1]))
  rescale = jnp.exp2(old - new)
  top[m] = new
  total[m] = rescale * total[m] + _fold(weights)
  rescaled = _across(rescale, values.shape[1]) * sums[m]
  sums[m] = rescaled + dot(weights.astype(values.dtype), values)


def _across(x, width):
  """`[n, 128]`, alike in all lanes, as `[n, width]`."""
  return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]


def _fold(x):
  """Sums that are left to one reduction at the end: `[n, 128]`, to be summed over lanes."""
  if x.shape[1] % LANES:
    lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
    return jnp.where(lane == 0, jnp.sum(x, axis=1, keepdims=True), 0)
  return sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES))
