"""Token files: a flat, memory-mapped array of token ids, and a json sidecar that explains it.

`corpus.bin` holds every split's tokens one after another, little-endian, each document opened by
`<bos>`; `corpus.json` holds the sizes, the digests and the tokenizer itself. The sidecar is written
last, by a rename, so a token file that has one is whole.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from latentlab.data import files, tokenizers

VERSION = 1
_FIELDS = {
  "dtype": str,
  "num_tokens": int,
  "sha256": str,
  "tokenizer_digest": str,
  "splits": dict,
  "metadata": dict,
  "tokenizer": dict,
}
_REMEDY = "make it again with experiments/prepare.py"


@dataclasses.dataclass(frozen=True)
class Split:
  """One split's place in the file: tokens `[begin, end)`, and what they hold."""

  begin: int
  end: int
  num_bytes: int
  num_documents: int


@dataclasses.dataclass(frozen=True)
class TokenFile:
  """An open token file.

  Attributes:
    path: Of the tokens; the sidecar lies beside it, with suffix `.json`.
    tokens: All tokens, memory-mapped, read-only.
    tokenizer: The tokenizer that made them.
    splits: By name.
    metadata: What the writer was told about the corpus.
    sha256: Of the tokens' bytes.
  """

  path: pathlib.Path
  tokens: np.ndarray
  tokenizer: tokenizers.Tokenizer
  splits: Mapping[str, Split]
  metadata: Mapping[str, Any]
  sha256: str

  def split(self, name: str) -> np.ndarray:
    """The tokens of a split, memory-mapped."""
    if name not in self.splits:
      raise ValueError(
        f"split={name!r} is not in {str(self.path)!r}, which has {sorted(self.splits)}."
      )
    return self.tokens[self.splits[name].begin : self.splits[name].end]

  @property
  def summary(self) -> dict[str, Any]:
    """What a log should say of it: digests, and raw bytes, tokens and documents by split."""
    summary = {
      **self.metadata,
      "token_file": str(self.path),
      "tokens_sha256": self.sha256,
      "tokenizer": self.tokenizer.kind,
      "tokenizer_digest": self.tokenizer.digest,
      "vocab_size": self.tokenizer.vocab_size,
    }
    for name, split in self.splits.items():
      summary |= {
        f"{name}_bytes": split.num_bytes,
        f"{name}_tokens": split.end - split.begin,
        f"{name}_documents": split.num_documents,
      }
    return summary


def paths(path: str | os.PathLike) -> tuple[pathlib.Path, pathlib.Path]:
  """The token file and its sidecar, given either."""
  path = pathlib.Path(path)
  return path.with_suffix(".bin"), path.with_suffix(".json")


def is_token_file(path: str | os.PathLike) -> bool:
  """Whether `path` names a token file, or the sidecar of one."""
  path = pathlib.Path(path)
  return path.suffix == ".bin" or path.suffix == ".json" and _recorded_sha256(path) is not None


def check_output(path: str | os.PathLike) -> None:
  """Raises a `ValueError` where no token file may be written: a bad name, or a file of the user."""
  if pathlib.Path(path).suffix != ".bin":
    raise ValueError(f"output={str(path)!r} must end in '.bin'; its sidecar will end in '.json'.")
  path, sidecar = paths(path)
  if sidecar.exists() and _recorded_sha256(sidecar) is None:
    raise ValueError(
      f"output={str(path)!r} needs {str(sidecar)!r} for its sidecar, which is "
      "another file; choose another name."
    )


