"""The diffusion head of LatentLM (https://arxiv.org/abs/2412.08635, section 3.2).

A residual perceptron with AdaLN-Zero that denoises one latent by itself, given the hidden vector of
the item before it. Details are those of the original release (microsoft/unilm, `LatentLM`), whose
default prediction is the noise; here it is `v`, since an error of predicted noise is magnified a
thousandfold where a sampler starts.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from latentlab import ops
from latentlab.layers.common import Projection, Shared
from latentlab.layers.decoder import REMAT_POLICIES
from latentlab.layers.feed_forward import FeedForward, FeedForwardConfig, ratio_width
from latentlab.layers.latent_heads import SolverSettings, as_rows, rms
from latentlab.typing import Array, Float, Int, Key

_logger = logging.getLogger(__name__)

TIME_FEATURES = 256
_TIME_INIT = nn.initializers.normal(0.02)
# DDPM's linear schedule starts at 157; the cosine's 20,000 was seen to draw noise.
_MAGNIFIED = 1000


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """What a network is trained to predict, at which noise.

  Attributes:
    prediction: One of `ops.PREDICTIONS`.
    schedule: Kind of the noise schedule, one of `ops.SCHEDULES`.
    num_timesteps: Of the schedule.
    t_sampler: How timesteps are drawn in training, one of `ops.TIMESTEP_SAMPLERS`.
    t_mean: Of the normal variable of `logit_normal`.
    t_std: Of that variable.
    min_snr: Limit of the weights of https://arxiv.org/abs/2303.09556; `None` for weights of 1.
  """

  prediction: str = "v"
  schedule: str = "cosine"
  num_timesteps: int = 1000
  t_sampler: str = "uniform"
  t_mean: float = 0.0
  t_std: float = 1.0
  min_snr: float | None = None

  def __post_init__(self):
    for name, choices in (("prediction", ops.PREDICTIONS), ("t_sampler", ops.TIMESTEP_SAMPLERS)):
      if getattr(self, name) not in choices:
        raise ValueError(f"unknown {name}={getattr(self, name)!r}; choose one of {choices}")
    if self.min_snr is not None and not self.min_snr > 0:
      raise ValueError(f"min_snr={self.min_snr} must be positive, or None for weights of 1")
    if not self.t_std > 0:
      raise ValueError(f"t_std={self.t_std} must be positive")
    if self.prediction == "epsilon" and not self.levels.tables[0].min() > 0:
      raise ValueError(
        f"prediction='epsilon' says nothing where schedule={self.schedule!r} leaves nothing of a "
        "latent; predict 'flow', 'v' or 'x0'"
      )

  @functools.cached_property
  def levels(self) -> ops.NoiseSchedule:
    return ops.NoiseSchedule(self.schedule, self.num_timesteps)

  def timesteps(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Random timesteps of training."""
    return ops.sample_timesteps(
      key, shape, self.num_timesteps, self.t_sampler, mean=self.t_mean, std=self.t_std
    )

  def noisy(
    self, latents: Float[Array, "*B Z"], noise: Float[Array, "*B Z"], t: Int[Array, "*B"]
  ) -> tuple[Float[Array, "*B Z"], Float[Array, "*B Z"], Float[Array, "*B"] | None]:
    """What the network is given, what it should say, and the weights of its errors."""
    alpha, sigma = self.levels.at(t)
    noisy = ops.add_noise(latents, noise, alpha, sigma)
    target = ops.prediction_target(self.prediction, latents, noise, alpha, sigma)
    if self.min_snr is None:
      return noisy, target, None
    return noisy, target, ops.min_snr_weight(self.prediction, alpha, sigma, self.min_snr)


