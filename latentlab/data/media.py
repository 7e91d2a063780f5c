"""Images and sounds as training data: rows and batches.

Batches are served by Grain just as those of texts are (`batches.py`): a record is a whole global
batch, and the order of an epoch, and every random crop in it, follows from the seed, the epoch and
the item alone. Captions are texts of bytes.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from latentlab.data import batches, collection, tokenizers
from latentlab.data.batches import Batch
from latentlab.data.collection import Collection
from latentlab.data.media_sources import SOURCES, MediaConfig, arrays, find

__all__ = [
  "SOURCES",
  "MediaConfig",
  "MediaData",
  "MediaRows",
  "TrainingRows",
  "build",
  "build_arrays",
]


@dataclasses.dataclass(frozen=True)
class MediaRows:
  """A split as numbered rows, one per item; row numbers at `num_rows` or above are padding.

  Attributes:
    collection: All items.
    members: The split's items, int64.
  """

  collection: Collection
  members: np.ndarray

  @property
  def num_rows(self) -> int:
    return len(self.members)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def class_names(self) -> Sequence[str]:
    return self.collection.class_names

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """Classes, int32; -1 for none."""
    return self.collection.labels[self.members]

  @functools.cached_property
  def captions(self) -> Sequence[str]:
    """Texts; empty for none."""
    return [self.collection.records[i].caption for i in self.members]

  @functools.cached_property
  def names(self) -> Sequence[str]:
    return [self.collection.records[i].name for i in self.members]

  def item(self, i: int) -> np.ndarray:
    """The medium of row `i` as evaluations see it, padded."""
    return self.rows(np.array([i]))["media"][0]

  def order(self, indices: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers that training visits at the places `indices` of its endless sequence."""
    return batches.shuffled(indices, self.num_rows, seed)

  def rows(self, indices: np.ndarray, draws: np.ndarray | None = None) -> Batch:
    """A batch: `media`, `labels`, `weights`, and of sounds `lengths`, the samples not padded.

    Args:
      indices: Row numbers.
      draws: Seeds of the random transformations; as evaluations see it if `None`.
    """
    media = np.zeros((len(indices), *self.collection.shape), np.float32)
    labels = np.full(len(indices), collection.NO_LABEL, np.int32)
    lengths = np.zeros(len(indices), np.int32)
    inside = indices < self.num_rows
    for j in np.flatnonzero(inside).tolist():
      row = int(indices[j])
      rng = None if draws is None else np.random.default_rng((int(draws[j]), row))
      example = self.collection.example(int(self.members[row]), rng)
      media[j, : len(example)] = example
      labels[j], lengths[j] = self.labels[row], len(example)
    batch = {"media": media, "labels": labels, "weights": inside.astype(np.float32)}
    return batch | ({"lengths": lengths} if self.collection.kind == "audio" else {})


@dataclasses.dataclass(frozen=True)
class TrainingRows:
  """Rows as training sees them: a row number holds the seed of its random transformations too.

  That seed is one of 32 bits for each seed of a run and epoch, so that an item is never cropped
  twice alike for no reason, and a resumed run crops it just as the first one would have.
  """

  split: MediaRows

  @property
  def num_rows(self) -> int:
    return self.split.num_rows

  def order(self, indices: np.ndarray, seed: int) -> np.ndarray:
    epochs = (indices // self.num_rows).tolist()
    draws = np.array([batches.epoch_seed(seed, epoch) for epoch in epochs], np.int64)
    return (draws << _ROW_BITS) + self.split.order(indices, seed)

  def rows(self, indices: np.ndarray) -> Batch:
    return self.split.rows(indices & ((1 << _ROW_BITS) - 1), indices >> _ROW_BITS)


_ROW_BITS = 31


@dataclasses.dataclass(frozen=True)
class MediaData(batches.Data):
  """Images or sounds, ready to train on; see `batches.Data`.

  Attributes:
    config: What it was built from.
    splits: "train" and, if there is one, "validation", as evaluations see them.
    training: The training split as training sees it.
    summary: What the collection is: its digest, items by split, the shape of an example, classes.
  """

  config: MediaConfig
  splits: Mapping[str, MediaRows]
  training: TrainingRows

  def eval_batches(
    self, split: str, max_batches: int | None = None, **windows: int | None
  ) -> grain.IterDataset[Batch]:
    """A split's batches, every item once; the last is padded. The first are a fair sample."""
    if asked := {k: v for k, v in windows.items() if v is not None}:
      raise ValueError(
        f"{asked} of an evaluation are of texts, and data.source={self.config.source!r} has no "
        "windows; leave them out."
      )
    return super().eval_batches(split, max_batches)


def build(
  data_config: Mapping[str, Any] | MediaConfig,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> MediaData:
  """Finds the media that the fields of `config.data` name; arguments as of `batches.build`.

  Raises:
    ValueError: the media, or their fit with the fields, are bad.
  """
  config = MediaConfig.of(data_config)
  return _data(config, find(config), batch_size, process_index, process_count)


def build_arrays(
  media: np.ndarray,
  labels: np.ndarray | Sequence[int | str] | None = None,
  captions: Sequence[str] | None = None,
  *,
  batch_size: int,
  names: Sequence[str] | None = None,
  lengths: np.ndarray | None = None,
  fields: Mapping[str, Any] | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> MediaData:
  """Media in memory.

  Args:
    media: Images or sounds; see `media_sources.arrays`, as for the next two.
    labels: Classes.
    captions: Texts.
    batch_size: Rows of a global batch.
    names: Decide the split; the numbers of the items if `None`.
    lengths: Samples of each sound.
    fields: Those of `MediaConfig`, `source` and `path` left out.
    process_index: This process.
    process_count: All processes.
  """
  config = MediaConfig(**({"source": "arrays", "path": "memory"} | dict(fields or {})))
  found = arrays(config, media, labels, captions, names, lengths)
  return _data(config, found, batch_size, process_index, process_count)


def _data(config: MediaConfig, found: Collection, *place: int) -> MediaData:
  batches.check_place(*place)
  found = _captioned(found, config.class_captions)
  names = [record.name for record in found.records]
  members = collection.split(names, config.validation_fraction, config.split_pattern)
  splits = {name: MediaRows(found, numbers) for name, numbers in members.items()}
  tokenizer = tokenizers.ByteTokenizer()
  summary = {
    "corpus": config.source,
    "media_sha256": found.digest,
    "items": {name: rows.num_rows for name, rows in splits.items()},
    "shape": list(found.shape),
    "sample_rate": found.sample_rate,
    "num_classes": len(found.class_names),
    "tokenizer": tokenizer.kind,
    "vocab_size": tokenizer.vocab_size,
  }
  training = TrainingRows(splits["train"])
  return MediaData(config, tokenizer, splits, training, *place, summary=summary)


def _captioned(found: Collection, captions: Sequence[str]) -> Collection:
  """Gives items the captions of their classes."""
  if not captions:
    return found
  if len(captions) != len(found.class_names):
    raise ValueError(
      f"data.class_captions has {len(captions)} captions for {len(found.class_names)} classes, "
      f"{tuple(found.class_names)}; give one for each."
    )
  by_class = dict(zip(found.class_names, captions, strict=True))
  records = [
    r if r.label is None else dataclasses.replace(r, caption=by_class[r.label])
    for r in found.records
  ]
  return dataclasses.replace(found, records=records)