def write(
  path: str | os.PathLike,
  tokenizer: tokenizers.Tokenizer,
  splits: Mapping[str, Iterable[str]],
  metadata: Mapping[str, Any],
) -> TokenFile:
  """Encodes texts into a token file and opens it.

  Safe to kill at any moment, and safe to race: processes that write the same corpus replace each
  other's file by an equal one.

  Args:
    path: Where to; its suffix is `.bin`.
    tokenizer: Must be lossless; a text whose tokens do not add up to its bytes is an error.
    splits: Texts by split, read once, in this order.
    metadata: Kept in the sidecar; json values.
  """
  check_output(path)
  path, sidecar = paths(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
  digest, begin, layout = hashlib.sha256(), 0, {}
  temporary = files.temporary_name(path)
  with contextlib.ExitStack() as stack:
    stack.callback(temporary.unlink, missing_ok=True)
    f = stack.enter_context(temporary.open("wb"))
    for name, texts in splits.items():
      end, num_bytes, num_documents = begin, 0, 0
      for text in texts:
        ids = tokenizer.encode(text)
        size = len(text.encode("utf-8"))
        if (decoded := int(tokenizer.byte_lengths[ids].sum())) != size:
          raise ValueError(
            f"data.tokenizer is not lossless: a text of {size} bytes became tokens "
            f"of {decoded} bytes; bits per byte would be wrong. Use another one."
          )
        data = np.concatenate([[tokenizer.bos_id], ids]).astype(dtype).tobytes()
        digest.update(data)
        f.write(data)
        end += len(ids) + 1
        num_bytes += size
        num_documents += 1
      layout[name] = dataclasses.asdict(Split(begin, end, num_bytes, num_documents))
      begin = end
    f.flush()
    os.fsync(f.fileno())
    # Without its sidecar an old file is nothing, so the two never disagree. An equal one stays:
    # another process may be about to read it.
    if _recorded_sha256(sidecar) != digest.hexdigest():
      sidecar.unlink(missing_ok=True)
    os.replace(temporary, path)
  files.write_json(
    sidecar,
    {
      "version": VERSION,
      "dtype": dtype.str,
      "num_tokens": begin,
      "sha256": digest.hexdigest(),
      "vocab_size": tokenizer.vocab_size,
      "tokenizer_digest": tokenizer.digest,
      "splits": layout,
      "metadata": dict(metadata),
      "tokenizer": tokenizer.to_dict(),
    },
  )
  return read(path)


def read(path: str | os.PathLike, *, verify: bool = False) -> TokenFile:
  """Opens a token file and checks it against its sidecar.

  Args:
    path: The token file or its sidecar.
    verify: Also read all tokens and compare their sha256.

  Raises:
    ValueError: the sidecar is missing or not one, or the two do not belong together.
  """
  path, sidecar = paths(path)
  try:
    layout = json.loads(sidecar.read_text("utf-8"))
    size = path.stat().st_size
  except OSError as e:
    raise ValueError(
      f"data.path: {e.filename!r} cannot be read ({e.strerror}); a token file is a "
      f"pair {path.name!r}, {sidecar.name!r}: {_REMEDY}."
    ) from e
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(f"data.path: {str(sidecar)!r} is not json ({e}); {_REMEDY}.") from e
  if not isinstance(layout, dict) or layout.get("version") != VERSION:
    raise ValueError(
      f"data.path: {str(sidecar)!r} is not the sidecar of a token file of version "
      f"{VERSION}; {_REMEDY}."
    )
  splits = _splits(layout, sidecar)
  dtype = np.dtype(layout["dtype"])
  expected = layout["num_tokens"] * dtype.itemsize
  if size != expected:
    raise ValueError(
      f"data.path: {str(path)!r} has {size} bytes, but its sidecar says {expected}; "
      f"it is truncated or another file: {_REMEDY}."
    )
  tokenizer = tokenizers.from_dict(
    layout["tokenizer"], f"data.path: the tokenizer in {str(sidecar)!r}"
  )
  if tokenizer.digest != layout["tokenizer_digest"]:
    raise ValueError(
      f"data.path: the tokenizer in {str(sidecar)!r} was changed: its digest is "
      f"{tokenizer.digest}, not {layout['tokenizer_digest']}; {_REMEDY}."
    )
  if verify:
    with path.open("rb") as f:
      found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != layout["sha256"]:
      raise ValueError(
        f"data.path: {str(path)!r} was changed: its sha256 is {found}, not "
        f"{layout['sha256']}; {_REMEDY}."
      )
  # An empty file cannot be mapped.
  tokens = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
  return TokenFile(path, tokens, tokenizer, splits, layout["metadata"], layout["sha256"])


def _splits(layout: Mapping[str, Any], sidecar: pathlib.Path) -> dict[str, Split]:
  """The splits of a sidecar, all of whose fields are checked."""
  bad = [name for name, kind in _FIELDS.items() if not isinstance(layout.get(name), kind)]
  if not bad and layout["dtype"] not in ("<u2", "<u4"):
    bad = [f"dtype={layout['dtype']!r}"]
  if bad:
    raise ValueError(f"data.path: {str(sidecar)!r} lacks or spoils {bad}; {_REMEDY}.")
  fields, splits = {f.name for f in dataclasses.fields(Split)}, {}
  for name, split in layout["splits"].items():
    known = isinstance(split, dict) and split.keys() == fields
    if not (
      known
      and all(isinstance(x, int) and x >= 0 for x in split.values())
      and split["begin"] <= split["end"] <= layout["num_tokens"]
    ):
      raise ValueError(
        f"data.path: {str(sidecar)!r} has a split {name!r} of {split}, which does "
        f"not lie in its {layout['num_tokens']} tokens; {_REMEDY}."
      )
    splits[name] = Split(**split)
  return splits


def _recorded_sha256(sidecar: pathlib.Path) -> str | None:
  try:
    layout = json.loads(sidecar.read_text("utf-8"))
  except (OSError, ValueError):
    return None
  known = isinstance(layout, dict) and "tokenizer_digest" in layout
  return layout.get("sha256", "") if known else None
