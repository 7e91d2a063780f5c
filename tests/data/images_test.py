import json

import numpy as np
import pytest
from PIL import Image

from latentlab import data
from latentlab.data import images, media, media_files


def _write(path, pixels):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
  """12 colour images of 10x8 pixels, of two classes; none is like another."""
  rng = np.random.default_rng(0)
  for i in range(12):
    name = f"{('cat', 'dog')[i % 2]}/{i:02}.png"
    _write(tmp_path / "images" / name, rng.integers(0, 256, (10, 8, 3)))
  return tmp_path / "images"


def _fields(path, **more):
  return dict(source="image_folder", path=str(path), validation_fraction=0.25) | more


def test_a_folder_of_classes(folder):
  built = data.build(_fields(folder), 4)
  rows = {name: built.splits[name] for name in ("train", "validation")}
  assert sum(r.num_rows for r in rows.values()) == 12
  assert rows["train"].class_names == ("cat", "dog") and rows["train"].captions[0] == ""
  for split in rows.values():
    for i, name in enumerate(split.names):
      want = np.asarray(Image.open(folder / name), np.float64) / 127.5 - 1
      np.testing.assert_allclose(split.item(i), want, atol=1e-6)
      assert split.class_names[split.labels[i]] == name.split("/")[0]
  again = data.build(_fields(folder), 4)
  assert again.summary == built.summary and again.summary["shape"] == [10, 8, 3]
  _write(folder / "cat" / "00.png", np.zeros((10, 8, 3)))
  assert data.build(_fields(folder), 4).summary["media_sha256"] != built.summary["media_sha256"]


def test_a_flat_folder_has_no_labels(tmp_path):
  for i in range(4):
    _write(tmp_path / f"{i}.png", np.full((4, 4), 60 * i))
  rows = data.build(_fields(tmp_path), 2).splits["train"]
  assert rows.num_classes == 0 and (rows.labels == -1).all() and rows.item(0).shape == (4, 4, 1)


def test_resize_and_crop(folder):
  built = data.build(_fields(folder, size=4, resize=5, random_crop=True), 4)
  rows = built.splits["train"]
  image = Image.open(folder / rows.names[0])
  # The shorter side, 8, becomes 5, the longer one 6.
  resized = np.asarray(image.resize((5, 6), Image.Resampling.BICUBIC), np.float64) / 127.5 - 1
  np.testing.assert_allclose(rows.item(0), resized[1:5, 0:4], atol=1.2 / 127.5)  # Twice rounded.
  crops = rows.rows(np.zeros(40, np.int64), np.arange(40))["media"]
  places = {
    next(
      (top, left)
      for top in range(3)
      for left in range(2)
      if np.abs(crop - resized[top : top + 4, left : left + 4]).max() < 1.2 / 127.5
    )
    for crop in crops
  }
  assert len(places) == 6


def test_channels(folder, tmp_path):
  grey = data.build(_fields(folder, channels=1), 4).splits["train"]
  want = np.asarray(Image.open(folder / grey.names[0]).convert("L"))
  np.testing.assert_allclose(grey.item(0)[..., 0], want / 127.5 - 1, atol=1e-6)
  # A transparent pixel is white, whatever colour lies beneath.
  pixels = np.zeros((2, 2, 4), np.uint8)
  pixels[0, 0] = (10, 20, 30, 255)
  _write(tmp_path / "a.png", pixels)
  image = images.decode((tmp_path / "a.png").read_bytes(), "a.png")
  np.testing.assert_allclose(image[0, 0], np.array([10, 20, 30]) / 127.5 - 1, atol=1e-6)
  assert (image[1] == 1).all() and image.shape == (2, 2, 3)


