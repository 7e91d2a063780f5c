"""Sources of images, and what is done to an image before a model sees it.

Images are float32 in [-1, 1], `[H, W, C]`, from the moment they are read.
"""

import dataclasses
import hashlib
import io
import pathlib
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from latentlab.data import collection, listing
from latentlab.data.collection import Collection, Record

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class Transform:
  """Resizes, crops and flips.

  Attributes:
    size: Height and width of an example; 0 leaves an image as large as it is.
    resize: The shorter side before the crop, by antialiased bicubic interpolation; `size` if 0.
    random_crop: Training cuts the square out anywhere, not out of the centre.
    flip: Training mirrors every other image, left to right.
  """

  size: int = 0
  resize: int = 0
  random_crop: bool = False
  flip: bool = False

  def __post_init__(self):
    if self.size < 0 or self.resize < 0:
      raise ValueError(
        f"data.size={self.size} and data.resize={self.resize} must not be negative; 0 leaves an "
        "image as it is."
      )
    if not self.size and (self.resize or self.random_crop):
      raise ValueError(
        f"data.resize={self.resize} and data.random_crop={self.random_crop} need data.size, the "
        "side of the square that is cut out."
      )
    if self.resize and self.resize < self.size:
      raise ValueError(
        f"data.resize={self.resize} is smaller than data.size={self.size}; enlarge it, or set it "
        "to 0."
      )

  def shape(self, height: int, width: int, channels: int) -> tuple[int, int, int]:
    """Of an example."""
    return (self.size or height, self.size or width, channels)

  def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    if self.size:
      image = _crop(_resize(image, self.resize or self.size), self.size, rng, self.random_crop)
    if self.flip and rng is not None and rng.integers(2):
      image = image[:, ::-1]
    return image


def digits(transform: Transform, channels: int = 0) -> Collection:
  """The embedded images: 1797 handwritten digits of 8x8 pixels (scikit-learn, CC BY 4.0)."""
  try:
    from sklearn import datasets
  except ImportError as e:
    raise ValueError(
      "data.source='digits' needs the package scikit-learn: pip install 'latentlab[images]'."
    ) from e
  found = datasets.load_digits()
  pixels = (found.images / 8 - 1).astype(np.float32)[..., None]  # Stored as 0 ... 16.
  records = [
    Record(f"digit_{i:04}", DIGIT_WORDS[label], DIGIT_WORDS[label])
    for i, label in enumerate(found.target.tolist())
  ]
  return in_memory(pixels, records, DIGIT_WORDS, transform, channels)


