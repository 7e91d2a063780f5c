"""Which keys a query of softmax attention sees, and how to leave out the blocks that none does."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from pallas_kernels.checks import check_integers, check_shapes

# Finite, since a row of -inf would turn to NaN, and its gradient with it.
HIDDEN = float(jnp.finfo(jnp.float32).min)

_MOST_UNROLLED = 8  # Blocks.
_MOST_BRANCHES = 16  # Of code, each with keys of its own.


@dataclasses.dataclass(frozen=True)
class MaskOptions:
  """What of a mask is known when a call is traced.

  Attributes:
    causal: A query sees no later key.
    window: It sees the last `window` keys alone, its own among them.
    q_offset: Position of the first query among the keys; `None` where `Visibility` has one per row.
  """

  causal: bool = True
  window: int | None = None
  q_offset: int | None = 0

  def __post_init__(self):
    if self.window is not None and (self.window < 1 or not self.causal):
      raise ValueError(f"window={self.window} is at least 1, of causal={self.causal} attention.")


class Visibility(NamedTuple):
  """The arrays that decide which keys a query sees; `None` hides nothing.

  Attributes:
    q_offset: Position of each row's first query, where `MaskOptions.q_offset` is `None`.
    segment_ids: Documents of the queries, which see their own keys alone.
    kv_segment_ids: Documents of the keys, given with `segment_ids`.
    lengths: Valid keys per row.
  """

  q_offset: Int[Array, "B"] | None = None
  segment_ids: Int[Array, "B T"] | None = None
  kv_segment_ids: Int[Array, "B S"] | None = None
  lengths: Int[Array, "B"] | None = None


def bounds_of(
  q: Array,
  k: Array,
  *,
  q_offset: int | Array,
  segment_ids: Array | None,
  kv_segment_ids: Array | None,
  lengths: Array | None,
) -> tuple[int | None, Visibility]:
  """An attention's arguments, checked: `MaskOptions.q_offset`, and what is not known when traced.

  Raises:
    ValueError: Shapes or types are none that these may have.
  """
  (batch, length), kv_length = q.shape[:2], k.shape[1]
  if segment_ids is None and kv_segment_ids is not None:
    raise ValueError("kv_segment_ids are given without segment_ids; give both.")
  if segment_ids is not None and kv_segment_ids is None:
    if length != kv_length:
      raise ValueError(f"Give kv_segment_ids where {k.shape=} is not as long as {q.shape=}.")
    kv_segment_ids = segment_ids
  static = isinstance(q_offset, int)
  offsets = None if static else q_offset
  check_shapes(
    f"{q.shape=} and {k.shape=}",
    q_offset=(offsets, [(), (batch,)]),
    segment_ids=(segment_ids, [(batch, length)]),
    kv_segment_ids=(kv_segment_ids, [(batch, kv_length)]),
    lengths=(lengths, [(batch,)]),
  )
  check_integers(
    q_offset=offsets, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids, lengths=lengths
  )
  offsets = None if static else jnp.broadcast_to(q_offset, batch)
  lengths = None if lengths is None else jnp.clip(lengths, 0, kv_length)  # Kernels index by them.
  return q_offset if static else None, Visibility(offsets, segment_ids, kv_segment_ids, lengths)


def visible(
  options: MaskOptions,
  visibility: Visibility,
  length: int,
  kv_length: int,
  start: int | Int[Array, ""] = 0,
  kv_start: int = 0,
) -> Bool[Array, "#B {length} {kv_length}"]:
  """Which keys of a stretch the queries of a stretch see.

  Args:
    options: Of the call.
    visibility: Of the call, for all of its tokens.
    length: Of the stretch of queries.
    kv_length: Of the stretch of keys.
    start: The stretch's first query; alone of these it may be traced, and the stretch may hang over
      the end.
    kv_start: The stretch's first key.
  """
  kv_index = kv_start + jnp.arange(kv_length)
  seen = jnp.ones((1, length, kv_length), bool)
  if options.causal:
    offset = options.q_offset if visibility.q_offset is None else visibility.q_offset[:, None]
    position = jnp.atleast_2d(offset + start + jnp.arange(length))[..., None]
    seen &= kv_index <= position
    if options.window is not None:
      seen &= position - kv_index < options.window
  if visibility.segment_ids is not None:
    # Clipped one by one: a slice that hangs over the end would be moved as a whole.
    index = start + jnp.arange(length)
    ids = jnp.take(visibility.segment_ids, index, axis=1, mode="clip")
    kv_ids = visibility.kv_segment_ids[:, kv_start : kv_start + kv_length]
    seen &= ids[:, :, None] == kv_ids[:, None]
  if visibility.lengths is not None:
    seen &= kv_index < visibility.lengths[:, None, None]
  return seen


def without_padding(
  k: Float[Array, "B S ..."], v: Float[Array, "B S ..."], lengths: Int[Array, "B"] | None
) -> tuple[Float[Array, "B S ..."], Float[Array, "B S ..."]]:
  """Zeros in place of padded keys and values: what they hold is not ours to trust.

  A weight of zero does not hide a NaN.
  """
  if lengths is None:
    return k, v
  valid = jnp.arange(k.shape[1]) < lengths[:, None]
  return tuple(jnp.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0) for x in (k, v))


def softmax_dtype(dtype: DTypeLike) -> jnp.dtype:
  """float32 for the scores and statistics of any input but float64, which tests alone use."""
  return jnp.promote_types(dtype, jnp.float32)


def sweep(
  options: MaskOptions,
  block_size: int,
  kv_length: int,
  step: Callable[..., tuple[Any, Any]],
  carry: Any,
  *arrays: Array,
) -> tuple[Any, Any]:
  """`step(keys, carry, start, *blocks)` over blocks of queries, which lie along axis -2.

  The static slice `keys` is what any query of the block sees. A few blocks are written out. More
  are scanned, since XLA runs blocks that it is free to order side by side, and holds all of a map;
  the slice is then switched, and of a stretch of blocks where there are more than `_MOST_BRANCHES`.
  """
  length = arrays[0].shape[-2]
  count = -(-length // block_size)

  def keys_of(start, stop):
    first, last = 0, kv_length
    if options.causal and options.q_offset is not None:
      last = min(last, options.q_offset + stop)
      if options.window is not None:
        first = max(first, options.q_offset + start - options.window + 1)
    last = max(last, 1)  # Where no key is seen, one that is hidden keeps the shapes.
    return slice(min(first, last - 1), last)

  if count <= _MOST_UNROLLED:
    outs = []
    for start in range(0, length, block_size):
      stop = min(start + block_size, length)
      blocks = (x[..., start:stop, :] for x in arrays)
      carry, out = step(keys_of(start, stop), carry, start, *blocks)
      outs.append(out)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x, axis=-2), *outs)

  size = -(-length // count)
  stretch = -(-count // _MOST_BRANCHES)

  def split(x):
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, count * size - length), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:-2], count, size, x.shape[-1]), -3, 0)

  def merge(x):
    x = jnp.moveaxis(x, 0, -3)
    return x.reshape(*x.shape[:-3], count * size, x.shape[-1])[..., :length, :]

  starts = range(0, count * size, stretch * size)
  branches = [functools.partial(step, keys_of(s, s + stretch * size)) for s in starts]

  def body(carry, x):
    index, *blocks = x
    return jax.lax.switch(index // stretch, branches, carry, index * size, *blocks)

  carry, outs = jax.lax.scan(body, carry, (jnp.arange(count), *map(split, arrays)))
  return carry, jax.tree.map(merge, outs)
