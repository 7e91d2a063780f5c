"""Tokenizers that lose nothing: bytes, characters, and byte-level BPE.

All give every token's exact byte string, so a loss in nats per token converts to bits per raw
byte with no estimate. Special tokens have an empty byte string and are never produced by `encode`,
whatever the text says.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import numpy as np
import tokenizers as hf

from latentlab.data import files

BOS, PAD = "<bos>", "<pad>"
# Names under which well-known releases keep the token that starts or separates documents.
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<|im_start|>", "<|endoftext|>")
_PAD_NAMES = (PAD, "<|pad|>", "<|padding|>")

# A cut after a newline that stands between two visible characters never changes a byte-level
# pre-tokenizer's words, so long texts are encoded, and trained on, in parallel pieces.
_SAFE_CUT = re.compile(r"(?<=\S\n)(?=\S)")
_PIECE_CHARS = 1 << 18

Ids: TypeAlias = np.ndarray | Sequence[SupportsIndex]


@runtime_checkable
class Tokenizer(Protocol):
  """What the rest of the library asks of a tokenizer."""

  kind: str
  vocab_size: int
  bos_id: int
  pad_id: int

  @property
  def token_bytes(self) -> Sequence[bytes]:
    """The byte string of every token; empty for special tokens."""

  @property
  def byte_lengths(self) -> np.ndarray:
    """`len` of `token_bytes`, int32 of `[vocab_size]`."""

  @property
  def digest(self) -> str:
    """sha256 over what determines `encode` and `decode`."""

  def encode(self, text: str) -> np.ndarray: ...

  def decode_bytes(self, ids: Ids) -> bytes: ...

  def decode(self, ids: Ids) -> str: ...

  def to_dict(self) -> dict[str, Any]: ...

  def save(self, path: str | os.PathLike) -> None: ...


class _Tokenizer:
  """The half of the protocol that follows from `token_bytes` and `to_dict`."""

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    return np.array([len(b) for b in self.token_bytes], np.int32)

  def decode_bytes(self, ids: Ids) -> bytes:
    """The raw bytes of `ids`; special tokens give none."""
    table = self.token_bytes
    return b"".join([table[i] for i in np.asarray(ids, np.int64).ravel().tolist()])

  def decode(self, ids: Ids) -> str:
    """The text of `ids`; bytes that are not utf-8 (a cut character) show as U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", errors="replace")

  def save(self, path: str | os.PathLike) -> None:
    """Writes a json file that `load` reads back; complete, or not there at all."""
    files.write_json(path, self.to_dict())


class ByteTokenizer(_Tokenizer):
  """One token per utf-8 byte, then `<bos>` and `<pad>`."""

  kind = "bytes"
  vocab_size = 258
  bos_id = 256
  pad_id = 257

  @functools.cached_property
  def token_bytes(self) -> Sequence[bytes]:
    return [bytes([i]) for i in range(256)] + [b"", b""]

  @property
  def digest(self) -> str:
    return _digest(self.to_dict())

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def decode_bytes(self, ids: Ids) -> bytes:
    ids = np.asarray(ids, np.int64)
    return ids[ids < 256].astype(np.uint8).tobytes()

  def to_dict(self) -> dict[str, Any]:
    return {"kind": self.kind, "bos_id": self.bos_id, "pad_id": self.pad_id}


