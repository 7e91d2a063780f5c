import json
import sysconfig

import pytest

from latentlab.data import sources


def _texts(documents):
  return {d.name: d.read() for d in documents}


def _write(root, **files):
  for name, text in files.items():
    (root / name).write_text(text)


def test_folder_by_name_and_pattern(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / ".git").mkdir()
  for name in ("b.txt", "a.py", "sub/c.txt", ".hidden", ".git/d.txt"):
    (tmp_path / name).write_text(name)
  (tmp_path / "empty.txt").touch()
  assert list(_texts(sources.files(tmp_path))) == ["a.py", "b.txt", "sub/c.txt"]
  assert list(_texts(sources.files(tmp_path, ["*.txt"]))) == ["b.txt", "sub/c.txt"]


def test_jsonl(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('{"text": "één"}\n\n{"text": "two", "id": 2}')
  assert _texts(sources.files(path)) == {"x.jsonl:1": "één", "x.jsonl:3": "two"}
  assert _texts(sources.files(tmp_path)) == _texts(sources.files(path))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"text": "a"', "x.jsonl:2' is not json"),
    ('["a"]', "no string field 'text'"),
    ('{"text": 3}', "no string field 'text'"),
    (r'{"text": "\ud800"}', "not valid unicode"),
  ],
)
def test_bad_jsonl(tmp_path, line, message):
  path = tmp_path / "x.jsonl"
  path.write_text('{"text": "fine"}\n' + line)
  with pytest.raises(ValueError, match=message):
    sources.files(path)[1].read()


def test_standard_library(tmp_path, monkeypatch):
  for folder in ("json", "site-packages/numpy", "__pycache__", "test"):
    (tmp_path / folder).mkdir(parents=True)
  _write(
    tmp_path,
    **{
      "abc.py": "a",
      "json/decoder.py": "b",
      "site-packages/numpy/x.py": "c",
      "README": "d",
      "__pycache__/y.py": "e",
    },
  )
  (tmp_path / "test/bad.py").write_bytes(b"# coding: latin-1\n\xe9")
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
  documents, skipped = sources.standard_library()
  assert _texts(documents) == {"abc.py": "a", "json/decoder.py": "b"}
  assert skipped == 1


def test_the_real_standard_library_is_there():
  root = sources.pathlib.Path(sysconfig.get_paths()["stdlib"])
  names = [d.name for d in sources._walk(root, ("*.py",))]
  assert "json/decoder.py" in names and names == sorted(names)
  assert not any("site-packages" in n or "dist-packages" in n for n in names)


def test_single_document_is_cut_as_nanogpt_does(tmp_path):
  path = tmp_path / "x.txt"
  path.write_text("é" + "0123456789" * 10)
  corpus = sources.split("x", sources.files(path), 0.1)
  (train,), (validation,) = corpus.splits["train"], corpus.splits["validation"]
  text = path.read_text()
  assert train.read() == text[: int(0.9 * len(text))]
  assert train.read() + validation.read() == text
  assert sum(corpus.num_bytes.values()) == len(text.encode())


def test_split_hangs_on_names_alone(tmp_path):
  _write(tmp_path, **{f"{i}.txt": f"document {i}" for i in range(200)})
  before = sources.split("x", sources.files(tmp_path), 0.2)
  names = {k: {d.name for d in v} for k, v in before.splits.items()}
  assert 20 <= len(names["validation"]) <= 60
  assert len(names["train"] | names["validation"]) == 200
  _write(tmp_path, **{"0.txt": "changed", "new.txt": "new"})
  after = sources.split("x", sources.files(tmp_path), 0.2)
  for split, members in names.items():
    assert members <= {d.name for d in after.splits[split]}
  assert before.digest != after.digest
  assert after.digest == sources.split("x", sources.files(tmp_path)[::-1], 0.2).digest


@pytest.mark.parametrize("fraction", [1e-9, 0.9999999])
def test_both_sides_have_a_document(tmp_path, fraction):
  _write(tmp_path, a="one", b="two", c="three")
  corpus = sources.split("x", sources.files(tmp_path), fraction)
  assert all(corpus.num_bytes.values())


def test_no_validation(tmp_path):
  _write(tmp_path, a="one", b="two")
  assert sources.split("x", sources.files(tmp_path), 0).num_bytes == {"train": 6, "validation": 0}


def test_max_train_bytes_takes_a_random_prefix(tmp_path):
  _write(tmp_path, **{f"{i:02}.txt": chr(ord("a") + i % 26) * 9 + "é" for i in range(40)})
  documents = sources.files(tmp_path)
  whole = sources.split("x", documents, 0.1)
  everything = "".join(d.read() for d in whole.splits["train"]).encode()
  for limit in (1, 21, 33, 34, 110):
    part = sources.split("x", documents, 0.1, limit)
    text = "".join(d.read() for d in part.splits["train"]).encode()
    assert everything.startswith(text) and limit - 1 <= len(text) <= limit
    assert part.num_bytes == whole.num_bytes | {"train": len(text)}
    assert part.splits["validation"] == whole.splits["validation"]
  names = [d.name for d in part.splits["train"]]
  assert names != sorted(names)


def test_errors(tmp_path):
  with pytest.raises(ValueError, match="data.path='nowhere' does not exist; give"):
    sources.files("nowhere")
  (tmp_path / "empty.txt").touch()
  with pytest.raises(ValueError, match=r"empty.txt' is empty; give"):
    sources.files(tmp_path / "empty.txt")
  with pytest.raises(ValueError, match=r"data.include=\('\*.py',\)"):
    sources.files(tmp_path, ("*.py",))
  bad = tmp_path / "bad.txt"
  bad.write_bytes(b"fine \xff")
  with pytest.raises(ValueError, match=r"bad.txt' is not utf-8: byte 0xff at offset 5"):
    sources.split("x", sources.files(bad), 0.1)
  with pytest.raises(ValueError, match="data.validation_fraction=1"):
    sources.split("x", [], 1)
  with pytest.raises(ValueError, match="data.max_train_bytes=-1"):
    sources.split("x", [], 0.1, -1)


def test_bad_utf8_in_jsonl_names_the_offset_in_the_file(tmp_path):
  path = tmp_path / "x.jsonl"
  first = json.dumps({"text": "a"}).encode() + b"\n"
  path.write_bytes(first + b'{"text": "\xff"}')
  with pytest.raises(ValueError, match=f"offset {len(first) + 10}"):
    sources.files(path)[1].read()


def test_unreadable_file(tmp_path, monkeypatch):
  path = tmp_path / "x.txt"
  path.write_text("a")

  def refuse(self, *args, **kwargs):
    raise PermissionError(13, "Permission denied", str(self))

  documents = sources.files(path)
  monkeypatch.setattr(sources.pathlib.Path, "open", refuse)
  with pytest.raises(ValueError, match=r"x.txt' cannot be read \(Permission denied\)"):
    documents[0].read()
