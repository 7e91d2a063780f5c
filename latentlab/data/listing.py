"""Which media a folder or a jsonl file lists, with their labels and captions."""

import json
import os
import pathlib
from collections.abc import Sequence

from latentlab.data.collection import Record

Listing = tuple[list[Record], list[pathlib.Path]]
"""Records, and the file of each."""


def folder(path: str, suffixes: Sequence[str]) -> Listing:
  """Files under a folder by their relative paths; a file in a subfolder has that one's label.

  Args:
    path: Hidden files and folders are left out.
    suffixes: Endings of file names, in lower case.

  Raises:
    ValueError: nothing is found.
  """
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    raise ValueError(f"data.path={path!r} is no folder; give one with {_endings(suffixes)} files.")
  found = []
  for parent, subfolders, names in os.walk(root, followlinks=True):
    subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
    found += [
      pathlib.Path(parent, n)
      for n in names
      if not n.startswith(".") and pathlib.Path(n).suffix.lower() in suffixes
    ]
  if not found:
    raise ValueError(f"data.path={path!r} has no {_endings(suffixes)} files; give another folder.")
  paths = sorted(found)
  relative = [p.relative_to(root) for p in paths]
  records = [Record(r.as_posix(), r.parts[0] if len(r.parts) > 1 else None) for r in relative]
  return records, paths


def manifest(path: str, field: str) -> Listing:
  """Lines of a jsonl file: a relative path in `field`, a caption in `text`, perhaps a `label`.

  Paths are relative to the file's folder and may not leave it. A path may come in several lines,
  with a caption each: its items stay in one split.

  Raises:
    ValueError: a line is bad, or names no file.
  """
  file = pathlib.Path(path).expanduser()
  try:
    lines = file.read_text("utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"data.path={path!r} cannot be read as a jsonl file ({e}).") from e
  root = file.resolve().parent
  records, paths = [], []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f"data.path: line {number} of {path!r}"
    try:
      fields = json.loads(line)
    except json.JSONDecodeError as e:
      raise ValueError(f"{where} is not json ({e}).") from e
    if not isinstance(fields, dict):
      raise ValueError(f"{where} is no json object; it needs the fields {field!r} and 'text'.")
    for name in (field, "text"):
      if not isinstance(fields.get(name), str) or not fields[name]:
        raise ValueError(f"{where} has no string {name!r}; add it, or leave the line out.")
    label = fields.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, (str, int))):
      raise ValueError(f"{where} has the label {label!r}; it must be a string or a whole number.")
    medium = (root / fields[field]).resolve()
    if not medium.is_relative_to(root):
      raise ValueError(f"{where} names {fields[field]!r}, which lies outside of {str(root)!r}.")
    if not medium.is_file():
      raise ValueError(f"{where} names {fields[field]!r}, which is no file; add it.")
    name = medium.relative_to(root).as_posix()
    records.append(Record(name, None if label is None else str(label), fields["text"]))
    paths.append(medium)
  if not records:
    raise ValueError(f"data.path={path!r} has no lines; each is to name a medium.")
  return records, paths


def content(path: pathlib.Path) -> bytes:
  """What a file holds."""
  try:
    return path.read_bytes()
  except OSError as e:
    raise ValueError(f"data.path: {str(path)!r} cannot be read ({e.strerror}).") from e


def _endings(suffixes: Sequence[str]) -> str:
  return " or ".join(suffixes)
