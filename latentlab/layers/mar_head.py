"""The diffusion head of MAR (https://arxiv.org/abs/2406.11838), as a head to compare with.

A perceptron of its own width, with LayerNorm and two-layer SiLU branches under AdaLN-Zero, that
predicts the noise and, beside it, a variance between the two that DDPM allows: learnt by the
variational bound of https://arxiv.org/abs/2102.09672, sections 3.1 and 3.2, whose first term is
here the density of the latent itself.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from latentlab import ops
from latentlab.layers.common import Projection, Shared
from latentlab.layers.diffusion_head import (
  TIME_FEATURES,
  Diffusion,
  modulation,
  solve,
  solver_times,
  time_features,
)
from latentlab.layers.latent_heads import SolverSettings, as_rows
from latentlab.typing import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class MarHeadConfig:
  """MAR's head.

  Attributes:
    depth: Layers.
    width: Of all of them.
    schedule: Kind of the noise schedule.
    num_timesteps: Of the schedule.
    num_draws: Draws of timestep and noise for each latent in training.
  """

  depth: int = 3
  width: int = 1024
  schedule: str = "cosine"
  num_timesteps: int = 1000
  num_draws: int = 4

  def __post_init__(self):
    for name in ("depth", "width", "num_draws"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} of MAR's head must be positive")
    _ = self.diffusion  # Raises where noise cannot be predicted.

  @property
  def diffusion(self) -> Diffusion:
    return Diffusion("epsilon", self.schedule, self.num_timesteps)

  def module(self, shared: Shared, dim: int, *, name: str | None = None) -> nn.Module:
    return MarHead(self, shared, dim, name=name)

  def num_params(self, embed_dim: int, dim: int) -> int:
    w = self.width
    layer = 2 * w + 2 * (w**2 + w) + 3 * (w**2 + w)
    time = TIME_FEATURES * w + w + w**2 + w
    final = 2 * (w**2 + w) + 2 * dim * (w + 1)
    return self.depth * layer + time + (dim + 1) * w + (embed_dim + 1) * w + final

  def flops_per_row(self, embed_dim: int, dim: int) -> float:
    """Matmul flops of one evaluation, those of the condition and the timestep left out."""
    del embed_dim
    w = self.width
    return 2 * (self.depth * 5 * w**2 + 2 * w**2 + 3 * w * dim)


class MarHead(nn.Module):
  """A denoiser of single latents that says its variance.

  Attributes:
    config: What it computes.
    shared: What it shares with the decoder.
    dim: Channels `Z`.
  """

  config: MarHeadConfig
  shared: Shared
  dim: int

  def setup(self):
    c, w = self.config, self.config.width
    self.inner = dataclasses.replace(self.shared, embed_dim=w)
    linear, normal = self.shared.init.mlp_linear, nn.initializers.normal(0.02)
    # Neither channels of latents nor features of time are axes that a mesh need divide.
    self.noisy_proj = BiasedProjection(w, (None, "embed"), linear, self.inner)
    self.condition_proj = BiasedProjection(w, (None, "embed"), linear, self.inner)
    self.time_in = BiasedProjection(w, (None, "mlp"), normal, self.inner)
    self.time_out = BiasedProjection(w, ("mlp", "embed"), normal, self.inner)
    self.layers = [MarLayer(self.inner) for _ in range(c.depth)]
    self.final_modulation = BiasedModulation(2, self.inner)
    zeros = nn.initializers.zeros_init()
    self.out_proj = BiasedProjection(2 * self.dim, ("embed", None), zeros, self.inner)

  def __call__(
    self,
    noisy: Float[Array, "*B Z"],
    t: Int[Array, "*B"] | Float[Array, "*B"],
    hidden: Float[Array, "*B D"],
  ) -> tuple[Float[Array, "*B Z"], Float[Array, "*B Z"]]:
    """The noise at `x^t`, and where between its bounds the log-variance lies, 0 to 1; float32."""
    return self.predict(noisy, self.condition_proj(hidden) + self.time(t))

  def time(self, t: Int[Array, "*B"] | Float[Array, "*B"]) -> Float[Array, "*B width"]:
    return self.time_out(nn.silu(self.time_in(time_features(t))))

  def predict(
    self, noisy: Float[Array, "*B Z"], condition: Float[Array, "*B width"]
  ) -> tuple[Float[Array, "*B Z"], Float[Array, "*B Z"]]:
    """As `__call__`, given the sum of condition and time embedding."""
    u, c = self.noisy_proj(as_rows(noisy)), nn.silu(as_rows(condition))
    for layer in self.layers:
      u = layer(u, c)
    shift, scale = self.final_modulation(c)
    out = self.out_proj(_layer_norm(u) * (1 + scale) + shift).astype(jnp.float32)
    noise, share = jnp.split(out.reshape(*noisy.shape[:-1], -1), 2, axis=-1)
    return noise, (share + 1) / 2

  def losses(
    self, hidden: Float[Array, "*B D"], latents: Float[Array, "*B Z"], key: Key[Array, ""]
  ) -> Float[Array, "*B"]:
    """Squared errors of the noise, and the variances' bound in bits; means over all else."""
    t_key, noise_key = jax.random.split(key)
    shape = (*latents.shape[:-1], self.config.num_draws)
    t = self.config.diffusion.timesteps(t_key, shape)
    noise = jax.random.normal(noise_key, (*shape, self.dim))
    errors, bound = self.losses_at(hidden, latents, t, noise)
    return errors + bound

  def losses_at(
    self,
    hidden: Float[Array, "*B D"],
    latents: Float[Array, "*B Z"],
    t: Int[Array, "*B draws"],
    noise: Float[Array, "*B draws Z"],
  ) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """Both terms of `losses`, at timesteps and noises of the caller's."""
    latents = jnp.broadcast_to(latents.astype(jnp.float32)[..., None, :], noise.shape)
    noisy, _, _ = self.config.diffusion.noisy(latents, noise, t)
    condition = self.condition_proj(hidden)[..., None, :] + self.time(t)
    predicted, share = self.predict(noisy, condition)
    errors = jnp.square(predicted - noise).mean((-1, -2))
    # The bound teaches the variance alone.
    bound = self._bound(latents, noise, jax.lax.stop_gradient(predicted), share, t)
    return errors, bound.mean((-1, -2))

  def _bound(self, latents, noise, predicted, share, t):
    """`KL(q(x^{t-1} | x^t, x) || p)` of each channel, in bits; at the first one, `-log2 p(x)`."""
    table = {n: jnp.asarray(x, jnp.float32)[t][..., None] for n, x in self._posterior.items()}
    log_variance = table["small"] + share * (table["large"] - table["small"])
    # Means differ by the noise's error alone; theirs are linear in the latent.
    off = table["of_noise"] * (predicted - noise)
    divergence = 0.5 * (
      log_variance
      - table["small"]
      - 1
      + jnp.exp(table["small"] - log_variance)
      + off**2 * jnp.exp(-log_variance)
    )
    density = 0.5 * (math.log(2 * math.pi) + log_variance + off**2 * jnp.exp(-log_variance))
    return jnp.where((t == 0)[..., None], density, divergence) / math.log(2)

  @property
  def _posterior(self) -> dict[str, Float[np.ndarray, "steps"]]:
    """Of each timestep: log-variances of both bounds, and what the mean has of the noise."""
    alpha, sigma = self.config.diffusion.levels.tables
    before_alpha, before_sigma = np.append(1.0, alpha[:-1]), np.append(0.0, sigma[:-1])
    beta = sigma**2 - (alpha / before_alpha) ** 2 * before_sigma**2
    small = beta * before_sigma**2 / sigma**2
    # The first step's is 0, whose logarithm would be without bounds: the second's stands for it.
    small[0] = small[1]
    of_noise = before_alpha * beta / (sigma * alpha)
    return dict(small=np.log(small), large=np.log(beta), of_noise=of_noise)

  def draw(
    self,
    hidden: Float[Array, "B D"],
    null_hidden: Float[Array, "B D"] | None,
    keys: Key[Array, " B"],
    settings: SolverSettings,
    progress: Float[Array, " B"] | None = None,
  ) -> Float[Array, "B Z"]:
    """As `DiffusionHead.draw`; the variance said is that of `settings.solver="ancestral"`.

    That solver draws each step with the conditional model's variance, times the temperature
    squared; others use the predicted noise alone.
    """
    d = self.config.diffusion
    both = hidden if null_hidden is None else jnp.concatenate([hidden, null_hidden])
    condition = self.condition_proj(both)
    scale = None if null_hidden is None else settings.scale(progress)
    head, variables = self.unbind()
    network = lambda x, time: head.apply(variables, x, condition + time, method="predict")
    times = self.time(solver_times(d, settings))
    if settings.solver != "ancestral":
      noise = lambda x, time: network(x, time)[0]
      return solve(d, noise, times, (self.dim,), keys, settings, scale)
    return self._ancestral(network, times, keys, settings, scale)

  def _ancestral(self, network, times, keys, settings, scale):
    large, small = (
      dataclasses.replace(settings, solver=name).table(self.config.diffusion.levels)
      for name in ("ancestral", "ancestral_small")
    )
    arrays = (large.alpha, large.sigma, large.on_x, large.on_clean[:, 0])
    bounds = np.stack([small.on_noise, large.on_noise], axis=1)
    bounds[-1] = 1.0  # No noise falls behind the last step.
    last = np.arange(len(bounds)) == len(bounds) - 1
    rows = (jnp.arange(len(bounds)), *(jnp.asarray(a, jnp.float32) for a in arrays))
    rows = (*rows, jnp.asarray(np.log(bounds), jnp.float32), jnp.asarray(last), times)
    starts, steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

    def normal(keys, index):
      draw = lambda key: jax.random.normal(jax.random.fold_in(key, index), (self.dim,))
      return jax.vmap(draw)(keys)

    def step(x, row):
      index, alpha, sigma, on_x, on_clean, (log_small, log_large), last, time = row
      noise, share = network(x if scale is None else jnp.concatenate([x, x]), time)
      if scale is not None:
        noise = ops.guide(*jnp.split(noise, 2), settings.scale_at(scale, sigma))
        share = share[: len(x)]
      mean = on_x * x + on_clean * ops.predicted_clean("epsilon", noise, x, alpha, sigma)
      std = settings.temperature * jnp.exp(log_small + share * (log_large - log_small))
      return jnp.where(last, mean, mean + std * normal(steps, index)), None

    x = jax.vmap(lambda key: jax.random.normal(key, (self.dim,)))(starts)
    return jax.lax.scan(step, x, rows)[0]


