import inspect

import numpy as np
import pytest

from latentlab import data
from latentlab.data import media
from latentlab.eval import features as features_lib
from latentlab.eval import metrics
from latentlab.eval.media_metrics import generation_metrics, reconstruction_metrics

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits():
  return data.build(dict(source="digits"), 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def classifier(digits, cache):
  return features_lib.build("classifier", digits.splits["train"], cache)


def test_the_classifier_knows_digits_it_has_not_seen(digits, classifier):
  rows = digits.splits["validation"]
  found = classifier.of_rows(rows)
  assert (found.probabilities.argmax(1) == rows.labels).mean() > 0.95
  np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-9)
  assert found.features.shape == (rows.num_rows, 32) and found.features.dtype == np.float64
  # Whatever else is looked at with it.
  few = classifier.of_rows(rows, max_rows=3)
  np.testing.assert_allclose(few.features, found.features[:3], atol=1e-6)


def test_the_classifier_is_trained_once(digits, classifier, cache, monkeypatch):
  def fail(*args):
    raise AssertionError("trained again")

  monkeypatch.setattr(features_lib, "_train", fail)
  again = features_lib.build("classifier", digits.splits["train"], cache)
  rows = digits.splits["validation"]
  np.testing.assert_array_equal(again.of_rows(rows).features, classifier.of_rows(rows).features)
  assert [p.suffix for p in cache.iterdir()] == [".npz"]
  other = data.build(dict(source="digits", validation_fraction=0.2), 8).splits["train"]
  for rows, seed in ((other, 0), (digits.splits["train"], 1)):  # What it is made of counts.
    with pytest.raises(AssertionError, match="trained again"):
      features_lib.build("classifier", rows, cache, seed)


def test_generation_metrics_tell_good_from_bad(digits, classifier):
  train = digits.splits["train"]
  real = train.rows(np.arange(800))
  reference = classifier(train.rows(np.arange(800, 1600))["media"])
  good = generation_metrics(real["media"], real["labels"], reference, classifier)
  assert good["agreement"] > 0.98 and good["inception_score"] > 7
  assert good["precision"] > 0.8 and good["recall"] > 0.8
  noise = np.random.default_rng(0).normal(0, 0.5, real["media"].shape).astype(np.float32)
  noisy = generation_metrics(real["media"] + noise, real["labels"], reference, classifier)
  assert noisy["frechet"] > 3 * good["frechet"] and noisy["precision"] < good["precision"]
  # One class alone is precise and does not vary; the wrong class shows in the agreement alone.
  zeros = train.rows(np.flatnonzero(train.labels == 0))
  one = generation_metrics(zeros["media"], zeros["labels"], reference, classifier)
  assert one["precision"] > 0.7 and one["recall"] < 0.3 and one["inception_score"] < 1.5
  wrong = generation_metrics(real["media"], (real["labels"] + 1) % 10, reference, classifier)
  assert wrong.pop("agreement") < 0.02 < good.pop("agreement") and wrong == good
  unasked = generation_metrics(real["media"], None, reference, classifier)
  assert unasked == good
  some = np.where(np.arange(800) < 5, real["labels"], -1)
  few = generation_metrics(real["media"], some, reference, classifier)
  assert few.pop("agreement") == 1 and few == good


def test_a_split_is_looked_at_once_or_each_time(digits, classifier):
  images, rows = digits.splits["train"].rows(np.arange(50))["media"], digits.splits["validation"]
  each, once = (
    generation_metrics(images, None, reference, classifier)
    for reference in (rows, classifier.of_rows(rows))
  )
  assert each == once


def test_pixels(digits):
  pixels = features_lib.build("pixels", digits.splits["train"])
  rows = digits.splits["validation"]
  found = pixels.of_rows(rows)
  np.testing.assert_array_equal(found.features[3], rows.item(3).ravel())
  assert found.probabilities is None
  numbers = generation_metrics(rows.rows(np.arange(100))["media"], None, found, pixels)
  assert sorted(numbers) == ["frechet", "precision", "recall"] and numbers["precision"] == 1


