"""Rows of items: tokens and latents in one sequence, packed, and routed to their losses.

A document is a prompt and a run of latents, or the other way round. With `t` for tokens and `z` for
latents,

  class     `class z1 .. zN`, and `<end>` where it has to be learnt
  text      `<bos> t .. t <begin> z1 .. zN <end>`
  caption   `<bos> <begin> z1 .. zN <end> t .. t`

and `both` has each item once as `text` and once as `caption`. Documents of a row see only
themselves. As the order of items is all that the papers' code has of a class-conditional sequence,
`class` has no token before its run; elsewhere these switch the head on and off (LatentLM, section
3.1, https://arxiv.org/abs/2412.08635).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentlab.data import media as media_lib
from latentlab.data import tokenizers
from latentlab.data.batches import Batch, Data, check_place, shuffled
from latentlab.data.latent_store import LatentItem, LatentSplit, LatentStore

CONDITIONS = ("class", "text", "caption", "both", "none")


@dataclasses.dataclass(frozen=True)
class LatentDataConfig:
  """The fields of `config.data` where latents are trained on.

  Attributes:
    source: "latents".
    modality: What the latents are called.
    media: Where images or clips come from: fields of `MediaConfig`.
    tokenizer_run: Workdir of the tokenizer's run; as empty, `tokenizer` beside this run's own
      files, trained first from `config.tokenizer`.
    condition: What documents are made of: "class", "text", "caption", "both", or "none" (`class`
      with one class for all).
    seq_length: Places of a row; the longest document's if 0.
    documents_per_row: Documents packed into a row; as many as surely fit if 0.
    max_text: Tokens of text that a document has at most; longer texts are cut.
    cache_dir: As of `DataConfig`.
  """

  source: str = "latents"
  modality: str = "image"
  media: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer_run: str = ""
  condition: str = "class"
  seq_length: int = 0
  documents_per_row: int = 0
  max_text: int = 64
  cache_dir: str = ""

  def __post_init__(self):
    if self.condition not in CONDITIONS:
      raise ValueError(f"data.condition={self.condition!r} is unknown; choose from {CONDITIONS}.")
    for name in ("seq_length", "documents_per_row", "max_text"):
      if getattr(self, name) < 0:
        raise ValueError(f"data.{name}={getattr(self, name)} must not be negative.")

  @classmethod
  def of(cls, fields: Mapping[str, Any]) -> "LatentDataConfig":
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
      raise ValueError(f"config.data has no field {unknown}; choose from {known}.")
    return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Document:
  """A sequence of items; one of `n` items fills `n - 1` places of a row.

  Attributes:
    tokens: Its tokens; at latents, what stands in for them.
    is_latent: Where its latents are.
    opens: Items behind which a latent may follow that are none themselves.
    droppable: Tokens of the prompt, which training replaces now and then.
    scored: Targets that the softmax is trained on.
    item: Whose latents these are.
  """

  tokens: np.ndarray
  is_latent: np.ndarray
  opens: np.ndarray
  droppable: np.ndarray
  scored: np.ndarray
  item: LatentItem


@dataclasses.dataclass(frozen=True)
class Documents:
  """Makes documents.

  Attributes:
    tokens: `models.latentlm.SpecialTokens`, or what looks like it.
    tokenizer: Of texts.
    condition: See `LatentDataConfig`.
    max_text: See there.
    stop: Of the modality: whether the softmax learns where runs end.
    modality: Number of the modality.
  """

  tokens: Any
  tokenizer: tokenizers.Tokenizer
  condition: str
  max_text: int
  stop: str
  modality: int = 0

  def prompt(self, label: int | None = None, text: str | None = None) -> np.ndarray:
    """The tokens before a run of latents."""
    if self.condition in ("class", "none"):
      label = 0 if self.condition == "none" else label
      if label is None or text is not None:
        raise ValueError("this model draws from classes: give a label, and no text")
      return np.array([self.tokens.class_token(label)])
    begin = [self.tokens.begin(self.modality)]
    if self.condition == "caption" and text:
      raise ValueError("this model writes captions and reads none: give no text")
    return np.concatenate([[self.tokenizer.bos_id], self._text(text or ""), begin])

  def captioned(self, count: int) -> np.ndarray:
    """The tokens before a caption: a whole run of `count` latents, closed."""
    special = self.tokens
    run = [special.latent(self.modality)] * count
    return np.array(
      [self.tokenizer.bos_id, special.begin(self.modality), *run, special.end(self.modality)]
    )

  def make(self, item: LatentItem, caption_first: bool) -> Document:
    """The document of an item."""
    count, latent = len(item.means), self.tokens.latent(self.modality)
    run = np.full(count, latent)
    if self.condition in ("class", "none"):
      head = self.prompt(item.label)
      tail = np.full(int(self.stop != "fixed"), self.tokens.end(self.modality))
    elif caption_first:
      head = self.prompt(text=item.caption)
      tail = np.array([self.tokens.end(self.modality), self.tokenizer.bos_id])
    else:
      head = self.captioned(0)[:-1]
      end = [self.tokens.end(self.modality)]
      tail = np.concatenate([end, self._text(item.caption), [self.tokenizer.bos_id]])
    tokens = np.concatenate([head, run, tail])
    at = np.arange(len(tokens))
    is_latent = (at >= len(head)) & (at < len(head) + count)
    in_run = is_latent | (at == len(head) + count) & bool(len(tail))
    droppable = at < len(head)
    if self.condition not in ("class", "none"):
      # What frames a prompt stays where the prompt is left out.
      droppable = (at > 0) & (at < len(head) - 1)
    # Latents are "another one" to the softmax, where it is asked.
    scored = np.where(in_run, self.stop == "token", at > 0)
    return Document(tokens, is_latent, at == len(head) - 1, droppable, scored, item)

  def longest(self, split: LatentSplit) -> int:
    """Places that the longest document of a split may fill."""
    longest = int(split.lengths.max())
    if self.condition in ("class", "none"):
      return longest + (self.stop != "fixed")
    return longest + 3 + max(len(self._text(text)) for text in split.captions)

  def _text(self, text: str) -> np.ndarray:
    return self.tokenizer.encode(text)[: self.max_text]


@dataclasses.dataclass(frozen=True)
class LatentRows:
  """A split as rows of packed documents.

  Attributes:
    split: Its items.
    documents: Makes their documents.
    seq_length: `T`.
    per_row: Documents of a row.
    dim: Channels `Z`.
    name: Of the modality.
    pad_id: Fills rows.
  """

  split: LatentSplit
  documents: Documents
  seq_length: int
  per_row: int
  dim: int
  name: str
  pad_id: int

  @property
  def num_documents(self) -> int:
    return len(self.split) * (2 if self.documents.condition == "both" else 1)

  @property
  def num_rows(self) -> int:
    return -(-self.num_documents // self.per_row)

  def order(self, indices: np.ndarray, seed: int) -> np.ndarray:
    return shuffled(indices, self.num_rows, seed)

  def rows(self, indices: np.ndarray) -> Batch:
    batch = _empty_batch(len(indices), self)
    for row, index in enumerate(indices.tolist()):
      place = 0
      for number, j in enumerate(range(index * self.per_row, (index + 1) * self.per_row)):
        if j < self.num_documents:
          place = self._add(batch, row, place, number + 1, self._document(j))
    return batch

  def _document(self, number: int) -> Document:
    caption_first = self.documents.condition == "text"
    if self.documents.condition == "both":
      number, caption_first = number // 2, bool(number % 2)
    return self.documents.make(self.split.item(number), caption_first)

  def _add(self, batch: Batch, row: int, place: int, number: int, document: Document) -> int:
    """Writes a document into a row; returns the place behind it."""
    size = len(document.tokens) - 1
    here, kind = slice(place, place + size), self.documents.modality + 1
    inside = document.opens | document.is_latent
    means = np.zeros((size + 1, self.dim), np.float32)
    means[document.is_latent] = document.item.means
    fields = dict(
      inputs=document.tokens[:-1],
      targets=document.tokens[1:],
      weights=document.scored[1:],
      kinds=document.is_latent[:-1] * kind,
      next_kinds=document.is_latent[1:] * kind,
      modes=inside[:-1] * kind,
      droppable=document.droppable[:-1],
      segment_ids=number,
    )
    for name, values in fields.items():
      batch[name][row, here] = values
    batch[f"latents/{self.name}"][row, here] = means[:-1]
    batch[f"next_latents/{self.name}"][row, here] = means[1:]
    if document.item.scales is not None:
      scales = np.zeros_like(means)
      scales[document.is_latent] = document.item.scales
      batch[f"scales/{self.name}"][row, here] = scales[:-1]
      batch[f"next_scales/{self.name}"][row, here] = scales[1:]
    if document.item.codes is not None:
      codes = np.zeros(size + 1, np.int32)
      codes[document.is_latent] = document.item.codes
      batch[f"codes/{self.name}"][row, here] = codes[:-1]
      batch[f"next_codes/{self.name}"][row, here] = codes[1:]
    return place + size


@dataclasses.dataclass(frozen=True)
class LatentData(Data):
  """Latents, ready to train on.

  Attributes:
    config: What it was built from.
    store: The latents.
    documents: Makes documents, and prompts to draw from.
  """

  config: Any
  store: LatentStore
  documents: Documents

  @functools.cached_property
  def media(self) -> media_lib.MediaData:
    """What the latents were made of."""
    return media_lib.build(self.config.media, 1)


def build(
  config: LatentDataConfig,
  store: LatentStore,
  tokens: Any,
  stop: str,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> LatentData:
  """Rows of documents over a store of latents.

  Args:
    config: Fields of `config.data`.
    store: The latents.
    tokens: `models.latentlm.SpecialTokens`.
    stop: How runs of latents end; see `models.latentlm.ModalityConfig`.
    batch_size: Rows of a global batch.
    process_index: This process.
    process_count: All processes.

  Raises:
    ValueError: a document does not fit into a row, or the data lacks what documents are made of.
  """
  check_place(batch_size, process_index, process_count)
  tokenizer = tokenizers.ByteTokenizer()
  documents = Documents(tokens, tokenizer, config.condition, config.max_text, stop)
  if config.condition == "class" and any((s.labels < 0).any() for s in store.splits.values()):
    raise ValueError(
      "data.condition='class' needs a class of every item, and data.media has items without; "
      "choose data.condition='none' or 'text'."
    )
  has_text = any(text for s in store.splits.values() for text in s.captions)
  if config.condition in ("text", "caption", "both") and not has_text:
    raise ValueError(
      f"data.condition={config.condition!r} needs texts of items, and data.media has none; give a "
      "text for each class in data.media.class_captions, or choose data.condition='class' or "
      "'none'."
    )
  longest = max(documents.longest(split) for split in store.splits.values())
  seq_length = config.seq_length or longest
  per_row = config.documents_per_row or seq_length // longest
  if per_row * longest > seq_length or per_row < 1:
    raise ValueError(
      f"data.seq_length={seq_length} has no room for data.documents_per_row={per_row} documents of "
      f"up to {longest} items; lengthen it, or shorten data.max_text."
    )
  make = functools.partial(
    LatentRows,
    documents=documents,
    seq_length=seq_length,
    per_row=per_row,
    dim=store.meta["dim"],
    name=config.modality,
    pad_id=tokenizer.pad_id,
  )
  splits = {name: make(split) for name, split in store.splits.items()}
  lengths = np.concatenate([split.lengths for split in store.splits.values()])
  summary = dict(store.meta) | dict(
    text_vocab_size=tokenizer.vocab_size,
    num_latents=int(lengths.max()),  # A tokenizer may take longer media than there are.
    equal_lengths=bool((lengths == lengths[0]).all()),
    train_rows=splits["train"].num_rows,
    seq_length=seq_length,
    documents_per_row=per_row,
    tokens_sha256=store.meta["key"],
  )
  return LatentData(
    dataclasses.replace(config, seq_length=seq_length),
    tokenizer,
    splits,
    splits["train"],
    batch_size,
    process_index,
    process_count,
    summary,
    store,
    documents,
  )


def _empty_batch(count: int, rows: LatentRows) -> Batch:
  shape = (count, rows.seq_length)
  names = ("inputs", "targets", "kinds", "next_kinds", "modes", "segment_ids")
  batch = {name: np.zeros(shape, np.int32) for name in names}
  batch |= {name: np.full(shape, rows.pad_id, np.int32) for name in ("inputs", "targets")}
  batch["weights"] = np.zeros(shape, np.float32)
  batch["droppable"] = np.zeros(shape, bool)
  latents: Sequence[str] = ("latents", "next_latents")
  if rows.split.scales is not None:
    latents = (*latents, "scales", "next_scales")
  for name in latents:
    batch[f"{name}/{rows.name}"] = np.zeros((*shape, rows.dim), np.float32)
  if rows.split.codes is not None:
    batch |= {f"{name}/{rows.name}": np.zeros(shape, np.int32) for name in ("codes", "next_codes")}
  return batch
