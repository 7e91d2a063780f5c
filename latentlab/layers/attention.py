"""Multi-head softmax attention with shared key/value heads, any mask, and a key/value cache."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers.cache import EMPTY, KVCache, RingCache
from latentlab.layers.common import (
  Context,
  Shared,
  heads_projection,
  mesh_spec,
  output_projection,
)
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """Softmax attention as a token mixer.

  Attributes:
    num_heads: Query heads `N`.
    head_dim: Query and key head size `H`.
    num_kv_heads: Key and value heads `K`; `N` if `None`.
    positions: Position scheme.
    mask: Which keys a query sees by position.
  """

  kind: ClassVar[str] = "attention"

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None
  positions: PositionConfig = PositionConfig()
  mask: ops.Mask = ops.Mask("causal")

  def __post_init__(self):
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
      )

  @property
  def kv_heads(self) -> int:
    return self.num_kv_heads or self.num_heads

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return Attention(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> KVCache:
    sizes = (batch_size, max_length, self.kv_heads, self.head_dim, self.head_dim, dtype)
    if self.mask.reach is None:
      return KVCache.empty(*sizes)
    return RingCache.empty(*sizes, mask=self.mask)

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward matmul flops; a causal query sees half of the keys on average."""
    projections = 2 * embed_dim * self.head_dim * 2 * (self.num_heads + self.kv_heads)
    seen = seq_length / 2
    if self.mask.kind == "sliding_window":
      seen = min(seen, self.mask.size)
    elif self.mask.kind == "blockwise_causal":
      seen = min(seen, 1.5 * self.mask.size)
    return projections + 4 * seen * self.num_heads * self.head_dim


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
    self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None = None
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    c = self.config
    q = heads_projection(self.shared, c.num_heads, c.head_dim, name="q_proj")(x)
    k, v = (
      heads_projection(
        self.shared, c.kv_heads, c.head_dim, heads_axis="kv_heads", role=role, name=name
      )(x)
      for name, role in (("k_proj", "mixer_in"), ("v_proj", "mixer_value"))
    )
    q, k = c.positions.rotate(q, k * c.head_dim**-0.5, context.positions)
    q = nn.with_logical_constraint(q, ("act_batch", "act_length", "act_heads", None))
    # With the length sharded, queries stay where they are and every device gathers the keys.
    whole = ("act_batch", None, "act_kv_heads", None)
    k, v = nn.with_logical_constraint(k, whole), nn.with_logical_constraint(v, whole)

    positions = context.positions
    biases = dict(decay=c.positions.decay(c.head_dim))
    biases["slopes"] = ops.alibi_slopes(c.num_heads) if c.positions.kind == "alibi" else None
    if cache is None and context.in_place and self.is_mutable_collection("intermediates"):
      pairs = dict(mask=c.mask, segment_ids=context.segment_ids, valid=context.valid)
      self.sow("intermediates", "distances", ops.scores_by_distance(q, k, **pairs, **biases))
    # The first tokens of rows attend among themselves, whatever slots the cache gives them.
    fresh = context.fresh and context.in_place
    fresh = fresh and context.allowed is None and context.key_bias is None
    if isinstance(cache, RingCache) and not fresh:
      out, cache = _attend_ring(q, k, v, context, cache, biases)
    else:
      if cache is None or fresh:
        # Places tell a mask, and the masks of documents' own blocks, all that it asks for.
        positions = None if context.in_place else positions
        keys = dict(kv_positions=positions, kv_segment_ids=context.segment_ids)
        # Where places ascend, padding lies behind every token, and a causal mask hides it anyway.
        hidden = context.in_place and c.mask.kind != "full"
        keys["kv_valid"] = None if hidden else context.valid
        if cache is not None:
          cache = cache.append(k, v, context.positions, context.lengths)
      else:
        cache = cache.append(k, v, positions, context.lengths)
        k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
        keys = dict(kv_positions=cache.positions, kv_valid=cache.valid)
      out = ops.attention(
        q,
        k,
        v,
        mask=c.mask,
        positions=positions,
        segment_ids=context.segment_ids,
        allowed=context.allowed,
        key_bias=context.key_bias,
        spec=mesh_spec("act_batch", "act_length", "act_heads", None),
        **keys,
        **biases,
      )
    if cache is not None:
      # Shapes cannot say that a row is full, and a token dropped in silence would go unnoticed.
      out = jnp.where(cache.overflowed[:, None, None, None], jnp.nan, out)
    out = nn.with_logical_constraint(
      out.astype(self.shared.dtype), ("act_batch", "act_length", "act_heads", None)
    )
    return output_projection(self.shared)(out), cache


def _attend_ring(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  context: Context,
  cache: RingCache,
  biases: dict[str, Any],
) -> tuple[Float[Array, "B T N H"], RingCache]:
  """Attention over the tokens of this pass and those that the cache holds, and the cache after.

  Raises:
    ValueError: the context names keys by their slots, which others take over.
  """
  for name in ("allowed", "key_bias"):
    if getattr(context, name) is not None:
      raise ValueError(
        f"slots of a cache under {cache.mask} are used again, so that {name} names no key; "
        "decode with mask='causal'"
      )
  positions, after = context.positions, cache.append(k, v, context.positions, context.lengths)
  attend, keys = ops.attention, (after.k, after.v, after.positions)
  if q.shape[1] > 1:
    # Early tokens of a pass see keys whose slots its later ones take.
    own = positions if context.valid is None else jnp.where(context.valid, positions, EMPTY)
    keys = [jnp.concatenate(x, axis=1) for x in zip(cache.unrolled(), (k, v, own), strict=True)]
    attend = ops.windowed_attention
  k, v, where = keys
  return attend(
    q,
    k.astype(q.dtype),
    v.astype(q.dtype),
    mask=cache.mask,
    positions=positions,
    kv_positions=where,
    kv_valid=where != EMPTY,
    **biases,
  ), after
