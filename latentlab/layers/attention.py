"""Multi-head softmax attention with shared key/value heads, any mask, and a key/value cache."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers.cache import EMPTY, Cache, KVCache, RingCache
from latentlab.layers.common import (
  Context,
  Shared,
  heads_projection,
  mesh_spec,
  output_projection,
  wanted,
)
from latentlab.layers.norms import HeadNorm
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, Bool, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Softmax attention as a token mixer.

  Attributes:
    num_heads: Query heads `N`.
    head_dim: Query and key head size `H`.
    num_kv_heads: Key and value heads `K`; `N` if `None`.
    positions: Position scheme.
    mask: Which keys a query sees by position.
    shared_kv: Whether keys and values are the decoder's, which it projects once for all such
      layers; this one then has queries and an output alone.
    logit_bits: Rounds scores to so many bits, for evaluations; not at all if `None`.
    head_norm: Whether an RMS norm of each head follows, as in differential attention but for its
      factor (table 6 of https://arxiv.org/abs/2410.05258).
    head_norm_affine: Whether it has a scale.
    head_norm_eps: Its epsilon.
  """

  kind: ClassVar[str] = "attention"

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None
  positions: PositionConfig = PositionConfig()
  mask: ops.Mask = ops.Mask("causal")
  shared_kv: bool = False
  logit_bits: int | None = None
  head_norm: bool = False
  head_norm_affine: bool = True
  head_norm_eps: float = 1e-5

  def __post_init__(self):
    check_attention(self)

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def shared_sizes(self) -> tuple[int, int, int]:
    """Heads, key features and value features of the shared keys and values that it reads."""
    return self.kv_heads, self.head_dim, self.head_dim

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return Attention(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> Cache:
    sizes = (self.kv_heads, self.head_dim, self.head_dim)
    return attention_cache(self, batch_size, max_length, *sizes, dtype)

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward matmul flops; a causal query sees half of the keys on average."""
    heads = self.num_heads + (0 if self.shared_kv else self.kv_heads)
    projections = 2 * embed_dim * self.head_dim * 2 * heads
    return projections + 4 * self.num_heads * self.head_dim * keys_seen(self.mask, seq_length)


def check_attention(config: Any) -> None:
  """Raises `ValueError` where what the attentions' configurations share is bad."""
  if config.kv_heads < 1 or config.num_heads % config.kv_heads:
    raise ValueError(
      f"num_heads={config.num_heads} must be a multiple of num_kv_heads={config.num_kv_heads}"
    )
  if config.shared_kv and config.mask.kind != "causal":
    raise ValueError(
      f"mask={config.mask.kind!r} of a layer with shared_kv must be 'causal': the one cache that "
      "such layers read holds every key"
    )
  if config.logit_bits is not None and config.logit_bits < 2:
    raise ValueError(f"logit_bits={config.logit_bits} must be at least 2: one is the sign")
  if config.head_norm_eps < 0:
    raise ValueError(f"head_norm_eps={config.head_norm_eps} must not be negative")


def attention_cache(config: Any, batch_size: int, max_length: int, *sizes: Any) -> Cache:
  """An empty cache of an attention of these sizes: nothing, a ring, or a slot for each token."""
  if config.shared_kv:
    return Cache()
  if config.mask.reach is None:
    return KVCache.empty(batch_size, max_length, *sizes)
  return RingCache.empty(batch_size, max_length, *sizes, mask=config.mask)


def keys_seen(mask: ops.Mask, seq_length: int) -> float:
  """Keys that a query sees on average."""
  if mask.kind == "full":
    return seq_length
  seen = seq_length / 2
  if mask.kind == "sliding_window":
    return min(seen, mask.size)
  return min(seen, 1.5 * mask.size) if mask.kind == "blockwise_causal" else seen


@dataclasses.dataclass(frozen=True)
class Seen:
  """The keys and values that queries meet, and what decides which of them a query sees.

  Attributes:
    k: Keys.
    v: Values.
    positions: Of the queries; `None` where they and the keys are in place.
    kv_positions: Of the keys.
    segment_ids: Documents, of the queries.
    kv_segment_ids: Of the keys.
    kv_valid: False where there is no key.
    slots: Whether the keys are a cache's whose slots are their positions, below the queries'.
    windowed: Whether they are as `ops.windowed_attention` asks for.
    overflowed: Rows whose cache was given more tokens than there are slots.
    gathered: Keys, values and their documents of all devices of a sequence, gathered once; see
      `ops.gather_sequence`.
  """

  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K V"]
  positions: Int[Array, "#B T"] | None = None
  kv_positions: Int[Array, "#B S"] | None = None
  segment_ids: Int[Array, "B T"] | None = None
  kv_segment_ids: Int[Array, "B S"] | None = None
  kv_valid: Bool[Array, "B S"] | None = None
  slots: bool = False
  windowed: bool = False
  overflowed: Bool[Array, " B"] | None = None
  gathered: Any = None

  @property
  def in_place(self) -> bool:
    """Whether queries and keys are the same tokens, in place."""
    return self.positions is None and self.kv_valid is None

  @property
  def conditions(self) -> dict[str, Any]:
    """As keywords of `ops.attention`."""
    names = ("positions", "kv_positions", "segment_ids", "kv_segment_ids", "kv_valid")
    return {name: getattr(self, name) for name in names}

  def checked(self, out: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """Outputs, NaN in rows that are full.

    Shapes cannot say so, and a token dropped in silence would go unnoticed.
    """
    if self.overflowed is None:
      return out
    return jnp.where(self.overflowed.reshape(-1, *[1] * (out.ndim - 1)), jnp.nan, out)


def own_keys(
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  mask: ops.Mask,
  context: Context,
  cache: Cache | None,
) -> tuple[Seen, Cache | None]:
  """What queries see where a layer makes keys and values of its own, and the cache behind them.

  Raises:
    ValueError: the context names keys by their slots, which a ring gives to others.
  """
  # With the length sharded, the op brings the keys in place to the queries: keys that are on every
  # device already would be gathered twice. Those of a cache are.
  length = "act_length" if context.in_place else None
  axes = ("act_batch", length, "act_kv_heads", None)
  k, v = nn.with_logical_constraint(k, axes), nn.with_logical_constraint(v, axes)
  if isinstance(cache, RingCache) and not context.among_themselves:
    return _ring(k, v, context, cache)
  positions = context.positions
  if cache is not None:
    cache = cache.append(k, v, positions, context.lengths, in_place=context.in_place)
  if cache is not None and not context.among_themselves:
    return Seen(
      cache.k,
      cache.v,
      positions=positions,
      kv_positions=cache.positions,
      kv_valid=cache.valid,
      slots=context.in_place and cache.in_place,
      overflowed=cache.overflowed,
    ), cache
  # Places tell a mask, and the masks of documents' own blocks, all that it asks for.
  positions = None if context.in_place else positions
  # Where places ascend, padding lies behind every token, and a causal mask hides it anyway.
  hidden = context.in_place and mask.kind != "full"
  return Seen(
    k,
    v,
    positions=positions,
    kv_positions=positions,
    segment_ids=context.segment_ids,
    kv_segment_ids=context.segment_ids,
    kv_valid=None if hidden else context.valid,
    overflowed=None if cache is None else cache.overflowed,
  ), cache


def shared_keys(context: Context) -> Seen:
  """What queries see where keys and values are the decoder's.

  Raises:
    ValueError: it has none.
  """
  kv = context.shared
  if kv is None:
    raise ValueError("a layer with shared_kv needs DecoderConfig.shared_kv, and to stand behind it")
  in_place = kv.in_place and context.in_place
  return Seen(
    kv.k,
    kv.v,
    positions=None if in_place else context.positions,
    kv_positions=None if in_place else kv.positions,
    segment_ids=context.segment_ids,
    kv_segment_ids=kv.segment_ids,
    kv_valid=kv.valid,
    slots=kv.slots and (context.in_place or context.positions.shape[1] == 1),
    overflowed=kv.overflowed,
    gathered=kv.gathered if in_place else None,
  )


def _ring(
  k: Float[Array, "B T K H"], v: Float[Array, "B T K V"], context: Context, cache: RingCache
) -> tuple[Seen, RingCache]:
  for name in ("allowed", "key_bias"):
    if getattr(context, name) is not None:
      raise ValueError(
        f"slots of a cache under {cache.mask} are used again, so that {name} names no key; "
        "decode with mask='causal'"
      )
  positions = context.positions
  after = cache.append(k, v, positions, context.lengths, in_place=context.in_place)
  keys = (after.k, after.v, after.positions)
  windowed = k.shape[1] > 1
  if windowed:
    # Early tokens of a pass see keys whose slots its later ones take.
    own = positions if context.valid is None else jnp.where(context.valid, positions, EMPTY)
    keys = [jnp.concatenate(x, axis=1) for x in zip(cache.unrolled(), (k, v, own), strict=True)]
  k, v, where = keys
  return Seen(
    k,
    v,
    positions=positions,
    kv_positions=where,
    kv_valid=where != EMPTY,
    windowed=windowed,
    overflowed=after.overflowed,
  ), after


def attend(
  q: Float[Array, "B T N H"],
  seen: Seen,
  context: Context,
  mask: ops.Mask,
  biases: dict[str, Any],
) -> Float[Array, "B T N V"]:
  """Softmax attention of queries over what they see."""
  k, v = seen.k.astype(q.dtype), seen.v.astype(q.dtype)
  options = seen.conditions | dict(mask=mask) | biases
  spec = mesh_spec("act_batch", "act_length", "act_heads", None)
  others = (*biases.values(), context.allowed, context.key_bias)
  if seen.gathered is not None and all(x is None for x in others):
    k, v, kv_segment_ids = seen.gathered
    documents = dict(segment_ids=seen.segment_ids, kv_segment_ids=kv_segment_ids)
    return ops.flash_attention(q, k, v, **documents, spec=spec)
  if seen.windowed:
    for name in ("segment_ids", "kv_segment_ids"):
      assert options.pop(name) is None, name  # Packed documents have no cache.
    return ops.windowed_attention(q, k, v, **options)
  return ops.attention(
    q,
    k,
    v,
    allowed=context.allowed,
    key_bias=context.key_bias,
    spec=spec,
    **options,
  )


class Attention(nn.Module):
  """Softmax attention.

  Attributes:
    config: What it computes.
    shared: What it shares with the other layers.
  """

  config: AttentionConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: Cache | None = None
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    c = self.config
    q = heads_projection(self.shared, c.num_heads, c.head_dim, name="q_proj")(x)
    q = c.positions.rotate_queries(q, context.positions)
    q = nn.with_logical_constraint(q, ("act_batch", "act_length", "act_heads", None))
    biases = dict(decay=c.positions.decay(c.head_dim))
    biases["slopes"] = ops.alibi_slopes(c.num_heads) if c.positions.kind == "alibi" else None
    if c.shared_kv:
      seen = shared_keys(context)
    else:
      k, v = (
        heads_projection(
          self.shared, c.kv_heads, c.head_dim, heads_axis="kv_heads", role=role, name=name
        )(x)
        for name, role in (("k_proj", "mixer_in"), ("v_proj", "mixer_value"))
      )
      k = c.positions.rotate_keys(k * c.head_dim**-0.5, context.positions)
      if cache is None and context.in_place and wanted(self, "intermediates"):
        pairs = dict(mask=c.mask, segment_ids=context.segment_ids, valid=context.valid)
        self.sow("intermediates", "distances", ops.scores_by_distance(q, k, **pairs, **biases))
      seen, cache = own_keys(k, v, c.mask, context, cache)
    if c.logit_bits is not None or wanted(self, "maps"):
      out = self._by_maps(q, seen, context, biases)
    else:
      out = attend(q, seen, context, c.mask, biases)
    if c.head_norm:
      out = HeadNorm("rms", c.head_norm_eps, c.head_norm_affine, name="head_norm")(out)
    out = nn.with_logical_constraint(
      seen.checked(out).astype(self.shared.dtype), ("act_batch", "act_length", "act_heads", None)
    )
    return output_projection(self.shared)(out), cache

  def _by_maps(self, q, seen, context, biases):
    options = dict(allowed=context.allowed, key_bias=context.key_bias, mask=self.config.mask)
    options |= seen.conditions | biases | dict(logit_bits=self.config.logit_bits)
    maps = ops.attention_maps(q, seen.k.astype(q.dtype), **options)
    self.sow("maps", "maps", maps)
    v = jnp.repeat(seen.v, q.shape[2] // seen.v.shape[2], axis=2)
    return jnp.einsum("BNTS,BSNV->BTNV", maps.weights, v.astype(maps.weights.dtype))
