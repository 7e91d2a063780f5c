"""Batches of packed windows, served by Grain.

Record `i` of a training dataset is the whole `i`-th global batch, or this process's rows of it.
An iterator's state is therefore one number, the same on every process and for every number of
processes, and a saved run may resume on another machine. Windows are visited in an order that
changes with every epoch and is computed, not stored: Grain's `index_shuffle` is a permutation of
`[0, n)` that answers for one index at a time, so any batch can be made without the ones before it.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import grain
import numpy as np

from latentlab.data import packing, prepare, synthetic, tokenizers
from latentlab.data.prepare import DataConfig

Batch: TypeAlias = dict[str, np.ndarray]
"""inputs, targets, positions, segment_ids (int32) and weights (float32), each `[b, T]`."""

# A record is a whole batch: two threads and a few records ahead hide its making.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@runtime_checkable
class Rows(Protocol):
  """A split as numbered rows; row numbers at `num_rows` or above are padding."""

  num_rows: int

  def order(self, indices: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers that training visits at the places `indices` of its endless sequence."""

  def rows(self, indices: np.ndarray) -> Batch: ...


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of `seq_length` targets over a split's tokens, one after another.

  Attributes:
    tokens: The split's tokens.
    tokenizer: Knows `<bos>` and padding.
    seq_length: `T`.
    packing: See `DataConfig`.
    evaluation: Read the last, partial window too, and score no document's end, which is no byte of
      the text. Training learns where documents end, and samples stop there.
    begins: Places where windows start, if not one after another.
    score_last: How many of a window's last targets carry weight; all if 0.
  """

  tokens: np.ndarray
  tokenizer: tokenizers.Tokenizer
  seq_length: int
  packing: str
  evaluation: bool
  begins: np.ndarray | None = None
  score_last: int = 0

  @property
  def num_rows(self) -> int:
    if self.begins is not None:
      return len(self.begins)
    targets = max(len(self.tokens) - 1, 0)
    return -(-targets // self.seq_length) if self.evaluation else targets // self.seq_length

  def order(self, indices: np.ndarray, seed: int) -> np.ndarray:
    return shuffled(indices, self.num_rows, seed)

  def rows(self, indices: np.ndarray) -> Batch:
    begin = indices * self.seq_length
    if self.begins is not None:
      begin = np.append(self.begins, len(self.tokens))[np.minimum(indices, self.num_rows)]
    places = begin[:, None] + np.arange(self.seq_length + 1)
    inside = places < len(self.tokens)
    ids = self.tokens[np.where(inside, places, 0)].astype(np.int32)
    ids = np.where(inside, ids, self.tokenizer.pad_id)
    inputs, targets, valid = ids[:, :-1], ids[:, 1:], inside[:, 1:]
    starts = (inputs == self.tokenizer.bos_id) & valid
    if self.packing == "stream":
      starts = np.zeros_like(starts)
    segment_ids, positions = packing.segments(starts)
    weights = valid
    if self.evaluation:
      weights = weights & (targets != self.tokenizer.bos_id)
    if self.score_last:
      weights = weights & (np.arange(self.seq_length) >= self.seq_length - self.score_last)
    return _batch(inputs, targets, np.where(valid, positions, 0), segment_ids * valid, weights)

  def in_documents(self, document_length: int) -> "Windows":
    """Windows that tell context lengths apart on one text.

    Every document is cut into pieces of `document_length` targets, its rest left out. A window is
    a segment of a piece, and the segments of a piece are all its targets, each once; or, where only
    the last targets of a piece are scored, the one window that ends with the piece.
    """
    n, d = self.seq_length, document_length
    if d < n:
      raise ValueError(f"document_length={d} must be at least seq_length={n}.")
    if self.score_last:
      segments = np.array([d - n])
    elif d % n:
      raise ValueError(
        f"document_length={d} must be a multiple of seq_length={n}, so that every length scores "
        "the same targets."
      )
    else:
      segments = np.arange(0, d, n)
    first = np.flatnonzero(self.tokens == self.tokenizer.bos_id)
    targets = np.diff(first, append=len(self.tokens)) - 1
    if not (targets >= d).any():
      raise ValueError(
        f"document_length={d} is longer than every document of the split, the longest of which has "
        f"{targets.max(initial=0)} tokens; shorten it."
      )
    pieces = [b + np.arange(0, t - d + 1, d) for b, t in zip(first, targets, strict=True) if t >= d]
    begins = (np.concatenate(pieces)[:, None] + segments).ravel()
    return dataclasses.replace(self, begins=begins)

  def raw_bytes(self, indices: np.ndarray | None = None) -> bytes:
    """The bytes of the tokens that the given windows cover, in corpus order, each once."""
    if indices is None:
      return self.tokenizer.decode_bytes(self.tokens)
    seen = np.zeros(len(self.tokens), bool)
    for begin in np.unique(indices[indices < self.num_rows]) * self.seq_length:
      seen[begin : begin + self.seq_length + 1] = True
    return self.tokenizer.decode_bytes(self.tokens[seen])


@dataclasses.dataclass(frozen=True)
class Task:
  """A synthetic task; row `i` depends on `stream` and `i` alone."""

  task: synthetic.Task
  tokenizer: tokenizers.Tokenizer
  seq_length: int
  stream: int
  num_rows: int

  def __post_init__(self):
    synthetic.check_length(self.task, self.seq_length, "config.data")

  def order(self, indices: np.ndarray, seed: int) -> np.ndarray:
    return indices + (seed << 30)  # Every seed has rows of its own.

  def rows(self, indices: np.ndarray) -> Batch:
    ids = np.full((len(indices), self.seq_length + 1), self.tokenizer.pad_id, np.int32)
    ids[:, 0] = self.tokenizer.bos_id
    answers = np.zeros(ids.shape, bool)
    lengths = np.zeros(len(indices), np.int64)
    for j, index in enumerate(indices.tolist()):
      if index >= self.num_rows:
        continue
      rng = np.random.default_rng((self.stream, index))
      symbols, asked = self.task(rng, self.seq_length)
      ids[j, 1 : len(symbols) + 1] = symbols
      answers[j, 1 : len(symbols) + 1] = asked
      lengths[j] = len(symbols)
    valid = np.arange(self.seq_length) < lengths[:, None]
    positions = np.where(valid, np.arange(self.seq_length), 0)
    return _batch(ids[:, :-1], ids[:, 1:], positions, valid, answers[:, 1:])


@dataclasses.dataclass(frozen=True)
class _Source:
  """Grain's random access to a process's rows of global batches."""

  rows: Rows
  batch_size: int
  process_index: int
  process_count: int
  num_batches: int
  seed: int | None = None  # `None` visits rows as they are numbered.

  def __len__(self) -> int:
    return self.num_batches

  def __getitem__(self, index: int) -> Batch:
    b = self.batch_size // self.process_count
    begin = index * self.batch_size + self.process_index * b
    indices = np.arange(begin, begin + b)
    return self.rows.rows(indices if self.seed is None else self.rows.order(indices, self.seed))


@dataclasses.dataclass(frozen=True)
class Data:
  """A corpus or task, ready to train on.

  Attributes:
    config: What it was built from.
    tokenizer: Its vocabulary is the model's.
    splits: "train" and, if there is one, "validation"; what `eval_batches` accepts.
    training: The rows that training visits.
    batch_size: Sequences of a global batch.
    process_index: This process.
    process_count: All processes; each makes `batch_size / process_count` rows.
    summary: What the corpus is: digests, and raw bytes, tokens, documents and windows by split.
  """

  config: DataConfig
  tokenizer: tokenizers.Tokenizer
  splits: Mapping[str, Rows]
  training: Rows
  batch_size: int
  process_index: int
  process_count: int
  summary: Mapping[str, Any]

  def train_iterator(self, seed: int) -> grain.DatasetIterator[Batch]:
    """Training batches without end; `get_state` is the number of batches given out."""
    if not 0 <= seed < 2**32:
      raise ValueError(f"{seed=} is not in [0, 2**32).")
    endless = sys.maxsize // (2 * self.batch_size)
    batches = self._dataset(self.training, endless, self.batch_size, seed)
    return iter(batches.to_iter_dataset(_READ_OPTIONS))

  def eval_batches(
    self,
    split: str,
    max_batches: int | None = None,
    seq_length: int | None = None,
    *,
    document_length: int | None = None,
    score_last: int | None = None,
  ) -> grain.IterDataset[Batch]:
    """A split's batches in corpus order, once, every target once; the last is padded.

    Documents lie in a random order, so the first `max_batches` are a fair sample.

    Args:
      split: Its name.
      max_batches: How many of its batches; all if `None`.
      seq_length: Targets of a window; as in training if `None`.
      document_length: Cut pieces of this many targets from documents, and these into windows; a
        batch then holds the windows of as many pieces as training's batch has rows, so that every
        `seq_length` scores the same targets of the same pieces (see `Windows.in_documents`).
      score_last: Only the last targets of each window, or piece, carry weight; all if `None`.
    """
    rows, batch_size = self._split(split), self.batch_size
    if seq_length is not None:
      if seq_length < 1:
        raise ValueError(f"{seq_length=} of an evaluation must be at least 1.")
      rows = dataclasses.replace(rows, seq_length=seq_length)
    if score_last is not None:
      if not 1 <= score_last <= rows.seq_length:
        raise ValueError(
          f"{score_last=} of an evaluation must lie in [1, seq_length={rows.seq_length}]."
        )
      rows = dataclasses.replace(self._windows(rows, "score_last"), score_last=score_last)
    if document_length is not None:
      rows = self._windows(rows, "document_length").in_documents(document_length)
      if not rows.score_last:
        batch_size *= document_length // rows.seq_length
    num_batches = -(-rows.num_rows // batch_size)
    if max_batches is not None:
      num_batches = min(num_batches, max_batches)
    return self._dataset(rows, num_batches, batch_size).to_iter_dataset(_READ_OPTIONS)

  def raw_bytes(self, split: str, max_batches: int | None = None) -> bytes:
    """The raw bytes of a split, or of what `eval_batches(split, max_batches)` shows of it."""
    windows = self._windows(self._split(split))
    if max_batches is None:
      return windows.raw_bytes()
    return windows.raw_bytes(np.arange(max_batches * self.batch_size))

  def whole_corpus_bytes(self) -> bytes:
    """The raw bytes of the training split as it is without `data.max_train_bytes`."""
    if not self.config.max_train_bytes:
      return self.raw_bytes("train")
    whole = dataclasses.replace(self.config, tokenizer="bytes", vocab_size=0, max_train_bytes=0)
    return build(whole, batch_size=1).raw_bytes("train")

  def split_tokens(self, split: str) -> np.ndarray:
    """The tokens of a split, documents in order, each behind its `<bos>`."""
    return self._windows(self._split(split), "tokens of its own").tokens

  def seen_bytes(self, num_batches: int, seed: int) -> bytes:
    """The raw bytes that the first `num_batches` of `train_iterator(seed)` showed, each once."""
    windows = self._windows(self.training)
    # The first epoch sees every window.
    count = min(num_batches * self.batch_size, windows.num_rows)
    return windows.raw_bytes(windows.order(np.arange(count), seed))

  def _split(self, name: str) -> Rows:
    if name not in self.splits:
      raise ValueError(
        f"split={name!r} does not exist; choose from {sorted(self.splits)}"
        " (data.validation_fraction=0 makes no validation split)."
      )
    return self.splits[name]

  def _windows(self, rows: Rows, what: str = "raw bytes") -> Windows:
    if not isinstance(rows, Windows):
      raise ValueError(f"data.source={self.config.source!r} has no {what}; use a corpus.")
    return rows

  def _dataset(
    self, rows: Rows, num_batches: int, batch_size: int, seed: int | None = None
  ) -> grain.MapDataset:
    return grain.MapDataset.source(
      _Source(rows, batch_size, self.process_index, self.process_count, num_batches, seed)
    )


def build(
  data_config: Mapping[str, Any] | DataConfig,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Data:
  """Makes or finds the corpus and checks that it can be trained on.

  Args:
    data_config: The fields of `DataConfig`.
    batch_size: Sequences of a global batch.
    process_index: This process.
    process_count: All processes.

  Raises:
    ValueError: the corpus, or its fit with the fields, is bad.
  """
  config = DataConfig.of(data_config)
  place = (batch_size, process_index, process_count)
  check_place(*place)
  if config.source == "synthetic":
    return _synthetic(config, *place)
  file = prepare.prepare(config, progress=process_index == 0)
  make = functools.partial(
    Windows, tokenizer=file.tokenizer, seq_length=config.seq_length, packing=config.packing
  )
  training = make(tokens=file.split("train"), evaluation=False)
  if not training.num_rows:
    raise ValueError(
      f"data.seq_length={config.seq_length} is longer than the training split of "
      f"{str(file.path)!r}, which has {len(training.tokens)} tokens; shorten it or "
      "use more text."
    )
  # A document of no text is a lone <bos>, which has no target.
  splits = {name: make(tokens=file.split(name), evaluation=True) for name in file.splits}
  splits = {name: rows for name, rows in splits.items() if rows.num_rows}
  summary = file.summary | {"train_windows": training.num_rows}
  return Data(config, file.tokenizer, splits, training, *place, summary=summary)


def _synthetic(config: DataConfig, *place: int) -> Data:
  task = synthetic.make(config.task, config.task_options)
  if config.tokenizer not in ("", "bytes") or config.vocab_size not in (
    0,
    tokenizers.ByteTokenizer.vocab_size,
  ):
    raise ValueError(
      f"data.source='synthetic' is made of bytes: data.tokenizer="
      f"{config.tokenizer!r} and data.vocab_size={config.vocab_size} must be 'bytes'"
      " and 0."
    )
  tokenizer = tokenizers.ByteTokenizer()
  make = functools.partial(Task, task, tokenizer, config.seq_length)
  splits = {"train": make(stream=0, num_rows=1024), "validation": make(stream=1, num_rows=1024)}
  summary = {"corpus": config.task, "options": dataclasses.asdict(task)}
  summary |= {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
  training = make(stream=0, num_rows=sys.maxsize)
  return Data(config, tokenizer, splits, training, *place, summary=summary)


def _batch(inputs, targets, positions, segment_ids, weights) -> Batch:
  return {
    "inputs": np.ascontiguousarray(inputs, np.int32),
    "targets": np.ascontiguousarray(targets, np.int32),
    "positions": np.ascontiguousarray(positions, np.int32),
    "segment_ids": np.ascontiguousarray(segment_ids, np.int32),
    "weights": np.ascontiguousarray(weights, np.float32),
  }


def check_place(batch_size: int, process_index: int, process_count: int) -> None:
  """Raises where processes cannot share batches."""
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(f"batch_size={batch_size} must be a positive multiple of {process_count=}.")
  if not 0 <= process_index < process_count:
    raise ValueError(f"{process_index=} is not in [0, {process_count=}).")


def shuffled(indices: np.ndarray, num_rows: int, seed: int) -> np.ndarray:
  """Row numbers at the places `indices` of an endless sequence, of every row once an epoch."""
  out = np.empty(len(indices), np.int64)
  for j, index in enumerate(indices.tolist()):
    epoch, place = divmod(index, num_rows)
    out[j] = grain.experimental.index_shuffle(
      place, max_index=num_rows - 1, seed=epoch_seed(seed, epoch), rounds=4
    )
  return out


@functools.lru_cache(maxsize=64)
def epoch_seed(seed: int, epoch: int) -> int:
  """32 bits, unrelated between epochs and between neighbouring seeds."""
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