class MarLayer(nn.Module):
  """`u + gate * W silu(W (norm(u) (1 + scale) + shift))`, the identity at first.

  Attributes:
    shared: What it shares with the other layers.
  """

  shared: Shared

  @nn.compact
  def __call__(
    self, u: Float[Array, "B T width"], c: Float[Array, "B T width"]
  ) -> Float[Array, "B T width"]:
    s, w = self.shared, self.shared.embed_dim
    shift, scale, gate = BiasedModulation(3, s, name="modulation")(c)
    one = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
    zero = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
    gain, offset = self.param("gain", one, (w,)), self.param("offset", zero, (w,))
    y = (_layer_norm(u) * gain + offset).astype(s.dtype) * (1 + scale) + shift
    project = lambda axes, name: BiasedProjection(w, axes, s.init.mlp_linear, s, name=name)
    y = nn.silu(project(("embed", "mlp"), "in_proj")(y))
    return u + gate * project(("mlp", "embed"), "out_proj")(y)


class BiasedProjection(nn.Module):
  """A linear map with a bias, zero at first.

  Attributes:
    features: Size of its output.
    axes: Logical axes of its kernel.
    initializer: Of its kernel.
    shared: What it shares with the other layers.
  """

  features: int
  axes: tuple[str | None, str | None]
  initializer: nn.initializers.Initializer
  shared: Shared

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B features"]:
    dtype = self.shared.dtype
    y = Projection((self.features,), self.axes, self.initializer, dtype, name="proj")(x)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
    return y + self.param("bias", zeros, (self.features,)).astype(dtype)


class BiasedModulation(nn.Module):
  """Shifts, scales and gates with biases, zero at first.

  Attributes:
    count: How many vectors.
    shared: What it shares with the other layers.
  """

  count: int
  shared: Shared

  @nn.compact
  def __call__(self, c: Float[Array, "B T width"]) -> Float[Array, "count B T width"]:
    s = self.shared
    zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), (None, "mlp"))
    bias = self.param("bias", zeros, (self.count, s.embed_dim)).astype(s.dtype)
    return jnp.moveaxis(modulation(self.count, s, name="modulation")(c) + bias, -2, 0)


def _layer_norm(x: Float[Array, "*B D"], eps: float = 1e-6) -> Float[Array, "*B D"]:
  """LayerNorm without a gain; statistics in float32."""
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)
