"""Sources of images, and what is done to an image before a model sees it.

Images are float32 in [-1, 1], `[H, W, C]`, from the moment they are read.
"""

import dataclasses

import numpy as np

from latentlab.data import collection
from latentlab.data.collection import Collection, Record

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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

  def __call__(self, image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    if self.size:
      image = _crop(_resize(image, self.resize or self.size), self.size, rng, self.random_crop)
    if self.flip and rng is not None and rng.integers(2):
      image = image[:, ::-1]
    return image


def digits(transform: Transform, channels: int) -> Collection:
  """The embedded images: 1797 handwritten digits of 8x8 pixels (scikit-learn, CC BY 4.0)."""
  try:
    from sklearn import datasets
  except ImportError as e:
    raise ValueError(
      "data.source='digits' needs the package scikit-learn: pip install 'latentlab[images]'."
    ) from e
  found = datasets.load_digits()
  images = (found.images / 8 - 1).astype(np.float32)[..., None]  # Stored as 0 ... 16.
  if channels:
    images = np.repeat(images, channels, axis=-1)
  records = [
    Record(f"digit_{i:04}", DIGIT_WORDS[label], DIGIT_WORDS[label])
    for i, label in enumerate(found.target.tolist())
  ]
  return in_memory(images, records, DIGIT_WORDS, transform)


def in_memory(images: np.ndarray, records, class_names, transform: Transform) -> Collection:
  """A collection of images `[n, H, W, C]`, float32 in [-1, 1]."""
  return Collection(
    "image",
    records,
    class_names,
    (*((transform.size,) * 2 if transform.size else images.shape[1:3]), images.shape[3]),
    read=images.__getitem__,
    transform=transform,
    digest=collection.digest(records, (image.tobytes() for image in images)),
  )


def _resize(image: np.ndarray, shorter: int) -> np.ndarray:
  from PIL import Image

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
