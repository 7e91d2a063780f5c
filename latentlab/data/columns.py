"""Texts in columnar files: Parquet, and the Arrow streams of Hugging Face `datasets` on a disk.

`Dataset.save_to_disk` makes a folder of `data-*.arrow` and a `state.json` that lists them in order;
`DatasetDict.save_to_disk` makes one such folder for each split, and a `dataset_dict.json`.
"""

import functools
import json
import os
import pathlib
from typing import Any

SUFFIXES = (".arrow", ".parquet")
FIELD = "text"


def shards(folder: pathlib.Path) -> list[pathlib.Path] | None:
  """Files of a data set that was saved to a disk; `None` if `folder` is none.

  Raises:
    ValueError: it holds several splits, or lacks a file that it lists.
  """
  if (folder / "dataset_dict.json").is_file():
    splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
    raise ValueError(
      f"data.path={str(folder)!r} holds the splits {splits} of a data set; give one of these "
      "folders, out of which data.validation_fraction takes its own validation split."
    )
  state = folder / "state.json"
  if not state.is_file() or not list(folder.glob("*.arrow")):
    return None
  try:
    names = [entry["filename"] for entry in json.loads(state.read_text("utf-8"))["_data_files"]]
  except (ValueError, KeyError, TypeError) as e:
    raise ValueError(
      f"data.path: {str(state)!r} lists no data files ({e!r}); save the data set again."
    ) from e
  found = [folder / name for name in names]
  if missing := [p.name for p in found if not p.is_file()]:
    raise ValueError(f"data.path: {str(folder)!r} lacks {missing}, which its state.json lists.")
  return found


def num_rows(path: pathlib.Path) -> int:
  """Rows of a columnar file."""
  return len(_column(path, _stamp(path)))


def read(path: pathlib.Path, row: int) -> str:
  """The text of a row."""
  text = _column(path, _stamp(path))[row].as_py()
  if text is None:
    raise ValueError(f"data.path: row {row} of {str(path)!r} has no {FIELD!r}; leave it out.")
  return text


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  """Changes with the file, so that a new one under an old name is read anew."""
  stat = os.stat(path)
  return stat.st_mtime_ns, stat.st_size


# Documents are visited in an order that jumps between files, so that all of them stay open.
@functools.lru_cache(maxsize=1024)
def _column(path: pathlib.Path, stamp: tuple[int, int]) -> Any:
  """The texts of a file: of a Parquet file in memory, of an Arrow stream on the disk, mapped."""
  del stamp
  try:
    import pyarrow as pa
    from pyarrow import parquet
  except ImportError as e:
    raise ValueError(
      f"data.path: {str(path)!r} needs the package pyarrow: pip install 'latentlab[arrow]'."
    ) from e
  is_parquet = path.suffix == ".parquet"
  try:
    if is_parquet:
      file = parquet.ParquetFile(path, memory_map=True)
      schema, read_column = file.schema_arrow, lambda: file.read(columns=[FIELD]).column(FIELD)
    else:
      stream = pa.ipc.open_stream(pa.memory_map(str(path)))
      schema, read_column = stream.schema, lambda: stream.read_all().column(FIELD)
    if FIELD not in schema.names:
      raise ValueError(
        f"data.path: {str(path)!r} has no column {FIELD!r}; it has {sorted(schema.names)}."
      )
    kind = schema.field(FIELD).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
      raise ValueError(f"data.path: column {FIELD!r} of {str(path)!r} holds {kind}, no strings.")
    return read_column()
  except (pa.ArrowInvalid, OSError) as e:
    expected = "a Parquet file" if is_parquet else "an Arrow stream, as datasets are saved in"
    raise ValueError(f"data.path: {str(path)!r} is not {expected} ({e}).") from e
