"""What the Mosaic GPU kernels of differential attention share: the tiles they visit, and the mask.

A block of queries visits a range of tiles of keys (and, in the backward, a block of keys a range of
tiles of queries), and masks the tiles that it does not see whole. Both ranges are tables made
before the call, so that no kernel knows why a tile is skipped.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.diff_attention.reference import Options, Visibility
from pallas_kernels.mosaic_gpu import WARPGROUP_ROWS, plgpu, tiled


def ceil_div(x: Any, y: Any) -> Any:
  """`x / y`, rounded up, of numbers or arrays."""
  return -(-x // y)


def padded(length: int) -> int:
  """Length of per-token arrays, which blocks read whole."""
  return ceil_div(length, 2 * WARPGROUP_ROWS) * 2 * WARPGROUP_ROWS


def flat(x: Array) -> Array:
  """`B T ...` as `B T X`, which copies slice; tiles of 8 rows must not hang over the end."""
  x = x.reshape(*x.shape[:2], -1)
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0)))


def smem(head_dim: int) -> Callable[..., Any]:
  """Makes tiles in shared memory: operands of a product are laid out alike, rows of any width."""
  return functools.partial(tiled, swizzle=64 if head_dim % 64 else 128)


def per_token(x: Float[Array, "B T ..."]) -> Float[Array, "B ... padded"]:
  """Tokens last, in float32, and padded."""
  x = jnp.moveaxis(x.astype(jnp.float32), 1, -1)
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded(x.shape[-1]) - x.shape[-1])])


def key_tiles(
  options: Options,
  visibility: Visibility,
  shape: tuple[int, int, int],
  block: int,
  tile: int,
) -> Int[Array, "B blocks 4"]:
  """The tiles of keys that each block of queries visits: first, first seen whole, their two ends.

  Args:
    options: Of the call.
    visibility: Of the call.
    shape: Rows of the batch, queries, keys.
    block: Queries of a block.
    tile: Keys of a tile.
  """
  batch, length, kv_length = shape
  xp = np if all(x is None for x in visibility) else jnp
  start = xp.arange(ceil_div(length, block))[None] * block
  offset, limit = _offset_and_limit(xp, options, visibility, kv_length)
  first, last = offset + start, offset + xp.minimum(start + block, length) - 1
  some = every = (xp.zeros_like(first), limit + xp.zeros_like(first))
  if options.causal:
    some, every = ((x[0], xp.minimum(x[1], end + 1)) for x, end in ((some, last), (every, first)))
    if options.window is not None:
      some, every = (
        (xp.maximum(0, begin - options.window + 1), x[1])
        for x, begin in ((some, first), (every, last))
      )
  table = _table(xp, some, every, tile, ceil_div(kv_length, tile))
  if visibility.segment_ids is not None:
    table = _of_documents(table, *_spans(visibility, block, tile))
  return jnp.broadcast_to(jnp.asarray(table, jnp.int32), (batch, *table.shape[1:]))


def query_tiles(
  options: Options,
  visibility: Visibility,
  shape: tuple[int, int, int],
  block: int,
  tile: int,
) -> Int[Array, "B blocks 4"]:
  """`key_tiles` the other way about: tiles of queries for each block of keys.

  Queries past the last are as good as seen: they weigh nothing.
  """
  batch, length, kv_length = shape
  xp = np if all(x is None for x in visibility) else jnp
  first = xp.arange(ceil_div(kv_length, block))[None] * block
  offset, limit = _offset_and_limit(xp, options, visibility, kv_length)
  last = xp.minimum(first + block, limit) - 1
  zero = xp.zeros_like(offset + first)
  some = (zero, xp.where(first < limit, length, zero))
  every = (zero, xp.where(first + block <= limit, length, zero))
  if options.causal:
    some, every = (
      (xp.maximum(0, begin - offset), x[1]) for x, begin in ((some, first), (every, last))
    )
    if options.window is not None:
      some, every = (
        (x[0], xp.clip(end + options.window - offset, 0, x[1]))
        for x, end in ((some, last), (every, first))
      )
  count = ceil_div(length, tile)
  every = (every[0], xp.where(every[1] == length, count * tile, every[1]))
  table = _table(xp, some, every, tile, count)
  if visibility.segment_ids is not None:
    queries, keys = _spans(visibility, tile, block)
    table = _of_documents(table, keys, queries)
  return jnp.broadcast_to(jnp.asarray(table, jnp.int32), (batch, *table.shape[1:]))


def mask_operands(visibility: Visibility) -> dict[str, Array | None]:
  """What `hiding` reads, under the names that it expects of the references."""

  def pad(ids):
    rest = padded(ids.shape[1]) - ids.shape[1]
    return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, rest)))

  ids, kv_ids = (
    None if x is None else pad(x) for x in (visibility.segment_ids, visibility.kv_segment_ids)
  )
  return dict(offsets=visibility.q_offset, limits=visibility.lengths, ids=ids, kv_ids=kv_ids)


def hiding(
  options: Options, refs: types.SimpleNamespace, row: Array, kv_length: int
) -> Callable[..., Float[Array, "rows columns"]]:
  """Inside a kernel, the function that hides scores of a row of the batch by `-inf`."""
  offset = options.q_offset if refs.offsets is None else refs.offsets[row]
  limit = kv_length if refs.limits is None else refs.limits[row]

  def hide(scores, query, key, documents=None, *, query_axis=0):
    """Scores of the queries and keys from `query` and `key` on; documents are of both."""
    index = [
      plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)
      for axis in (query_axis, 1 - query_axis)
    ]
    position, key = index[0] + (query + offset), index[1] + key
    seen = key < limit
    if options.causal:
      seen &= key <= position
      if options.window is not None:
        seen &= position - key < options.window
    if documents is not None:
      ids, kv_ids = documents
      seen &= spread(ids, scores.shape, query_axis) == spread(kv_ids, scores.shape, 1 - query_axis)
    return jnp.where(seen, scores, -jnp.inf)

  return hide


def sweep(
  body: Callable[[bool, Array, Any], Any],
  carry: Any,
  bounds: tuple[Array, Array, Array, Array],
  *,
  head: bool,
  tail: bool,
  documents: bool,
) -> Any:
  """Runs `body(masked, tile, carry)` over a row of a table of tiles.

  Loops that mask and loops that don't are apart: a branch inside would cost the registers of a
  second tile of scores.

  Args:
    body: The work on a tile.
    carry: Its first.
    bounds: The row.
    head: Whether tiles before the first seen whole can exist.
    tail: Whether tiles after the last seen whole can.
    documents: Whether none counts as seen whole.
  """
  first, whole, whole_end, end = bounds
  masked, plain = (functools.partial(body, x) for x in (True, False))
  if documents:
    return lax.fori_loop(first, end, masked, carry)
  if head:
    carry = lax.fori_loop(first, whole, masked, carry)
  carry = lax.fori_loop(whole, whole_end, plain, carry)
  return lax.fori_loop(whole_end, end, masked, carry) if tail else carry


def load_vector(ref: Any, axis: int) -> Array:
  """A vector from memory, laid out along `axis` of a tile in registers."""
  return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def spread(x: Array, shape: tuple[int, int], axis: int = 0) -> Array:
  """A vector along `axis` of a tile of a shape."""
  return lax.broadcast_in_dim(x, shape, [axis])


def opaque_zero(step: Array) -> Array:
  """Zero, though the compiler cannot know that no step is negative.

  Added to an index it keeps what is reached by it inside the loop. The compiler would otherwise
  prepare every matrix operand's descriptor before the loop, two registers each, and spill them.
  """
  return lax.shift_right_arithmetic(step, jnp.int32(31))


def constant(value: float, shape: tuple[int, ...]) -> Array:
  """A tile in registers, or a vector of its rows."""
  layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _offset_and_limit(xp, options, visibility, kv_length):
  offset, lengths = visibility.q_offset, visibility.lengths
  offset = xp.full((1, 1), options.q_offset or 0) if offset is None else offset[:, None]
  return offset, kv_length if lengths is None else lengths[:, None]


def _table(xp, some, every, tile, count):
  """Ranges of tokens seen by some of a block and by all of it, as ranges of tiles."""
  first = xp.minimum(some[0] // tile, count)
  end = xp.where(some[0] < some[1], xp.clip(ceil_div(some[1], tile), first, count), first)
  whole = xp.clip(ceil_div(every[0], tile), first, end)
  whole_end = xp.clip(every[1] // tile, whole, end)
  return xp.stack(xp.broadcast_arrays(first, whole, whole_end, end), axis=-1)


def _spans(visibility, block, tile):
  """Least and greatest document of each block of queries and of each block of keys."""

  def span(ids, size):
    rest = -ids.shape[1] % size
    ids = jnp.pad(ids, ((0, 0), (0, rest)), mode="edge").reshape(ids.shape[0], -1, size)
    return ids.min(axis=-1), ids.max(axis=-1)

  return span(visibility.segment_ids, block), span(visibility.kv_segment_ids, tile)


def _of_documents(table, blocks, tiles):
  """Narrows the ranges to tiles that share a document; none of them counts as seen whole."""
  (least, greatest), (tile_least, tile_greatest) = blocks, tiles
  index = jnp.arange(tile_least.shape[1])
  meet = (tile_least[:, None] <= greatest[..., None]) & (tile_greatest[:, None] >= least[..., None])
  meet &= (index >= table[..., :1]) & (index < table[..., 3:])
  first = jnp.argmax(meet, axis=-1)
  end = jnp.where(meet.any(axis=-1), index.size - jnp.argmax(meet[..., ::-1], axis=-1), first)
  return jnp.stack([first, first, first, end], axis=-1)