@dataclasses.dataclass(frozen=True)
class DiffusionHeadConfig:
  """A diffusion head.

  Attributes:
    depth: Layers.
    mlp_ratio: Width of their feed-forward, by `ratio_width`.
    mlp_dim: That width itself; overrides `mlp_ratio`.
    diffusion: What it predicts, at which noise.
    num_draws: Draws of timestep and noise for each latent in training (the paper's K).
    norm_gain: Whether the layers' norms have a gain, as VibeVoice's do.
    norm_eps: Their epsilon.
    condition_proj: Whether the hidden vector passes a linear map first.
    input_bias: Whether maps from latents, a LatentLM's into its decoder too, have a bias, as the
      release's do on images.
    remat: What the backward pass keeps of a layer, a name of `decoder.REMAT_POLICIES`.
  """

  depth: int = 3
  mlp_ratio: float = 4.0
  mlp_dim: int | None = None
  diffusion: Diffusion = Diffusion()
  num_draws: int = 4
  norm_gain: bool = False
  norm_eps: float = 1e-6
  condition_proj: bool = True
  input_bias: bool = False
  remat: str = "none"

  def __post_init__(self):
    for name in ("depth", "mlp_ratio", "num_draws", "norm_eps"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}={getattr(self, name)} of a diffusion head must be positive")
    if self.mlp_dim is not None and self.mlp_dim < 1:
      raise ValueError(f"mlp_dim={self.mlp_dim} must be positive, or None for mlp_ratio's")
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"unknown remat={self.remat!r}; choose one of {sorted(REMAT_POLICIES)}")

  def module(self, shared: Shared, dim: int, *, name: str | None = None) -> nn.Module:
    return DiffusionHead(self, shared, dim, name=name)

  def width(self, embed_dim: int) -> int:
    """Of the feed-forward layers."""
    return ratio_width(embed_dim, self.mlp_ratio) if self.mlp_dim is None else self.mlp_dim

  def num_params(self, embed_dim: int, dim: int) -> int:
    h = embed_dim
    layer = 3 * h**2 + 3 * h * self.width(h) + h * self.norm_gain
    ends = 2 * h * dim + 2 * h**2  # Latents in and out, and the last modulation.
    options = h**2 * self.condition_proj + h * self.input_bias
    return self.depth * layer + ends + TIME_FEATURES * h + h**2 + options

  def flops_per_row(self, embed_dim: int, dim: int) -> float:
    """Matmul flops of one evaluation, those of the condition and the timestep left out."""
    h = embed_dim
    return 2 * (self.depth * (3 * h**2 + 3 * h * self.width(h)) + 2 * h * dim + 2 * h**2)


