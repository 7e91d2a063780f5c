"""Dot-product attention with structured masks, biases and shared key heads.

The blockwise causal mask is section 3.3 of xPos (https://arxiv.org/abs/2212.10554), and `decay` is
its scale (section 2.2); the linear bias is ALiBi's (https://arxiv.org/abs/2108.12409).

xPos multiplies a score's terms by `zeta^(n - m)`, as a scale of the query and one of the key. About
one center for all positions these overflow some way off. Here a tile of queries has a center of its
own, to which all keys are scaled anew: keys that the tile sees lie behind it, where their scales
fall, so that no length overflows, and keys in a cache are merely rotated and stay valid.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from latentlab.ops.mesh import axes_to_map
from latentlab.ops.positions import document_positions
from latentlab.ops.sequence import Gathered, map_attention
from latentlab.typing import Array, Bool, DTypeLike, Float, Int, Shaped
from pallas_kernels.common import target_platform
from pallas_kernels.flash_attention import Implementation
from pallas_kernels.flash_attention import flash_attention as kernel
from pallas_kernels.visibility import HIDDEN

_HEADS_AT_ONCE = 8  # Of a decoding step on a CPU; with more, their zeros outweigh a copy.
_LOWEST_BIAS = -1e30  # So far above HIDDEN that a hidden key gets no weight beside any visible one.


@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query sees, by their positions.

  Attributes:
    kind: "full"; "causal"; "sliding_window", the last `size` keys with the query's own among them;
      "blockwise_causal", causal within the query's block of `size` keys and the one before it.
    size: Of the window or block; `None` for the others.
  """

  kind: Literal["full", "causal", "sliding_window", "blockwise_causal"] = "causal"
  size: int | None = None

  def __post_init__(self):
    sized = self.kind in ("sliding_window", "blockwise_causal")
    if not sized and self.kind not in ("full", "causal"):
      raise ValueError(
        f"kind={self.kind!r} must be 'full', 'causal', 'sliding_window' or 'blockwise_causal'."
      )
    if sized and (self.size is None or self.size < 1):
      raise ValueError(f"size={self.size} of a {self.kind} mask must be at least 1.")
    if not sized and self.size is not None:
      raise ValueError(f"size={self.size} means nothing to a {self.kind} mask; leave it None.")

  @property
  def reach(self) -> int | None:
    """How many of the last positions a query sees at most, its own among them; `None` if all."""
    return 2 * self.size if self.kind == "blockwise_causal" else self.size

  def __call__(self, q: Int[Array, "#B T 1"], k: Int[Array, "#B 1 S"]) -> Bool[Array, "#B T S"]:
    """True where the query at position `q` sees the key at position `k`."""
    if self.kind == "full":
      return jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
    causal = k <= q
    if self.kind == "sliding_window":
      return causal & (q - k < self.size)
    if self.kind == "blockwise_causal":
      return causal & (q // self.size - k // self.size <= 1)
    return causal


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  *,
  mask: Mask = Mask("causal"),  # noqa: B008 (frozen)
  positions: Int[Array, "#B T"] | None = None,
  kv_positions: Int[Array, "#B S"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  kv_valid: Bool[Array, "B S"] | None = None,
  allowed: Bool[Array, "#B T S"] | None = None,
  key_bias: Float[Array, "#B S"] | None = None,
  slopes: Float[Array, "N"] | None = None,
  decay: Float[np.ndarray, "H"] | None = None,
  return_lse: bool = False,
  spec: PartitionSpec | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
  """Softmax attention, `softmax(q k^T + bias) v`, with float32 scores and statistics.

  A key is seen if every condition given allows it. A query that sees none gets zeros. Where
  positions are places, and documents alone hide what the mask does not, this is `flash_attention`,
  which computes the visible blocks; blocks of a blockwise causal mask are then a batch of their own
  (see `windowed_attention`). Elsewhere all scores are held at once.

  Args:
    q: Queries. Nothing is scaled in here.
    k: Keys; `N` is a multiple of their `K` heads, which query heads share in consecutive groups.
    v: Values.
    mask: Structured mask over positions.
    positions: Of the queries; their places `0 ... T - 1` if `None`. Blocks of a mask begin with
      position 0, and without positions with each document.
    kv_positions: Of the keys, whatever their place in a cache; `0 ... S - 1` if `None`.
    segment_ids: Documents of the queries, which see their own keys alone.
    kv_segment_ids: Documents of the keys; those of the queries if `None`.
    kv_valid: False where a cache slot holds padding or nothing.
    allowed: Arbitrary mask, such as `tree_mask`.
    key_bias: Added to the scores of a key, such as `segment_bias`; `-inf` hides it.
    slopes: ALiBi's, subtracting `slope * (query position - key position)`.
    decay: xPos's (`xpos_decay`), for queries and keys that are rotated and not scaled: feature `h`
      of a score gets the factor `exp(decay[h] * (query position - key position))`.
    return_lse: Also return the log-sum-exp of each row, float32 and `-inf` where no key is seen.
    spec: Layout of a `B T N H` array over the ambient mesh, for `flash_attention` to follow.

  Raises:
    ValueError: Shapes or options disagree, or a decay would grow ahead of a query.
  """
  (batch, length, heads, head_dim), (kv_length, kv_heads) = q.shape, k.shape[1:3]
  if heads % kv_heads or v.shape[:3] != k.shape[:3]:
    raise ValueError(f"{k.shape=} and {v.shape=} must agree, with heads that divide {q.shape=}'s.")
  if segment_ids is None and kv_segment_ids is not None:
    raise ValueError("kv_segment_ids are given without segment_ids; give both.")
  if segment_ids is not None and kv_segment_ids is None:
    if kv_length != length:
      raise ValueError(f"Give kv_segment_ids where {k.shape=} is not as long as {q.shape=}.")
    kv_segment_ids = segment_ids
  if decay is not None and mask.kind == "full":
    raise ValueError(
      "xPos's decay grows for keys behind a query's position, which a full mask shows; choose a "
      f"causal mask, not {mask.kind=}."
    )
  documents = dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
  rest = dict(decay=decay, return_lse=return_lse, spec=spec)
  elsewhere = (positions, kv_positions, kv_valid, allowed, key_bias, slopes)
  if mask.kind != "blockwise_causal" and all(x is None for x in elsewhere):
    return _flash(q, k, v, causal=mask.kind != "full", window=mask.size, **documents, **rest)
  in_place = positions is None and kv_positions is None and allowed is None
  if mask.kind == "blockwise_causal" and in_place and kv_segment_ids is segment_ids:
    rest |= dict(segment_ids=segment_ids, kv_valid=kv_valid, key_bias=key_bias, slopes=slopes)
    return _in_blocks(q, k, v, mask, **rest)
  positions = jnp.arange(length)[None] if positions is None else positions
  kv_positions = jnp.arange(kv_length)[None] if kv_positions is None else kv_positions
  if decay is not None:
    tile = _tile(decay, q.dtype)
    if length > tile:
      rows = dict(q=q, positions=positions, segment_ids=segment_ids, allowed=allowed)
      keys = dict(kv_positions=kv_positions, kv_segment_ids=kv_segment_ids, kv_valid=kv_valid)
      keys |= dict(k=k, v=v, mask=mask, key_bias=key_bias, slopes=slopes)
      return _by_tiles(lambda start, rows: attention(**rows, **keys, **rest), rows, tile)
    q, k = _scale(q, k, positions, kv_positions, decay)
  distance = positions[:, :, None] - kv_positions[:, None, :]
  visible = visible_keys(
    mask,
    positions,
    kv_positions,
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    kv_valid=kv_valid,
    allowed=allowed,
    key_bias=key_bias,
  )
  visible = visible[:, None, None]

  # Heads before length: plain batched products, and rows of scores that lie together in memory.
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)  # B K G T H
  # The one query of a decoding step would have a whole cache transposed: see `_scores_at_once`.
  at_once = length == 1 and kv_heads <= _HEADS_AT_ONCE and spec is None
  at_once = at_once and target_platform() == "cpu"
  if at_once:
    scores = _scores_at_once(q, k, dtype)
  else:
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=dtype)
  if key_bias is not None:
    scores += jnp.maximum(key_bias.astype(dtype), _LOWEST_BIAS)[:, None, None, None, :]
  if slopes is not None:
    slopes = slopes.reshape(1, kv_heads, -1, 1, 1).astype(dtype)
    scores -= slopes * distance[:, None, None].astype(dtype)
  scores = jnp.where(visible, scores, HIDDEN)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  if at_once:
    out = _mean_at_once(weights, v, dtype)
  else:
    out = jnp.einsum("BKGTS,BKSV->BKGTV", weights, v, preferred_element_type=dtype)
  seen = visible.any(axis=-1, keepdims=True)
  out = jnp.where(seen, out, 0).transpose(0, 3, 1, 2, 4)
  out = out.reshape(batch, length, heads, v.shape[-1]).astype(v.dtype)
  if not return_lse:
    return out
  lse = jnp.where(seen[..., 0], jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
  return out, lse.reshape(batch, heads, length).swapaxes(1, 2)


def visible_keys(
  mask: Mask,
  positions: Int[Array, "#B T"],
  kv_positions: Int[Array, "#B S"],
  *,
  segment_ids: Int[Array, "B T"] | None,
  kv_segment_ids: Int[Array, "B S"] | None,
  kv_valid: Bool[Array, "B S"] | None,
  allowed: Bool[Array, "#B T S"] | None,
  key_bias: Float[Array, "#B S"] | None,
) -> Bool[Array, "#B T S"]:
  """Which keys a query sees under all conditions of `attention`."""
  visible = mask(positions[:, :, None], kv_positions[:, None, :])
  if segment_ids is not None:
    visible &= segment_ids[:, :, None] == kv_segment_ids[:, None, :]
  if kv_valid is not None:
    visible &= kv_valid[:, None, :]
  if allowed is not None:
    visible &= allowed
  if key_bias is not None:
    visible &= key_bias[:, None, :] > -jnp.inf
  return visible


def _scores_at_once(
  q: Float[Array, "B K G 1 H"], k: Float[Array, "B S K H"], dtype: DTypeLike
) -> Float[Array, "B K G 1 S"]:
  """Scores of one query by a product over all heads' features, which reads keys where they lie.

  A query is zero outside of its head. That is `K` times the arithmetic, and no copy of the keys,
  which XLA's CPU backend makes before a product per head.
  """
  batch, heads, groups = q.shape[:3]
  apart = jnp.eye(heads, dtype=q.dtype)[:, None, None]  # J 1 1 K
  apart = q[:, :, :, 0].transpose(0, 1, 3, 2)[..., None] * apart
  matrix = apart.reshape(batch, -1, groups * heads)
  scores = jnp.matmul(k.reshape(batch, k.shape[1], -1), matrix, preferred_element_type=dtype)
  scores = scores.reshape(batch, -1, groups, heads)
  return scores.transpose(0, 3, 2, 1)[:, :, :, None]


def _mean_at_once(
  weights: Float[Array, "B K G 1 S"], v: Float[Array, "B S K V"], dtype: DTypeLike
) -> Float[Array, "B K G 1 V"]:
  """Means of the values in the same way: of all heads, of which each keeps its own."""
  batch, heads, groups, _, length = weights.shape
  weights, flat = weights.reshape(batch, -1, length), v.reshape(batch, length, -1)
  out = jnp.matmul(weights, flat, preferred_element_type=dtype)
  out = out.reshape(batch, heads, groups, heads, -1)
  return jnp.einsum("BKGKV->BKGV", out)[:, :, :, None]


def windowed_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  *,
  mask: Mask,
  positions: Int[Array, "B T"],
  kv_positions: Int[Array, "B S"],
  kv_valid: Bool[Array, "B S"],
  slopes: Float[Array, "N"] | None = None,
  decay: Float[np.ndarray, "H"] | None = None,
) -> Float[Array, "B T N V"]:
  """`attention` where a mask has an end, in `T * 2 reach` scores at most and not `T * S`.

  Every block of `mask.size` queries is a row of a larger batch, beside those keys that it reaches.

  Args:
    q: Queries.
    k: Keys: `mask.reach` older ones, invalid where there are not as many, then the queries' own.
    v: Values.
    mask: A sliding window, or blocks that begin at any position.
    positions: Of the queries; they ascend, as do those of valid keys.
    kv_positions: Of the keys.
    kv_valid: False where there is no key.
    slopes: See `attention`.
    decay: See there.

  Raises:
    ValueError: The mask has no end, or older keys are not as many as it reaches.
  """
  length, reach = q.shape[1], mask.reach
  if reach is None or k.shape[1] != length + reach:
    raise ValueError(f"{k.shape=} must have {mask}'s reach of {reach} keys more than {q.shape=}.")
  keys = dict(k=k, v=v, kv_positions=kv_positions, kv_valid=kv_valid)
  options = dict(mask=mask, slopes=slopes, decay=decay)
  if length <= mask.size:
    return attention(q, positions=positions, **keys, **options)
  # Padding that stays beside its block, about whose middle a decay's scales are.
  positions = jnp.pad(positions, ((0, 0), (0, -length % mask.size)), mode="edge")
  batch, (q, positions) = len(q), (_blocks(x, mask.size) for x in (q, positions))
  keys = {name: _windows(x, mask.size, reach) for name, x in keys.items()}
  return _in_rows(attention(q, positions=positions, **keys, **options), batch, length)


