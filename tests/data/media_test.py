import itertools

import numpy as np
import pytest

from latentlab import data
from latentlab.data import batches, collection, media

pytest.importorskip("sklearn")
DIGITS = dict(source="digits")
AUGMENTED = dict(source="digits", size=6, resize=8, random_crop=True, flip=True)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _assert_equal(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_digits_are_the_embedded_default():
  built = data.build(DIGITS, 8)
  assert isinstance(built, data.MediaData) and isinstance(built, data.Data)
  train, validation = built.splits["train"], built.splits["validation"]
  assert train.num_rows + validation.num_rows == 1797
  assert 0.08 < validation.num_rows / 1797 < 0.12
  assert not set(train.names) & set(validation.names)
  assert train.num_classes == 10 and train.class_names[3] == "three"
  assert [train.class_names[i] for i in train.labels] == train.captions
  assert built.tokenizer.decode(built.tokenizer.encode(train.captions[0])) == train.captions[0]
  batch = next(built.train_iterator(0))
  assert batch["media"].shape == (8, 8, 8, 1) and batch["media"].dtype == np.float32
  assert batch["media"].min() >= -1 and batch["media"].max() <= 1
  # 17 grey levels.
  np.testing.assert_array_equal(np.round(batch["media"] * 8), batch["media"] * 8)
  assert batch["labels"].dtype == np.int32 and batch["weights"].tolist() == [1.0] * 8


def test_digits_are_those_of_the_package():
  from sklearn import datasets

  wanted = datasets.load_digits()
  rows = data.build(DIGITS, 8).splits["train"]
  for i in range(20):
    number = int(rows.names[i].removeprefix("digit_"))
    np.testing.assert_array_equal(8 * (rows.item(i)[..., 0] + 1), wanted.images[number])
    assert rows.labels[i] == wanted.target[number]


@pytest.mark.parametrize("fields", [DIGITS, AUGMENTED], ids=["plain", "augmented"])
def test_iterator_is_split_and_carried(fields):
  built = data.build(fields, 600)  # An epoch ends within the third batch.
  whole = _take(built.train_iterator(5), 5)
  iterator = built.train_iterator(5)
  first, state = _take(iterator, 2), iterator.get_state()
  resumed = data.build(fields, 600).train_iterator(5)
  resumed.set_state(state)
  _assert_equal([*first, *_take(resumed, 3)], whole)
  assert not np.array_equal(next(built.train_iterator(6))["media"], whole[0]["media"])


def test_processes_share_batches():
  whole = _take(data.build(AUGMENTED, 6).train_iterator(1), 3)
  parts = [data.build(AUGMENTED, 6, i, 2) for i in range(2)]
  shares = [_take(p.train_iterator(1), 3) for p in parts]
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*shares, strict=True)]
  _assert_equal(joined, whole)
  evaluated = list(data.build(AUGMENTED, 6).eval_batches("validation"))
  shares = [list(p.eval_batches("validation")) for p in parts]
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*shares, strict=True)]
  _assert_equal(joined, evaluated)


def test_an_epoch_visits_every_item_once_and_each_epoch_crops_anew():
  built = data.build(AUGMENTED, 101)  # 1616 training items: 16 batches an epoch.
  training, split = built.training, built.splits["train"]
  n = split.num_rows
  visits = training.order(np.arange(2 * n), 3)
  rows = visits & (2**31 - 1)
  for epoch in (rows[:n], rows[n:]):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
  np.testing.assert_array_equal(rows, split.order(np.arange(2 * n), 3))
  assert (rows[:n] != rows[n:]).any()
  # One item, 60 epochs: all 9 places of the crop and both directions occur; evaluation has one.
  draws = np.array([batches.epoch_seed(3, epoch) for epoch in range(60)])
  seen = split.rows(np.zeros(60, np.int64), draws)["media"]
  image = data.build(DIGITS, 8).splits["train"].item(0)
  windows = [
    image[top : top + 6, left : left + 6][:, ::step]
    for top, left, step in itertools.product(range(3), range(3), (1, -1))
  ]
  found = {next(i for i, w in enumerate(windows) if np.array_equal(w, s)) for s in seen}
  assert len(found) > 14
  np.testing.assert_array_equal(split.item(0), image[1:7, 1:7])


def test_evaluation_pads_the_last_batch():
  built = data.build(DIGITS, 100)
  first, last = built.eval_batches("validation")
  assert last["weights"].sum() == built.splits["validation"].num_rows - 100
  padded = last["weights"] == 0
  assert (last["labels"][padded] == -1).all() and not last["media"][padded].any()
  assert len(list(built.eval_batches("validation", max_batches=1))) == 1
  np.testing.assert_array_equal(first["media"][7], built.splits["validation"].item(7))


def test_split_by_pattern_and_by_hash():
  names = [f"{i}_x_{j}" for i in range(10) for j in range(10)]
  by_pattern = collection.split(names, 0.1, r"_[01]$")
  assert {names[i] for i in by_pattern["validation"]} == {n for n in names if n[-1] in "01"}
  by_hash = collection.split(names, 0.2)
  more = collection.split([*names, "another"], 0.2)
  for side in by_hash:  # A new item moves no other.
    assert set(by_hash[side]) <= set(more[side])
  assert list(collection.split(names, 0.0)) == ["train"]
  assert [len(v) for v in collection.split(["a", "b"], 0.99).values()] == [1, 1]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(source="digits", sise=3), "no field"),
    (dict(source="digits", channels=2), "channels=2"),
    (dict(source="digits", validation_fraction=1.0), "validation_fraction=1.0"),
    (dict(source="digits", split_pattern="("), "no regular expression"),
    (dict(source="digits", split_pattern="nowhere"), "in no name"),
    (dict(source="digits", split_pattern="digit"), "in every name"),
    (dict(source="digits", random_crop=True), "need data.size"),
    (dict(source="digits", size=8, resize=4), "smaller than data.size"),
    (dict(source="digits", size=-1), "must not be negative"),
    (dict(source="digits", class_captions=("a",)), "1 captions for 10 classes"),
    (dict(source="digits", class_captions="abc"), "must be a list"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    data.build(fields, 8)


def test_bad_requests():
  built = data.build(DIGITS | dict(validation_fraction=0.0), 8)
  with pytest.raises(ValueError, match="makes no validation split"):
    built.eval_batches("validation")
  with pytest.raises(ValueError, match="are of texts"):
    built.eval_batches("train", seq_length=4)
  with pytest.raises(ValueError, match="'digits' has no raw bytes"):
    built.raw_bytes("train")
  with pytest.raises(ValueError, match="positive multiple"):
    data.build(DIGITS, 7, 0, 2)
  with pytest.raises(ValueError, match="process_index=2 is not in"):
    data.build(DIGITS, 8, 2, 2)
  with pytest.raises(ValueError, match="is unknown"):
    media.MediaConfig.of(dict(source="photographs"))
  with pytest.raises(ValueError, match="'photographs' is unknown.*'synthetic', 'digits'"):
    data.build(dict(source="photographs"), 8)


def test_class_captions_and_channels():
  words = tuple(f"the digit {i}" for i in range(10))
  built = data.build(DIGITS | dict(class_captions=words, channels=3), 8)
  rows = built.splits["train"]
  assert rows.captions[0] == words[rows.labels[0]]
  image = rows.item(0)
  assert image.shape == (8, 8, 3)
  np.testing.assert_array_equal(image[..., 0], image[..., 2])
