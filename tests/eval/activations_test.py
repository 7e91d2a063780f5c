"""Largest magnitudes and medians against numpy, over what a model computes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab.eval import activations
from latentlab.models import LanguageModel, build_config

LENGTH = 12
SIZES = dict(num_layers=2, embed_dim=16, num_heads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("text")
  for i in range(12):
    (path / f"{i}.txt").write_text(f"{i}: some text. " * (1 + i % 3))
  config = dict(path=str(path), include=("*.txt",), seq_length=LENGTH, validation_fraction=0.5)
  return data_lib.build(config | dict(cache_dir=str(path / "cache")), batch_size=8)


def _model(name, **fields):
  return LanguageModel(build_config(SIZES | dict(name=name) | fields, 258))


def _params(model):
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  return jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, params)


@pytest.mark.parametrize("name", ["transformer", "diff_transformer"])
def test_matches_numpy(data, name):
  model = _model(name)
  params = _params(model)
  task = types.SimpleNamespace(model=model)
  got = dict(activations.Evaluator(task, data, jax.jit).run(params))
  logits, hidden = [], []
  batches = list(data.eval_batches("validation"))
  assert len(batches) > 1 and not all((b["segment_ids"] > 0).all() for b in batches)
  for batch in batches:
    ids = jnp.asarray(batch["segment_ids"])
    _, sown = model.apply(
      {"params": params},
      jnp.asarray(batch["inputs"]),
      segment_ids=ids,
      mutable=["maps", "hidden"],
      method="hidden",
    )
    maps, residual = (sown[name]["decoder"]["stage_0"]["block_0"] for name in ("maps", "hidden"))
    maps, residual = maps["mixer"]["maps"][0], residual["residual"][0]
    place = np.arange(LENGTH)
    for row, segments in enumerate(batch["segment_ids"]):
      # Pairs of one document, in order, and no padding: what the mask shows, by its definition.
      seen = (segments[:, None] == segments) & (place[:, None] >= place) & (segments > 0)[:, None]
      logits.append(np.abs(np.asarray(maps.logits[:, row], np.float64)[..., seen]).ravel())
      hidden.append(np.abs(np.asarray(residual[:, row], np.float64)[:, segments > 0]).ravel())
  for name, values in (("logits", logits), ("hidden", hidden)):
    values = np.sort(np.concatenate(values))[::-1]
    for k in activations.TOP:
      assert got.pop(f"{name}_top_{k}") == pytest.approx(values[k - 1], rel=1e-4), (name, k)
    assert got.pop(f"{name}_median") == pytest.approx(np.median(values), rel=2e-3)
  assert not got


def test_hidden_states_of_a_model_without_softmax(data):
  model = _model("retnet")
  task = types.SimpleNamespace(model=model)
  options = dict(quantities=("hidden",), max_batches=1)
  got = dict(activations.Evaluator(task, data, jax.jit, **options).run(_params(model)))
  assert list(got) == [f"hidden_top_{k}" for k in activations.TOP] + ["hidden_median"]
  assert list(got.values())[:-1] == sorted(list(got.values())[:-1], reverse=True)
  assert 0 < got["hidden_median"] < got["hidden_top_100"]
  with pytest.raises(ValueError, match="'logits' needs softmax attention; this model has"):
    activations.Evaluator(task, data, jax.jit)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e4])
def test_median_of_a_histogram(scale):
  x = scale * np.random.default_rng(0).standard_normal((7, 1001)).astype(np.float32)
  x[:, ::10] = 0
  counted = np.random.default_rng(1).random((7, 1)) < 0.7
  counts = np.asarray(activations.histogram(jnp.asarray(x), jnp.asarray(counted)), np.float64)
  assert counts.sum() == 1001 * counted.sum()
  want = np.median(np.abs(x[counted[:, 0]]))
  assert activations.histogram_median(counts) == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(quantities=("values",)), r"quantities=\('values',\) .* must be among"),
    (dict(quantities=()), r"quantities=\(\)"),
    (dict(max_batches=-1), "max_batches=-1"),
    (dict(split="test"), "split='test'"),
  ],
  ids=str,
)
def test_bad_fields(data, fields, message):
  task = types.SimpleNamespace(model=_model("transformer"))
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": dict(type="activations", every_steps=1) | fields}, task, data, jax.jit)
