"""Writes media for the eye and the ear: PNG files of images side by side, and wav files."""

import os
import pathlib
import struct
import wave
from collections.abc import Sequence

import numpy as np
from PIL import Image

from latentlab.data import files


def check_sample(shape: Sequence[int], sample_rate: int) -> None:
  """Raises a `ValueError` where a run's samples are sounds that no file can be made of."""
  if len(shape) == 2 and not sample_rate:
    raise ValueError(
      "config.sample.num_samples asks for sounds, and their sample rate is unknown; set "
      "data.sample_rate to what they have, or num_samples to 0."
    )


def write_png(
  path: str | os.PathLike, images: np.ndarray, columns: int = 0, scale: int = 1
) -> None:
  """Writes images side by side, a pixel apart, row by row.

  Args:
    path: Of the file; its folder is made.
    images: `[n, H, W, C]` in [-1, 1], which they are clipped to, of 1 or 3 channels.
    columns: Images of a row; as wide as high if 0.
    scale: Side of the square of pixels that shows one.
  """
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
    raise ValueError(f"images of shape {images.shape} must be [n, H, W, 1] or [n, H, W, 3].")
  if not np.isfinite(images).all():
    raise ValueError(f"images for {str(path)!r} hold values that are no numbers.")
  count, height, width, channels = images.shape
  columns = min(columns or int(np.ceil(count**0.5)), count)
  lines = -(-count // columns)
  pixels = np.round((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8)
  pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  cells = np.full((lines * columns, height * scale + 1, width * scale + 1, channels), 255, np.uint8)
  cells[:count, :-1, :-1] = pixels
  grid = cells.reshape(lines, columns, *cells.shape[1:]).swapaxes(1, 2)
  grid = grid.reshape(lines * cells.shape[1], columns * cells.shape[2], channels)[:-1, :-1]
  files.write(
    path,
    lambda file: Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).save(file, "png"),
  )


def write_wav(path: str | os.PathLike, sound: np.ndarray, sample_rate: int) -> None:
  """Writes a sound of one channel with 16 bits.

  Args:
    path: Of the file; its folder is made.
    sound: `[S]` or `[S, 1]` in [-1, 1], which it is clipped to.
    sample_rate: Samples a second.
  """
  if not sound.size:
    raise ValueError(f"a sound of shape {sound.shape} for {str(path)!r} is empty.")
  _sixteen_bits(sound, path)  # Raises with the path as it was given.

  files.write(path, lambda file: WavWriter(file, sample_rate).write(sound))


class WavWriter:
  """A wav file as of `write_wav` that grows: after each piece, all before it can be heard.

  The file is open during a piece alone, so that thousands may grow side by side.
  """

  def __init__(self, path: str | os.PathLike, sample_rate: int):
    """Begins the file, in the place of one that is there.

    Args:
      path: Of the file; its folder is made.
      sample_rate: Samples a second.
    """
    if sample_rate < 1:
      raise ValueError(f"{sample_rate=} of a wav file must be at least 1.")
    self._path, self._size = pathlib.Path(path), 0
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(self._path), "wb") as wav:
      wav.setnchannels(1)
      wav.setsampwidth(2)
      wav.setframerate(sample_rate)

  def write(self, sound: np.ndarray) -> None:
    """Adds a piece, `[S]` or `[S, 1]` in [-1, 1], which it is clipped to.

    Raises:
      ValueError: it is of another shape, or holds what is no number.
    """
    content = _sixteen_bits(sound, self._path)
    with self._path.open("r+b") as file:
      file.seek(_WAV_HEADER + self._size)
      file.write(content)
      self._size += len(content)
      # RIFF counts all behind its own size, the chunk of samples the samples.
      for place, size in ((4, _WAV_HEADER - 8 + self._size), (_WAV_HEADER - 4, self._size)):
        file.seek(place)
        file.write(struct.pack("<I", size))


_WAV_HEADER = 44
"""Bytes before the first sample of what `wave` writes."""


def _sixteen_bits(sound: np.ndarray, path: str | os.PathLike) -> bytes:
  if sound.ndim > 2 or sound.size != len(sound):
    raise ValueError(f"a sound of shape {sound.shape} must be [S] or [S, 1].")
  if not np.isfinite(sound).all():
    raise ValueError(f"the sound for {str(path)!r} holds values that are no numbers.")
  return np.round(np.clip(sound.ravel(), -1, 1) * 32767).astype("<i2").tobytes()
