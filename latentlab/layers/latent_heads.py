"""Heads that draw a latent given a hidden vector, and what such heads have in common.

The diffusion head is in `layers.diffusion_head`. Those here are what it is compared with: one gives
the mean (a regression), one a mixture of diagonal Gaussians (GIVT,
https://arxiv.org/abs/2312.02116).
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers.common import Projection, Shared
from latentlab.layers.feed_forward import FeedForward, FeedForwardConfig, ratio_width
from latentlab.typing import Array, Float, Key


@struct.dataclass
class SolverSettings:
  """How latents are drawn.

  Attributes:
    guidance: Scale of classifier-free guidance; used where there is a null condition.
    temperature: Factor of the noise that a solver starts from, and of other heads' noise.
    solver: One of `ops.SOLVERS`.
    num_steps: Steps of the solver.
    lambda_min: Leaves out levels below this log-ratio; see `ops.sample_grid`.
    guidance_kind: `constant`, or `linear` in the share of a sequence that is drawn.
    guidance_interval: Levels, as `sigma`, at which guidance is on.
  """

  guidance: Any = 1.0
  temperature: Any = 1.0
  solver: str = struct.field(pytree_node=False, default="dpm_2m")
  num_steps: int = struct.field(pytree_node=False, default=20)
  lambda_min: float | None = struct.field(pytree_node=False, default=None)
  guidance_kind: str = struct.field(pytree_node=False, default="constant")
  guidance_interval: tuple[float, float] = struct.field(pytree_node=False, default=(0.0, 1.0))

  def __post_init__(self):
    if self.solver not in ops.SOLVERS:
      raise ValueError(f"unknown solver={self.solver!r}; choose one of {ops.SOLVERS}")
    if self.num_steps < 1:
      raise ValueError(f"num_steps={self.num_steps} of a solver must be positive")
    if self.guidance_kind not in ops.GUIDANCE_KINDS:
      raise ValueError(
        f"unknown guidance_kind={self.guidance_kind!r}; choose one of {ops.GUIDANCE_KINDS}"
      )
    low, high = self.guidance_interval
    if not 0 <= low < high <= 1:
      raise ValueError(f"guidance_interval={self.guidance_interval} must ascend within [0, 1]")

  def table(self, schedule: ops.NoiseSchedule) -> ops.SolverTable:
    return ops.solver_table(self.solver, schedule, self.num_steps, self.lambda_min)

  def scale(self, progress: Float[Array, " B"] | None) -> Float[Array, "..."]:
    """Guidance of each row; see `ops.guidance_scale`."""
    return ops.guidance_scale(self.guidance, self.guidance_kind, progress)

  def scale_at(self, scale: Float[Array, "..."], sigma: Float[Array, ""]) -> Float[Array, "..."]:
    """Guidance at a level: `scale` within the interval, 1 outside."""
    low, high = self.guidance_interval
    if (low, high) == (0.0, 1.0):
      return scale
    return jnp.where((sigma >= low) & (sigma <= high), scale, 1.0)


@runtime_checkable
class LatentHeadConfig(Protocol):
  """What a model asks of a head: any frozen dataclass with these will do."""

  def module(self, shared: Shared, dim: int, *, name: str | None = None) -> nn.Module:
    """A module with `losses(hidden, latents, key)` and `draw(hidden, null_hidden, keys, settings)`.

    Losses are means over the `dim` channels, of shape `[*B]` for hidden vectors `[*B D]`. Draws are
    `[B Z]`, float32, of a row's key alone.
    """

  def num_params(self, embed_dim: int, dim: int) -> int:
    """Parameters, given the width of hidden vectors and the latents' channels."""


@dataclasses.dataclass(frozen=True)
class RegressionHeadConfig:
  """A head that gives the mean: a residual perceptron, trained by the squared error.

  Attributes:
    depth: Residual feed-forward layers.
    mlp_ratio: Their width, by `ratio_width`.
  """

  depth: int = 3
  mlp_ratio: float = 4.0

  def __post_init__(self):
    _check_sizes(self)

  def module(self, shared: Shared, dim: int, *, name: str | None = None) -> nn.Module:
    return RegressionHead(self, shared, dim, name=name)

  def num_params(self, embed_dim: int, dim: int) -> int:
    return _trunk_params(self, embed_dim) + embed_dim * dim


