"""Parquet and Arrow files, and folders in the layout of Hugging Face's `datasets`."""

import json
import sys

import pytest

from latentlab import data
from latentlab.data import sources

TEXTS = [f"row {i}: h\u00e4lf of it is h\u00e9ld out. " * (1 + i % 5) for i in range(40)]


@pytest.fixture
def pa():
  return pytest.importorskip("pyarrow")


def _stream(pa, path, columns):
  """As `datasets` writes one: an Arrow stream of several batches."""
  table = pa.table(columns)
  with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, table.schema) as stream:
    stream.write_table(table, max_chunksize=7)


def _data_set(pa, folder, texts):
  """What `Dataset.save_to_disk` leaves behind, two files of it."""
  folder.mkdir(parents=True)
  names = [f"data-0000{i}-of-00002.arrow" for i in range(2)]
  for name, part in zip(names, (texts[:25], texts[25:]), strict=True):
    _stream(pa, folder / name, {"label": list(range(len(part))), "text": part})
  (folder / "dataset_info.json").write_text('{"features": {}}')
  state = dict(_data_files=[{"filename": name} for name in names], _split="train")
  (folder / "state.json").write_text(json.dumps(state))
  return folder


def _read(path):
  return [d.read() for d in sources.files(path)]


def test_files(pa, tmp_path):
  from pyarrow import parquet

  _stream(pa, tmp_path / "a.arrow", {"text": TEXTS})
  kinds = (pa.string(), pa.large_string())
  for i, kind in enumerate(kinds):
    table = pa.table({"id": range(40), "text": pa.array(TEXTS, kind)})
    parquet.write_table(table, tmp_path / f"b{i}.parquet", row_group_size=9)
  for name in ("a.arrow", "b0.parquet", "b1.parquet"):
    assert _read(tmp_path / name) == TEXTS
  documents = sources.files(tmp_path, ["*.parquet"])
  assert len(documents) == 80 and documents[41].name == "b1.parquet:1"


def test_a_data_set_on_a_disk_trains(pa, tmp_path):
  folder = _data_set(pa, tmp_path / "books/train", TEXTS)
  assert _read(folder) == TEXTS  # And neither its state nor its info.
  built = data.build(dict(path=str(folder), seq_length=16, cache_dir=str(tmp_path)), batch_size=4)
  together = built.raw_bytes("train") + built.raw_bytes("validation")
  assert len(together) == sum(len(text.encode()) for text in TEXTS)
  assert all(text.encode() in together for text in TEXTS)
  assert next(built.train_iterator(0))["inputs"].shape == (4, 16)


def test_a_file_that_changes_is_read_anew(pa, tmp_path):
  for texts in (TEXTS[:3], TEXTS[5:9]):
    _stream(pa, tmp_path / "new.arrow", {"text": texts})
    (tmp_path / "new.arrow").rename(tmp_path / "a.arrow")
    assert _read(tmp_path / "a.arrow") == texts


def test_splits_are_not_mixed(pa, tmp_path):
  for split in ("train", "test"):
    _data_set(pa, tmp_path / split, TEXTS)
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
  with pytest.raises(ValueError, match=r"holds the splits \['test', 'train'\] of a data set; give"):
    sources.files(tmp_path)


def test_bad_files(pa, tmp_path):
  def fails(message):
    with pytest.raises(ValueError, match=message):
      _read(tmp_path)

  path = tmp_path / "x.arrow"
  _stream(pa, path, {"words": TEXTS})
  fails(r"x.arrow' has no column 'text'; it has \['words'\]")
  _stream(pa, path, {"text": [1, 2]})
  fails("column 'text' of .*x.arrow' holds int64, no strings")
  _stream(pa, path, {"text": ["a", None]})
  fails("row 1 of .*x.arrow' has no 'text'")
  path.write_bytes(b"no stream at all")
  fails("x.arrow' is not an Arrow stream")
  path.rename(tmp_path / "x.parquet")
  fails("x.parquet' is not a Parquet file")


def test_bad_data_sets(pa, tmp_path):
  folder = _data_set(pa, tmp_path / "set", TEXTS)
  (folder / "data-00001-of-00002.arrow").unlink()
  with pytest.raises(ValueError, match=r"lacks \['data-00001-of-00002.arrow'\]"):
    sources.files(folder)
  (folder / "state.json").write_text('{"_data_files": [1]}')
  with pytest.raises(ValueError, match="state.json' lists no data files"):
    sources.files(folder)


def test_says_which_package_is_missing(monkeypatch, tmp_path):
  (tmp_path / "x.parquet").write_bytes(b"PAR1")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(
    ValueError, match=r"needs the package pyarrow: pip install 'latentlab\[arrow\]'"
  ):
    sources.files(tmp_path)
