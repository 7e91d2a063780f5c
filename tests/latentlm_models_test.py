"""Each row of LatentLM's comparison, from its config through the loop to samples and a table."""

import pathlib

import jax
import latent_cases as cases
import numpy as np
import pytest

from experiments import tables
from experiments.configs.latentlm import models
from latentlab import sample
from latentlab.layers.latent_heads import SolverSettings
from latentlab.train import loop, metrics
from latentlab.train.step import init_state, make_step
from latentlab.train.tasks import build_task


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Where a tokenizer is trained once for all rows that ask for it."""
  return tmp_path_factory.mktemp("home")


def _train_tokenizer(config):
  run = pathlib.Path(config.data.tokenizer_run)
  if not run.exists():
    loop.train(config.tokenizer, run)


def _config(row, home):
  c = models.get_config(f"row={row},smoke")
  c.train_steps = c.checkpoint_steps = c.tokenizer.train_steps = c.tokenizer.checkpoint_steps = 2
  for evaluation in (*c.evals.values(), *c.tokenizer.evals.values()):
    evaluation.update(every_steps=2)
  c.evals.generation.features = "pixels"  # The classifier has tests of its own.
  c.sample.num_samples = c.evals.generation.num_samples  # One program for both.
  c.data.cache_dir = str(home)
  c.data.tokenizer_run = str(home / models.ROWS[row].get("tokenizer", "sigma"))
  return c


@pytest.mark.slow
@pytest.mark.parametrize("row", ["dit", "vq", "transfusion"])
def test_a_row_trains_and_is_drawn_from(row, home, tmp_path):
  config = _config(row, home)
  _train_tokenizer(config)
  loop.train(config, tmp_path)
  last = metrics.read_metrics(tmp_path / "metrics.jsonl")[-1]
  assert last["step"] == 2 and np.isfinite(last["train/loss"])
  loss = "token_loss" if row == "vq" else "latent_loss"
  assert np.isfinite(last[f"eval/validation/{loss}"]) and np.isfinite(last["eval/generation/fd"])
  assert (tmp_path / "samples/images.png").stat().st_size > 0


@pytest.mark.parametrize("row", ["mar", "regression", "mixture"])
def test_a_head_trains_and_is_drawn_from(row, home, tmp_path):
  config = _config(row, home)
  config.latents.head.update(depth=1)
  rows = cases.data(tmp_path / "s", batch_size=8)
  task = build_task(config, 0, rows.summary)
  state = jax.jit(lambda key: init_state(task, key))(jax.random.key(0))
  step, batch = jax.jit(make_step(task)), next(rows.train_iterator(0))
  for _ in range(2):
    state, found = step(state, dict(batch))
  assert np.isfinite(found["latent_loss"])
  generator = task.generator(state.params, rows)
  prompts, _ = generator.prompts(3)
  settings = SolverSettings(guidance=1.5)
  keys = sample.row_keys(jax.random.key(1), np.arange(3))
  first, again = (generator.runs(prompts, settings, k)[0] for k in (keys, keys[::-1]))
  assert np.isfinite(first).all() and np.shape(first) == (3, 4, cases.DIM)
  # A mean is what it is, whatever the key; all else is drawn from a distribution.
  assert np.allclose(first, again) == (row == "regression")


def test_the_table_has_an_evaluation_for_each_column(tmp_path):
  table = tables.describe(models)
  cells = tables.make_cells(table, tmp_path, scale="small", seeds=["0"])
  assert {cell.run for cell in cells} == set(models.ROWS)
  assert table.rows["dit_plain"].base == "latentlm_plain"


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("row=vq,tokenizer=plain", "row=vq has codes, and tokenizer=plain has none"),
    ("row=latentlm,tokenizer=vq", "unknown tokenizer='vq'"),
  ],
)
def test_bad_arguments(argument, message):
  with pytest.raises(ValueError, match=message):
    models.get_config(argument)


def test_a_tokenizer_takes_the_place_of_the_rows():
  plain = models.get_config("row=dit,tokenizer=plain")
  assert plain.tokenizer.to_dict() == models.get_config("row=dit_plain").tokenizer.to_dict()
  assert plain.tokenizer.model.bottleneck == "plain"
