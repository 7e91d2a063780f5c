"""Multi-scale retention (RetNet, arXiv 2307.08621, section 2; equations 5 to 8)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers.cache import RetentionState
from latentlab.layers.common import Context, Shared, heads_projection, mesh_spec, output_projection
from latentlab.layers.norms import HEAD_NORMS, HeadNorm
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float

NORMALIZATIONS = ("none", "decay", "paper")
DECAYS = ("pow2", "linspace", "one", "const")


@dataclasses.dataclass(frozen=True)
class RetentionConfig:
  """Retention as a token mixer.

  Attributes:
    num_heads: Heads `N`, each with its own decay.
    head_dim: Query and key head size `H`.
    value_head_dim: Value head size `V` (the paper: `2 H`).
    positions: Rotation; RetNet's has the `linspace` grid.
    decay: `pow2` (equation 8), `linspace` (the paper's experiments), `one`, or `const`.
    decay_value: The decay of `const`.
    gate: Whether `swish(x W_G)` multiplies the output.
    head_norm: One of `HEAD_NORMS`.
    head_norm_eps: Its epsilon.
    head_norm_affine: Whether it has a scale.
    normalization: Row scale before the head norm: `none`, `decay` (divide by `s_n`), or `paper`
      (all three steps of section 2.2, by the closed form `o / max(|q.z|, s_n)`).
    chunk_size: Chunk length asked of the op; its own choice if `None`.
    implementation: Implementation of the op; the platform's default if `None`.
  """

  kind: ClassVar[str] = "retention"

  num_heads: int
  head_dim: int
  value_head_dim: int
  positions: PositionConfig = PositionConfig("rope", grid="linspace")
  decay: str = "pow2"
  decay_value: float | None = None
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

  @property
  def log_decay(self) -> Float[Array, " N"]:
    return ops.log_decay_rates(self.num_heads, self.decay, value=self.decay_value)

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
    projections = 2 * embed_dim * self.num_heads * (2 * self.head_dim + wide * self.value_head_dim)
    inner = 2 * chunk * (self.head_dim + self.value_head_dim)
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
    heads = lambda name, dim: heads_projection(self.shared, c.num_heads, dim, name=name)(x)
    q, k = heads("q_proj", c.head_dim), heads("k_proj", c.head_dim)
    v = heads("v_proj", c.value_head_dim)
    q, k = c.positions.rotate(q, k * c.head_dim**-0.5, context.positions)

    out, state = self._retain(q, k, v, context, cache.state if cache is not None else None)
    z = None
    if c.normalization == "paper":
      # q.z is a retention of ones: an exact normaliser in every form, at the price of one column.
      start = cache.z[..., None] if cache is not None else None
      ones = jnp.ones_like(v[..., :1], jnp.float32)
      row_sum, z = self._retain(q, k, ones, context, start)
      z = z[..., 0]
      scale = jnp.maximum(jnp.abs(row_sum), self._decay_scale(context))
      out = out / jax.lax.stop_gradient(scale)
    elif c.normalization == "decay":
      out = out / self._decay_scale(context)

    if c.head_norm != "none":
      norm = HeadNorm(c.head_norm, c.head_norm_eps, c.head_norm_affine, name="head_norm")
      out = norm(out)
    if c.gate:
      out = nn.silu(heads("gate_proj", c.value_head_dim)) * out
    out = nn.with_logical_constraint(
      out.astype(self.shared.dtype), ("act_batch", "act_length", "act_heads", None)
    )
    out = output_projection(self.shared)(out)
    return out, None if cache is None else RetentionState(state=state, z=z)

  def _retain(self, q, k, v, context, state):
    c = self.config
    spec = mesh_spec("act_batch", "act_length", "act_heads", None)
    if q.shape[1] == 1 and state is not None and context.lengths is None:
      out, state = ops.retention_decode(q[:, 0], k[:, 0], v[:, 0], c.log_decay, state, spec=spec)
      return out[:, None], state
    return ops.retention(
      q,
      k,
      v,
      c.log_decay,
      initial_state=state,
      lengths=context.lengths,
      segment_ids=context.segment_ids,
      chunk_size=c.chunk_size,
      implementation=c.implementation,
      spec=spec,
    )

  def _decay_scale(self, context):
    return ops.decay_scale(context.positions, self.config.log_decay)[..., None]
