"""Sources of sounds, and what is done to a sound before a model sees it.

Sounds are float32 in [-1, 1], `[S, 1]`: one channel, all at one sample rate, from the moment they
are read.
"""

import dataclasses
import hashlib
import io
import math
import pathlib
import re
import struct
from collections.abc import Sequence

import numpy as np
from scipy import signal
from scipy.io import wavfile

from latentlab.data import collection, listing
from latentlab.data import vowels as vowels_lib
from latentlab.data.collection import Collection, Record


@dataclasses.dataclass(frozen=True)
class Segment:
  """Cuts a sound that is too long: training anywhere, evaluations at its beginning.

  Attributes:
    num_samples: Of an example, at most.
  """

  num_samples: int

  def __call__(self, sound: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    spare = max(len(sound) - self.num_samples, 0)
    begin = rng.integers(0, spare + 1) if spare and rng is not None else 0
    return sound[begin : begin + self.num_samples]


def folder(
  path: str,
  class_names: Sequence[str],
  sample_rate: int,
  num_samples: int,
  label_pattern: str = "",
  peak: float = 0.0,
) -> Collection:
  """The wav files of a folder, or those that a jsonl file names; see `listing.manifest`.

  In a folder, the transcript of `x.wav` is the text of `x.txt`: all sounds have one, or none has.

  Args:
    path: Of the folder or the jsonl file.
    class_names: See `collection.class_names`.
    sample_rate: To which all are resampled; 0 for the files' own, which then is the same.
    num_samples: Of an example, at most; 0 for as many as the longest sound has.
    label_pattern: A regular expression with one group: what it finds in a file's name is its label.
      Without it a sound's label is the subfolder it lies in, or the jsonl file's.
    peak: Largest magnitude, to which each sound is scaled; 0 leaves it as it is.
  """
  if path.endswith(".jsonl"):
    records, paths = listing.manifest(path, "audio")
  else:
    records, paths = listing.folder(path, (".wav",))
    records = _with_transcripts(records, paths)
  if label_pattern:
    records = _labelled(records, label_pattern)
  lengths, contents, first = [], [], None
  for file in paths:
    content = listing.content(file)
    rate, sound = decode(content, str(file))
    first = first or (file, rate)
    if not sample_rate and rate != first[1]:
      raise ValueError(
        f"data.path: {str(file)!r} has {rate} samples a second, and {str(first[0])!r} has "
        f"{first[1]}; set data.sample_rate to make them alike."
      )
    lengths.append(_resampled_length(len(sound), rate, sample_rate or rate))
    scaled = repr(peak).encode() if peak else b""
    contents.append(hashlib.sha256(content + scaled).digest())
  to_rate = sample_rate or first[1]
  num_samples = num_samples or max(lengths)

  def read(item: int) -> np.ndarray:
    rate, sound = decode(listing.content(paths[item]), str(paths[item]))
    return _scaled(resample(sound, rate, to_rate), peak)

  return Collection(
    "audio",
    records,
    collection.class_names(records, class_names),
    (num_samples, 1),
    read=read,
    transform=Segment(num_samples),
    digest=collection.digest(records, contents),
    sample_rate=to_rate,
  )


def vowels(sample_rate: int, num_samples: int) -> Collection:
  """The embedded sounds; see `data.vowels`."""
  sample_rate = sample_rate or vowels_lib.SAMPLE_RATE
  sounds, lengths, records = vowels_lib.make(sample_rate)
  names = collection.class_names(records)
  return in_memory(sounds, records, names, sample_rate, num_samples, lengths)


def in_memory(
  sounds: np.ndarray,
  records: Sequence[Record],
  class_names: Sequence[str],
  sample_rate: int,
  num_samples: int,
  lengths: np.ndarray | None = None,
) -> Collection:
  """A collection of sounds `[n, S]` or `[n, S, 1]`, int16, or floats in [-1, 1].

  Args:
    sounds: At one sample rate.
    records: Of each.
    class_names: What labels name.
    sample_rate: Of the sounds; 0 if unknown.
    num_samples: Of an example, at most; 0 for `S`.
    lengths: Samples of each sound, padded on the right; all of them if `None`.
  """
  sounds = sounds[..., None] if sounds.ndim == 2 else sounds
  lengths = np.full(len(sounds), sounds.shape[1]) if lengths is None else lengths
  if lengths.shape != (len(sounds),) or lengths.min() < 1 or lengths.max() > sounds.shape[1]:
    raise ValueError(
      f"lengths of shape {lengths.shape} from {lengths.min()} to {lengths.max()} do not fit sounds "
      f"of shape {sounds.shape}; give each sound's samples."
    )
  num_samples = num_samples or int(lengths.max())
  return Collection(
    "audio",
    records,
    class_names,
    (num_samples, 1),
    read=lambda item: as_floats(sounds[item, : lengths[item]]),
    transform=Segment(num_samples),
    digest=collection.digest(
      records, (sound[:n].tobytes() for sound, n in zip(sounds, lengths, strict=True))
    ),
    sample_rate=sample_rate,
  )


def decode(content: bytes, name: str) -> tuple[int, np.ndarray]:
  """Reads a wav file: its sample rate, and its sound `[n, 1]`, the mean of its channels."""
  try:
    rate, samples = wavfile.read(io.BytesIO(content))
  except (ValueError, EOFError, struct.error) as e:
    raise ValueError(
      f"data.path: {name!r} cannot be read as a wav file ({e}); convert it, or leave it out."
    ) from e
  if not samples.size:
    raise ValueError(f"data.path: {name!r} has no samples; leave it out.")
  sound = as_floats(samples)
  if not np.isfinite(sound).all():
    raise ValueError(f"data.path: {name!r} has samples that are no numbers; leave it out.")
  return rate, sound.mean(1, keepdims=True) if sound.ndim == 2 else sound[:, None]


def as_floats(sound: np.ndarray) -> np.ndarray:
  """Integers by their whole range, or floats, which are clipped, as float32 in [-1, 1]."""
  if sound.dtype == np.uint8:  # Wav files of 8 bits are unsigned.
    return (sound.astype(np.float32) - 128) / 128
  if np.issubdtype(sound.dtype, np.signedinteger):
    return (sound / -float(np.iinfo(sound.dtype).min)).astype(np.float32)
  return np.clip(sound.astype(np.float32), -1, 1)


def resample(sound: np.ndarray, rate: int, to_rate: int) -> np.ndarray:
  """Changes the sample rate with an antialiasing filter."""
  if rate == to_rate:
    return sound
  common = math.gcd(rate, to_rate)
  # The filter overshoots.
  return np.clip(signal.resample_poly(sound, to_rate // common, rate // common), -1, 1)


def _scaled(sound: np.ndarray, peak: float) -> np.ndarray:
  loudest = np.abs(sound).max()
  return sound * np.float32(peak / loudest) if peak and loudest else sound


def _resampled_length(length: int, rate: int, to_rate: int) -> int:
  return -(-length * to_rate // rate)


def _with_transcripts(records: list[Record], paths: list[pathlib.Path]) -> list[Record]:
  texts = [path.with_suffix(".txt") for path in paths]
  missing = [t for t in texts if not t.is_file()]
  if len(missing) == len(texts):
    return records
  if missing:
    raise ValueError(
      f"data.path: {str(missing[0])!r}, the transcript of a sound, is missing, as {len(missing)} "
      f"of {len(texts)}; add them, or remove the others."
    )
  captions = []
  for text in texts:
    try:
      captions.append(listing.content(text).decode("utf-8").strip())
    except UnicodeDecodeError as e:
      raise ValueError(f"data.path: {str(text)!r} is not utf-8 ({e}); convert it.") from e
  return [dataclasses.replace(r, caption=c) for r, c in zip(records, captions, strict=True)]


def _labelled(records: list[Record], pattern: str) -> list[Record]:
  try:
    compiled = re.compile(pattern)
  except re.error as e:
    raise ValueError(f"data.label_pattern={pattern!r} is no regular expression ({e}).") from e
  if compiled.groups != 1:
    raise ValueError(
      f"data.label_pattern={pattern!r} has {compiled.groups} groups; put the label, and nothing "
      "else, in parentheses."
    )
  labelled = []
  for record in records:
    found = compiled.search(pathlib.PurePosixPath(record.name).name)
    if found is None or not found[1]:
      raise ValueError(
        f"data.path: data.label_pattern={pattern!r} finds no label in {record.name!r}; mend the "
        "pattern, or leave the file out."
      )
    labelled.append(dataclasses.replace(record, label=found[1]))
  return labelled