class CharTokenizer(_Tokenizer):
  """One token per character of a closed alphabet, then `<bos>` and `<pad>`.

  Attributes:
    characters: The alphabet, sorted by code point.
    vocab_size: Its size and two.
    bos_id: Starts a document.
    pad_id: Pads.
  """

  kind = "chars"

  def __init__(self, characters: str):
    if not characters or list(characters) != sorted(set(characters)):
      raise ValueError(
        f"{characters=} of a character tokenizer must be different, sorted by code point, and at "
        "least one."
      )
    self.characters = characters
    self._points = _code_points(characters)
    self.bos_id, self.pad_id = len(characters), len(characters) + 1
    self.vocab_size = len(characters) + 2

  @classmethod
  def train(cls, texts: Iterable[str]) -> "CharTokenizer":
    """Takes every character of `texts` into the alphabet."""
    found: set[str] = set()
    for text in texts:
      found.update(text)
    if not found:
      raise ValueError("data.tokenizer='chars' found no character in the corpus; give more text.")
    return cls("".join(sorted(found)))

  @functools.cached_property
  def token_bytes(self) -> Sequence[bytes]:
    return [c.encode("utf-8") for c in self.characters] + [b"", b""]

  @functools.cached_property
  def digest(self) -> str:
    return _digest(self.to_dict())

  def encode(self, text: str) -> np.ndarray:
    points = _code_points(text)
    ids = np.searchsorted(self._points, points).astype(np.int32)
    known = self._points[np.minimum(ids, len(self._points) - 1)] == points
    if not known.all():
      unknown = "".join(dict.fromkeys(text[i] for i in np.flatnonzero(~known)))
      raise ValueError(
        f"the text has {unknown[:20]!r}, none of the {len(self.characters)} characters that this "
        "tokenizer knows; leave them out, or use data.tokenizer='bytes', which knows all."
      )
    return ids

  def to_dict(self) -> dict[str, Any]:
    return {"kind": self.kind, "characters": self.characters}


class BPETokenizer(_Tokenizer):
  """Byte-level BPE, trained or loaded by the `tokenizers` library.

  Attributes:
    bos_id: The token that starts a document; found by name in a loaded file.
    pad_id: The padding token; `bos_id` where a loaded file has none.
  """

  kind = "bpe"

  def __init__(self, model: hf.Tokenizer):
    layout = json.loads(model.to_str())
    if layout["model"]["type"] != "BPE" or (layout["decoder"] or {}).get("type") != "ByteLevel":
      raise ValueError(
        "data.tokenizer must be a byte-level BPE, whose tokens are exact byte strings; got "
        f"model {layout['model']['type']!r} with decoder {layout['decoder']!r}. Train one with "
        'data.tokenizer="bpe", or pass a file of that kind.'
      )
    if layout["normalizer"] is not None or (layout["pre_tokenizer"] or {}).get("add_prefix_space"):
      raise ValueError(
        "data.tokenizer changes the text before encoding it (a normalizer or a prefix space), so "
        "bits per raw byte would be wrong. Remove that step from the tokenizer's file."
      )
    model.encode_special_tokens = True  # A "<bos>" in the text is text.
    self._model = model
    self._layout = layout
    self.vocab_size = model.get_vocab_size()
    names = {t["content"]: t["id"] for t in layout["added_tokens"] if t["special"]}
    self._special_ids = frozenset(names.values())
    found = [names[n] for n in _BOS_NAMES if n in names]
    if not found:
      raise ValueError(
        f"data.tokenizer has no special token to start a document with: "
        f"{sorted(names)=}; add one of {_BOS_NAMES}."
      )
    self.bos_id = found[0]
    self.pad_id = next((names[n] for n in _PAD_NAMES if n in names), self.bos_id)

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
    """Learns `vocab_size` tokens, two of them special, from `texts`."""
    smallest = 256 + 2
    if vocab_size < smallest:
      raise ValueError(
        f"data.vocab_size={vocab_size} is too small for byte-level BPE; "
        f"it needs at least {smallest} (256 bytes, {BOS}, {PAD})."
      )
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[BOS, PAD],
      show_progress=False,
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator((p for text in texts for p in _pieces(text)), trainer)
    if model.get_vocab_size() < vocab_size:
      raise ValueError(
        f"data.vocab_size={vocab_size} asks for more tokens than the corpus can teach "
        f"({model.get_vocab_size()}); lower it, use more text, or set data.tokenizer='bytes'."
      )
    return cls(model)

  @functools.cached_property
  def token_bytes(self) -> Sequence[bytes]:
    to_byte = _alphabet()
    table = [b""] * self.vocab_size
    for token, i in self._model.get_vocab().items():
      if i not in self._special_ids:
        # A token added by hand is stored as plain text, which may leave the alphabet.
        known = all(c in to_byte for c in token)
        table[i] = bytes([to_byte[c] for c in token]) if known else token.encode("utf-8")
    return table

  @functools.cached_property
  def digest(self) -> str:
    # Not the whole file: the library may write the same tokenizer differently in another version.
    model = self._layout["model"]
    return _digest(
      {
        "kind": self.kind,
        "vocab": model["vocab"],
        "merges": model["merges"],
        "bos_id": self.bos_id,
        "pad_id": self.pad_id,
      }
    )

  def encode(self, text: str) -> np.ndarray:
    encodings = self._model.encode_batch_fast(list(_pieces(text)), add_special_tokens=False)
    return np.concatenate([np.asarray(e.ids, np.int32) for e in encodings] or [_EMPTY])

  def to_dict(self) -> dict[str, Any]:
    return self._layout