@dataclasses.dataclass(frozen=True)
class MixtureHeadConfig:
  """A head that gives a mixture of Gaussians with diagonal covariances, trained by likelihood.

  Attributes:
    num_components: Gaussians.
    depth: Residual feed-forward layers.
    mlp_ratio: Their width, by `ratio_width`.
    min_std: Floor of standard deviations.
    num_candidates: Draws that guidance chooses among.
  """

  num_components: int = 16
  depth: int = 3
  mlp_ratio: float = 4.0
  min_std: float = 1e-3
  num_candidates: int = 64

  def __post_init__(self):
    _check_sizes(self)
    if self.num_components < 1 or self.num_candidates < 1 or not self.min_std > 0:
      raise ValueError(
        f"num_components={self.num_components}, num_candidates={self.num_candidates} and "
        f"min_std={self.min_std} of a mixture must be positive"
      )

  def module(self, shared: Shared, dim: int, *, name: str | None = None) -> nn.Module:
    return MixtureHead(self, shared, dim, name=name)

  def num_params(self, embed_dim: int, dim: int) -> int:
    return _trunk_params(self, embed_dim) + embed_dim * self.num_components * (1 + 2 * dim)


class RegressionHead(nn.Module):
  """The mean of a latent.

  Attributes:
    config: Its sizes.
    shared: What it shares with the decoder.
    dim: Channels `Z`.
  """

  config: RegressionHeadConfig
  shared: Shared
  dim: int

  @nn.compact
  def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B Z"]:
    u = _Trunk(self.config, self.shared, name="trunk")(hidden)
    return _zero_projection(self.dim, self.shared, name="out_proj")(u).astype(jnp.float32)

  def losses(
    self, hidden: Float[Array, "*B D"], latents: Float[Array, "*B Z"], key: Key[Array, ""]
  ) -> Float[Array, "*B"]:
    """Squared errors, means over channels."""
    del key
    return jnp.square(self(hidden) - latents.astype(jnp.float32)).mean(-1)

  def draw(
    self,
    hidden: Float[Array, "B D"],
    null_hidden: Float[Array, "B D"] | None,
    keys: Key[Array, " B"],
    settings: SolverSettings,
    progress: Float[Array, " B"] | None = None,
  ) -> Float[Array, "B Z"]:
    """The mean, guided if there is a null condition; nothing is random."""
    del keys
    if null_hidden is None:
      return self(hidden)
    both = jnp.split(self(jnp.concatenate([hidden, null_hidden])), 2)
    return ops.guide(*both, settings.scale(progress))