def _in_blocks(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  mask: Mask,
  *,
  segment_ids: Int[Array, "B T"] | None,
  kv_valid: Bool[Array, "B T"] | None,
  key_bias: Float[Array, "#B T"] | None,
  slopes: Float[Array, "N"] | None,
  spec: PartitionSpec | None,
  **options: Any,
):
  """Blockwise causal attention in place: blocks of queries as a batch, each beside two of keys.

  With documents it is beside three, for their blocks begin anywhere in a row.
  """
  (batch, length), size, causal = q.shape[:2], mask.size, Mask("causal")
  if length <= 2 * size:  # No query is further than a block from the first key.
    biases = dict(kv_valid=kv_valid, key_bias=key_bias, slopes=slopes)
    return attention(q, k, v, mask=causal, segment_ids=segment_ids, spec=spec, **biases, **options)
  reach = size if segment_ids is None else 2 * size

  def windows(x):
    return _windows(jnp.pad(x, [(0, 0), (reach, 0)] + [(0, 0)] * (x.ndim - 2)), size, reach)

  valid = jnp.ones((batch, length), bool) if kv_valid is None else kv_valid
  q, k, v, valid = _blocks(q, size), windows(k), windows(v), windows(valid)
  if segment_ids is None and key_bias is None and slopes is None:
    # A window is one document, and what pads it another.
    ids = dict(segment_ids=jnp.ones(q.shape[:2], jnp.int32), kv_segment_ids=valid.astype(jnp.int32))
    if spec is not None:  # Rows come before blocks in the batch: a sharded length is gathered.
      spec = PartitionSpec(spec[0], None, *spec[2:])
    out = _flash(q, k, v, offset=reach, **ids, spec=spec, **options)
  else:
    places = jnp.arange(reach + size)[None]
    keys = dict(kv_positions=places, kv_valid=valid)
    if key_bias is not None:
      keys["key_bias"] = windows(jnp.broadcast_to(key_bias, (batch, length)))
    if segment_ids is not None:
      keys |= dict(segment_ids=_blocks(segment_ids, size), kv_segment_ids=windows(segment_ids))
      inside = document_positions(segment_ids)
      keys["allowed"] = mask(_blocks(inside, size)[..., None], windows(inside)[:, None])
    out = attention(
      q, k, v, mask=causal, positions=places[:, reach:], slopes=slopes, **keys, **options
    )
  return jax.tree.map(lambda x: _in_rows(x, batch, length), out)