def test_an_image_lying_on_its_side(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
  Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
  Image.fromarray(pixels).save(tmp_path / "b.png", exif=exif)
  built = data.build(_fields(tmp_path), 1)
  assert built.summary["shape"] == [3, 2, 1]
  want = np.rot90(pixels, -1) / 127.5 - 1
  np.testing.assert_allclose(built.splits["train"].item(0)[..., 0], want, atol=1e-6)


def _captions(folder, lines):
  path = folder / "captions.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def test_captioned_images(folder):
  lines = [
    dict(image=f"{('cat', 'dog')[i % 2]}/{i:02}.png", text=f"{word} number {i}", label=i % 3)
    for i in range(12)
    for word in ("image", "picture")
  ]
  path = _captions(folder, lines)
  built = data.build(_fields(path, source="captioned_images"), 4)
  rows = built.splits
  assert rows["train"].class_names == ("0", "1", "2")
  assert sum(r.num_rows for r in rows.values()) == 24
  assert not set(rows["train"].names) & set(rows["validation"].names)  # Captions of one image.
  for split in rows.values():
    for name, caption, label in zip(split.names, split.captions, split.labels, strict=True):
      number = int(name[-6:-4])
      assert caption.endswith(f"number {number}") and label == number % 3


def test_arrays(tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (20, 5, 5), np.uint8)
  labels = np.arange(20) % 4
  captions = np.array([f"number {i}" for i in range(20)])
  np.savez(tmp_path / "a.npz", media=pixels, labels=labels, captions=captions)
  built = data.build(dict(source="arrays", path=str(tmp_path / "a.npz")), 4)
  in_memory = media.build_arrays(pixels, labels, list(captions), batch_size=4)
  assert built.summary == in_memory.summary
  for split in ("train", "validation"):
    rows = built.splits[split]
    for i, name in enumerate(rows.names):
      np.testing.assert_allclose(rows.item(i)[..., 0], pixels[int(name)] / 127.5 - 1, atol=1e-6)
      assert rows.labels[i] == int(name) % 4 and rows.captions[i] == f"number {name}"
  # A class that no item has keeps its number; names may be given.
  sparse = media.build_arrays(pixels, labels * 2, batch_size=4, fields=dict(channels=3, flip=True))
  assert sparse.splits["train"].num_classes == 7
  assert set(sparse.splits["train"].labels) == {0, 2, 4, 6}
  assert next(sparse.train_iterator(0))["media"].shape == (4, 5, 5, 3)
  named = media.build_arrays(pixels, ["b", "a"] * 10, batch_size=4)
  assert named.splits["train"].class_names == ("a", "b")


def _with(folder, name, content):
  (folder / name).parent.mkdir(parents=True, exist_ok=True)
  (folder / name).write_bytes(content)


@pytest.mark.parametrize(
  ("damage", "fields", "message"),
  [
    (lambda f: _with(f, "cat/x.png", b"no image"), {}, r"x\.png' cannot be read as an image"),
    (lambda f: _write(f / "cat" / "x.png", np.zeros((9, 8, 3))), {}, "set data.size"),
    (lambda f: _write(f / "cat" / "x.png", np.zeros((10, 8))), {}, "data.channels, to make them"),
    (lambda f: _write(f / "x.png", np.zeros((10, 8, 3))), {}, r"'x\.png' has no label"),
    (lambda f: None, dict(class_names=("cat",)), "the label 'dog', which is not among"),
    (lambda f: None, dict(class_names=("cat", "dog", "cat")), "has a name twice"),
    (lambda f: None, dict(sample_rate=8000), "'sample_rate': 8000"),
    (lambda f: None, dict(label_pattern="(.)"), "label_pattern"),
    (lambda f: None, dict(path=""), "give the path"),
    (lambda f: None, dict(path="/nowhere"), "is no folder"),
  ],
)
def test_bad_folders(folder, damage, fields, message):
  damage(folder)
  with pytest.raises(ValueError, match=message):
    data.build(_fields(folder) | fields, 4)


def test_an_empty_folder_and_a_damaged_image(folder, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="has no .*png.* files"):
    data.build(_fields(tmp_path / "empty"), 4)
  png = folder / "cat" / "00.png"
  png.write_bytes(png.read_bytes()[:-60])
  with pytest.raises(ValueError, match=r"00\.png' cannot be read as an image"):
    data.build(_fields(folder), 4)
  png.unlink()
  # The head of this one is whole, and only a batch finds out.
  jpg = folder / "cat" / "00.jpg"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 8, 3), np.uint8)).save(jpg)
  jpg.write_bytes(jpg.read_bytes()[:-60])
  built = data.build(_fields(folder, validation_fraction=0.0), 4)
  with pytest.raises(ValueError, match=r"00\.jpg' cannot be read as an image"):
    list(built.eval_batches("train"))
  Image.fromarray(np.zeros((4, 4), np.uint16)).save(png)
  with pytest.raises(ValueError, match="8 bits a channel"):
    data.build(_fields(folder), 4)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("{", "line 2 .* is not json"),
    ("3", "is no json object"),
    (json.dumps(dict(image="cat/00.png")), "line 2 .* has no string 'text'"),
    (json.dumps(dict(image="cat/00.png", text="")), "has no string 'text'"),
    (json.dumps(dict(image="../images.png", text="a")), "lies outside of"),
    (json.dumps(dict(image="/etc/passwd", text="a")), "lies outside of"),
    (json.dumps(dict(image="cat/99.png", text="a")), "which is no file"),
    (json.dumps(dict(image="cat/00.png", text="a", label=[1])), "has the label"),
    (json.dumps(dict(image="cat/00.png", text="a", label="b")), "label all or none"),
  ],
)
def test_bad_captions(folder, line, message):
  path = folder / "captions.jsonl"
  path.write_text(json.dumps(dict(image="cat/00.png", text="a")) + "\n" + line)
  with pytest.raises(ValueError, match=message):
    data.build(_fields(path, source="captioned_images"), 2)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(media=np.full((3, 4, 4), 2.0)), "scale them"),
    (dict(media=np.full((3, 4, 4), np.nan)), "scale them"),
    (dict(media=np.zeros((3, 4, 4), np.int16)), "give uint8"),
    (dict(media=np.zeros((3, 4, 4, 2))), "2 channels"),
    (dict(media=np.zeros(3)), r"shape \(3,\)"),
    (dict(media=np.zeros((3, 4, 4)), labels=[0, 1]), "2 labels for 3 media"),
    (dict(media=np.zeros((3, 4, 4)), labels=[0, 1, -1]), "-1 throughout"),
    (dict(media=np.zeros((3, 4, 4)), labels=np.array([0.5, 1, 2])), "whole numbers or names"),
    (dict(media=np.zeros((3, 4, 4)), lengths=np.ones(3, int)), "lengths are of sounds"),
    (
      dict(media=np.zeros((3, 4, 4)), labels=[0, 1, 2], fields=dict(class_names=("a", "b"))),
      "add the others",
    ),
  ],
)
def test_bad_arrays(arguments, message):
  with pytest.raises(ValueError, match=message):
    media.build_arrays(**arguments, batch_size=1)


