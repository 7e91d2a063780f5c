"""Files that are never half written: a killed process leaves the old one or the new one."""

import json
import os
import pathlib
import uuid
from collections.abc import Callable
from typing import Any


def write(path: str | os.PathLike, write_to: Callable[[pathlib.Path], None]) -> None:
  """Writes a file by way of a temporary one beside it, and makes its folder."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = temporary_name(path)
  try:
    write_to(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a text; see `write`."""

  def write_to(temporary: pathlib.Path) -> None:
    temporary.write_text(text, "utf-8")

  write(path, write_to)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes json; see `write_text`."""
  write_text(path, json.dumps(value, indent=1) + "\n")


def temporary_name(path: pathlib.Path) -> pathlib.Path:
  """A name beside `path` that no other process uses, here or on a machine that shares the disk."""
  return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
