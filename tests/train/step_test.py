"""The step on a model small enough to be checked by hand."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentlab.train.step import init_state, make_step
from latentlab.train.task import Group, LossTerms

LR = 0.1


@dataclasses.dataclass(frozen=True)
class _Task:
  """Two matrices in a row, and noise that the key decides."""

  groups: tuple[Group, ...]
  dtype: jnp.dtype = jnp.float32

  def init(self, key):
    keys = jax.random.split(key)
    normal = lambda key: {"kernel": jax.random.normal(key, (4, 4), self.dtype)}
    return {"encoder": {"layer": normal(keys[0])}, "decoder": normal(keys[1])}


def _loss(noise: float = 0.0) -> Callable:
  def loss(params, batch, key):
    x = batch["x"] + noise * jax.random.normal(key, batch["x"].shape)
    y = x @ params["encoder"]["layer"]["kernel"] @ params["decoder"]["kernel"]
    errors = jnp.sum((y - batch["y"]) ** 2, -1)
    return LossTerms(
      total=jnp.sum(errors * batch["weights"]),
      weight=jnp.sum(batch["weights"]),
      metrics={"rows": (jnp.sum(errors < 1.0), jnp.float32(errors.size))},
    )

  return loss


def _group(optimizer=None, *, noise=0.0, **kwargs) -> Group:
  descent = optax.chain(optimizer or optax.identity(), optax.scale(-1.0))
  defaults = dict(name="model", loss=_loss(noise), schedule=optax.constant_schedule(LR))
  return Group(**(defaults | dict(optimizer=descent) | kwargs))


def _batch(seed: int, rows: int = 8, **overrides):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(2, rows, 4)).astype(np.float32)
  return {"x": x, "y": y, "weights": rng.uniform(0, 3, rows).astype(np.float32)} | overrides


def _assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def _numpy(tree):
  return jax.tree.map(np.array, tree)


@pytest.mark.parametrize("optimizer", [None, optax.scale_by_adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("accumulate_steps", [2, 4])
def test_accumulation_equals_the_whole_batch(optimizer, accumulate_steps):
  task = _Task((_group(optimizer),))
  weights = np.array([5, 0, 0.1, 0, 0, 2, 0, 1], np.float32)
  results = []
  for n in (1, accumulate_steps):
    state, step = init_state(task, jax.random.key(0)), jax.jit(make_step(task, accumulate_steps=n))
    for i in range(3):
      state, metrics = step(state, _batch(i, weights=weights))
    results.append((state.params, metrics))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *results)


def test_sgd_is_the_gradient_of_the_weighted_mean():
  task = _Task((_group(),))
  state, batch = init_state(task, jax.random.key(0)), _batch(0)

  def mean(params):
    y = batch["x"] @ params["encoder"]["layer"]["kernel"] @ params["decoder"]["kernel"]
    return np.sum(batch["weights"] / batch["weights"].sum() * jnp.sum((y - batch["y"]) ** 2, -1))

  loss, grads = jax.value_and_grad(mean)(state.params)
  new, metrics = jax.jit(make_step(task))(state, batch)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda p, g, q: close(p - LR * g, q), state.params, grads, new.params)
  close(metrics["loss"], loss)
  close(metrics["grad_norm"], optax.tree.norm(grads))
  close(metrics["lr"], LR)
  assert set(metrics) == {"loss", "grad_norm", "lr", "skipped", "rows"}
  assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}


def test_rate_follows_the_schedule():
  task = _Task((_group(schedule=lambda step: 0.01 * (step + 1)),))
  state, step = init_state(task, jax.random.key(0)), jax.jit(make_step(task))
  for i in range(3):
    state, metrics = step(state, _batch(i))
    np.testing.assert_allclose(metrics["lr"], 0.01 * (i + 1), rtol=1e-6)


def test_frozen_parameters_stay_and_have_no_optimizer_state():
  task = _Task((_group(optax.scale_by_adam(), trainable=("encoder/.*",)),))
  state = init_state(task, jax.random.key(0))
  new, _ = jax.jit(make_step(task))(state, _batch(0))
  _assert_equal(new.params["decoder"], state.params["decoder"])
  assert not np.array_equal(*(s.params["encoder"]["layer"]["kernel"] for s in (state, new)))
  shapes = [x.shape for x in jax.tree.leaves(state.opt_states["model"])]
  assert sorted(shapes) == [(), (4, 4), (4, 4)]


@pytest.mark.parametrize("pattern", ["encodr/.*", "encoder", "layer"])
def test_a_pattern_without_match_is_an_error(pattern):
  task = _Task((_group(trainable=("decoder/kernel", pattern)),))
  with pytest.raises(ValueError, match=f"'{pattern}'.*decoder/kernel"):
    init_state(task, jax.random.key(0))


def test_groups_that_overlap_are_an_error():
  groups = _group(name="a"), _group(name="b", trainable=("decoder/.*",))
  with pytest.raises(ValueError, match="'a' and 'b' both train 'decoder/kernel'"):
    init_state(_Task(groups), jax.random.key(0))
  with pytest.raises(ValueError, match="different names"):
    init_state(_Task((groups[0], groups[0])), jax.random.key(0))


def test_adversarial_groups_step_from_the_same_parameters():
  def bilinear(sign):
    def loss(params, batch, key):
      x, y = params["encoder"]["layer"]["kernel"], params["decoder"]["kernel"]
      return LossTerms(total=sign * jnp.sum(x * y), weight=jnp.float32(1.0))

    return loss

  task = _Task(
    (
      _group(name="low", loss=bilinear(1), trainable=("encoder/.*",)),
      _group(name="high", loss=bilinear(-1), trainable=("decoder/.*",)),
    )
  )
  state = init_state(task, jax.random.key(0))
  new, metrics = jax.jit(make_step(task))(state, _batch(0))
  x, y = state.params["encoder"]["layer"]["kernel"], state.params["decoder"]["kernel"]
  np.testing.assert_allclose(new.params["encoder"]["layer"]["kernel"], x - LR * y, rtol=1e-6)
  np.testing.assert_allclose(new.params["decoder"]["kernel"], y + LR * x, rtol=1e-6)
  np.testing.assert_allclose(metrics["low/loss"], -metrics["high/loss"])
  assert {"low/grad_norm", "high/grad_norm", "low/lr", "high/lr", "skipped"} < set(metrics)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("fault", ["nan", "inf", "no weight"])
def test_a_step_that_is_not_finite_changes_only_the_counters(fault, accumulate_steps):
  bad = _batch(1)
  if fault == "no weight":
    bad["weights"] = np.zeros_like(bad["weights"])
  else:
    bad["x"][3, 2] = float(fault)
  task = _Task((_group(optax.scale_by_adam()),))
  step = jax.jit(make_step(task, ema_decay=0.9, accumulate_steps=accumulate_steps))
  before, _ = step(init_state(task, jax.random.key(0), ema_decay=0.9), _batch(0))

  state, metrics = step(before, bad)
  state, metrics = step(state, bad)
  for field in ("params", "opt_states", "ema"):
    _assert_equal(getattr(state, field), getattr(before, field))
  assert (state.step, state.skipped, state.total_skipped) == (3, 2, 2)
  assert metrics["skipped"] == 2

  state, metrics = step(state, _batch(2))
  assert (state.step, state.skipped, state.total_skipped, metrics["skipped"]) == (4, 0, 2, 0)
  assert np.isfinite(metrics["loss"])
  assert not np.array_equal(state.params["decoder"]["kernel"], before.params["decoder"]["kernel"])


def test_an_update_that_is_not_finite_is_not_taken():
  huge = optax.chain(optax.scale_by_adam(), optax.scale(1e38), optax.scale(1e38))
  task = _Task((_group(huge),))
  before = init_state(task, jax.random.key(0))
  state, metrics = jax.jit(make_step(task))(before, _batch(0))
  assert np.isfinite(metrics["loss"]) and state.skipped == 1
  _assert_equal(state.params, before.params)


def test_one_group_that_is_not_finite_stops_all():
  broken = lambda params, batch, key: LossTerms(
    total=jnp.nan * jnp.sum(params["decoder"]["kernel"]), weight=jnp.float32(1.0)
  )
  task = _Task(
    (
      _group(name="sound", trainable=("encoder/.*",)),
      _group(name="broken", loss=broken, trainable=("decoder/.*",)),
    )
  )
  state = init_state(task, jax.random.key(0))
  new, _ = jax.jit(make_step(task))(state, _batch(0))
  _assert_equal(new.params, state.params)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_keys_follow_the_step_so_a_copy_resumes_bit_for_bit(accumulate_steps):
  task = _Task((_group(optax.scale_by_adam(), noise=1.0),))
  step = jax.jit(make_step(task, accumulate_steps=accumulate_steps))
  state = init_state(task, jax.random.key(0))
  saved, losses = None, []
  for i in range(4):
    if i == 2:
      saved = state.replace(**{f: _numpy(getattr(state, f)) for f in ("step", "params")})
    state, metrics = step(state, _batch(0))
    losses.append(float(metrics["loss"]))
  for _ in range(2):
    saved, metrics = step(saved, _batch(0))
  _assert_equal(saved.params, state.params)
  assert float(metrics["loss"]) == losses[-1]

  # With the parameters put back, only the key differs from step to step.
  first = init_state(task, jax.random.key(0))
  at = lambda n: float(step(first.replace(step=jnp.int32(n)), _batch(0))[1]["loss"])
  assert at(0) == at(0) != at(1)


def test_average_is_float32_and_starts_fast():
  task = _Task((_group(),), dtype=jnp.bfloat16)
  state = init_state(task, jax.random.key(0), ema_decay=0.15)
  step = jax.jit(make_step(task, ema_decay=0.15))
  mean = _numpy(state.ema["decoder"]["kernel"])
  assert mean.dtype == np.float32
  for decay in (1 / 10, 0.15, 0.15):
    state, _ = step(state, _batch(0))
    mean = decay * mean + (1 - decay) * np.array(state.params["decoder"]["kernel"], np.float32)
    np.testing.assert_allclose(state.ema["decoder"]["kernel"], mean, rtol=1e-5, atol=1e-6)
  assert state.params["decoder"]["kernel"].dtype == jnp.bfloat16


def test_rows_that_do_not_divide_are_an_error():
  task = _Task((_group(),))
  step = make_step(task, accumulate_steps=3)
  with pytest.raises(ValueError, match="8 rows.*accumulate_steps=3"):
    jax.eval_shape(step, init_state(task, jax.random.key(0)), _batch(0))
  with pytest.raises(ValueError, match="at least 1"):
    make_step(task, accumulate_steps=0)
