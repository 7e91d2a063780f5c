"""Differences between media that tokenizers are trained on, beyond those of samples and pixels."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.typing import Array, Float

_FLOOR = 1e-5  # The least magnitude of a band, so that silence has a logarithm.


def perceptual_distance(
  features: Sequence[Float[Array, "B ..."]], others: Sequence[Float[Array, "B ..."]]
) -> Float[Array, " B"]:
  """Squared distances of features' directions, as LPIPS has them (https://arxiv.org/abs/1801.03924).

  At each place of a layer, its channels, the last axis, are scaled to length 1; the mean over
  places is summed over layers. LPIPS also learns a weight for each channel, which features may
  bring along, multiplied in.

  Args:
    features: Of some media, a layer each.
    others: Of others.
  """
  total = 0.0
  for a, b in zip(features, others, strict=True):
    square = jnp.square(_directions(a) - _directions(b)).sum(-1)
    total = total + square.reshape(square.shape[0], -1).mean(1)
  return total


def _directions(x):
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-10)


def magnitudes(sounds: Float[Array, "B S"], window: int, hop: int) -> Float[Array, "B frames bins"]:
  """Magnitudes of a short-time Fourier transform with Hann windows.

  A frame stands every `hop` samples, from the first one on, in its middle; zeros beyond the ends.
  """
  length = sounds.shape[1]
  sounds = jnp.pad(sounds.astype(jnp.float32), ((0, 0), (window // 2, window)))
  starts = np.arange(0, length, hop)
  frames = sounds[:, starts[:, None] + np.arange(window)]
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
  spectra = jnp.fft.rfft(frames * jnp.asarray(hann, jnp.float32))
  # The root of a sum has no gradient at silence.
  return jnp.sqrt(jnp.square(spectra.real) + jnp.square(spectra.imag) + 1e-12)


def spectral_distance(
  sounds: Float[Array, "B S"],
  others: Float[Array, "B S"],
  banks: Sequence[Float[np.ndarray, "_ _"]],
) -> Float[Array, " B"]:
  """Absolute differences of bands' magnitudes and of their logarithms, mean over resolutions.

  Args:
    sounds: Some.
    others: Others.
    banks: A filter bank `[bins, bands]` for each resolution, whose window has `2 (bins - 1)`
      samples and moves by a quarter of them.
  """
  total = 0.0
  for bank in banks:
    window = 2 * (bank.shape[0] - 1)
    a, b = (
      magnitudes(x, window, window // 4) @ jnp.asarray(bank, jnp.float32) for x in (sounds, others)
    )
    logs = (jnp.log10(jnp.maximum(x, _FLOOR)) for x in (a, b))
    total = total + (jnp.abs(jnp.subtract(*logs)) + jnp.abs(a - b)).mean((1, 2))
  return total / len(banks)


def hinge_real_fake(
  real: Sequence[Float[Array, "B ..."]], fake: Sequence[Float[Array, "B ..."]]
) -> Float[Array, " B"]:
  """A discriminator's hinge loss, mean over its maps: real beyond 1, fake below -1."""
  above, below = (
    [jax.nn.relu(1 + sign * x) for x in maps] for sign, maps in ((-1, real), (1, fake))
  )
  return _mean_of_maps(above) + _mean_of_maps(below)


def hinge_fooled(fake: Sequence[Float[Array, "B ..."]]) -> Float[Array, " B"]:
  """What a generator makes of a discriminator's maps: it wants them high."""
  return -_mean_of_maps(fake)


def _mean_of_maps(maps):
  means = [x.astype(jnp.float32).reshape(x.shape[0], -1).mean(1) for x in maps]
  return jnp.stack(means).mean(0)
