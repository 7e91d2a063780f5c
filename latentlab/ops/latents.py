"""Latents of a tokenizer: the noise they are drawn with, what holds them in place, and codes.

The sigma-VAE of https://arxiv.org/abs/2412.08635 predicts means alone; the scale of the noise is
imposed, `z = mu + s eps` with one `s ~ N(0, (std / 0.8)^2)` for all of an example, so that it
cannot collapse. 0.8 is about E|N(0, 1)|: the mean of |s| is `std`. The sign of s means nothing.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from latentlab.typing import Array, Bool, Float, Int, Key

NOISES = ("gaussian_scale", "fixed", "learned", "none")
SCALES_PER = ("example", "token")

_MEAN_OF_ABSOLUTE = 0.8  # The release's rounding of sqrt(2 / pi) = 0.7979.


@dataclasses.dataclass(frozen=True)
class Noise:
  """What a tokenizer adds to its means where latents are drawn.

  Attributes:
    kind: `gaussian_scale` (sigma-VAE), a scale drawn from a Gaussian; `fixed`, the scale `std`;
      `learned` (plain VAE), the encoder's own standard deviations; `none`.
    std: Mean of the imposed scale's size; 0 for kinds that impose none.
    per: What one drawn scale belongs to, an `example` or a `token`.
    on_sphere: Whether drawn latents are put back on the sphere that their means lie on.
  """

  kind: str = "gaussian_scale"
  std: float = 0.75
  per: str = "example"
  on_sphere: bool = False

  def __post_init__(self):
    if self.kind not in NOISES:
      raise ValueError(f"unknown noise kind={self.kind!r}; choose one of {NOISES}")
    if self.per not in SCALES_PER:
      raise ValueError(f"per={self.per!r} of a noise must be one of {SCALES_PER}")
    imposed = self.kind in ("gaussian_scale", "fixed")
    if imposed and not (self.std > 0 and math.isfinite(self.std)):
      raise ValueError(f"std={self.std} of {self.kind!r} noise must be positive; 'none' adds none")
    if not imposed and self.std:
      raise ValueError(f"std={self.std} means nothing to {self.kind!r} noise; set it to 0")

  def level(
    self,
    log_variances: Float[Array, "B N Z"] | None = None,
    weights: Float[Array, "B N"] | None = None,
  ) -> Float[Array, ""]:
    """Mean size of the scale: `std`, or that of the encoder's standard deviations."""
    if self.kind != "learned":
      return jnp.float32(self.std)
    stds = jnp.exp(0.5 * log_variances.astype(jnp.float32)).mean(-1)
    return jnp.average(stds, weights=weights)

  def draw_scales(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Scales of `gaussian_scale` noise, one for each that `per` names."""
    return self.std / _MEAN_OF_ABSOLUTE * jax.random.normal(key, shape)


def behind_latents(kinds: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
  """Items that are no latents and have one before them in their document.

  Args:
    kinds: Above 0 at latents.
    segment_ids: Packed documents, whose ids rise along a row; 0 is padding.
  """
  last = jax.lax.cummax(jnp.where(kinds > 0, segment_ids, 0), axis=1)
  return (kinds == 0) & (segment_ids > 0) & (last == segment_ids)


def sample_latents(
  key: Key[Array, ""],
  means: Float[Array, "B ... Z"],
  noise: Noise,
  log_variances: Float[Array, "B ... Z"] | None = None,
) -> Float[Array, "B ... Z"]:
  """Draws latents around their means, in float32.

  Args:
    key: Decides scales and noise.
    means: Of an example's latents, which may lie in any number of axes.
    noise: What is added.
    log_variances: The encoder's, for `learned` noise and for no other.

  Raises:
    ValueError: `log_variances` are missing or superfluous.
  """
  if (log_variances is not None) != (noise.kind == "learned"):
    raise ValueError(
      f"{noise.kind!r} noise got log_variances={log_variances is not None}; 'learned' noise needs "
      "the encoder's, and no other has any"
    )
  means = means.astype(jnp.float32)
  if noise.kind == "none":
    return means
  scale_key, noise_key = jax.random.split(key)
  if noise.kind == "learned":
    scale = jnp.exp(0.5 * log_variances.astype(jnp.float32))
  elif noise.kind == "fixed":
    scale = noise.std
  else:
    kept = 1 if noise.per == "example" else means.ndim - 1
    shape = means.shape[:kept] + (1,) * (means.ndim - kept)
    scale = noise.draw_scales(scale_key, shape)
  latents = means + scale * jax.random.normal(noise_key, means.shape)
  return to_sphere(latents) if noise.on_sphere else latents


def to_sphere(x: Float[Array, "... Z"], radius: float | None = None) -> Float[Array, "... Z"]:
  """Scales each vector to length `radius`, the root of its size if `None`."""
  radius = math.sqrt(x.shape[-1]) if radius is None else radius
  x = x.astype(jnp.float32)
  # A vector of zeros has no direction, and the root there no gradient.
  return x * (radius * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12))


def gaussian_kl(
  means: Float[Array, "... Z"], log_variances: Float[Array, "... Z"]
) -> Float[Array, "... Z"]:
  """KL divergence of each latent's Gaussian from the standard one, in nats."""
  means, log_variances = means.astype(jnp.float32), log_variances.astype(jnp.float32)
  # expm1 keeps what is left where the variance is close to one.
  return 0.5 * (jnp.square(means) + jnp.expm1(log_variances) - log_variances)


def weighted_std(x: Float[Array, "B ..."], weights: Float[Array, " B"]) -> Float[Array, ""]:
  """Standard deviation over all elements of the rows, each row with its weight."""
  x, total = x.astype(jnp.float32), weights.sum()
  axes = tuple(range(1, x.ndim))
  mean = jnp.sum(weights * x.mean(axes)) / total
  return jnp.sqrt(jnp.sum(weights * jnp.square(x - mean).mean(axes)) / total)


def nearest_codes(x: Float[Array, "... Z"], codebook: Float[Array, "vocab Z"]) -> Int[Array, "..."]:
  """Index of the code next to each vector; the first of equals."""
  x, codebook = x.astype(jnp.float32), codebook.astype(jnp.float32)
  # The vector's own square is the same for all codes.
  scores = jnp.square(codebook).sum(-1) - 2 * jnp.einsum(
    "...Z,vZ->...v", x, codebook, precision=jax.lax.Precision.HIGHEST
  )
  return jnp.argmin(scores, axis=-1).astype(jnp.int32)


def straight_through(x: Float[Array, "..."], value: Float[Array, "..."]) -> Float[Array, "..."]:
  """`value`, with the gradient of the identity for `x` and none for `value`."""
  return x + jax.lax.stop_gradient(value - x)


def code_usage(
  codes: Int[Array, "B ..."], weights: Float[Array, " B"], vocab_size: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Perplexity of the codes in a batch, and the share of the vocabulary that is used at all."""
  rows = weights.reshape(-1, *[1] * (codes.ndim - 1))
  counts = jnp.zeros(vocab_size).at[codes.ravel()].add(jnp.broadcast_to(rows, codes.shape).ravel())
  shares = counts / counts.sum()
  entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-30)), 0.0))
  return jnp.exp(entropy), (counts > 0).mean()
