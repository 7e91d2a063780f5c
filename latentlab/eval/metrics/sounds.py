"""How near a sound of one channel is to another; sounds are `[S]`, in [-1, 1]."""

import functools
import warnings
from collections.abc import Callable

import numpy as np
from scipy import fft, signal

from latentlab.typing import Float

Sound = Float[np.ndarray, "S"]

_FLOOR = 1e-5
"""The least magnitude of a band, so that silence has a logarithm."""


def mel_filterbank(
  num_mels: int, window: int, sample_rate: int, low: float = 0.0, high: float | None = None
) -> Float[np.ndarray, "bins num_mels"]:
  """Triangles, each 1 at its peak, whose peaks are equally apart on the mel scale.

  The scale is `2595 log10(1 + f / 700)`.

  Args:
    num_mels: Bands.
    window: Samples of the Fourier transform, of `window // 2 + 1` bins.
    sample_rate: Samples a second.
    low: Where the first triangle begins, in Hz.
    high: Where the last one ends; half the sample rate if `None`.
  """
  high = sample_rate / 2 if high is None else high
  if num_mels < 1 or window < 2 or not 0 <= low < high <= sample_rate / 2:
    raise ValueError(
      f"{num_mels=} and {window=} must be positive, and {low=} < {high=} must lie in [0, "
      f"{sample_rate / 2}], half the sample rate."
    )
  mels = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (low, high)), num_mels + 2)
  edges = 700 * (10 ** (mels / 2595) - 1)
  bins = np.fft.rfftfreq(window, 1 / sample_rate)[:, None]
  begin, peak, end = edges[:-2], edges[1:-1], edges[2:]
  bank = np.maximum(np.minimum((bins - begin) / (peak - begin), (end - bins) / (end - peak)), 0)
  if not bank.any(0).all():
    raise ValueError(
      f"{num_mels=} are too many for {window=} at {sample_rate=}: a band holds no bin of the "
      "transform. Lower num_mels, or lengthen the window."
    )
  return bank


def log_mel(
  sound: Sound, sample_rate: int, *, num_mels: int = 80, window: int = 1024, hop: int = 256
) -> Float[np.ndarray, "frames num_mels"]:
  """Logarithms, to base 10, of the magnitudes of mel bands.

  A frame stands every `hop` samples, from the first one on, in its middle; Hann windows; zeros
  beyond the ends.
  """
  sound = _finite(sound)
  transform = signal.ShortTimeFFT(
    signal.windows.hann(window, sym=False), hop, fs=sample_rate, fft_mode="onesided"
  )
  frames = -(-len(sound) // hop)
  # SciPy refuses what is shorter than half a window.
  sound = np.pad(sound, (0, max(window - len(sound), 0)))
  magnitudes = np.abs(transform.stft(sound, p0=0, p1=frames))
  bands = magnitudes.T @ _filterbank(num_mels, window, sample_rate)
  return np.log10(np.maximum(bands, _FLOOR))


_filterbank = functools.lru_cache(maxsize=16)(mel_filterbank)


def mel_distance(sound: Sound, reference: Sound, sample_rate: int, **options: int) -> float:
  """Mean absolute difference of log mel spectrograms; `options` are those of `log_mel`.

  Published distances differ in scales, windows and bands, and are not to be set beside it.
  """
  _same_length(sound, reference)
  spectra = [log_mel(x, sample_rate, **options) for x in (sound, reference)]
  return float(np.abs(spectra[0] - spectra[1]).mean())


def stoi(sound: Sound, reference: Sound, sample_rate: int, extended: bool = False) -> float:
  """Short-time objective intelligibility (Taal et al., 2011), by the package pystoi.

  Raises:
    ValueError: the package is missing, or the reference has less than 0.4 seconds of sound.
  """
  try:
    import pystoi
  except ImportError as e:
    raise ValueError("STOI needs the package pystoi: pip install 'latentlab[audio]'.") from e
  _same_length(sound, reference)
  sound, reference = _finite(sound), _finite(reference)
  with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)
    try:
      return float(pystoi.stoi(reference, sound, sample_rate, extended=extended))
    except (RuntimeWarning, ValueError) as e:  # It would return a number that means nothing.
      raise ValueError(
        f"STOI of {len(reference)} samples at {sample_rate=} cannot be told ({e}); give at least "
        "0.4 seconds that are not silent."
      ) from e


def speaker_similarity(
  sound: Sound, reference: Float[np.ndarray, "T"], embed: Callable[[np.ndarray], np.ndarray]
) -> float:
  """Cosine of two embeddings, which belong to the number's name."""
  a, b = (np.asarray(embed(x), np.float64) for x in (sound, reference))
  norm = np.linalg.norm(a) * np.linalg.norm(b)
  if not norm > 0:
    raise ValueError("an embedding of zeros, or of values that are no numbers, has no direction.")
  return float(a.ravel() @ b.ravel() / norm)


def mfcc_statistics(
  sound: Sound, sample_rate: int, num_coefficients: int = 20, **options: int
) -> Float[np.ndarray, "features"]:
  """Means and standard deviations of cepstral coefficients, a stand-in for a speaker embedding.

  No network stands behind it: it tells the colour of a voice and of a room, and the cosines of
  strangers are high as well. The first coefficient, which is loudness, is left out. `options` are
  those of `log_mel`.
  """
  bands = log_mel(sound, sample_rate, **options)
  if not 1 <= num_coefficients < bands.shape[1]:
    raise ValueError(f"{num_coefficients=} must lie in [1, num_mels={bands.shape[1]}).")
  coefficients = fft.dct(bands, axis=1, norm="ortho")[:, 1 : num_coefficients + 1]
  return np.concatenate([coefficients.mean(0), coefficients.std(0)])


def _finite(sound: np.ndarray) -> np.ndarray:
  if sound.ndim != 1 or not sound.size:
    raise ValueError(f"a sound of shape {sound.shape} must be [S], and not empty.")
  if not np.isfinite(sound).all():
    raise ValueError("a sound holds values that are no numbers.")
  return sound.astype(np.float64)


def _same_length(sound: np.ndarray, reference: np.ndarray) -> None:
  if sound.shape != reference.shape:
    raise ValueError(
      f"a sound of shape {sound.shape} and its reference of {reference.shape} must be equally long."
    )