class MixtureHead(nn.Module):
  """A mixture of diagonal Gaussians.

  Attributes:
    config: Its sizes.
    shared: What it shares with the decoder.
    dim: Channels `Z`.
  """

  config: MixtureHeadConfig
  shared: Shared
  dim: int

  @nn.compact
  def __call__(
    self, hidden: Float[Array, "*B D"]
  ) -> tuple[
    Float[Array, "*B components"], Float[Array, "*B components Z"], Float[Array, "*B components Z"]
  ]:
    """Log-weights, means and standard deviations of the components."""
    c, s = self.config, self.shared
    u = _Trunk(c, s, name="trunk")(hidden)
    # Not zero: components that start alike stay alike.
    init, axes = s.init.mlp_linear, ("embed", None)
    project = lambda *features, name: Projection(
      features, (*axes, None)[: 1 + len(features)], init, s.dtype, name=name
    )(u).astype(jnp.float32)
    logits = project(c.num_components, name="logit_proj")
    means = project(c.num_components, self.dim, name="mean_proj")
    stds = c.min_std + nn.softplus(project(c.num_components, self.dim, name="std_proj"))
    return nn.log_softmax(logits), means, stds

  def losses(
    self, hidden: Float[Array, "*B D"], latents: Float[Array, "*B Z"], key: Key[Array, ""]
  ) -> Float[Array, "*B"]:
    """Negative log-likelihood in nats per channel."""
    del key
    return -mixture_log_prob(self(hidden), latents.astype(jnp.float32)) / self.dim

  def draw(
    self,
    hidden: Float[Array, "B D"],
    null_hidden: Float[Array, "B D"] | None,
    keys: Key[Array, " B"],
    settings: SolverSettings,
    progress: Float[Array, " B"] | None = None,
  ) -> Float[Array, "B Z"]:
    """A draw of the mixture; guided, the best weighed of several.

    Guidance asks for draws of `p(z | c)^s p(z)^(1 - s)`. Candidates of `p(z | c)` are weighed by
    `(p(z | c) / p(z))^(s - 1)` and one is drawn by its weight.
    """
    parameters = self(hidden)
    if null_hidden is None:
      candidates = self._candidates(parameters, keys, settings.temperature, 1)
      return candidates[:, 0]
    count = self.config.num_candidates
    candidates = self._candidates(parameters, keys, settings.temperature, count)
    density = jax.vmap(jax.vmap(mixture_log_prob, in_axes=(None, 0)))
    ratio = density(parameters, candidates) - density(self(null_hidden), candidates)
    scale = jnp.broadcast_to(settings.scale(progress), hidden.shape[:1])
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    chosen = jax.vmap(jax.random.categorical)(keys, (scale[:, None] - 1) * ratio)
    return jnp.take_along_axis(candidates, chosen[:, None, None], axis=1)[:, 0]

  def _candidates(self, parameters, keys, temperature, count) -> Float[Array, "B candidates Z"]:
    def row(key, log_weights, means, stds):
      pick, noise = jax.random.split(jax.random.fold_in(key, 0))
      which = jax.random.categorical(pick, log_weights, shape=(count,))
      normal = jax.random.normal(noise, (count, self.dim))
      return means[which] + temperature * stds[which] * normal

    return jax.vmap(row)(keys, *parameters)


def mixture_log_prob(
  parameters: tuple[
    Float[Array, "*B components"], Float[Array, "*B components Z"], Float[Array, "*B components Z"]
  ],
  latents: Float[Array, "*B Z"],
) -> Float[Array, "*B"]:
  """Log-density of latents, a sum over channels; parameters as `MixtureHead` gives them."""
  log_weights, means, stds = parameters
  scaled = (latents[..., None, :] - means) / stds
  terms = -0.5 * jnp.square(scaled) - jnp.log(stds) - 0.5 * jnp.log(2 * jnp.pi)
  return jax.nn.logsumexp(log_weights + terms.sum(-1), axis=-1)


class _Trunk(nn.Module):
  """Residual feed-forward layers over a hidden vector."""

  config: RegressionHeadConfig | MixtureHeadConfig
  shared: Shared

  @nn.compact
  def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    s, width = self.shared, hidden.shape[-1]
    axes = ("embed", "mlp")
    u = Projection((width,), axes, s.init.mlp_linear, s.dtype, name="condition_proj")(hidden)
    u = as_rows(u)
    feed_forward = FeedForwardConfig(ratio_width(width, self.config.mlp_ratio), "swiglu")
    for i in range(self.config.depth):
      u = u + FeedForward(feed_forward, s, name=f"layer_{i}")(rms(u))
    return rms(u).reshape(hidden.shape)


def as_rows(x: Float[Array, "*B D"]) -> Float[Array, "B T D"]:
  """As a batch of sequences, which feed-forward layers have names for the axes of."""
  batch = x.shape[0] if x.ndim > 1 else 1
  return x.reshape(batch, -1, x.shape[-1])


def rms(x: Float[Array, "*B D"], eps: float = 1e-6) -> Float[Array, "*B D"]:
  """RMS norm without a gain; statistics in float32."""
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def _zero_projection(features: int, shared: Shared, *, name: str) -> Projection:
  # Latents' few channels are no axis that a mesh need divide.
  axes, zeros = ("embed", None), nn.initializers.zeros_init()
  return Projection((features,), axes, zeros, shared.dtype, name=name)


def _trunk_params(config, embed_dim: int) -> int:
  width = ratio_width(embed_dim, config.mlp_ratio)
  return embed_dim**2 + config.depth * 3 * embed_dim * width


def _check_sizes(config) -> None:
  if config.depth < 1 or not config.mlp_ratio > 0:
    raise ValueError(
      f"depth={config.depth} and mlp_ratio={config.mlp_ratio} of a head must be positive"
    )