def load(name: str | os.PathLike) -> Tokenizer:
  """Loads a tokenizer: "bytes", or a json file of `save` or of the `tokenizers` library."""
  if name == "bytes":
    return ByteTokenizer()
  path = pathlib.Path(name)
  try:
    layout = json.loads(path.read_text("utf-8"))
  except OSError as e:
    raise ValueError(
      f"data.tokenizer={str(name)!r} cannot be read ({e.strerror}); give 'bytes', "
      "'chars', 'bpe' or the path of a tokenizer's json file."
    ) from e
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"data.tokenizer={str(name)!r} is not json ({e}).") from e
  return from_dict(layout, f"data.tokenizer={str(name)!r}")


def from_dict(layout: Any, origin: str = "the layout") -> Tokenizer:
  """The inverse of `Tokenizer.to_dict`, for any json; `origin` is what errors call it."""
  if not isinstance(layout, Mapping) or not {"kind", "model"} & layout.keys():
    raise ValueError(
      f"{origin} is no tokenizer; expected a file of the tokenizers library, which "
      "has a 'model', {'kind': 'bytes'}, or {'kind': 'chars', 'characters': ...}."
    )
  if layout.get("kind") == ByteTokenizer.kind:
    return ByteTokenizer()
  if layout.get("kind") == CharTokenizer.kind:
    characters = layout.get("characters")
    if not isinstance(characters, str):
      raise ValueError(f"{origin} is no character tokenizer: {characters=} is no string.")
    return CharTokenizer(characters)
  with _parsing(origin):
    model = hf.Tokenizer.from_str(json.dumps(layout))
  return BPETokenizer(model)


class _parsing(contextlib.AbstractContextManager):
  """Turns the bare `Exception` of the `tokenizers` library, by its exact type, into an error."""

  def __init__(self, origin: str):
    self.origin = origin

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
    if kind is Exception:
      raise ValueError(
        f"{self.origin} cannot be read by the tokenizers library ({error}); save "
        "the tokenizer again."
      ) from error


_EMPTY = np.zeros(0, np.int32)


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _pieces(text: str) -> Iterator[str]:
  """Cuts a long text where no word of the pre-tokenizer can straddle the cut."""
  begin = 0
  while cut := _SAFE_CUT.search(text, begin + _PIECE_CHARS):
    yield text[begin : cut.start()]
    begin = cut.start()
  if begin < len(text):
    yield text[begin:]


def _alphabet() -> dict[str, int]:
  """GPT-2's printable stand-ins for bytes: a visible latin-1 byte is itself, the rest go above."""
  visible = [
    *range(ord("!"), ord("~") + 1),
    *range(ord("¡"), ord("¬") + 1),
    *range(ord("®"), ord("ÿ") + 1),
  ]
  hidden = [b for b in range(256) if b not in set(visible)]
  return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
