"""Differential attention: the difference of two softmax maps (https://arxiv.org/abs/2410.05258).

Section 2, equations 1 to 3, and the successor that its authors call V2 (token-wise lambda, no
headwise norm): see `DiffAttentionConfig`. Lambda is float32 throughout.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers.attention import (
  Seen,
  attend,
  attention_cache,
  check_attention,
  keys_seen,
  own_keys,
  shared_keys,
)
from latentlab.layers.cache import Cache
from latentlab.layers.common import (
  Context,
  Projection,
  Shared,
  mesh_spec,
  output_projection,
  wanted,
)
from latentlab.layers.norms import HeadNorm, HeadScale
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float, Int

LAMBDA_MODES = ("reparam", "constant", "token")
KEY_PAIRINGS = ("distinct", "shared")
HEAD_LAYOUTS = ("neighbour", "halves")


def lambda_schedule(layer: Int[Array, ""] | int) -> Float[Array, ""]:
  """`lambda_init` of a layer, counted from 0: `0.8 - 0.6 exp(-0.3 layer)` (section 2.1)."""
  return 0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer, jnp.float32))


@dataclasses.dataclass(frozen=True)
class DiffAttentionConfig:
  """Differential attention as a token mixer.

  Attributes:
    num_heads: Heads `N`, each of two maps; half of a Transformer's.
    head_dim: Query and key head size `H` of a map.
    num_kv_heads: Key and value heads `K`; `N` if `None`.
    value_head_dim: Value head size `V`; `2 H` if `None`. V2 has `H`.
    positions: Position scheme, of both maps.
    mask: Which keys a query sees by position, in both maps.
    lambda_mode: `reparam` (equation 2), `constant` (`lambda_init`, not learned), or `token` (V2: a
      sigmoid of the token's own vector, per head).
    lambda_init: The same for all layers; the schedule over depth if `None`.
    lambda_std: Standard deviation that the vectors of `reparam` begin with.
    key_pairing: Whether the maps of a head have `distinct` keys, or one key is `shared` (V2).
    head_norm: Whether an RMS norm of each head follows (equation 3), with the factor
      `1 - lambda_init`.
    head_norm_affine: Whether it has a scale, as the original release and not the paper.
    head_norm_eps: Its epsilon.
    head_layout: Which projected heads are a pair: `neighbour` (2i, 2i+1) as the original release,
      or `halves` (i, i + N) as in transformers' DiffLlama, whose values are halved likewise.
    shared_kv: See `AttentionConfig`.
    logit_bits: See there.
    implementation: Implementation of the op; the platform's default if `None`.
  """

  kind: ClassVar[str] = "diff_attention"

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None
  value_head_dim: int | None = None
  positions: PositionConfig = PositionConfig()
  mask: ops.Mask = ops.Mask("causal")
  lambda_mode: str = "reparam"
  lambda_init: float | None = None
  lambda_std: float = 0.1
  key_pairing: str = "distinct"
  head_norm: bool = True
  head_norm_affine: bool = True
  head_norm_eps: float = 1e-5
  head_layout: str = "neighbour"
  shared_kv: bool = False
  logit_bits: int | None = None
  implementation: str | None = None

  def __post_init__(self):
    check_attention(self)
    for field, choices in (
      ("lambda_mode", LAMBDA_MODES),
      ("key_pairing", KEY_PAIRINGS),
      ("head_layout", HEAD_LAYOUTS),
    ):
      if getattr(self, field) not in choices:
        raise ValueError(f"unknown {field}={getattr(self, field)!r}; choose one of {choices}")
    if self.lambda_mode == "token" and (self.head_norm or self.lambda_init is not None):
      raise ValueError(
        f"lambda_mode='token' has no lambda_init={self.lambda_init}, nor the norm of "
        f"head_norm={self.head_norm} that a factor 1 - lambda_init follows: set None and False"
      )
    if self.head_layout == "halves" and (self.value_dim % 2 or self.shared_kv):
      raise ValueError(
        f"head_layout='halves' joins a value of two halves, of value_head_dim={self.value_dim}, "
        f"which shared_kv={self.shared_kv} has as neighbours: choose 'neighbour'"
      )
    if self.lambda_std < 0:
      raise ValueError(f"{self.lambda_std=} must not be negative")

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def value_dim(self) -> int:
    return 2 * self.head_dim if self.value_head_dim is None else self.value_head_dim

  @property
  def keys_per_value(self) -> int:
    return 2 if self.key_pairing == "distinct" else 1

  @property
  def shared_sizes(self) -> tuple[int, int, int]:
    return self.kv_heads, self.keys_per_value * self.head_dim, self.value_dim

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return DiffAttention(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> Cache:
    """Keys of both maps lie side by side: `4 H K` numbers a token."""
    return attention_cache(self, batch_size, max_length, *self.shared_sizes, dtype)

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward matmul flops; the maps' products with the values are two, as kernels have them."""
    heads, kv = self.num_heads, 0 if self.shared_kv else self.kv_heads
    features = heads * (2 * self.head_dim + self.value_dim)
    features += kv * (self.keys_per_value * self.head_dim + self.value_dim)
    if self.lambda_mode == "token":
      features += heads
    maps = 2 * heads * 2 * (self.head_dim + self.value_dim)
    return 2 * embed_dim * features + maps * keys_seen(self.mask, seq_length)


class DiffAttention(nn.Module):
  """Differential attention.

  Attributes:
    config: What it computes.
    shared: What it shares with the other layers.
  """

  config: DiffAttentionConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: Cache | None = None
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    c, (batch, length) = self.config, x.shape[:2]

    def turned(rotate, heads):  # B T N 2 H, rotated as heads of their own.
      flat = rotate(heads.reshape(batch, length, -1, c.head_dim), context.positions)
      return flat.reshape(heads.shape)

    q = turned(c.positions.rotate_queries, self._pairs("q_proj", c.num_heads, c.head_dim)(x))
    q = nn.with_logical_constraint(q, ("act_batch", "act_length", "act_heads", None, None))
    if c.shared_kv:
      seen = shared_keys(context)
    else:
      if c.key_pairing == "distinct":
        k = self._pairs("k_proj", c.kv_heads, c.head_dim, axis="kv_heads")(x)
      else:
        k = self._heads("k_proj", (c.kv_heads, c.head_dim), "kv_heads")(x)
      k = turned(c.positions.rotate_keys, k * c.head_dim**-0.5)
      v = self._values(x)
      seen, cache = own_keys(k.reshape(batch, length, c.kv_heads, -1), v, c.mask, context, cache)

    lam, lambda_init = self._lambda(x, context.layer)
    if c.logit_bits is not None or wanted(self, "maps"):
      out = self._normed(self._by_maps(q, seen, context, lam), lambda_init)
    elif self._fuses(seen, context):
      out = self._fused(q, seen, context, lam, lambda_init)
    else:
      out = self._normed(self._two_calls(q, seen, context, lam), lambda_init)
    out = nn.with_logical_constraint(
      seen.checked(out).astype(self.shared.dtype), ("act_batch", "act_length", "act_heads", None)
    )
    return output_projection(self.shared)(out), cache

  def _heads(self, name, features, axis, role="mixer_in"):
    axes = ("embed", axis, "head_dim")
    return Projection(features, axes, getattr(self.shared.init, role), self.shared.dtype, name=name)

  def _pairs(self, name, heads, dim, *, axis="heads", role="mixer_in"):
    """A projection to `B T heads 2 dim`, whatever the layout of its kernel."""
    halves = self.config.head_layout == "halves"
    sizes, names = ((2, heads), (None, axis)) if halves else ((heads, 2), (axis, None))
    axes, init = ("embed", *names, "head_dim"), getattr(self.shared.init, role)
    project = Projection((*sizes, dim), axes, init, self.shared.dtype, name=name)
    return lambda x: project(x).swapaxes(2, 3) if halves else project(x)

  def _values(self, x):
    c = self.config
    if c.head_layout == "neighbour":
      return self._heads("v_proj", (c.kv_heads, c.value_dim), "kv_heads", "mixer_value")(x)
    dim = c.value_dim // 2
    v = self._pairs("v_proj", c.kv_heads, dim, axis="kv_heads", role="mixer_value")(x)
    return v.reshape(*v.shape[:3], -1)

  def _lambda(self, x, layer):
    """Lambda, of all or per token and head, and lambda_init, which `token` has not."""
    c = self.config
    if c.lambda_mode == "token":
      init, axes = self.shared.init.mixer_in, ("embed", "heads")
      logits = Projection((c.num_heads,), axes, init, jnp.float32, name="lambda_proj")(x)
      return jax.nn.sigmoid(logits), None
    lambda_init = lambda_schedule(layer) if c.lambda_init is None else jnp.float32(c.lambda_init)
    if c.lambda_mode == "constant":
      return lambda_init, lambda_init
    init = nn.with_logical_partitioning(nn.initializers.normal(c.lambda_std), ("head_dim",))
    q1, k1, q2, k2 = (
      self.param(f"lambda_{name}", init, (c.head_dim,)) for name in ("q1", "k1", "q2", "k2")
    )
    return jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + lambda_init, lambda_init

  def _gain(self):
    c = self.config
    if not c.head_norm_affine:
      return jnp.ones((c.value_dim,), jnp.float32)
    return HeadScale(c.value_dim, name="head_norm")()

  def _fuses(self, seen: Seen, context: Context) -> bool:
    """Whether the op knows all that decides which keys are seen, by places alone."""
    c = self.config
    plain = context.allowed is None and context.key_bias is None
    plain = plain and c.positions.kind != "alibi" and c.positions.decay(c.head_dim) is None
    masked = c.mask.kind in ("causal", "sliding_window") and seen.in_place
    return plain and not seen.windowed and (masked or (c.mask.kind == "causal" and seen.slots))

  def _fused(self, q, seen, context, lam, lambda_init):
    c = self.config
    norm = {}
    if c.head_norm:  # lambda_init may depend on a layer that is known to a scan alone.
      norm = dict(gain=self._gain() * (1 - lambda_init), eps=c.head_norm_eps)
    options = norm | dict(implementation=c.implementation)
    options["spec"] = mesh_spec("act_batch", "act_length", "act_heads", None)
    if seen.gathered is not None:
      k, v, kv_segment_ids = seen.gathered
      k = ops.Gathered(_maps_apart(k.copies, c))
      documents = dict(segment_ids=seen.segment_ids, kv_segment_ids=kv_segment_ids)
      return ops.diff_attention(q, k, v, lam, **documents, **options)
    k, v = _maps_apart(seen.k.astype(q.dtype), c), seen.v.astype(q.dtype)
    if seen.in_place:  # Of keys whose places are known when the call is traced.
      documents = dict(segment_ids=seen.segment_ids, kv_segment_ids=seen.kv_segment_ids)
      return ops.diff_attention(q, k, v, lam, window=c.mask.size, **documents, **options)
    first = jnp.broadcast_to(context.positions[:, 0], q.shape[:1])
    if q.shape[1] == 1:
      lam = lam[:, 0] if lam.ndim else lam
      return ops.diff_attention_decode(q[:, 0], k, v, lam, lengths=first + 1, **options)[:, None]
    return ops.diff_attention(q, k, v, lam, q_offset=first, **options)

  def _biases(self) -> dict[str, Any]:
    """Of both maps, the first ones of all heads before the second ones."""
    c = self.config
    slopes = None
    if c.positions.kind == "alibi":
      slopes = jnp.tile(ops.alibi_slopes(c.num_heads), 2)
    return dict(decay=c.positions.decay(c.head_dim), slopes=slopes)

  def _maps_as_heads(self, q, seen):
    c = self.config
    k = _maps_apart(seen.k, c)
    k = k if k.ndim == 5 else jnp.stack([k, k], axis=3)
    merge = lambda x: x.swapaxes(2, 3).reshape(*x.shape[:2], -1, c.head_dim)
    return merge(q), dataclasses.replace(seen, k=merge(k), gathered=None)

  def _two_calls(self, q, seen, context, lam):
    """Both maps as heads of one attention, for what only that knows; subtracted in float32."""
    q, seen = self._maps_as_heads(q.astype(jnp.float32), seen)
    seen = dataclasses.replace(seen, v=jnp.concatenate([seen.v, seen.v], axis=2))
    out = attend(q, seen, context, self.config.mask, self._biases())
    first, second = jnp.split(out, 2, axis=2)
    return first - lam[..., None] * second

  def _by_maps(self, q, seen, context, lam):
    c = self.config
    q, seen = self._maps_as_heads(q.astype(jnp.float32), seen)
    options = dict(allowed=context.allowed, key_bias=context.key_bias, mask=c.mask)
    options |= seen.conditions | self._biases() | dict(logit_bits=c.logit_bits)
    maps = ops.attention_maps(q, seen.k.astype(q.dtype), **options)
    first, second = jnp.split(maps.weights, 2, axis=1)
    by_head = lam.swapaxes(1, 2)[..., None] if lam.ndim else lam
    maps = maps._replace(weights=first - by_head * second)
    self.sow("maps", "maps", maps)
    v = jnp.repeat(seen.v, c.num_heads // c.kv_heads, axis=2)
    return jnp.einsum("BNTS,BSNV->BTNV", maps.weights, v.astype(jnp.float32))

  def _normed(self, out, lambda_init):
    c = self.config
    if not c.head_norm:
      return out
    out = HeadNorm("rms", c.head_norm_eps)(out)
    return out * (self._gain() * (1 - lambda_init))


def _maps_apart(
  k: Float[Array, "*lead K H2"], config: DiffAttentionConfig
) -> Float[Array, "*lead K 2 H"] | Float[Array, "*lead K H"]:
  """Keys as a cache holds them, as the op takes them."""
  if config.key_pairing == "shared":
    return k
  return k.reshape(*k.shape[:-1], 2, config.head_dim)
