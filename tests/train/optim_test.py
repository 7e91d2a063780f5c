"""Schedules at their corners, and optimisers against optax's own."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from optax import contrib

from latentlab.train import optim

AXES = {
  "decoder/mlp/kernel": ("layers", "embed", "mlp"),
  "decoder/mlp/bias": ("layers", "mlp"),
  "decoder/norm/scale": ("layers", "embed"),
  "decoder/out_proj/kernel": ("layers", "heads", "head_dim", "embed"),
  "decoder/q_proj/bias": ("layers", "heads", "head_dim"),
  "decoder/q_proj/kernel": ("layers", "embed", "heads", "head_dim"),
  "embedder/embedding": ("vocab", "embed"),
}
_SIZES = dict(layers=3, embed=8, mlp=12, heads=2, head_dim=4, vocab=16)


def _config(**fields) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(name="adamw", peak_lr=0.5, schedule="linear", warmup_steps=0, weight_decay=0.0) | fields
  )


def _tree(seed: int):
  rng = np.random.default_rng(seed)
  tree = {}
  for path, names in AXES.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.asarray(rng.normal(size=[_SIZES[n] for n in names]), jnp.float32)
  return tree


def _updates(config, steps: int = 3):
  optimizer, params = optim.make_optimizer(config, AXES), _tree(0)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for i in range(1, steps + 1):
    updates, state = update(_tree(i), state, params)
  return updates


@pytest.mark.parametrize("name", optim.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
def test_no_step_of_a_run_has_a_rate_of_zero(name, warmup):
  schedule = optim.make_schedule(_config(schedule=name, warmup_steps=warmup, power=2.0), 10)
  rates = np.asarray(schedule(jnp.arange(10)))
  assert min(rates) > 0
  np.testing.assert_allclose(max(rates), 0.5)
  np.testing.assert_allclose(rates[:warmup], 0.5 * (np.arange(warmup) + 1) / max(warmup, 1))
  assert np.all(np.diff(rates[warmup:]) <= 0)


@pytest.mark.parametrize(
  "name, middle",
  [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55), ("polynomial", 0.1 + 0.9 / 8)],
)
def test_decay_to_a_share_of_the_peak(name, middle):
  config = _config(schedule=name, warmup_steps=4, end_lr_ratio=0.1, power=3.0)
  schedule = jax.jit(optim.make_schedule(config, 24))
  got = [schedule(jnp.int32(i)) for i in (3, 4, 14, 24, 99)]
  end = 1.0 if name == "constant" else 0.1
  np.testing.assert_allclose(got, 0.5 * np.array([1, 1, middle, end, end]), rtol=1e-6)
  assert got[0].dtype == jnp.float32


def test_adamw_is_optax_adamw():
  got = _updates(_config(weight_decay=0.1, b1=0.8, b2=0.9, eps=1e-6))
  params = _tree(0)
  want_optimizer = optax.adamw(
    1.0,
    0.8,
    0.9,
    1e-6,
    weight_decay=0.1,
    mask=jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params),
  )
  state, update = want_optimizer.init(params), jax.jit(want_optimizer.update)
  for i in (1, 2, 3):
    want, state = update(_tree(i), state, params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_only_matrices_decay(decay_embeddings):
  config = _config(weight_decay=0.5, decay_embeddings=decay_embeddings)
  optimizer, params = optim.make_optimizer(config, AXES), _tree(0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  decayed = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, x in jax.tree.leaves_with_path(updates)
    if jnp.any(x != 0)
  }
  want = {path for path in AXES if path.endswith("/kernel")}
  assert decayed == want | ({"embedder/embedding"} if decay_embeddings else set())


def test_clipping_bounds_the_norm_of_all_gradients():
  got = _updates(_config(name="sgd", clip_norm=0.25), steps=1)
  grads = _tree(1)
  scale = 0.25 / float(optax.tree.norm(grads))
  jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -scale * g, rtol=1e-5), got, grads)
  loose = _updates(_config(name="sgd", clip_norm=1e9), steps=1)
  jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -g), loose, grads)


def test_muon_orthogonalises_each_layer_of_each_kernel():
  updates = _updates(_config(name="muon", b1=0.9))
  alone = contrib.muon(1.0, beta=0.9, consistent_rms=0.2)
  update = jax.jit(alone.update)
  for name, rows in (("q_proj", 8), ("out_proj", 8), ("mlp", 8)):
    got = updates["decoder"][name]["kernel"].reshape(3, rows, -1)
    for layer in range(3):
      matrix = lambda i, name=name, layer=layer, rows=rows: {
        "w": _tree(i)["decoder"][name]["kernel"][layer].reshape(rows, -1)
      }
      state = alone.init(matrix(0))
      for i in (1, 2, 3):
        want, state = update(matrix(i), state, matrix(0))
      np.testing.assert_allclose(got[layer], want["w"], rtol=1e-3, atol=1e-4)
      values = np.linalg.svd(got[layer], compute_uv=False)
      assert values.max() < 2.5 * values.min()
  # Everything else is Adam's, whose first update has one size everywhere.
  first = _updates(_config(name="muon"), steps=1)["embedder"]["embedding"]
  signs = -jnp.sign(_tree(1)["embedder"]["embedding"])
  np.testing.assert_allclose(first / first[0, 0], signs / signs[0, 0], rtol=1e-3)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(name="adamax"), r"optimizer.name='adamax'.*'adam', 'adamw', 'muon', 'sgd'"),
    (dict(name="sgd", weight_decay=0.1), "weight_decay=0.1 does nothing"),
    (dict(b2=1.0), "b2=1.0"),
  ],
)
def test_bad_optimizers_are_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    optim.make_optimizer(_config(**fields), AXES)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(schedule="step"), r"optimizer.schedule='step'.*'constant', 'cosine', 'linear'"),
    (dict(warmup_steps=11), "optimizer.warmup_steps=11.*train_steps=10"),
    (dict(peak_lr=0.0), "optimizer.peak_lr=0.0"),
    (dict(end_lr_ratio=2.0), "optimizer.end_lr_ratio=2.0"),
  ],
)
def test_bad_schedules_are_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    optim.make_schedule(_config(**fields), 10)
