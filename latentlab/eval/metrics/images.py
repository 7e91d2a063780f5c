"""How near images in [-1, 1] are to others, one number for each pair."""

import numpy as np
from scipy import ndimage, signal

from latentlab.typing import Float

_RANGE = 2.0
"""Of values in [-1, 1]."""

Images = Float[np.ndarray, "n H W C"]
PerImage = Float[np.ndarray, "n"]


def mse(images: Images, references: Images) -> PerImage:
  """Mean squared difference of the pixels."""
  images, references = _pairs(images, references)
  return np.square(images - references).mean((1, 2, 3))


def psnr(images: Images, references: Images) -> PerImage:
  """Peak signal-to-noise ratio in dB; infinite for equal images."""
  with np.errstate(divide="ignore"):
    return 10 * np.log10(_RANGE**2 / mse(images, references))


def ssim(images: Images, references: Images, window: int = 11, sigma: float = 1.5) -> PerImage:
  """Structural similarity (Wang et al., 2004), the mean over all windows inside the image.

  Args:
    images: Of any number of channels, over which it is the mean.
    references: As many.
    window: Side of the Gaussian window.
    sigma: Its width.
  """
  images, references = _pairs(images, references)
  if window < 1 or window % 2 == 0 or window > min(images.shape[1:3]):
    raise ValueError(
      f"{window=} must be odd and at most the images' sides, {images.shape[1:3]}; set it so."
    )
  weights = signal.windows.gaussian(window, sigma)
  weights /= weights.sum()
  margin = window // 2
  height, width = images.shape[1:3]

  def mean(x: np.ndarray) -> np.ndarray:
    for axis in (1, 2):
      x = ndimage.correlate1d(x, weights, axis=axis)
    return x[:, margin : height - margin, margin : width - margin]

  a, b = mean(images), mean(references)
  variance_a = mean(images**2) - a**2
  variance_b = mean(references**2) - b**2
  covariance = mean(images * references) - a * b
  c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
  similarity = (2 * a * b + c1) * (2 * covariance + c2)
  similarity /= (a**2 + b**2 + c1) * (variance_a + variance_b + c2)
  return similarity.mean((1, 2, 3))


def _pairs(images: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  if images.shape != references.shape or images.ndim != 4 or not images.size:
    raise ValueError(
      f"images of shape {images.shape} and references of {references.shape} must both be the same "
      "[n, H, W, C]."
    )
  return images.astype(np.float64), references.astype(np.float64)