def in_memory(
  images: np.ndarray,
  records: Sequence[Record],
  class_names: Sequence[str],
  transform: Transform,
  channels: int = 0,
) -> Collection:
  """A collection of images `[n, H, W]` or `[n, H, W, C]`, uint8, or floats in [-1, 1]."""
  if images.ndim == 3:
    images = images[..., None]
  height, width, own = images.shape[1:]
  if own not in (1, 3):
    raise ValueError(
      f"images of shape {images.shape} have {own} channels; give [n, H, W], or 1 or 3 as the last "
      "axis."
    )
  if channels not in (0, own, 3):
    raise ValueError(f"data.channels={channels}, but the images have {own}; set it to 0 or {own}.")

  def read(item: int) -> np.ndarray:
    return np.repeat(as_floats(images[item]), (channels or own) // own, axis=-1)

  return Collection(
    "image",
    records,
    class_names,
    transform.shape(height, width, channels or own),
    read=read,
    transform=transform,
    digest=collection.digest(records, (image.tobytes() for image in images)),
  )


def folder(
  path: str, class_names: Sequence[str], transform: Transform, channels: int
) -> Collection:
  """The images of a folder; those in `path/<class>/` are labelled."""
  return _of_files(*listing.folder(path, SUFFIXES), class_names, transform, channels)


def captioned(
  path: str, class_names: Sequence[str], transform: Transform, channels: int
) -> Collection:
  """The images that a jsonl file names; see `listing.manifest`."""
  return _of_files(*listing.manifest(path, "image"), class_names, transform, channels)


def as_floats(image: np.ndarray) -> np.ndarray:
  """Bytes, or floats as they are, as float32 in [-1, 1]."""
  if image.dtype == np.uint8:
    return image / np.float32(127.5) - np.float32(1)
  return image.astype(np.float32)


def decode(content: bytes, name: str, channels: int = 0) -> np.ndarray:
  """Reads an image file; what is transparent becomes white.

  Args:
    content: Of the file.
    name: Of the file, for errors.
    channels: 1 or 3; 0 for the image's own.
  """
  with _opened(content, name) as image:
    own = _channels(image, name)
    try:
      image = ImageOps.exif_transpose(image)
      if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
      pixels = np.asarray(image.convert("L" if (channels or own) == 1 else "RGB"))
    except _DAMAGES as e:
      raise _damaged(name, e) from e
  return as_floats(pixels[..., None] if pixels.ndim == 2 else pixels)


# What Pillow raises where a file is cut short or damaged.
_DAMAGES = (OSError, SyntaxError, ValueError, EOFError, struct.error)


def _damaged(name: str, e: Exception) -> ValueError:
  return ValueError(
    f"data.path: {name!r} cannot be read as an image ({e}); replace it, or leave it out."
  )


def _opened(content: bytes, name: str) -> Image.Image:
  try:
    return Image.open(io.BytesIO(content))
  except (*_DAMAGES, Image.DecompressionBombError) as e:
    raise _damaged(name, e) from e


def _shape(content: bytes, name: str) -> tuple[int, int, int]:
  """Height, width and channels of an image as `decode` would give it."""
  with _opened(content, name) as image:
    try:
      lies_on_its_side = image.getexif().get(_ORIENTATION, 1) > 4
    except _DAMAGES as e:
      raise _damaged(name, e) from e
    return (*(image.size if lies_on_its_side else image.size[::-1]), _channels(image, name))


_ORIENTATION = 0x0112


def _channels(image: Image.Image, name: str) -> int:
  if image.mode in ("1", "L", "LA"):
    return 1
  if image.mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr"):
    return 3
  raise ValueError(
    f"data.path: {name!r} has pixels of mode {image.mode!r}; store it with 8 bits a channel."
  )


def _of_files(
  records: Sequence[Record],
  paths: Sequence[pathlib.Path],
  class_names: Sequence[str],
  transform: Transform,
  channels: int,
) -> Collection:
  first, contents = None, []
  for path in paths:
    content = listing.content(path)
    height, width, own = _shape(content, str(path))
    shape = transform.shape(height, width, channels or own)
    first = first or (path, shape)
    if shape != first[1]:
      raise ValueError(
        f"data.path: {str(path)!r} has the shape {shape}, and {str(first[0])!r} {first[1]}; set "
        "data.size, and data.channels, to make them alike."
      )
    contents.append(hashlib.sha256(content).digest())

  def read(item: int) -> np.ndarray:
    return decode(listing.content(paths[item]), str(paths[item]), channels)

  return Collection(
    "image",
    records,
    collection.class_names(records, class_names),
    first[1],
    read=read,
    transform=transform,
    digest=collection.digest(records, contents),
  )


def _resize(image: np.ndarray, shorter: int) -> np.ndarray:
  height, width = image.shape[:2]
  if min(height, width) == shorter:
    return image
  scale = shorter / min(height, width)
  size = (max(round(width * scale), shorter), max(round(height * scale), shorter))
  planes = [
    np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.BICUBIC))
    for plane in np.moveaxis(image, -1, 0)
  ]
  return np.clip(np.stack(planes, axis=-1), -1, 1)  # Bicubic weights overshoot.


def _crop(
  image: np.ndarray, size: int, rng: np.random.Generator | None, random: bool
) -> np.ndarray:
  spare = np.array(image.shape[:2]) - size
  if random and rng is not None:
    top, left = rng.integers(0, spare + 1)
  else:
    top, left = spare // 2
  return image[top : top + size, left : left + size]
