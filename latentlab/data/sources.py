"""Documents: what a corpus is made of, where each lies on disk, and which split it belongs to.

A `Document` is a reference that reads itself, so a corpus is never held in memory whole and can be
visited in any order. Every choice (which split, which subset) hangs on a hash of the document's
name and nothing else: adding a file moves no other file, and no random state is involved.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Sequence

from latentlab.data import columns


@dataclasses.dataclass(frozen=True)
class Document:
  """A utf-8 text: a file, or the "text" field of a jsonl file's line or a columnar file's row.

  Attributes:
    name: Unique in its corpus; decides the split.
    path: The file it lies in.
    line: Byte range `(begin, end)` of its line in a jsonl file.
    row: Its row in a columnar file; `None`, as `line`, for a whole file.
    begin: First character used.
    end: Character after the last one used; `None` for all.
  """

  name: str
  path: pathlib.Path
  line: tuple[int, int] | None = None
  row: int | None = None
  begin: int = 0
  end: int | None = None

  def read(self) -> str:
    """The text; a `ValueError` names the file and what is wrong with it."""
    if self.row is not None:
      return columns.read(self.path, self.row)[self.begin : self.end]
    offset, end = self.line or (0, None)
    try:
      with self.path.open("rb") as f:
        f.seek(offset)
        data = f.read() if end is None else f.read(end - offset)
      text = data.decode("utf-8")
    except OSError as e:
      raise ValueError(f"data.path: {str(self.path)!r} cannot be read ({e.strerror}).") from e
    except UnicodeDecodeError as e:
      raise ValueError(
        f"data.path: {str(self.path)!r} is not utf-8: byte {data[e.start]:#04x} at offset "
        f"{offset + e.start}. Convert it, or leave it out with data.include."
      ) from e
    if self.line is not None:
      text = _jsonl_text(text, self.name)
    return text[self.begin : self.end]


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents by split, with what is needed to name the corpus and to report on it.

  Attributes:
    name: A short name for files and logs.
    splits: Documents of "train" and "validation", in the order of their names' hashes, so that a
      prefix of a split is a random sample of it.
    num_bytes: Raw utf-8 bytes by split.
    digest: sha256 over names and contents of all documents used, split by split.
    skipped: Files left out because they are not utf-8 (embedded corpus only).
  """

  name: str
  splits: dict[str, Sequence[Document]]
  num_bytes: dict[str, int]
  digest: str
  skipped: int = 0


def standard_library() -> tuple[list[Document], int]:
  """The embedded corpus: sources of the running Python's standard library.

  Returns:
    Every `.py` file under the standard library's folder, installed packages excluded, by relative
    path, and the number of files left out because they are not utf-8 (fixtures of Python's own
    tests).
  """
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  documents, skipped = [], 0
  for document in _walk(root, ("*.py",)):
    try:
      document.read()
    except ValueError as e:
      if not isinstance(e.__cause__, UnicodeDecodeError):
        raise
      skipped += 1
    else:
      documents.append(document)
  if not documents:
    raise ValueError(
      f"This Python's standard library has no source files under {str(root)!r}; "
      "set data.path to a text of your own."
    )
  return documents, skipped


def files(path: str | os.PathLike, include: Sequence[str] = ("*",)) -> list[Document]:
  """Documents of a text, jsonl, Parquet or Arrow file, of a folder of these, or of a data set.

  Args:
    path: A jsonl file holds one document per line and a columnar file one per row, both in a field
      "text"; any other file is one document. A folder may be a data set that Hugging Face's
      `datasets` saved to the disk.
    include: In a folder, patterns that a file's name must match (one of them). Hidden files and
      folders are left out.
  """
  path = pathlib.Path(path).expanduser()
  try:
    return _find(path, include)
  except OSError as e:
    raise ValueError(f"data.path: {e.filename!r} cannot be read ({e.strerror}).") from e


def _find(path: pathlib.Path, include: Sequence[str]) -> list[Document]:
  if path.is_dir():
    shards = columns.shards(path)
    found = _walk(path, include) if shards is None else [Document(p.name, p) for p in shards]
    documents = [d for file in found for d in _documents(file)]
    if not documents:
      raise ValueError(
        f"data.path={str(path)!r} holds no file that matches data.include={tuple(include)!r}."
      )
    return documents
  if not path.exists():
    raise ValueError(
      f"data.path={str(path)!r} does not exist; give a text, jsonl, Parquet or Arrow file, a "
      "folder or a token file made by experiments/prepare.py."
    )
  documents = _documents(Document(path.name, path))
  if not documents or not path.stat().st_size:
    raise ValueError(f"data.path={str(path)!r} is empty; give a file that holds text.")
  return documents