class DiffusionHead(nn.Module):
  """A denoiser of single latents.

  Attributes:
    config: What it computes.
    shared: What it shares with the decoder.
    dim: Channels `Z`.
  """

  config: DiffusionHeadConfig
  shared: Shared
  dim: int

  def setup(self):
    c, s = self.config, self.shared
    h = s.embed_dim
    self.noisy_proj = LatentProjection(s, c.input_bias)
    self.time = TimeEmbedding(s)
    if c.condition_proj:
      self.condition_proj = Projection((h,), ("embed", "mlp"), s.init.mlp_linear, s.dtype)
    layer = HeadLayer
    if c.remat != "none":
      layer = nn.remat(HeadLayer, policy=REMAT_POLICIES[c.remat])
    self.layers = [layer(c, s) for _ in range(c.depth)]
    self.final = FinalLayer(s, self.dim)

  def __call__(
    self,
    noisy: Float[Array, "*B Z"],
    t: Int[Array, "*B"] | Float[Array, "*B"],
    hidden: Float[Array, "*B D"],
  ) -> Float[Array, "*B Z"]:
    """The prediction at `x^t`, float32; one timestep and one hidden vector for each latent."""
    return self.predict(noisy, self.condition(hidden) + self.time(t))

  def condition(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """What a hidden vector adds to the modulation; made once for all timesteps."""
    hidden = hidden.astype(self.shared.dtype)
    return self.condition_proj(hidden) if self.config.condition_proj else hidden

  def predict(
    self, noisy: Float[Array, "*B Z"], condition: Float[Array, "*B D"]
  ) -> Float[Array, "*B Z"]:
    """The prediction, given the sum of condition and time embedding."""
    u = self.noisy_proj(as_rows(noisy))
    c = nn.silu(as_rows(condition))
    for layer in self.layers:
      u = layer(u, c)
    return self.final(u, c).astype(jnp.float32).reshape(noisy.shape)

  def losses(
    self, hidden: Float[Array, "*B D"], latents: Float[Array, "*B Z"], key: Key[Array, ""]
  ) -> Float[Array, "*B"]:
    """Squared errors: means over channels, and over `num_draws` timesteps and noises a latent."""
    t_key, noise_key = jax.random.split(key)
    shape = (*latents.shape[:-1], self.config.num_draws)
    t = self.config.diffusion.timesteps(t_key, shape)
    noise = jax.random.normal(noise_key, (*shape, self.dim))
    return self.losses_at(hidden, latents, t, noise)

  def losses_at(
    self,
    hidden: Float[Array, "*B D"],
    latents: Float[Array, "*B Z"],
    t: Int[Array, "*B draws"],
    noise: Float[Array, "*B draws Z"],
  ) -> Float[Array, "*B"]:
    """As `losses`, at timesteps and noises of the caller's."""
    latents = latents.astype(jnp.float32)[..., None, :]
    latents = jnp.broadcast_to(latents, noise.shape)
    noisy, target, weights = self.config.diffusion.noisy(latents, noise, t)
    condition = self.condition(hidden)[..., None, :] + self.time(t)
    errors = jnp.square(self.predict(noisy, condition) - target).mean(-1)
    return (errors if weights is None else errors * weights).mean(-1)

  def draw(
    self,
    hidden: Float[Array, "B D"],
    null_hidden: Float[Array, "B D"] | None,
    keys: Key[Array, " B"],
    settings: SolverSettings,
    progress: Float[Array, " B"] | None = None,
  ) -> Float[Array, "B Z"]:
    """A latent behind each hidden vector, float32.

    Args:
      hidden: Conditions.
      null_hidden: Null conditions of guidance; `None` for the conditional model as it is, which
        costs half.
      keys: One for each row, which depends on no other row.
      settings: The solver, and the guidance.
      progress: Share of a row's latents that are drawn once this one is, for
        `settings.guidance_kind="linear"`.

    Raises:
      ValueError: the solver is not of this schedule, or guidance asks for `progress`.
    """
    d = self.config.diffusion
    both = hidden if null_hidden is None else jnp.concatenate([hidden, null_hidden])
    condition = self.condition(both)
    scale = None if null_hidden is None else settings.scale(progress)
    # A module cannot be called within jax's own loops, but a function of its parameters can.
    head, variables = self.unbind()
    network = lambda x, time: head.apply(variables, x, condition + time, method="predict")
    times = self.time(solver_times(d, settings))
    return solve(d, network, times, (self.dim,), keys, settings, scale)


def check_solver(diffusion: Diffusion | None, settings: SolverSettings) -> None:
  """Raises a `ValueError` where a solver does not fit a model; warns where it starts from errors.

  Args:
    diffusion: The model's; `None` if no solver draws from it, and any settings fit.
    settings: The solver's.
  """
  if diffusion is None:
    return
  table = settings.table(diffusion.levels)
  magnified = table.sigma[0] / table.alpha[0] if diffusion.prediction == "epsilon" else 1
  if magnified > _MAGNIFIED:
    _warn_of_first_step(f"{magnified:.0f}")


@functools.cache
def _warn_of_first_step(magnified: str) -> None:
  _logger.warning(
    "prediction='epsilon': the solver starts where an error of predicted noise is magnified %s "
    "times, and may draw noise; leave such levels out with lambda_min=-3.",
    magnified,
  )


def solver_times(diffusion: Diffusion, settings: SolverSettings) -> Float[Array, "evaluations"]:
  """Timesteps at which a solver evaluates a network."""
  return jnp.asarray(settings.table(diffusion.levels).t, jnp.float32)


def solve(
  diffusion: Diffusion,
  network: Callable[[Array, Array], Array],
  times: Float[Array, "evaluations D"],
  shape: tuple[int, ...],
  keys: Key[Array, " B"],
  settings: SolverSettings,
  scale: Float[Array, "..."] | None = None,
) -> Float[Array, "B ..."]:
  """Runs a solver over a network, guided if there is a scale.

  Args:
    diffusion: What the network predicts, at which noise.
    network: From `x^t` and a time embedding to its output. Under guidance it is given `x^t` twice,
      for the condition's rows and then for the null condition's.
    times: Embeddings of the timesteps of `solver_times`.
    shape: Of a row.
    keys: One for each row, which depends on no other row.
    settings: The solver.
    scale: Guidance, of all rows or of each; `None` for a network that is not guided.
  """
  if scale is not None and scale.ndim:
    scale = scale.reshape(-1, *[1] * (len(shape) - 1))

  def denoise(x, level, time):
    output = network(x if scale is None else jnp.concatenate([x, x]), time)
    if scale is not None:
      output = ops.guide(*jnp.split(output, 2), settings.scale_at(scale, level.sigma))
    return ops.predicted_clean(diffusion.prediction, output, x, level.alpha, level.sigma)

  starts, steps = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  x = jax.vmap(lambda key: jax.random.normal(key, shape))(starts) * settings.temperature
  return ops.run_solver(denoise, x, settings.table(diffusion.levels), steps, along=times)


class LatentProjection(nn.Module):
  """From latents to the width of a network.

  Attributes:
    shared: What it shares with the decoder.
    bias: Whether there is a bias, zero at first.
  """

  shared: Shared
  bias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B T Z"]) -> Float[Array, "B T D"]:
    s = self.shared
    # The few channels are no axis of the model's, so that a mesh need not divide them.
    axes, init = (None, "embed"), s.init.mlp_linear
    y = Projection((s.embed_dim,), axes, init, s.dtype, name="proj")(x)
    if not self.bias:
      return y
    init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("embed",))
    return y + self.param("bias", init, (s.embed_dim,)).astype(s.dtype)