def _blocks(x: Shaped[Array, "B T ..."], size: int) -> Shaped[Array, "blocks {size} ..."]:
  """A row's blocks as rows of their own; the last one is padded."""
  padded = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
  return padded.reshape(-1, size, *x.shape[2:])


def _windows(
  x: Shaped[Array, "B S ..."], size: int, reach: int
) -> Shaped[Array, "blocks window ..."]:
  """Beside each block of a row's `S - reach` last tokens, the `reach` tokens before it."""
  blocks = _blocks(x, size).reshape(len(x), -1, size, *x.shape[2:])
  count = blocks.shape[1] - reach // size
  parts = [blocks[:, i : i + count] for i in range(reach // size + 1)]
  return jnp.concatenate(parts, axis=2).reshape(-1, reach + size, *x.shape[2:])


def _in_rows(
  x: Shaped[Array, "blocks size ..."], batch: int, length: int
) -> Shaped[Array, "B T ..."]:
  """Undoes `_blocks`."""
  return x.reshape(batch, -1, *x.shape[2:])[:, :length]


def _flash(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  *,
  causal: bool = True,
  window: int | None = None,
  offset: int = 0,
  segment_ids: Int[Array, "B T"] | None,
  kv_segment_ids: Int[Array, "B S"] | None,
  decay: Float[np.ndarray, "H"] | None,
  return_lse: bool,
  spec: PartitionSpec | None,
):
  """`flash_attention` with a decay: one call for every tile of queries, mostly one."""
  options = dict(causal=causal, window=window, return_lse=return_lse, spec=spec)
  if decay is None:
    documents = dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
    return flash_attention(q, k, v, q_offset=offset, **documents, **options)

  def attend(start, rows):
    start += offset
    stop = start + rows["q"].shape[1]
    first = 0 if window is None else max(start - window + 1, 0)
    first = min(first, k.shape[1] - 1)
    seen = lambda x: x if x is None else x[:, first : max(stop, first + 1)]
    places = jnp.arange(start, stop)[None], jnp.arange(first, first + seen(k).shape[1])[None]
    q, keys = _scale(rows.pop("q"), seen(k), *places, decay)
    rows["kv_segment_ids"] = seen(kv_segment_ids)
    return flash_attention(q, keys, seen(v), q_offset=start - first, **rows, **options)

  return _by_tiles(attend, dict(q=q, segment_ids=segment_ids), _tile(decay, q.dtype))


def _scale(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  positions: Int[Array, "#B T"],
  kv_positions: Int[Array, "#B S"],
  decay: Float[np.ndarray, "H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"]]:
  """xPos's scales about the middle of the queries, which span `_tile` positions at most.

  More would overflow to NaN. Keys behind the last query, which no query sees, are scaled as if they
  were beside it, and so are empty slots.
  """
  first, last = (f(positions, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
  center = first + (last - first) // 2
  rates = jnp.asarray(decay, jnp.promote_types(q.dtype, jnp.float32))
  scale = lambda x, distance: (x * jnp.exp(distance[..., None, None] * rates)).astype(x.dtype)
  return scale(q, positions - center), scale(k, center - jnp.minimum(kv_positions, last))


def decayed(
  product: Callable[[Array, Array], Array],
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  positions: Int[Array, "#B T"],
  kv_positions: Int[Array, "#B S"],
  decay: Float[np.ndarray, "H"],
  *,
  axis: int,
) -> Array:
  """`product(q, k)` of queries and keys with xPos's scales, tile by tile.

  Args:
    product: Of them.
    q: Queries.
    k: Keys.
    positions: Of the queries.
    kv_positions: Of the keys.
    decay: See `attention`.
    axis: Of the queries in what `product` returns.
  """
  parts = []
  for start in range(0, q.shape[1], tile := _tile(decay, q.dtype)):
    rows = slice(start, start + tile)
    parts.append(product(*_scale(q[:, rows], k, positions[:, rows], kv_positions, decay)))
  return jnp.concatenate(parts, axis=axis)


def _tile(decay: Float[np.ndarray, "H"], dtype: DTypeLike) -> int:
  """Positions that a tile of queries may span.

  A scale, and a query's times a key's, which gradients meet too, stay far within the dtype: on
  either side of the center the exponent goes to 0.36 of the largest (32 in float32, 4 in float16).
  """
  steepest = float(-np.min(decay))
  limit = 2 * 0.36 * math.log(jnp.finfo(dtype).max)
  return max(int(min(limit / steepest, 2.0**30)), 1) if steepest > 0 else 2**30


def _by_tiles(attend: Callable, rows: dict[str, Array | None], tile: int):
  """Calls `attend(start, rows)` for every `tile` queries; concatenates what it returns."""
  length = rows["q"].shape[1]
  results = []
  for start in range(0, length, tile):
    part = {name: x if x is None else x[:, start : start + tile] for name, x in rows.items()}
    results.append(attend(start, part))
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *results)


def flash_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"] | Gathered,
  v: Float[Array, "B S K V"] | Gathered,
  *,
  scale: float = 1.0,
  causal: bool = True,
  window: int | None = None,
  q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | Gathered | None = None,
  lengths: Int[Array, "B"] | None = None,
  return_lse: bool = False,
  implementation: Implementation | Sequence[Implementation] | None = None,
  spec: PartitionSpec | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
  """`pallas_kernels.flash_attention`, which see, run on each device's part of the arrays.

  Where the length is sharded, queries stay where they are, and `latentlab.ops.sequence` has their
  keys: gathered before, gathered here, or a window of them passed on by the devices before.

  Args:
    q: See `pallas_kernels.flash_attention`.
    k: See there; or as `gather_sequence` made them.
    v: See there; or with `k`.
    scale: See there.
    causal: See there.
    window: See there.
    q_offset: See there.
    segment_ids: See there.
    kv_segment_ids: See there; or with `k`.
    lengths: See there.
    return_lse: See there.
    implementation: See there.
    spec: Layout of a `B T N H` array over the ambient mesh, as `ops.retention` has it; key heads
      that its devices do not divide are repeated.

  Raises:
    ValueError: The spec shards `H`, or names axes that the mesh lacks or that do not divide; or
      keys were gathered by another layout.
  """
  options = dict(scale=scale, causal=causal, window=window, return_lse=return_lse)
  options |= dict(implementation=implementation)
  args = dict(q=q, k=k, v=v, lengths=lengths)
  args |= dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
  args = {name: x for name, x in args.items() if x is not None}
  axes = axes_to_map(spec)
  b, t, n = (names or None for names in axes or ((),) * 3)
  out = PartitionSpec(b, t, n)
  return map_attention(
    functools.partial(kernel, **options),
    args,
    {},
    (out, out) if return_lse else out,
    q_offset=q_offset,
    window=window,
    axes=axes,
  )


def tree_mask(parents: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Each node of a token tree sees itself and its ancestors.

  Args:
    parents: Index of each node's parent, in any order; a root's is its own, or -1.
  """
  length = parents.shape[1]
  reach = (parents[..., None] == jnp.arange(length)) | jnp.eye(length, dtype=bool)
  for _ in range(math.ceil(math.log2(max(length, 2)))):  # Each squaring doubles the ancestry.
    reach = jnp.einsum("BTU,BUS->BTS", *[reach.astype(jnp.float32)] * 2) > 0
  return reach


def segment_bias(
  values: Float[Array, "#B G"], kv_segment_ids: Int[Array, "B S"]
) -> Float[Array, "B S"]:
  """Spreads one bias per segment over its keys; ids outside `0 ... G - 1` get none."""
  known = (kv_segment_ids >= 0) & (kv_segment_ids < values.shape[1])
  ids = jnp.where(known, kv_segment_ids, 0)
  values = jnp.broadcast_to(values, (ids.shape[0], values.shape[1]))
  return jnp.where(known, jnp.take_along_axis(values, ids, axis=1), 0)
