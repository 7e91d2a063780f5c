"""Differential attention of one query per row on a TPU: the cache is read once for both maps."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from pallas_kernels import mosaic_tpu, tpu_layout
from pallas_kernels.diff_attention import reference, tpu_tiles, xla
from pallas_kernels.diff_attention.reference import HIDDEN, Options
from pallas_kernels.diff_attention.tpu_forward import absorb, clear
from pallas_kernels.diff_attention.tpu_tiles import LN2, maps
from pallas_kernels.mosaic_tpu import LANES, PARALLEL, SEQUENTIAL, dot

_MOST_KEYS = 512  # Of a tile.
_ROWS = 16  # Of a bfloat16 tile: the query heads of a group are filled up to so many.


@xla.with_gradient
def decode(
  options: Options,
  q: Float[Array, "B N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B N"],
  gain: Float[Array, "V"] | None,
  lengths: Int[Array, "B"] | None,
  num_splits: int | None = None,
) -> Float[Array, "B N V"]:
  """The implementation "pallas_tpu" of decoding; one split if `None`, for a core has one sequence.

  Raises:
    NotImplementedError: The dtypes are not the matrix unit's.
  """
  tpu_tiles.refuse_unless_served(q, k, v)
  (batch, heads, _, head_dim), (_, kv_length, kv_heads, value_dim) = q.shape, v.shape
  most = -(-kv_length // ((num_splits or 1) * LANES)) * LANES
  keys = min(_MOST_KEYS, kv_length, most)
  tiles = pl.cdiv(kv_length, keys)
  steps = pl.cdiv(tiles, num_splits or 1)
  splits = pl.cdiv(tiles, steps)

  groups = heads // kv_heads
  rows = pl.cdiv(groups, _ROWS) * _ROWS
  queries = q.reshape(batch, kv_heads, groups, 2, head_dim).swapaxes(2, 3)
  queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, rows - groups), (0, 0)))
  if lengths is None:
    lengths = jnp.full(batch, kv_length)
  limits = jnp.minimum(lengths, kv_length).astype(jnp.int32)
  firsts = jnp.zeros_like(limits)
  if options.window is not None:
    firsts = jnp.maximum(limits - options.window, 0)

  def tile_index(b, split, step, firsts, limits):
    """Of the cache, held to what the row sees: no tile beside it is read."""
    last = jnp.maximum(limits[b] - 1, 0) // keys
    return jnp.clip(split * steps + step, firsts[b] // keys, last)

  def cache(x):
    dim = math.prod(x.shape[3:])
    place = lambda b, n, p, s, *bounds: (b, tile_index(b, p, s, *bounds), n)
    view = tpu_layout.side_by_side(x.reshape(*x.shape[:3], dim))
    return view, tpu_layout.blocks(dim, keys, place)

  def part(width):
    struct = jax.ShapeDtypeStruct((splits, batch, kv_heads, 2, rows, width), jnp.float32)
    block = (None, None, None, 2, rows, width)
    return struct, pl.BlockSpec(block, lambda b, n, p, s, *_: (p, b, n, 0, 0, 0))

  def kernel(firsts, limits, q, k, v, top, total, sums):
    b, split, step = (pl.program_id(i) for i in (0, 2, 3))
    start = (split * steps + step) * keys
    pl.when(step == 0)(lambda: clear(top, total, sums))

    @pl.when((start < limits[b]) & (start + keys > firsts[b]))
    def _():
      column = jax.lax.broadcasted_iota(jnp.int32, (rows, keys), 1) + start
      seen = (column >= firsts[b]) & (column < limits[b])
      row = jax.lax.broadcasted_iota(jnp.int32, (keys, value_dim), 0) + start
      # What lies behind the last key is nobody's, and a weight of zero does not hide a NaN.
      values = jnp.where(row < limits[b], v[...], jnp.zeros((), v.dtype))
      for m, k_map in enumerate(maps(k[...], head_dim)):
        scores = dot(q[m], k_map, (1, 1)) * (options.scale / LN2)
        absorb(m, jnp.where(seen, scores, HIDDEN), values, top, total, sums)

  whole = pl.BlockSpec((None, None, 2, rows, head_dim), lambda b, n, *_: (b, n, 0, 0, 0))
  (k_view, k_spec), (v_view, v_spec) = cache(k), cache(v)
  outputs = [part(LANES), part(LANES), part(value_dim)]
  args = firsts, limits, queries, k_view, v_view
  out_shape = [struct for struct, _ in outputs]
  pairs = batch * heads * kv_length
  top, total, sums = mosaic_tpu.call(
    kernel,
    *args,
    name="diff_attention_decode",
    out_shape=out_shape,
    grid=(batch, kv_heads, splits, steps),
    in_specs=[whole, k_spec, v_spec],
    out_specs=[spec for _, spec in outputs],
    semantics=(PARALLEL, PARALLEL, PARALLEL, SEQUENTIAL),
    cost=mosaic_tpu.cost_estimate(
      args, out_shape, flops=pairs * 4 * (head_dim + value_dim), transcendentals=2 * pairs
    ),
    num_scalar_prefetch=2,
  )

  def by_head(x: Any) -> Any:  # P B K 2 G X to P B K G 2 X.
    return x[:, :, :, :, :groups].swapaxes(3, 4)

  parts = by_head(sums), by_head(top)[..., :1] * LN2, jnp.sum(by_head(total), -1, keepdims=True)
  return reference.merge(options, *parts, lam, gain, v)