class TimeEmbedding(nn.Module):
  """Embeds timesteps: cosines and sines of 128 frequencies, then a two-layer perceptron.

  Attributes:
    shared: What it shares with the decoder.
  """

  shared: Shared

  @nn.compact
  def __call__(self, t: Int[Array, "*B"] | Float[Array, "*B"]) -> Float[Array, "*B D"]:
    s = self.shared
    features = time_features(t)
    project = lambda axes, name: Projection((s.embed_dim,), axes, _TIME_INIT, s.dtype, name=name)
    x = nn.silu(project((None, "mlp"), "in_proj")(features))
    return project(("mlp", "embed"), "out_proj")(x)


def time_features(t: Int[Array, "*B"] | Float[Array, "*B"]) -> Float[Array, "*B features"]:
  """Cosines, then sines, of `t 10000^(-k/128)`, in float32.

  Raises:
    ValueError: `t` is of half precision.
  """
  ops.check_timesteps(t)
  half = TIME_FEATURES // 2
  frequencies = jnp.asarray(10_000.0 ** (-np.arange(half) / half), jnp.float32)
  angles = t.astype(jnp.float32)[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class HeadLayer(nn.Module):
  """`u + gate * SwiGLU(norm(u) (1 + scale) + shift)`, the identity at first.

  Attributes:
    config: The head.
    shared: What it shares with the decoder.
  """

  config: DiffusionHeadConfig
  shared: Shared

  @nn.compact
  def __call__(self, u: Float[Array, "B T D"], c: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    width = u.shape[-1]
    shift, scale, gate = jnp.moveaxis(modulation(3, self.shared)(c), -2, 0)
    normed = rms(u, self.config.norm_eps)
    if self.config.norm_gain:
      init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
      normed = normed * self.param("gain", init, (width,)).astype(u.dtype)
    feed_forward = FeedForwardConfig(self.config.width(width), "swiglu")
    y = FeedForward(feed_forward, self.shared, name="feed_forward")(normed * (1 + scale) + shift)
    return u + gate * y


class FinalLayer(nn.Module):
  """`(norm(u) (1 + scale) + shift) W`, zero at first.

  Attributes:
    shared: What it shares with the decoder.
    dim: Channels `Z`.
  """

  shared: Shared
  dim: int

  @nn.compact
  def __call__(self, u: Float[Array, "B T D"], c: Float[Array, "B #T D"]) -> Float[Array, "B T Z"]:
    shift, scale = jnp.moveaxis(modulation(2, self.shared)(c), -2, 0)
    zeros = nn.initializers.zeros_init()
    out = Projection((self.dim,), ("embed", None), zeros, self.shared.dtype, name="out_proj")
    return out(rms(u) * (1 + scale) + shift)


def modulation(count: int, shared: Shared, *, name: str = "modulation") -> Projection:
  """Shifts, scales and gates of AdaLN-Zero, `D -> (count, D)` of an activated condition."""
  axes, zeros = ("embed", None, "mlp"), nn.initializers.zeros_init()
  return Projection((count, shared.embed_dim), axes, zeros, shared.dtype, name=name)