def test_bad_npz_files(tmp_path):
  path = tmp_path / "a.npz"
  fields = dict(source="arrays", path=str(path))
  for arrays, message in (
    (dict(media=np.array([object()])), "without objects"),
    (dict(images=np.zeros((3, 4, 4))), "it needs 'media'"),
  ):
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message):
      data.build(fields, 1)
  path.write_bytes(b"PK\x03\x04")
  with pytest.raises(ValueError, match="cannot be read as an npz"):
    data.build(fields, 1)


def test_png_of_images_side_by_side(tmp_path):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (5, 3, 4, 3), np.uint8)
  media_files.write_png(tmp_path / "new" / "a.png", pixels / 127.5 - 1, columns=3, scale=2)
  grid = np.asarray(Image.open(tmp_path / "new" / "a.png"))
  assert grid.shape == (2 * 7 - 1, 3 * 9 - 1, 3)
  np.testing.assert_array_equal(grid[7:13:2, 9:17:2], pixels[4])
  np.testing.assert_array_equal(grid[8:13:2, 10:17:2], pixels[4])
  assert (grid[6] == 255).all() and (grid[7:, 18:] == 255).all()
  media_files.write_png(tmp_path / "b.png", np.full((1, 2, 2, 1), 7.0))
  assert (np.asarray(Image.open(tmp_path / "b.png")) == np.full((2, 2), 255)).all()
  with pytest.raises(ValueError, match=r"shape \(2, 2, 1\)"):
    media_files.write_png(tmp_path / "c.png", np.zeros((2, 2, 1)))
  with pytest.raises(ValueError, match="no numbers"):
    media_files.write_png(tmp_path / "c.png", np.full((1, 2, 2, 1), np.nan))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["b.png", "new"]
