"""The evaluator of reconstructions, against numbers that are known."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.data import media
from latentlab.eval import metrics, reconstruction, runner
from latentlab.models.latent_tokenizer import LatentTokenizer, build_config


def _data(rows=22):
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (rows, 8, 8, 1)).astype(np.float32)
  return media.build_arrays(images, batch_size=8)


def _task(**fields):
  sizes = dict(image_size=8, channels=1, patch_size=4, num_layers=1, embed_dim=16, num_heads=2)
  config = build_config(dict(name="vit_tokenizer", init="fan_in", dim=3) | sizes | fields)
  model = LatentTokenizer(config)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  return types.SimpleNamespace(model=model), params


@pytest.mark.parametrize("bottleneck", ["sigma_fixed", "plain", "vq"])
def test_numbers_are_those_of_the_split(bottleneck):
  data = _data()
  task, params = _task(bottleneck=bottleneck, codebook_size=9 * (bottleneck == "vq"))
  evaluator = reconstruction.Evaluator(task, data, jax.jit, split="train", perturbation=0.5)
  got = dict(evaluator.run(params))
  assert got == dict(evaluator.run(params))  # Its noise is its own.
  assert "ssim" not in got
  rows = data.splits["train"]
  images = jnp.array(rows.rows(np.arange(rows.num_rows))["media"])
  out = jax.jit(lambda p, x: task.model.apply({"params": p}, x))(params, images)
  errors = np.square(np.asarray(out.reconstruction - images, np.float64))
  np.testing.assert_allclose(got["mse"], errors.mean(), rtol=1e-5)
  np.testing.assert_allclose(got["psnr"], 10 * np.log10(4 / errors.mean()), rtol=1e-5)
  std = np.asarray(out.means, np.float64).std()
  np.testing.assert_allclose(got["latent_std"], std, rtol=1e-4)
  np.testing.assert_allclose(got["sensitivity"], got["mse_perturbed"] / got["mse"], rtol=1e-6)
  assert got["mse_perturbed"] != got["mse"]
  if bottleneck == "vq":
    assert got["mse_sampled"] == got["mse"] and "noise_ratio" not in got
    shares = np.bincount(np.asarray(out.codes).ravel(), minlength=9) / out.codes.size
    used = shares[shares > 0]
    np.testing.assert_allclose(
      got["code_perplexity"], np.exp(-(used * np.log(used)).sum()), rtol=1e-5
    )
    np.testing.assert_allclose(got["code_usage"], len(used) / 9)
    return
  level = 0.75
  if bottleneck == "plain":
    level = np.exp(np.asarray(out.log_variances, np.float64) / 2).mean()
  np.testing.assert_allclose(got["noise_ratio"], level / std, rtol=1e-4)


def test_no_perturbation_is_the_mean():
  task, params = _task(bottleneck="mean")
  got = dict(
    reconstruction.Evaluator(task, _data(), jax.jit, split="train", perturbation=0.0).run(params)
  )
  np.testing.assert_allclose([got["mse_perturbed"], got["mse_sampled"]], got["mse"], rtol=1e-5)


def test_metrics_of_images_are_of_their_first_rows_if_asked_for():
  data, (task, params) = _data(), _task()
  rows = data.splits["train"]
  assert rows.num_rows == 21
  for asked, count in ((5, 5), (-1, 21)):
    fields = dict(split="train", media_metrics=asked)
    got = dict(reconstruction.Evaluator(task, data, jax.jit, **fields).run(params))
    images = rows.rows(np.arange(count))["media"]
    apply = jax.jit(lambda p, x: task.model.apply({"params": p}, x).reconstruction)
    made = np.asarray(apply(params, images))
    np.testing.assert_allclose(got["mean_psnr"], metrics.psnr(made, images).mean(), rtol=1e-5)
    np.testing.assert_allclose(got["ssim"], metrics.ssim(made, images, window=7).mean(), rtol=1e-4)


def test_metrics_of_sounds(monkeypatch):
  monkeypatch.setattr(metrics, "stoi", lambda sound, reference, rate: len(sound) / rate)
  rng = np.random.default_rng(0)
  sounds, lengths = rng.uniform(-1, 1, (9, 800)), np.arange(560, 740, 20)
  data = media.build_arrays(sounds, batch_size=4, lengths=lengths, fields=dict(sample_rate=8000))
  fields = dict(name="speech_tokenizer", num_samples=740, width=4, strides=(4, 5), depths=(0, 1, 0))
  model = LatentTokenizer(build_config(fields | dict(dim=3, init_std=0.0)))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 740, 1)))["params"]
  task = types.SimpleNamespace(model=model)
  options = dict(split="train", media_metrics=3, intelligibility=True)
  got = dict(reconstruction.Evaluator(task, data, jax.jit, **options).run(params))
  batch = data.splits["train"].rows(np.arange(3))
  made = np.asarray(jax.jit(model.apply)({"params": params}, batch["media"]).reconstruction)
  mels = dict(num_mels=32, window=256, hop=128)
  distances = [
    metrics.mel_distance(a[:n, 0], b[:n, 0], 8000, **mels)
    for a, b, n in zip(made, batch["media"], batch["lengths"], strict=True)
  ]
  np.testing.assert_allclose(got["mel_distance"], np.mean(distances), rtol=1e-4)
  assert got["stoi"] == pytest.approx(batch["lengths"].mean() / 8000)


def test_bad_fields():
  task, data = _task()[0], _data()
  for fields, message in (
    (dict(perturbation=-0.1), "perturbation=-0.1"),
    (dict(max_batches=-1), "max_batches=-1"),
    (dict(media_metrics=-2), "media_metrics=-2"),
    (dict(intelligibility=True), "intelligibility=True is one of media_metrics"),
    (dict(noise=1), "unknown fields"),
  ):
    section = dict(type="reconstruction", every_steps=1, split="train") | fields
    with pytest.raises(ValueError, match=message):
      runner.build({"x": section}, task, data, lambda f: f)
  with pytest.raises(ValueError, match="needs a latent tokenizer"):
    reconstruction.Evaluator(types.SimpleNamespace(model=None), data, lambda f: f)
