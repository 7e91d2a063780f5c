"""The evaluator of reconstructions, against numbers that are known."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.data import media
from latentlab.eval import reconstruction, runner
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


def test_bad_fields():
  task, data = _task()[0], _data()
  for fields, message in (
    (dict(perturbation=-0.1), "perturbation=-0.1"),
    (dict(max_batches=-1), "max_batches=-1"),
    (dict(noise=1), "unknown fields"),
  ):
    section = dict(type="reconstruction", every_steps=1, split="train") | fields
    with pytest.raises(ValueError, match=message):
      runner.build({"x": section}, task, data, lambda f: f)
  with pytest.raises(ValueError, match="needs a latent tokenizer"):
    reconstruction.Evaluator(types.SimpleNamespace(model=None), data, lambda f: f)
