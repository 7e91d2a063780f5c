"""Latents on disk: what a tokenizer's encoder made of a media data set, encoded once.

A folder with `meta.json` and, for each split, the means of all its items one after another, where
each item's begin, their labels and their captions. Noise is drawn when they are read for training,
anew in every epoch, so the means are all that is kept (and the scales, of an encoder that has
some; with a codebook, the means are the codes' vectors, and the codes are kept beside them).
NumPy files without pickles; the means are mapped, not read.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from latentlab.data import files

_META = "meta.json"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LatentItem:
  """One image or clip.

  Attributes:
    means: Its latents before noise, `[n, Z]`.
    label: Its class; -1 for none.
    caption: Its text.
    scales: Standard deviation of each channel's noise, where an encoder gives it.
    codes: Numbers of the vectors that `means` are, of a tokenizer with a codebook.
  """

  means: np.ndarray
  label: int = -1
  caption: str = ""
  scales: np.ndarray | None = None
  codes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class LatentSplit:
  """A split's items, in the order of its media's rows."""

  means: np.ndarray
  offsets: np.ndarray
  labels: np.ndarray
  captions: Sequence[str]
  scales: np.ndarray | None
  codes: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.labels)

  @property
  def lengths(self) -> np.ndarray:
    return np.diff(self.offsets)

  def item(self, index: int) -> LatentItem:
    span = slice(self.offsets[index], self.offsets[index + 1])
    return LatentItem(
      np.asarray(self.means[span]),
      int(self.labels[index]),
      self.captions[index],
      None if self.scales is None else np.asarray(self.scales[span]),
      None if self.codes is None else np.asarray(self.codes[span]),
    )


@dataclasses.dataclass(frozen=True)
class LatentStore:
  """A folder of latents.

  Attributes:
    path: The folder.
    meta: `modality`, `dim`, `noise` (kind and std), `codebook_size`, `num_classes`, `class_names`,
      `mean` and `std` of all training latents with their noise, `key`, the digest of what they were
      made from, and `latent_tokenizer`, that of the tokenizer alone.
  """

  path: pathlib.Path
  meta: Mapping[str, Any]

  @functools.cached_property
  def splits(self) -> Mapping[str, LatentSplit]:
    return {name: _read_split(self.path, name) for name in self.meta["splits"]}


def read(path: str | os.PathLike) -> LatentStore:
  """Opens a folder of latents.

  Raises:
    ValueError: it is none, or not of this version.
  """
  path = pathlib.Path(path)
  if not (path / _META).is_file():
    raise ValueError(f"{str(path)!r} holds no latents ({_META} is missing); encode them first.")
  meta = json.loads((path / _META).read_text("utf-8"))
  if meta.get("version") != _VERSION:
    raise ValueError(
      f"{str(path)!r} holds latents of version {meta.get('version')}, and this is {_VERSION}; "
      "delete the folder, and they are encoded anew."
    )
  return LatentStore(path, meta)


def write(
  path: str | os.PathLike, splits: Mapping[str, Iterable[LatentItem]], meta: Mapping[str, Any]
) -> LatentStore:
  """Writes a folder of latents, whole or not at all.

  Args:
    path: The folder. If another process makes it meanwhile, of the same things, that one is kept.
    splits: Items by split.
    meta: See `LatentStore`; `mean` and `std` are added.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
  try:
    moments = {name: _write_split(temporary, name, items) for name, items in splits.items()}
    noise_std = _noise_std(meta["noise"])
    mean, variance = moments["train"]
    stats = {"mean": mean, "std": float(np.sqrt(variance + noise_std**2))}
    text = dict(meta) | stats | {"version": _VERSION, "splits": sorted(moments)}
    files.write_json(temporary / _META, text)
    try:
      temporary.rename(path)
    except OSError:
      if not (path / _META).is_file():
        raise
      shutil.rmtree(temporary)  # Another process was first.
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise
  return read(path)


def digest(*parts: Any) -> str:
  """A short name for what JSON can say."""
  text = json.dumps(parts, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _noise_std(noise: Mapping[str, Any]) -> float:
  """Standard deviation that a noise of its own adds to channels; 0 where items bring theirs."""
  if noise.get("on_sphere"):  # Latents are put back on it, where they are as long as their means.
    return 0.0
  kind, std = noise["kind"], noise.get("std", 0.0)
  # A scale drawn from N(0, (std / 0.8)^2) makes noise of that standard deviation.
  return {"gaussian_scale": std / 0.8, "fixed": std}.get(kind, 0.0)


def _write_split(
  folder: pathlib.Path, name: str, items: Iterable[LatentItem]
) -> tuple[float, float]:
  means, scales, codes, lengths, labels, captions = [], [], [], [], [], []
  for item in items:
    if not np.isfinite(item.means).all():
      raise ValueError(
        f"item {len(lengths)} of split {name!r} has latents that are not finite: the tokenizer "
        "diverged, or the item is damaged."
      )
    means.append(np.asarray(item.means, np.float32))
    lengths.append(len(item.means))
    labels.append(item.label)
    captions.append(item.caption)
    if item.scales is not None:
      scales.append(np.asarray(item.scales, np.float32))
    if item.codes is not None:
      codes.append(np.asarray(item.codes, np.int32))
  if not means:
    raise ValueError(f"split {name!r} has no item to encode.")
  joined = np.concatenate(means)
  np.save(folder / f"{name}.means.npy", joined)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  np.savez(folder / f"{name}.index.npz", offsets=offsets, labels=np.asarray(labels, np.int32))
  files.write_json(folder / f"{name}.captions.json", {"captions": captions})
  if codes:
    np.save(folder / f"{name}.codes.npy", np.concatenate(codes))
  variance = float(joined.astype(np.float64).var())
  if scales:
    np.save(folder / f"{name}.scales.npy", np.concatenate(scales))
    variance += float(np.square(np.concatenate(scales).astype(np.float64)).mean())
  return float(joined.astype(np.float64).mean()), variance


def _read_split(folder: pathlib.Path, name: str) -> LatentSplit:
  means = np.load(folder / f"{name}.means.npy", mmap_mode="r", allow_pickle=False)
  with np.load(folder / f"{name}.index.npz", allow_pickle=False) as index:
    offsets, labels = index["offsets"], index["labels"]
  captions = json.loads((folder / f"{name}.captions.json").read_text("utf-8"))["captions"]
  scales, codes = (
    np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None
    for path in (folder / f"{name}.scales.npy", folder / f"{name}.codes.npy")
  )
  if offsets[-1] != len(means) or not len(offsets) - 1 == len(labels) == len(captions):
    raise ValueError(f"the latents in {str(folder)!r} are damaged; delete the folder.")
  return LatentSplit(means, offsets, labels, captions, scales, codes)