def split(
  name: str,
  documents: Sequence[Document],
  validation_fraction: float,
  max_train_bytes: int = 0,
  skipped: int = 0,
) -> Corpus:
  """Splits documents, limits the training part, and takes the corpus's digest.

  A single document is cut as nanoGPT cuts its corpora: the first `1 - validation_fraction` of its
  characters are training. Of several, those whose name's hash falls below `validation_fraction`
  are validation, and at least one document is on each side.

  Args:
    name: The corpus's short name.
    documents: All documents.
    validation_fraction: 0 for no validation split.
    max_train_bytes: Keep a random subset of the training documents of this many raw bytes, the
      last one cut; 0 keeps all.
    skipped: Passed on.
  """
  if not 0 <= validation_fraction < 1:
    raise ValueError(f"data.validation_fraction={validation_fraction} is not in [0, 1).")
  if max_train_bytes < 0:
    raise ValueError(f"data.max_train_bytes={max_train_bytes} is negative; 0 means all.")
  ranked = sorted(documents, key=lambda d: (rank(d.name), d.name))
  if len(ranked) == 1:
    train, validation = _cut(ranked[0], validation_fraction)
  else:
    count = sum(rank(d.name) < validation_fraction for d in ranked)
    if validation_fraction:
      count = min(max(count, 1), len(ranked) - 1)
    validation, train = ranked[:count], ranked[count:]
  splits = {"train": train, "validation": validation}
  digest, num_bytes, kept = hashlib.sha256(), {}, {}
  for split_name, members in splits.items():
    limit = max_train_bytes if split_name == "train" else 0
    kept[split_name], num_bytes[split_name] = _take(members, limit, digest)
  if not num_bytes["train"]:
    raise ValueError(
      f"data.path: the training split of {name!r} is empty ({len(ranked)} documents "
      f"in all, data.validation_fraction={validation_fraction})."
    )
  return Corpus(name, kept, num_bytes, digest.hexdigest(), skipped)


def _walk(root: pathlib.Path, include: Sequence[str]) -> list[Document]:
  """Files under `root` that match, by relative path, whatever order the file system has."""
  found = []
  for folder, subfolders, names in os.walk(root, onerror=_raise):
    subfolders[:] = [s for s in subfolders if not s.startswith(".") and s not in _EXCLUDED_FOLDERS]
    found += [
      pathlib.Path(folder, n)
      for n in names
      if not n.startswith(".") and any(fnmatch.fnmatchcase(n, p) for p in include)
    ]
  named = sorted((p.relative_to(root).as_posix(), p) for p in found if p.is_file())
  return [Document(name, path) for name, path in named if path.stat().st_size]


def _raise(error: OSError):
  raise error


_EXCLUDED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})


def _documents(file: Document) -> list[Document]:
  if file.path.suffix in columns.SUFFIXES:
    rows = range(columns.num_rows(file.path))
    return [Document(f"{file.name}:{row}", file.path, row=row) for row in rows]
  if file.path.suffix != ".jsonl":
    return [file]
  documents, begin = [], 0
  with file.path.open("rb") as f:
    for number, line in enumerate(f, 1):
      end = begin + len(line)
      if line.strip():
        documents.append(Document(f"{file.name}:{number}", file.path, (begin, end)))
      begin = end
  return documents


def _jsonl_text(line: str, name: str) -> str:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as e:
    raise ValueError(f"data.path: line {name!r} is not json ({e}).") from e
  text = record.get("text") if isinstance(record, dict) else None
  if not isinstance(text, str):
    raise ValueError(f"data.path: line {name!r} has no string field 'text'.")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as e:  # json may escape half of a surrogate pair.
    raise ValueError(f"data.path: line {name!r} is not valid unicode ({e}).") from e
  return text


def rank(name: str) -> float:
  """A number in [0, 1) that depends on the name alone."""
  return (
    int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    / 2**64
  )


def _cut(document: Document, validation_fraction: float) -> tuple[list[Document], list[Document]]:
  if not validation_fraction:
    return [document], []
  length = len(document.read())
  cut = int(length * (1 - validation_fraction))
  return ([dataclasses.replace(document, end=cut)], [dataclasses.replace(document, begin=cut)])


def _take(documents: Sequence[Document], limit: int, digest) -> tuple[list[Document], int]:
  """The first `limit` bytes of `documents`, whole characters; every document's digest is added."""
  kept, total = [], 0
  digest.update(b"split\0")
  for document in documents:
    data = document.read().encode("utf-8")
    full = limit and total + len(data) > limit
    if full:
      text = data[: limit - total].decode("utf-8", errors="ignore")
      data = text.encode("utf-8")
      document = dataclasses.replace(document, end=document.begin + len(text))
    if data:
      digest.update(document.name.encode("utf-8", "surrogateescape") + b"\0")
      digest.update(hashlib.sha256(data).digest())
      kept.append(document)
      total += len(data)
    if full:
      break
  return kept, total