def test_sounds_are_seen_as_spectrograms():
  sounds = np.random.default_rng(0).normal(0, 0.2, (6, 900)).clip(-1, 1)
  built = media.build_arrays(sounds, batch_size=2, fields=dict(sample_rate=8000))
  rows = built.splits["train"]
  pixels = features_lib.build("pixels", rows)
  want = metrics.log_mel(rows.item(2)[:, 0], 8000, num_mels=32, window=256, hop=128)
  np.testing.assert_allclose(pixels.of_rows(rows).features[2], want.ravel(), rtol=1e-5)
  # Sounds that ended early are padded.
  drawn = [rows.item(i) for i in range(5)]
  short = [*drawn[:4], drawn[4][:500]]
  silent = np.stack(drawn)
  silent[4, 500:] = 0
  numbers = [generation_metrics(x, None, rows, pixels) for x in (short, silent, drawn)]
  assert numbers[0] == numbers[1] != numbers[2]
  with pytest.raises(ValueError, match=r"of shape \(901, 1\) does not fit"):
    generation_metrics([np.zeros((901, 1))] * 5, None, rows, pixels)
  unknown = media.build_arrays(sounds, batch_size=2).splits["train"]
  with pytest.raises(ValueError, match="set data.sample_rate"):
    features_lib.build("pixels", unknown)


def test_reconstructions_of_images(digits, classifier):
  rows = digits.splits["validation"]
  real = rows.rows(np.arange(100))["media"]
  off = real + 0.1 * np.random.default_rng(0).normal(size=real.shape).astype(np.float32)
  got = reconstruction_metrics(off, rows, classifier)
  want = {
    "mse": np.square(off - real).mean(),
    "psnr": metrics.psnr(off, real).mean(),
    "ssim": metrics.ssim(off, real, window=7).mean(),
  }
  distance = got.pop("frechet")
  assert got == pytest.approx(want) and distance > 0
  same = reconstruction_metrics(real, rows, classifier)
  assert same["ssim"] == 1 and same["frechet"] == pytest.approx(0, abs=1e-6)
  with pytest.raises(ValueError, match="intelligibility is of sounds"):
    reconstruction_metrics(real, rows, intelligibility=True)
  with pytest.raises(ValueError, match="182 reconstructions do not fit a split of 181"):
    reconstruction_metrics(np.zeros((182, 8, 8, 1), np.float32), rows)
  with pytest.raises(ValueError, match="must be"):
    reconstruction_metrics(real[:, 1:], rows)


def test_reconstructions_of_sounds():
  pytest.importorskip("pystoi")
  rng = np.random.default_rng(0)
  sounds = np.repeat(rng.uniform(0.05, 1, (4, 20)), 400, axis=1) * rng.normal(0, 0.2, (4, 8000))
  lengths = np.array([8000, 7000, 6000, 5000])
  built = media.build_arrays(
    sounds.clip(-1, 1), batch_size=2, lengths=lengths, fields=dict(sample_rate=8000)
  )
  rows = built.splits["train"]
  batch = rows.rows(np.arange(rows.num_rows))
  off = batch["media"] + 0.1 * rng.normal(size=batch["media"].shape).astype(np.float32)
  got = reconstruction_metrics(off, rows, intelligibility=True)
  cut = [
    (a[:n, 0], b[:n, 0]) for a, b, n in zip(off, batch["media"], batch["lengths"], strict=True)
  ]
  options = dict(num_mels=32, window=256, hop=128)
  assert got == pytest.approx(
    {
      "mse": np.mean([np.square(a - b).mean() for a, b in cut]),
      "mel_distance": np.mean([metrics.mel_distance(a, b, 8000, **options) for a, b in cut]),
      "stoi": np.mean([metrics.stoi(a, b, 8000) for a, b in cut]),
    }
  )
  assert reconstruction_metrics(batch["media"], rows) == {"mse": 0, "mel_distance": 0}
  unknown = media.build_arrays(sounds.clip(-1, 1), batch_size=2).splits["train"]
  with pytest.raises(ValueError, match="set data.sample_rate"):
    reconstruction_metrics(unknown.rows(np.arange(1))["media"], unknown)


def test_bad_requests(digits, classifier):
  train = digits.splits["train"]
  with pytest.raises(ValueError, match="features='inception' are unknown"):
    features_lib.build("inception", train)
  unlabelled = media.build_arrays(np.zeros((4, 8, 8)), batch_size=2).splits["train"]
  with pytest.raises(ValueError, match="need labels of at least 2 classes"):
    features_lib.build("classifier", unlabelled)
  with pytest.raises(ValueError, match=r"of shape \(2, 9, 8, 1\) have no features"):
    classifier(np.zeros((2, 9, 8, 1), np.float32))
  images, labels = train.rows(np.arange(12))["media"], train.labels[:12]
  with pytest.raises(ValueError, match=r"of shape \(7, 8, 1\) does not fit"):
    generation_metrics(images[:, 1:], labels, train, classifier)
  with pytest.raises(ValueError, match="11 labels for 12"):
    inspect.unwrap(generation_metrics)(images, labels[:11], train, classifier)
  with pytest.raises(ValueError, match="labels hold 10"):
    generation_metrics(images, labels * 0 + 10, train, classifier)
