"""What the evaluation of samples tells of their latents, position by position."""

import jax
import latent_cases as cases
import numpy as np
import pytest

from experiments.configs.latentlm import models
from latentlab.data import latent_store, mixed
from latentlab.eval import generation, runner
from latentlab.layers.latent_heads import SolverSettings
from latentlab.train.state import unbox
from latentlab.train.tasks import build_task

_COUNT = 12


def _task(row, summary):
  config = models.get_config(f"row={row},smoke")
  config.latents.head.update(depth=1)
  config.model.update(num_layers=1, embed_dim=16)
  task = build_task(config, 0, summary)
  params = jax.jit(lambda key: unbox(task.init(key)))(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  return task, jax.tree.unflatten(tree, [x + rng.normal(0, 0.3, x.shape) for x in leaves])


def _evaluator(task, data):
  return generation.Evaluator(task, data, None, num_samples=_COUNT, features="pixels")


def test_distances_by_position_are_those_of_gaussians():
  """`|m - n|^2 + sum (s - t)^2` of diagonal Gaussians, whose scale and mean drift."""
  rng, count = np.random.default_rng(0), 40_000
  means = np.array([[0.0, 0.0], [0.5, 0.0], [1.0, -0.5]])
  stds = np.array([[1.0, 2.0], [1.5, 2.0], [0.5, 1.0]])
  drawn = means + stds * rng.normal(size=(count, 3, 2))
  real = np.array([1.0, 2.0]) * rng.normal(size=(count, 3, 2))
  found = generation.position_moments(list(drawn), list(real))
  want = np.square(means).sum(-1) + np.square(stds - [1.0, 2.0]).sum(-1)
  np.testing.assert_allclose(found["distance"], want, atol=0.04)
  np.testing.assert_allclose(found["std"], np.sqrt(np.square(stds).mean(-1)), rtol=0.02)
  np.testing.assert_allclose(found["real_std"], np.sqrt(2.5), rtol=0.02)


def test_positions_count_the_runs_that_reach_them():
  rng = np.random.default_rng(0)
  runs = [rng.normal(size=(n, 2)) for n in (1, 3, 3, 4)]
  found = generation.position_moments(runs, runs)
  assert {len(x) for x in found.values()} == {3}  # Of the fourth there is one.
  np.testing.assert_allclose(found["distance"], 0.0, atol=1e-9)
  third = np.stack([run[2] for run in runs[1:]])
  np.testing.assert_allclose(found["std"][2], np.sqrt(third.var(0).mean()))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_behind_its_own_latents_a_model_draws_them_again(guidance, tmp_path):
  """Of a head that gives the mean: were its draws the data, it would draw them behind real ones."""
  made = cases.data(tmp_path / "a", noise=dict(kind="none", std=0.0))
  task, params = _task("regression", made.summary)
  settings = SolverSettings(guidance=guidance)
  generator = task.generator(params, made)
  prompts, labels = generator.prompts(_COUNT)
  keys = jax.random.split(jax.random.key(1), _COUNT)
  runs, _ = generator.runs(prompts, settings, keys)
  items = [latent_store.LatentItem(r, int(c)) for r, c in zip(runs, labels, strict=True)]
  meta = {k: x for k, x in made.store.meta.items() if k not in ("mean", "std", "splits", "version")}
  store = latent_store.write(tmp_path / "b", {"train": items, "validation": items[:1]}, meta)
  config = mixed.LatentDataConfig(condition="class", seq_length=8)  # Two documents a row.
  data = mixed.build(config, store, cases.tokens("class"), "fixed", 2)
  evaluator = _evaluator(task, data)
  again = evaluator.draw_behind_real(params, settings)
  assert np.std(runs) > 0.01
  np.testing.assert_allclose(again, runs, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(evaluator.real_latents(), runs)
  np.testing.assert_allclose(evaluator.positions(again)["distance"], 0.0, atol=1e-6)


def test_the_last_batch_brings_no_item_twice(tmp_path, monkeypatch):
  monkeypatch.setattr(generation, "_BATCH", 4)
  data = cases.data(tmp_path, seq_length=4)  # Six rows, in batches of four.
  task, params = _task("regression", data.summary)
  runs = _evaluator(task, data).draw_behind_real(params, SolverSettings())
  assert [len(run) for run in runs] == [4] * 6


def test_positions_are_in_units_of_the_latents(tmp_path):
  """Distances grow with the square of what is added, over the variance of all latents."""
  data = cases.data(tmp_path, noise=dict(kind="fixed", std=0.5), counts=(4,) * 40)
  task, params = _task("latentlm", data.summary)
  evaluator = _evaluator(task, data)
  real = evaluator.real_latents()
  assert len(real) == 40 and not np.array_equal(real[0], data.store.splits["train"].item(0).means)
  for again, first in zip(evaluator.real_latents(), real, strict=True):
    np.testing.assert_array_equal(again, first)
  np.testing.assert_allclose(np.concatenate(real).std(), data.store.meta["std"], rtol=0.1)
  moved = evaluator.positions([run + [0.3, 0.4] for run in real])
  np.testing.assert_allclose(moved["distance"], 0.25 / data.store.meta["std"] ** 2, rtol=1e-4)
  assert len(evaluator.position_floor()) == 4 and min(evaluator.position_floor()) > 0


def test_a_head_of_noise_is_drawn_from_without_the_noisiest_levels(tmp_path):
  """There an error of the noise, here 1 and more, is one of the latent times `sigma / alpha`."""
  data = cases.data(tmp_path)
  task, params = _task("mar", data.summary)
  stds = []
  for limit in (None, -1.0):
    evaluator = generation.Evaluator(
      *(task, data, None), num_samples=_COUNT, features="pixels", num_steps=4, lambda_min=limit
    )
    stds.append(np.std(evaluator.draw_behind_real(params, evaluator.settings)))
  assert stds[0] > 1000 * stds[1], stds


@pytest.mark.parametrize(
  ("row", "fields", "message"),
  [
    ("latentlm", dict(num_steps=5000), "num_steps=5000 of a sampler must be in"),
    ("latentlm", dict(lambda_min=50.0), "lambda_min=50.0 leaves no timestep"),
    ("latentlm", dict(solver="flow_euler"), "schedule.kind='cosine' must be 'flow'"),
    ("regression", dict(solver="euler"), "unknown solver='euler'"),
  ],
)
def test_a_solver_that_does_not_fit_is_an_error_at_once(row, fields, message, tmp_path):
  data = cases.data(tmp_path)
  task, _ = _task(row, data.summary)
  section = dict(type="generation", every_steps=1, num_samples=_COUNT, features="pixels")
  with pytest.raises(ValueError, match=f"config.evals.a: .*{message}"):
    runner.build({"a": section | fields}, task, data, jax.jit)
  if row == "regression":  # It goes through no levels.
    runner.build({"a": section | dict(num_steps=5000)}, task, data, jax.jit)


def test_a_model_of_all_latents_at_once_is_refused(tmp_path):
  data = cases.data(tmp_path)
  config = models.get_config("row=dit,smoke")
  config.model.update(num_layers=1, embed_dim=16, num_heads=2)
  evaluator = _evaluator(build_task(config, 0, data.summary), data)
  with pytest.raises(ValueError, match="a DiT draws no latent behind others"):
    evaluator.draw_behind_real({}, SolverSettings())
