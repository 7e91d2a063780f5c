"""Diffusion of vectors: noise schedules, parametrisations, timesteps, guidance.

Next-token diffusion (LatentLM, https://arxiv.org/abs/2412.08635, section 3.2) noises each latent by
itself: `x^t = alpha_t x + sigma_t e`. Tables are made in float64 and rounded once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.typing import Array, Float, Int, Key

PREDICTIONS = ("v", "epsilon", "x0", "flow")
TIMESTEP_SAMPLERS = ("uniform", "logit_normal")
GUIDANCE_KINDS = ("constant", "linear")

_LINEAR_BETAS = (1e-4, 0.02)


def _log_snr_to_signal(log_snr: np.ndarray, excess: float) -> np.ndarray:
  """The release's damped sigmoid: the signal left at the end is `excess` and not 0."""
  return 1 - 1 / (np.exp(log_snr) + 1 + excess)


def _cosine(u: np.ndarray) -> np.ndarray:
  return np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2


def _laplace(u: np.ndarray) -> np.ndarray:
  log_snr = np.sign(u - 0.5) * np.log(1 - 2 * 0.98 * np.abs(u - 0.5))
  return _log_snr_to_signal(log_snr, 0.02)


def _cauchy(u: np.ndarray) -> np.ndarray:
  return _log_snr_to_signal(3 + np.tan(0.9 * np.pi * (0.5 - u)), 0.1)


def _linear(count: int) -> np.ndarray:
  return np.linspace(*_LINEAR_BETAS, count)


def _scaled_linear(count: int) -> np.ndarray:
  return np.linspace(*np.sqrt(_LINEAR_BETAS), count) ** 2


def _sigmoid(count: int) -> np.ndarray:
  low, high = _LINEAR_BETAS
  return low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, count)))


# Of the share of signal left at a time in [0, 1], or of a step's share of noise.
_SIGNALS = {"cosine": _cosine, "laplace": _laplace, "cauchy": _cauchy}
_BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "sigmoid": _sigmoid}
SCHEDULES = (*_SIGNALS, *_BETAS, "flow")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
  """How much of a latent and how much noise there is at each timestep, `0` the cleanest.

  Attributes:
    kind: `cosine` (the release's, squared cosine with betas of at most 0.999), `linear`,
      `scaled_linear`, `sigmoid`, `laplace` and `cauchy` (log-SNRs spread like those; they leave
      something of a latent at the last timestep), all with `alpha^2 + sigma^2 = 1`; or `flow`, the
      straight path `alpha = 1 - sigma` of rectified flows.
    num_timesteps: Timesteps a model is trained on.
  """

  kind: str = "cosine"
  num_timesteps: int = 1000

  def __post_init__(self):
    if self.kind not in SCHEDULES:
      raise ValueError(f"unknown schedule {self.kind!r}; choose one of {SCHEDULES}")
    if self.num_timesteps < 2:
      raise ValueError(f"num_timesteps={self.num_timesteps} of a schedule must be at least 2")

  @functools.cached_property
  def tables(self) -> tuple[Float[np.ndarray, "steps"], Float[np.ndarray, "steps"]]:
    """`alpha` and `sigma` of each timestep, in float64."""
    count = self.num_timesteps
    if self.kind == "flow":
      sigma = np.arange(1, count + 1) / count
      return 1 - sigma, sigma
    if self.kind in _SIGNALS:
      signal = _SIGNALS[self.kind](np.arange(count + 1) / count)
      betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    else:
      betas = _BETAS[self.kind](count)
    kept = np.cumprod(1 - betas)
    return np.sqrt(kept), np.sqrt(1 - kept)

  @functools.cached_property
  def log_ratios(self) -> Float[np.ndarray, "steps"]:
    """`lambda = ln(alpha / sigma)`, in float64; `-inf` where nothing is left of a latent."""
    alpha, sigma = self.tables
    with np.errstate(divide="ignore"):
      return np.log(alpha) - np.log(sigma)

  def at(self, t: Int[Array, "*B"]) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """`alpha_t` and `sigma_t` in float32.

    Raises:
      ValueError: `t` is no integer.
    """
    if not jnp.issubdtype(t.dtype, jnp.integer):
      raise ValueError(f"{t.dtype=} indexes no table of timesteps; give int32")
    alpha, sigma = (jnp.asarray(table, jnp.float32) for table in self.tables)
    return alpha[t], sigma[t]


def check_timesteps(t: Array) -> None:
  """Raises a `ValueError` for timesteps of half precision, which rounds integers above 256."""
  if jnp.issubdtype(t.dtype, jnp.floating) and jnp.finfo(t.dtype).bits < 32:
    raise ValueError(f"{t.dtype=} cannot hold timesteps up to 999; give int32 or float32")


