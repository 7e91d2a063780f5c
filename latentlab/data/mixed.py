"""Rows of items: tokens and latents in one sequence, packed, and routed to their losses.

A document is a prompt and a run of latents, or the other way round. With `t` for tokens and `z` for
latents,

  class     `class z1 .. zN`, and `<end>` where it has to be learnt
  text      `<bos> t .. t <begin> z1 .. zN <end>`
  caption   `<bos> <begin> z1 .. zN <end> t .. t`

and `both` has each item once as `text` and once as `caption`. Documents of a row see only
themselves. As the order of items is all that the papers' code has of a class-conditional sequence,
`class` has no token before its run; elsewhere these switch the head on and off (LatentLM, section
3.1, https://arxiv.org/abs/2412.08635). Documents of several modalities take turns, each as often as
it is among them, and share rows.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentlab.data import latent_store, tokenizers
from latentlab.data import media as media_lib
from latentlab.data.batches import Batch, Data, check_place, shuffled
from latentlab.data.latent_store import LatentItem, LatentSplit, LatentStore
from latentlab.typing import Int

CONDITIONS = ("class", "text", "caption", "both", "none")
OF_ROWS = ("seq_length", "documents_per_row")
"""Fields of `LatentDataConfig` that the first modality's has for all."""


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
    repeats: How often an epoch of training has each document, beside those of other modalities.
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
  repeats: int = 1
  cache_dir: str = ""

  def __post_init__(self):
    if self.condition not in CONDITIONS:
      raise ValueError(f"data.condition={self.condition!r} is unknown; choose from {CONDITIONS}.")
    for name in ("seq_length", "documents_per_row", "max_text"):
      if getattr(self, name) < 0:
        raise ValueError(f"data.{name}={getattr(self, name)} must not be negative.")
    if self.repeats < 1:
      raise ValueError(f"data.repeats={self.repeats} must be at least 1.")

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
class Share:
  """What one modality gives to the rows of a split.

  Attributes:
    split: Its items.
    documents: Makes their documents.
    dim: Channels `Z`.
    name: Of the modality.
    repeats: How often each document comes.
  """

  split: LatentSplit
  documents: Documents
  dim: int
  name: str
  repeats: int = 1

  @property
  def num_documents(self) -> int:
    return self.repeats * self._different

  @property
  def _different(self) -> int:
    return len(self.split) * (2 if self.documents.condition == "both" else 1)

  def document(self, number: int) -> Document:
    """The document of a number below `num_documents`."""
    caption_first, number = self.documents.condition == "text", number % self._different
    if self.documents.condition == "both":
      number, caption_first = number // 2, bool(number % 2)
    return self.documents.make(self.split.item(number), caption_first)

  def empty(self, shape: tuple[int, int]) -> Batch:
    """Its fields of a batch of rows `[b, T]`, with nothing in them: `[b, T, Z]`, codes `[b, T]`."""
    names = ("latents", "next_latents")
    if self.split.scales is not None:
      names = (*names, "scales", "next_scales")
    batch = {f"{name}/{self.name}": np.zeros((*shape, self.dim), np.float32) for name in names}
    if self.split.codes is not None:
      batch |= {f"{n}/{self.name}": np.zeros(shape, np.int32) for n in ("codes", "next_codes")}
    return batch

  def write(self, batch: Batch, row: int, place: int, document: Document) -> None:
    """Writes a document's latents, and what comes with them, into a row from a place on."""
    item, here = document.item, slice(place, place + len(document.tokens) - 1)
    fields = dict(latents=item.means, scales=item.scales, codes=item.codes)
    for name, values in fields.items():
      if values is None:
        continue
      whole = np.zeros((len(document.tokens), *values.shape[1:]), values.dtype)
      whole[document.is_latent] = values
      batch[f"{name}/{self.name}"][row, here] = whole[:-1]
      batch[f"next_{name}/{self.name}"][row, here] = whole[1:]


