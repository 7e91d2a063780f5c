"""What `config.data` says of images and sounds, and where it finds them."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Sequence

import numpy as np

from latentlab.data import audio, collection, images, packages
from latentlab.data.collection import Collection

KINDS = {
  "digits": "image",
  "vowels": "audio",
  "mnist": "image",
  "emoji": "image",
  "image_folder": "image",
  "captioned_images": "image",
  "wav_folder": "audio",
  "arrays": None,  # Their shape tells.
}
SOURCES = tuple(KINDS)
EMBEDDED = ("digits", "vowels")
_OF_IMAGES = ("size", "resize", "random_crop", "flip", "channels")
_OF_SOUNDS = ("sample_rate", "num_samples", "peak")


@dataclasses.dataclass(frozen=True)
class MediaConfig:
  """The fields of `config.data` where its source is one of images or sounds.

  Attributes:
    source: "digits" and "vowels" are embedded; "mnist" and "emoji" are fetched beforehand (see
      `packages`); "image_folder", images in folders named by their classes, or in one;
      "captioned_images", a jsonl file (see `listing.manifest`); "wav_folder", a folder of wav files
      or a jsonl file (see `audio.folder`); "arrays", an npz file (see `load_arrays`).
    path: What sources that are not embedded read; of those fetched beforehand, the folder if it is
      not the cache folder's.
    validation_fraction: Part of the items held out, by a hash of their names.
    split_pattern: A regular expression; items in whose name it is found are held out instead.
    class_names: The classes in the order of their numbers; those found, sorted, if empty.
    class_captions: A caption for each class, in place of captions of the items' own.
    label_pattern: A regular expression with one group, which finds a wav file's label in its name.
    size: Height and width of an image; 0 leaves images, which then are all alike, as they are.
    resize: The shorter side of an image before a square of `size` is cut out of it; `size` if 0.
    random_crop: Training cuts that square out anywhere, not out of the centre.
    flip: Training mirrors every other image.
    channels: 1 (grey) or 3 (colour); 0 takes images, which then are all alike, as they are.
    sample_rate: Of sounds, to which files are resampled; 0 takes files, which then are all alike,
      as they are. Of arrays it is what they have.
    num_samples: Of a sound, at most: training cuts longer ones anywhere, and shorter ones are
      padded; 0 pads all to the longest.
    peak: Largest magnitude of a sound, to which each file is scaled; 0 leaves it as it is. Of
      recordings of several levels a loss of absolute errors hears the loud ones alone.
  """

  source: str = "digits"
  path: str = ""
  validation_fraction: float = 0.1
  split_pattern: str = ""
  class_names: Sequence[str] = ()
  class_captions: Sequence[str] = ()
  label_pattern: str = ""
  size: int = 0
  resize: int = 0
  random_crop: bool = False
  flip: bool = False
  channels: int = 0
  sample_rate: int = 0
  num_samples: int = 0
  peak: float = 0.0

  def __post_init__(self):
    if self.source not in SOURCES:
      raise ValueError(f"data.source={self.source!r} is unknown; choose from {SOURCES}.")
    own_place = self.source in packages.PACKAGES
    if not own_place and bool(self.path) != (self.source not in EMBEDDED):
      raise ValueError(
        f"data.path={self.path!r} with data.source={self.source!r}: "
        + ("leave the path out." if self.path else "give the path that it reads.")
      )
    if self.label_pattern and self.source != "wav_folder":
      raise ValueError(
        f"data.label_pattern={self.label_pattern!r} is of data.source='wav_folder', and this one "
        f"is {self.source!r}; leave it out."
      )
    if self.channels not in (0, 1, 3):
      raise ValueError(f"data.channels={self.channels} must be 1, 3, or 0 for the images' own.")
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(f"data.validation_fraction={self.validation_fraction} is not in [0, 1).")
    for field in _OF_SOUNDS:
      if (value := getattr(self, field)) < 0:
        raise ValueError(f"data.{field}={value} must not be negative; 0 takes what sounds have.")
    if not self.peak <= 1:  # Nor is a NaN.
      raise ValueError(f"data.peak={self.peak} must be at most 1, the largest magnitude there is.")
    if self.peak and self.source != "wav_folder":
      raise ValueError(
        f"data.peak={self.peak} is of data.source='wav_folder', and this one is {self.source!r}; "
        "leave it out."
      )
    for field in ("class_names", "class_captions"):
      if isinstance(value := getattr(self, field), str):
        raise ValueError(f"data.{field}={value!r} must be a list, ({value!r},) say.")

    if self.source in EMBEDDED and self.class_names:
      raise ValueError(
        f"data.class_names={tuple(self.class_names)}, but the classes of data.source="
        f"{self.source!r} have names; leave it out."
      )
    if kind := KINDS[self.source]:
      self.check_kind(kind)

  def check_kind(self, kind: str) -> None:
    """Raises where a field is set that a collection of this kind has no use for."""
    others = _OF_SOUNDS if kind == "image" else _OF_IMAGES
    if given := {name: getattr(self, name) for name in others if getattr(self, name)}:
      raise ValueError(
        f"config.data has {given}, and data.source={self.source!r} gives media of the kind "
        f"{kind!r}; leave them out."
      )

  @property
  def transform(self) -> images.Transform:
    return images.Transform(self.size, self.resize, self.random_crop, self.flip)

  @classmethod
  def of(cls, fields) -> "MediaConfig":
    """From a mapping, for instance an `ml_collections.ConfigDict`."""
    if isinstance(fields, cls):
      return fields
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
      raise ValueError(
        f"config.data has no field {unknown} where its source is {fields.get('source')!r}; choose "
        f"from {known}."
      )
    return cls(**fields)


def find(config: MediaConfig) -> Collection:
  """What the fields name.

  Raises:
    ValueError: there is none, or it is bad.
  """
  of_images = (config.transform, config.channels)
  of_sounds = (config.sample_rate, config.num_samples)
  match config.source:
    case "digits":
      return images.digits(*of_images)
    case "vowels":
      return audio.vowels(*of_sounds)
    case "mnist":
      found = packages.find(config.source, config.path)
      return load_arrays(dataclasses.replace(config, path=str(found)))
    case "emoji":
      found = packages.find(config.source, config.path)
      return images.captioned(str(found), config.class_names, *of_images)
    case "image_folder":
      return images.folder(config.path, config.class_names, *of_images)
    case "captioned_images":
      return images.captioned(config.path, config.class_names, *of_images)
    case "wav_folder":
      fields = (config.label_pattern, config.peak)
      return audio.folder(config.path, config.class_names, *of_sounds, *fields)
    case _:
      return load_arrays(config)


def arrays(
  config: MediaConfig,
  media: np.ndarray,
  labels: np.ndarray | Sequence[int | str] | None,
  captions: Sequence[str] | None,
  names: Sequence[str] | None,
  lengths: np.ndarray | None,
) -> Collection:
  """Media in memory.

  Args:
    config: Its source and path are not looked at.
    media: Images `[n, H, W]` or `[n, H, W, C]`, uint8, or floats in [-1, 1]; or sounds `[n, S]` or
      `[n, S, 1]`, int16, or floats in [-1, 1].
    labels: Numbers of classes, -1 throughout for none; or names of classes.
    captions: Texts.
    names: Decide the split; the numbers of the items if `None`.
    lengths: Samples of each sound; all of them if `None`.
  """
  is_sound = media.ndim == 2 or (media.ndim == 3 and media.shape[-1] == 1)
  kind = "audio" if is_sound else "image"
  integers = np.int16 if is_sound else np.uint8
  if media.ndim not in (2, 3, 4) or not media.size:
    raise ValueError(
      f"media of shape {media.shape}: give images [n, H, W] or [n, H, W, C], or sounds [n, S] or "
      "[n, S, 1]."
    )
  if np.issubdtype(media.dtype, np.floating):
    if not np.abs(media).max() <= 1:
      raise ValueError(
        f"media lie in [{media.min()}, {media.max()}]; scale them to [-1, 1], or give "
        f"{integers.__name__}."
      )
  elif media.dtype != integers:
    raise ValueError(
      f"media of the kind {kind!r} have the type {media.dtype}; give {integers.__name__}, or "
      "floats in [-1, 1]."
    )
  for name, value in dict(labels=labels, captions=captions, names=names).items():
    if value is not None and len(value) != len(media):
      raise ValueError(f"{len(value)} {name} for {len(media)} media; give one for each.")
  if lengths is not None and not is_sound:
    raise ValueError("lengths are of sounds, and these media are images; leave them out.")
  config.check_kind(kind)
  classes, by_item = _named_labels(labels, config.class_names, len(media))
  records = [
    collection.Record(
      str(i) if names is None else str(names[i]),
      by_item[i],
      "" if captions is None else str(captions[i]),
    )
    for i in range(len(media))
  ]
  classes = classes or collection.class_names(records, config.class_names)
  if is_sound:
    of_sounds = (config.sample_rate, config.num_samples)
    return audio.in_memory(media, records, classes, *of_sounds, lengths)
  return images.in_memory(media, records, classes, config.transform, config.channels)


def load_arrays(config: MediaConfig) -> Collection:
  """Reads an npz file with an array `media`, and perhaps `labels`, `captions`, `names`, `lengths`.

  What they hold is told at `arrays`; texts are arrays of strings, not of objects.
  """
  known = ("media", "labels", "captions", "names", "lengths")
  try:
    with np.load(pathlib.Path(config.path).expanduser(), allow_pickle=False) as file:
      found = {name: file[name] for name in file.files}
      texts = {name: found[name].tolist() for name in ("captions", "names") if name in found}
  except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError) as e:
    raise ValueError(
      f"data.path={config.path!r} cannot be read as an npz file without objects ({e}); save it "
      "with numpy.savez."
    ) from e
  if not {"media"} <= set(found) <= set(known):
    raise ValueError(
      f"data.path={config.path!r} has the arrays {sorted(found)}; it needs 'media', and may have "
      f"{known[1:]}."
    )
  return arrays(config, **{name: (found | texts).get(name) for name in known})


def _named_labels(
  labels: np.ndarray | Sequence[int | str] | None, class_names: Sequence[str], count: int
) -> tuple[Sequence[str], Sequence[str | None]]:
  """Classes, where numbers give them, and the name of each item's."""
  if labels is None:
    return (), [None] * count
  labels = np.asarray(labels)
  if labels.ndim != 1 or labels.dtype.kind not in "iuU":
    raise ValueError(
      f"labels of shape {labels.shape} and type {labels.dtype} must be whole numbers or names, one "
      "for each item."
    )
  if labels.dtype.kind == "U":
    return (), labels.tolist()
  if (labels == collection.NO_LABEL).all():
    return (), [None] * count
  if labels.min() < 0:
    raise ValueError(f"labels hold {labels.min()}; give classes from 0 on, or -1 throughout.")
  names = tuple(class_names) or tuple(str(i) for i in range(int(labels.max()) + 1))
  if labels.max() >= len(names):
    raise ValueError(
      f"labels hold {labels.max()}, and data.class_names has {len(names)} names; add the others."
    )
  return names, [names[i] for i in labels.tolist()]