def sample_timesteps(
  key: Key[Array, ""],
  shape: tuple[int, ...],
  num_timesteps: int,
  kind: str = "uniform",
  *,
  mean: float = 0.0,
  std: float = 1.0,
) -> Int[Array, "..."]:
  """Random timesteps in `0 ... num_timesteps - 1`.

  Args:
    key: Random key.
    shape: How many.
    num_timesteps: Of the schedule.
    kind: `uniform`, or `logit_normal` (the middle more often; `sigmoid` of a normal variable).
    mean: Of that variable.
    std: Of that variable.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind == "uniform":
    return jax.random.randint(key, shape, 0, num_timesteps)
  if kind != "logit_normal":
    raise ValueError(f"unknown timestep sampler {kind=}; choose one of {TIMESTEP_SAMPLERS}")
  u = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))
  return jnp.minimum((u * num_timesteps).astype(jnp.int32), num_timesteps - 1)


def add_noise(
  clean: Float[Array, "*B Z"],
  noise: Float[Array, "*B Z"],
  alpha: Float[Array, "*B"],
  sigma: Float[Array, "*B"],
) -> Float[Array, "*B Z"]:
  """`x^t = alpha x + sigma e`."""
  return alpha[..., None] * clean + sigma[..., None] * noise


def prediction_target(
  prediction: str,
  clean: Float[Array, "*B Z"],
  noise: Float[Array, "*B Z"],
  alpha: Float[Array, "*B"],
  sigma: Float[Array, "*B"],
) -> Float[Array, "*B Z"]:
  """What a network is trained to give for `x^t`.

  Args:
    prediction: `v` (`alpha e - sigma x`, https://arxiv.org/abs/2202.00512 appendix D), `epsilon`
      (the noise, as the paper's equation), `x0` (the latent) or `flow` (`e - x`).
    clean: `x`.
    noise: `e`.
    alpha: Of each latent.
    sigma: Of each latent.

  Raises:
    ValueError: the prediction is unknown.
  """
  on_clean, on_noise = _target_coefficients(prediction, alpha[..., None], sigma[..., None])
  return on_clean * clean + on_noise * noise


def predicted_clean(
  prediction: str,
  output: Float[Array, "*B Z"],
  noisy: Float[Array, "*B Z"],
  alpha: Float[Array, ""],
  sigma: Float[Array, ""],
) -> Float[Array, "*B Z"]:
  """The latent that an output stands for at `noisy`; one level for all rows.

  An affine map of the output, so that guidance is the same in every parametrisation.

  Raises:
    ValueError: the prediction is unknown.
  """
  # Both lines are solved for x: noisy = alpha x + sigma e, and output = a x + b e.
  a, b = _target_coefficients(prediction, alpha, sigma)
  return (b * noisy - sigma * output) / (b * alpha - sigma * a)


def predicted_noise(
  prediction: str,
  output: Float[Array, "*B Z"],
  noisy: Float[Array, "*B Z"],
  alpha: Float[Array, ""],
  sigma: Float[Array, ""],
) -> Float[Array, "*B Z"]:
  """The noise that an output stands for at `noisy`; one level for all rows.

  Raises:
    ValueError: the prediction is unknown.
  """
  a, b = _target_coefficients(prediction, alpha, sigma)
  return (alpha * output - a * noisy) / (b * alpha - sigma * a)


def min_snr_weight(
  prediction: str, alpha: Float[Array, "*B"], sigma: Float[Array, "*B"], limit: float = 5.0
) -> Float[Array, "*B"]:
  """Weights of squared errors; those of the latent then weigh `min(alpha^2 / sigma^2, limit)`.

  https://arxiv.org/abs/2303.09556, section 3.4, for every parametrisation.

  Raises:
    ValueError: the prediction is unknown, or `limit` is not positive.
  """
  if not limit > 0:
    raise ValueError(f"the {limit=} of signal-to-noise ratios must be positive")
  a, b = _target_coefficients(prediction, alpha, sigma)
  # The numerator's sigma^2 is that of d latent / d output = sigma / (b alpha - sigma a), squared.
  return jnp.minimum(alpha**2, limit * sigma**2) / (b * alpha - sigma * a) ** 2


def guide(
  conditional: Float[Array, "*B Z"],
  unconditional: Float[Array, "*B Z"],
  scale: Float[Array, "#*B"] | float,
) -> Float[Array, "*B Z"]:
  """Classifier-free guidance, `u + s (c - u)`, of two outputs at the same `x^t`."""
  scale = jnp.asarray(scale)
  scale = scale[..., None] if scale.ndim else scale
  return unconditional + scale * (conditional - unconditional)


def guidance_scale(
  scale: Float[Array, "#B"] | Float[Array, ""] | float,
  kind: str = "constant",
  progress: Float[Array, " B"] | None = None,
) -> Float[Array, "..."]:
  """The scale of each row.

  Args:
    scale: The scale asked for; 1 guides nothing, 0 leaves the condition out.
    kind: `constant`, or `linear`: from 1 up to the scale at a sequence's last latent (MAR's).
    progress: Share of a row's latents that are drawn once this one is, which `linear` asks for.

  Raises:
    ValueError: the kind is unknown, or `linear` knows no progress.
  """
  if kind == "constant":
    return jnp.asarray(scale, jnp.float32)
  if kind != "linear":
    raise ValueError(f"unknown guidance {kind=}; choose one of {GUIDANCE_KINDS}")
  if progress is None:
    raise ValueError("guidance kind='linear' needs progress, the share of latents drawn")
  return 1 + (jnp.asarray(scale, jnp.float32) - 1) * progress


def _target_coefficients(prediction, alpha, sigma):
  """`(a, b)` of the target `a x + b e`."""
  one = jnp.ones_like(alpha)
  if prediction == "v":
    return -sigma, alpha
  if prediction == "epsilon":
    return 0 * one, one
  if prediction == "x0":
    return one, 0 * one
  if prediction == "flow":
    return -one, one
  raise ValueError(f"unknown {prediction=}; choose one of {PREDICTIONS}")
