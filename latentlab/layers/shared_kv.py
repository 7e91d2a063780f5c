"""Keys and values that a decoder projects once, for all layers of its second half to read.

YOCO (https://arxiv.org/abs/2405.05254), equation 2: the output of the self-decoder, behind a norm
of its own, is projected to the keys and values of every layer of the cross-decoder. They are the
one cache that grows with the length.
"""

import dataclasses
from typing import Any

from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers.cache import KVCache
from latentlab.layers.common import Context, Shared, heads_projection, mesh_spec
from latentlab.layers.norms import NORMS, residual_norm
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, Bool, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True)
class SharedKVConfig:
  """What is projected.

  Attributes:
    num_kv_heads: Value heads `K`.
    head_dim: Key head size `H`.
    value_head_dim: Value head size `V`; `H` if `None`.
    keys_per_value: Keys of each value head: two where the maps of differential attention differ.
    positions: Rotation of the keys, once and for all layers, which turn their queries alike.
    norm: Norm before the projections; `none` for none.
  """

  num_kv_heads: int
  head_dim: int
  value_head_dim: int | None = None
  keys_per_value: int = 1
  positions: PositionConfig = PositionConfig()
  norm: str = "rms"

  def __post_init__(self):
    if self.norm not in (*NORMS, "none"):
      raise ValueError(f"unknown norm {self.norm!r}; choose one of {(*NORMS, 'none')}")
    if min(self.num_kv_heads, self.head_dim, self.value_dim, self.keys_per_value) < 1:
      raise ValueError(f"sizes of {self} must be positive")

  @property
  def value_dim(self) -> int:
    return self.head_dim if self.value_head_dim is None else self.value_head_dim

  @property
  def key_dim(self) -> int:
    """Features of the keys that stand beside a value head."""
    return self.keys_per_value * self.head_dim

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> KVCache:
    heads = (self.num_kv_heads, self.key_dim, self.value_dim)
    return KVCache.empty(batch_size, max_length, *heads, dtype)

  def flops_per_token(self, embed_dim: int) -> float:
    return 2 * embed_dim * self.num_kv_heads * (self.key_dim + self.value_dim)


@struct.dataclass
class SharedKV:
  """What layers read.

  Attributes:
    k: Keys.
    v: Values.
    positions: Of the keys.
    segment_ids: Documents of the keys.
    valid: False where there is no key; `None` where causality hides such places anyway.
    overflowed: Rows whose cache was given more tokens than there are slots.
    gathered: Keys, values and their documents of all devices of a sequence, gathered once
      (`ops.gather_sequence`); `None` where no mesh splits it.
    in_place: Whether keys are the tokens of this pass, with positions that ascend by one along each
      document.
    slots: Whether the position of a key is its place.
  """

  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K V"]
  positions: Int[Array, "#B S"]
  segment_ids: Int[Array, "B S"] | None = None
  valid: Bool[Array, "B S"] | None = None
  overflowed: Bool[Array, " B"] | None = None
  gathered: Any = None
  in_place: bool = struct.field(pytree_node=False, default=False)
  slots: bool = struct.field(pytree_node=False, default=False)


class SharedKVProjection(nn.Module):
  """Makes keys and values of hidden vectors, and keeps them.

  Attributes:
    config: What is projected.
    shared: What it shares with the layers.
  """

  config: SharedKVConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: KVCache | None
  ) -> tuple[SharedKV, KVCache | None]:
    c = self.config
    if c.norm != "none":
      x = residual_norm(c.norm, self.shared, name="norm")(x)

    def heads(name, count, dim, role="mixer_in"):
      options = dict(heads_axis="kv_heads", role=role, name=name)
      return heads_projection(self.shared, count, dim, **options)(x)

    k = heads("k_proj", c.num_kv_heads * c.keys_per_value, c.head_dim)
    k = c.positions.rotate_keys(k * c.head_dim**-0.5, context.positions)
    k = k.reshape(*k.shape[:2], c.num_kv_heads, c.key_dim)
    v = heads("v_proj", c.num_kv_heads, c.value_dim, role="mixer_value")
    overflowed = None
    if cache is not None:
      cache = cache.append(k, v, context.positions, context.lengths, in_place=context.in_place)
      overflowed = cache.overflowed
      if not context.among_themselves:
        return SharedKV(
          cache.k,
          cache.v,
          cache.positions,
          valid=cache.valid,
          overflowed=overflowed,
          slots=context.in_place and cache.in_place,
        ), cache
    spec, gathered = mesh_spec("act_batch", "act_length", "act_kv_heads", None), None
    if cache is None and context.in_place and spec is not None and spec[1]:
      gathered = ops.gather_sequence(k, v, context.segment_ids, spec=spec)
    return SharedKV(
      k,
      v,
      context.positions,
      segment_ids=context.segment_ids,
      valid=None if context.in_place else context.valid,
      overflowed=overflowed,
      gathered=gathered,
      in_place=context.in_place,
      slots=context.in_place and context.segment_ids is None,
    ), cache
