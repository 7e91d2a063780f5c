"""Multi-scale retention (RetNet, arXiv 2307.08621, section 2; equations 5 to 8).

With gates it is that of YOCO (arXiv 2405.05254, section 3.1, equations 4 to 8): the decay is
a token's own, `gamma = sigmoid(x w)^(1 / tau)`, a number per head.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers.cache import RetentionState
from latentlab.layers.common import (
  Context,
  Projection,
  Shared,
  heads_projection,
  mesh_spec,
  output_projection,
)
from latentlab.layers.norms import HEAD_NORMS, HeadNorm
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float

NORMALIZATIONS = ("none", "decay", "paper", "torchscale")
DECAYS = ("pow2", "linspace", "one", "const", "custom", "gated")


@dataclasses.dataclass(frozen=True)
class RetentionConfig:
  """Retention as a token mixer.

  Attributes:
    num_heads: Heads `N`, each with its own decay.
    head_dim: Query and key head size `H`.
    value_head_dim: Value head size `V` (the paper: `2 H`).
    num_kv_heads: Key and value heads `K`, each shared by `N / K` query heads; `N` if `None`. Decay
      and state stay per query head.
    positions: Rotation; RetNet's has the `linspace` grid.
    decay: `pow2` (equation 8), `linspace` (the paper's experiments), `one`, `const`, `custom`, or
      `gated` (by token).
    decay_value: The decay of `const`.
    decay_values: Those of `custom`, one a head.
    tau: Temperature of `gated`; 16 tokens halve what a gate of a half remembers.
    gate: Whether `swish(x W_G)` multiplies the output.
    head_norm: One of `HEAD_NORMS`.
    head_norm_eps: Its epsilon.
    head_norm_affine: Whether it has a scale.
    normalization: Row scale before the head norm: `none`, `decay` (divide by `s_n`), `paper` (all
      three steps of section 2.2, by the closed form `o / max(|q.z|, s_n)`), or `torchscale`, for
      parity with that release's forms, which differ: the recurrent one's scale with a cache, else
      the chunkwise one's if there is a `chunk_size`, else the parallel one's.
    chunk_size: Chunk length asked of the op; its own choice if `None`.
    implementation: Implementation of the op; the platform's default if `None`.
  """

  kind: ClassVar[str] = "retention"

  num_heads: int
  head_dim: int
  value_head_dim: int
  num_kv_heads: int | None = None
  positions: PositionConfig = PositionConfig("rope", grid="linspace")
  decay: str = "pow2"
  decay_value: float | None = None
  decay_values: tuple[float, ...] | None = None
  tau: float = 16.0
  gate: bool = True
  head_norm: str = "rms"
  head_norm_eps: float = 1e-6
  head_norm_affine: bool = False
  normalization: str = "none"
  chunk_size: int | None = None
  implementation: str | None = None

  def __post_init__(self):
    for field, choices in (
      ("decay", DECAYS),
      ("head_norm", HEAD_NORMS),
      ("normalization", NORMALIZATIONS),
    ):
      if getattr(self, field) not in choices:
        raise ValueError(f"unknown {field}={getattr(self, field)!r}; choose one of {choices}")
    if self.kv_heads < 1 or self.num_heads % self.kv_heads:
      raise ValueError(f"{self.num_heads=} is no multiple of num_kv_heads={self.num_kv_heads}")
    for field, kind in (("decay_value", "const"), ("decay_values", "custom")):
      value = getattr(self, field)
      if (value is not None) != (self.decay == kind):
        raise ValueError(f"{field}={value} belongs to decay={kind!r} alone; got {self.decay=}")
    if self.decay_values is not None and len(self.decay_values) != self.num_heads:
      raise ValueError(f"{self.decay_values=} must be as many as {self.num_heads=}")
    if self.tau <= 0:
      raise ValueError(f"{self.tau=} must be positive")
    if self.decay == "gated" and self.normalization != "none":
      raise ValueError(
        f"normalization={self.normalization!r} is of a fixed decay: decay='gated' takes 'none'"
      )

  @property
  def kv_heads(self) -> int:
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def log_decay(self) -> Float[Array, " N"]:
    """Of a fixed decay."""
    value = self.decay_values if self.decay == "custom" else self.decay_value
    return ops.log_decay_rates(self.num_heads, self.decay, value=value)

  @property
  def ends_in_kernel(self) -> bool:
    """Whether decoding's kernel does all that stands between retention and its projection."""
    plain = self.normalization == "none" and not self.head_norm_affine
    return plain and self.head_norm in ("rms", "none")

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return MultiScaleRetention(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> RetentionState:
    del max_length, dtype  # The state grows with nothing, and is float32.
    rows = (batch_size, self.num_heads, self.head_dim)
    return RetentionState(
      state=jnp.zeros((*rows, self.value_head_dim), jnp.float32),
      z=jnp.zeros(rows, jnp.float32) if self.normalization == "paper" else None,
    )

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward matmul flops of the chunkwise form (kernels: `2C(dk+dv) + 4 dk dv` a head)."""
    chunk = min(self.chunk_size or 64, seq_length)
    wide = 3 if self.gate else 2
    projections = (
      2
      * embed_dim
      * (
        self.num_heads * (self.head_dim + (wide - 1) * self.value_head_dim)
        + self.kv_heads * (self.head_dim + self.value_head_dim)
      )
    )
    inner = 2 * chunk * (self.head_dim + self.value_head_dim)
    if self.decay == "gated":
      projections += 2 * embed_dim * self.num_heads
    return projections + self.num_heads * (inner + 4 * self.head_dim * self.value_head_dim)


class MultiScaleRetention(nn.Module):
  """Retention with per-head decay, per-head norm and a swish gate.

  Attributes:
    config: What it computes.
    shared: What it shares with the other layers.
  """

  config: RetentionConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: RetentionState | None = None
  ) -> tuple[Float[Array, "B T D"], RetentionState | None]:
    c = self.config
    if context.allowed is not None or context.key_bias is not None:
      raise ValueError("retention has no score matrix: it takes no `allowed` and no `key_bias`")
    q = self._heads("q_proj", c.head_dim)(x)
    k = self._heads("k_proj", c.head_dim, shared=True)(x)
    v = self._heads("v_proj", c.value_head_dim, shared=True, role="mixer_value")(x)
    gate = self._heads("gate_proj", c.value_head_dim)(x) if c.gate else None
    q, k = c.positions.rotate(q, k * c.head_dim**-0.5, context.positions)
    log_decay = self._log_decay(x)

    one_token = cache is not None and x.shape[1] == 1 and context.lengths is None
    if one_token and c.ends_in_kernel:
      eps = c.head_norm_eps if c.head_norm == "rms" else None
      out, state = self._step(q, k, v, cache.state, log_decay, gate=gate, norm_eps=eps)
      z = None
    else:
      retain = self._step if one_token else functools.partial(self._retain, context=context)
      out, state = retain(q, k, v, None if cache is None else cache.state, log_decay)
      z = None
      if c.normalization == "paper":
        # q.z is a retention of ones: an exact normaliser in every form, for one column more.
        ones = jnp.ones_like(v[..., :1], jnp.float32)
        z = None if cache is None else cache.z[..., None]
        row_sum, z = retain(q, k, ones, z, log_decay)
        z = z[..., 0]
        scale = jnp.maximum(jnp.abs(row_sum), self._decay_scale(context))
        out = out / jax.lax.stop_gradient(scale)
      elif c.normalization == "torchscale" and cache is None:
        out = out / self._torchscale(q, k, v, context)[..., None]
      elif c.normalization != "none":
        out = out / self._decay_scale(context)
      if c.head_norm != "none":
        norm = HeadNorm(c.head_norm, c.head_norm_eps, c.head_norm_affine, name="head_norm")
        out = norm(out)
      if c.gate:
        out = nn.silu(gate) * out
    out = nn.with_logical_constraint(
      out.astype(self.shared.dtype), ("act_batch", "act_length", "act_heads", None)
    )
    out = output_projection(self.shared)(out)
    return out, None if cache is None else RetentionState(state=state, z=z)

  def _heads(self, name, dim, *, shared=False, role="mixer_in"):
    heads, axis = self.config.num_heads, "heads"
    if shared:
      heads, axis = self.config.kv_heads, "kv_heads"
    return heads_projection(self.shared, heads, dim, heads_axis=axis, role=role, name=name)

  def _log_decay(self, x):
    """Per head, or per token and head."""
    c = self.config
    if c.decay != "gated":
      return c.log_decay
    init, axes = self.shared.init.mixer_in, ("embed", "heads")
    logits = Projection((c.num_heads,), axes, init, jnp.float32, name="decay_proj")(x)
    return nn.log_sigmoid(logits) / c.tau

  def _step(self, q, k, v, state, log_decay, **end):
    token, spec = (x[:, 0] for x in (q, k, v)), _spec()
    log_decay = log_decay[:, 0] if log_decay.ndim == 3 else log_decay
    end["gate"] = end["gate"][:, 0] if end.get("gate") is not None else None
    out, state = ops.retention_decode(*token, log_decay, state, **end, spec=spec)
    return out[:, None], state

  def _retain(self, q, k, v, state, log_decay, context):
    c = self.config
    return ops.retention(
      q,
      k,
      v,
      log_decay,
      initial_state=state,
      lengths=context.lengths,
      segment_ids=context.segment_ids,
      chunk_size=c.chunk_size,
      implementation=c.implementation,
      spec=_spec(),
    )

  def _torchscale(self, q, k, v, context):
    c = self.config
    if c.chunk_size is None:
      return ops.parallel_row_scale(q, k, c.log_decay, context.segment_ids)
    if context.segment_ids is not None:
      raise ValueError(
        f"normalization='torchscale' with {c.chunk_size=} knows no packed documents: leave "
        "chunk_size out for the parallel form's scale, or choose another normalization"
      )
    return ops.chunkwise_row_scale(q, k, v, c.log_decay, c.chunk_size)

  def _decay_scale(self, context):
    return ops.decay_scale(context.positions, self.config.log_decay)[..., None]


def _spec():
  return mesh_spec("act_batch", "act_length", "act_heads", None)