@dataclasses.dataclass(frozen=True)
class LatentRows:
  """A split as rows of packed documents.

  Attributes:
    shares: Of each modality whose documents there are.
    modalities: Of each that the model has, for what their places in a batch are like.
    seq_length: `T`.
    per_row: Documents of a row.
    pad_id: Fills rows.
  """

  shares: tuple[Share, ...]
  modalities: tuple[Share, ...]
  seq_length: int
  per_row: int
  pad_id: int

  @property
  def num_documents(self) -> int:
    return sum(share.num_documents for share in self.shares)

  @property
  def num_rows(self) -> int:
    return -(-self.num_documents // self.per_row)

  def order(self, indices: np.ndarray, seed: int) -> np.ndarray:
    return shuffled(indices, self.num_rows, seed)

  def rows(self, indices: np.ndarray) -> Batch:
    batch = self._empty(len(indices))
    for row, index in enumerate(indices.tolist()):
      place = 0
      for number, j in enumerate(range(index * self.per_row, (index + 1) * self.per_row)):
        if j < self.num_documents:
          place = self._add(batch, row, place, number + 1, *self._turns[:, j].tolist())
    return batch

  @functools.cached_property
  def _turns(self) -> Int[np.ndarray, "2 documents"]:
    """Of each document the share that it is from, and its number there: shares take turns."""
    counts = [share.num_documents for share in self.shares]
    shares = np.repeat(np.arange(len(counts)), counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    when = (numbers + 0.5) / np.array(counts)[shares]
    return np.stack([shares, numbers])[:, np.argsort(when, kind="stable")]

  def _add(
    self, batch: Batch, row: int, place: int, number: int, share_number: int, in_share: int
  ) -> int:
    """Writes a document into a row; returns the place behind it."""
    share = self.shares[share_number]
    document = share.document(in_share)
    size = len(document.tokens) - 1
    here, kind = slice(place, place + size), share.documents.modality + 1
    inside = document.opens | document.is_latent
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
    share.write(batch, row, place, document)
    return place + size

  def _empty(self, count: int) -> Batch:
    shape = (count, self.seq_length)
    names = ("kinds", "next_kinds", "modes", "segment_ids")
    batch = {name: np.full(shape, self.pad_id, np.int32) for name in ("inputs", "targets")}
    batch |= {name: np.zeros(shape, np.int32) for name in names}
    batch["weights"] = np.zeros(shape, np.float32)
    batch["droppable"] = np.zeros(shape, bool)
    for share in self.modalities:
      batch |= share.empty(shape)
    return batch


@dataclasses.dataclass(frozen=True)
class LatentData(Data):
  """Latents, ready to train on.

  Attributes:
    config: What it was built from, the first modality's where there are several.
    store: The latents of that one.
    documents: Makes its documents, and prompts to draw from.
    parts: The data of each of several modalities alone, by name; none where there is one.
  """

  config: Any
  store: LatentStore
  documents: Documents
  parts: Mapping[str, "LatentData"] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def media(self) -> media_lib.MediaData:
    """What the latents were made of."""
    return media_lib.build(self.config.media, 1)

  @property
  def modalities(self) -> tuple[str, ...]:
    """Names of all kinds of latents."""
    return tuple(self.parts) or (self.config.modality,)

  def of(self, modality: str) -> "LatentData":
    """The data of one modality alone.

    Raises:
      ValueError: there is no such modality.
    """
    if modality not in self.modalities:
      raise ValueError(f"{modality=} is unknown; choose one of {list(self.modalities)}.")
    return self.parts.get(modality, self)


@dataclasses.dataclass(frozen=True)
class Part:
  """What is known of one modality before its documents are made.

  Attributes:
    config: Its data.
    store: Its latents.
    stop: How its runs end; see `models.latentlm.ModalityConfig`.
  """

  config: LatentDataConfig
  store: LatentStore
  stop: str


def build(
  config: LatentDataConfig,
  store: LatentStore,
  tokens: Any,
  stop: str,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  *,
  others: Sequence[Part] = (),
) -> LatentData:
  """Rows of documents over a store of latents, or over several.

  Args:
    config: Fields of `config.data`, which says how long rows are.
    store: The latents.
    tokens: `models.latentlm.SpecialTokens`.
    stop: How runs of latents end; see `models.latentlm.ModalityConfig`.
    batch_size: Rows of a global batch.
    process_index: This process.
    process_count: All processes.
    others: Further modalities; all have the same splits.

  Raises:
    ValueError: a document does not fit into a row, the data lacks what documents are made of, or
      modalities have other splits or lengths of rows.
  """
  check_place(batch_size, process_index, process_count)
  tokenizer = tokenizers.ByteTokenizer()
  parts = (Part(config, store, stop), *others)
  documents = [
    Documents(tokens, tokenizer, p.config.condition, p.config.max_text, p.stop, number)
    for number, p in enumerate(parts)
  ]
  for number, part in enumerate(parts):
    _check_condition(part, f"config.others.{part.config.modality}.data" if number else "data")
    if number and (part.config.seq_length or part.config.documents_per_row):
      raise ValueError(
        f"config.others.{part.config.modality}.data has no {' and no '.join(OF_ROWS)}: rows are "
        "those of config.data."
      )
  pairs = list(zip(parts, documents, strict=True))
  longest = max(d.longest(split) for p, d in pairs for split in p.store.splits.values())
  seq_length = config.seq_length or longest
  per_row = config.documents_per_row or seq_length // longest
  if per_row * longest > seq_length or per_row < 1:
    raise ValueError(
      f"data.seq_length={seq_length} has no room for data.documents_per_row={per_row} documents of "
      f"up to {longest} items; lengthen it, or shorten data.max_text."
    )
  if missing := {n for p in others for n in set(store.splits) ^ set(p.store.splits)}:
    raise ValueError(
      f"of splits {sorted(missing)}, some modalities have media and some have none; give each the "
      "same splits."
    )
  splits: dict[str, tuple[Share, ...]] = {
    name: tuple(
      Share(
        p.store.splits[name],
        d,
        p.store.meta["dim"],
        p.config.modality,
        p.config.repeats if name == "train" else 1,
      )
      for p, d in pairs
    )
    for name in store.splits
  }

  def data(shown: slice, part: Part, its: Documents, more=None, alone=None) -> LatentData:
    rows = {
      name: LatentRows(shares[shown], shares, seq_length, per_row, tokenizer.pad_id)
      for name, shares in splits.items()
    }
    summary = _summary(part.store) | dict(
      text_vocab_size=tokenizer.vocab_size,
      train_rows=rows["train"].num_rows,
      seq_length=seq_length,
      documents_per_row=per_row,
    )
    return LatentData(
      dataclasses.replace(part.config, seq_length=seq_length),
      tokenizer,
      rows,
      rows["train"],
      batch_size,
      process_index,
      process_count,
      summary | (more or {}),
      part.store,
      its,
      alone or {},
    )

  if not others:
    return data(slice(None), *pairs[0])
  alone = {p.config.modality: data(slice(i, i + 1), p, d) for i, (p, d) in enumerate(pairs)}
  keys = [p.store.meta["key"] for p in parts]
  more = dict(
    tokens_sha256=latent_store.digest(keys),
    others={p.config.modality: _summary(p.store) for p in others},
  )
  return data(slice(None), *pairs[0], more, alone)


def _check_condition(part: Part, where: str) -> None:
  """Raises if items lack what documents are made of."""
  condition, splits = part.config.condition, part.store.splits.values()
  if condition == "class" and any((s.labels < 0).any() for s in splits):
    raise ValueError(
      f"{where}.condition='class' needs a class of every item, and {where}.media has items "
      f"without; choose {where}.condition='none' or 'text'."
    )
  has_text = any(text for s in splits for text in s.captions)
  if condition in ("text", "caption", "both") and not has_text:
    raise ValueError(
      f"{where}.condition={condition!r} needs texts of items, and {where}.media has none; give a "
      f"text for each class in {where}.media.class_captions, or choose {where}.condition='class' "
      "or 'none'."
    )


def _summary(store: LatentStore) -> dict[str, Any]:
  """What a store is, as a run keeps it."""
  lengths = np.concatenate([split.lengths for split in store.splits.values()])
  return dict(store.meta) | dict(
    num_latents=int(lengths.max()),  # A tokenizer may take longer media than there are.
    equal_lengths=bool((lengths == lengths[0]).all()),
    tokens_sha256=store.meta["key"],
  )
