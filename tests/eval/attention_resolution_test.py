"""Attention resolution of a model, against its own scores pair by pair."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import data as data_lib
from latentlab import ops
from latentlab.eval import attention_resolution
from latentlab.models import LanguageModel, build_config

LENGTH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("text")
  for i in range(12):
    (path / f"{i}.txt").write_text(f"{i}: one, and another, and so on to the end of it. " * 2)
  config = dict(path=str(path), include=("*.txt",), seq_length=LENGTH, validation_fraction=0.5)
  return data_lib.build(config | dict(cache_dir=str(path / "cache")), batch_size=4)


def _model(**fields):
  sizes = dict(name="transformer", num_layers=2, embed_dim=16, num_heads=2, train_length=LENGTH)
  return LanguageModel(build_config(sizes | dict(unroll=1) | fields, 258))


def _task(**fields):
  variant = lambda more: _model(**fields, **more)
  return types.SimpleNamespace(model=_model(**fields), variant=variant)


def _scores(model, params, tokens):
  """The scores of the softmax of every layer, `L B N T T`, from its projections by hand."""
  p = params["decoder"]["stage_0"]["block_0"]["mixer"]
  c = model.config.decoder.stages[0].pattern[0].mixer
  _, sown = model.apply(
    {"params": params},
    tokens,
    mutable="intermediates",
    capture_intermediates=lambda m, _: m.name == "mixer_norm",
  )
  x = sown["intermediates"]["decoder"]["stage_0"]["block_0"]["mixer_norm"]["__call__"][0]
  t = np.arange(tokens.shape[1])
  found = []
  for layer in range(2):
    q, k = (
      jnp.einsum("BTD,DNH->BTNH", x[layer], p[n]["kernel"][layer]) for n in ("q_proj", "k_proj")
    )
    k = k * c.head_dim**-0.5
    if c.positions.kind == "xpos":
      options = dict(scale_base=LENGTH / 2, center=LENGTH)
      q, k = (
        ops.apply_xpos(z, jnp.asarray(t)[None], role=r, **options)
        for z, r in ((q, "query"), (k, "key"))
      )
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
    if c.positions.kind == "alibi":
      scores -= ops.alibi_slopes(2)[:, None, None] * (t[:, None] - t)
    found.append(np.asarray(scores, np.float64))
  return np.stack(found)


@pytest.mark.parametrize(
  "scheme, mask, average_heads",
  [("xpos", None, True), ("xpos", "blockwise_causal", False), ("alibi", "blockwise_causal", True)],
)
def test_lex_06_estimator_is_the_mean_over_pairs(data, scheme, mask, average_heads):
  length, task = 2 * LENGTH, _task(positions=scheme)
  params = nn.unbox(task.model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  params = jax.tree.map(lambda x: 4 * x if x.ndim > 3 else x, params)
  options = dict(seq_length=length, document_length=length, max_batches=2)
  model = task.variant(dict(mask=mask)) if mask else task.model
  evaluator = attention_resolution.Evaluator(
    task,
    data,
    jax.jit,
    average_heads=average_heads,
    model=dict(mask=mask) if mask else None,
    **options,
  )
  got = dict(evaluator.run(params))
  i, j = np.mgrid[:length, :length]
  visible = (j <= i) & ((i // 4 - j // 4 <= 1) if mask else True)
  batches = data.eval_batches("validation", 2, length, document_length=length)
  # Rows that only fill the last batch are no texts.
  tokens = np.concatenate([b["inputs"][b["weights"].any(1)] for b in batches])
  e = _scores(model, params, jnp.asarray(tokens)).mean(1)  # L N T T, over texts.
  distances = [n for n in range(length) if visible[i - j == n].any()]
  assert len(distances) == (8 if mask else length)
  s = np.array([e[..., visible & (i - j == n)].mean(-1) for n in distances])  # n L N
  s = s.mean(-1, keepdims=True) if average_heads else s
  p = np.exp(s - s.max(0)) / np.exp(s - s.max(0)).sum(0)
  layers = ((p**2).sum(0) - (p[:-1] * p[1:]).sum(0)).mean(-1)
  assert list(got) == ["resolution", "layer_0", "layer_1"]
  np.testing.assert_allclose([got["layer_0"], got["layer_1"]], layers, rtol=1e-3)
  assert got["resolution"] == pytest.approx(layers.mean(), rel=1e-3)
  assert abs(layers[0] - layers[1]) > 1e-4


def test_a_model_without_attention_is_refused(data):
  sizes = dict(name="retnet", num_layers=1, embed_dim=16, num_heads=2)
  task = types.SimpleNamespace(model=LanguageModel(build_config(sizes, 258)))
  with pytest.raises(ValueError, match="softmax attention; this model has"):
    attention_resolution.Evaluator(task, data, jax.jit)


def test_training_and_initialisation_sow_nothing():
  model = _model(positions="xpos")
  variables = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  assert set(variables) == {"params"}
  lowered = jax.jit(lambda v, t: model.apply(v, t).logits).lower(
    variables, jnp.zeros((1, 5), jnp.int32)
  )
  assert "roll" not in lowered.as_text()
