"""Whole runs on latents: the tokenizer first, resumed, and with the tokenizer of another run."""

import jax
import latent_cases as cases
import numpy as np
import pytest

from experiments.configs import quickstart_latent
from latentlab.data import files
from latentlab.train import loop, workdir_files


def _config(tmp_path, steps=4, tokenizer_run=""):
  c = quickstart_latent.get_config("smoke")
  c.train_steps, c.checkpoint_steps, c.tokenizer.train_steps = steps, 2, 4
  c.data.update(tokenizer_run=str(tokenizer_run), cache_dir=str(tmp_path / "cache"))
  del c.evals.generation
  c.tokenizer.evals = {}
  c.sample.num_samples = c.tokenizer.sample.num_samples = 0
  return c


def test_a_run_on_latents_is_loaded_as_it_is(tmp_path):
  rows = cases.data(tmp_path / "s")
  (tmp_path / workdir_files.CONFIG).write_text(_config(tmp_path).to_json())
  rows.tokenizer.save(tmp_path / workdir_files.TOKENIZER)
  with pytest.raises(ValueError, match="holds no corpus.json of its latents"):
    loop.load(tmp_path)
  files.write_json(tmp_path / workdir_files.CORPUS, rows.summary)
  with pytest.raises(ValueError, match=r"changes a language model, and .* trained 'latentlm'"):
    loop.load(tmp_path, model=dict(mask="blockwise_causal"))
  with pytest.raises(ValueError, match="no checkpoint"):
    loop.load(tmp_path)


@pytest.mark.parametrize(
  ("field", "value"), [("condition", "none"), ("documents_per_row", 2), ("seq_length", 99)]
)
def test_rows_of_another_kind_do_not_go_on(tmp_path, field, value):
  config = _config(tmp_path)
  (tmp_path / workdir_files.CONFIG).write_text(config.to_json())
  loop._check_batches(config, tmp_path)
  config.data[field] = value
  with pytest.raises(ValueError, match=f"other batches: config.data.{field}: .* -> {value!r}"):
    loop._check_batches(config, tmp_path)


def _params(workdir):
  return jax.device_get(loop.load(workdir).params)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
  loop.train(_config(tmp_path), tmp_path / "whole")
  tokenizer = tmp_path / "whole/tokenizer"
  assert (tokenizer / "metrics.jsonl").exists()
  before = {p: p.stat().st_mtime_ns for p in tokenizer.rglob("*")}
  part = tmp_path / "part"
  loop.train(_config(tmp_path, 2, tokenizer), part)  # As it stood when it was killed.
  loop.train(_config(tmp_path, 4, tokenizer), part)
  jax.tree.map(np.testing.assert_array_equal, _params(part), _params(tmp_path / "whole"))
  assert {p: p.stat().st_mtime_ns for p in tokenizer.rglob("*")} == before  # Another run's is left.
  run = loop.load(part)
  other = loop.load(tmp_path / "whole")
  assert run.data.summary == other.data.summary  # Encoded once.


@pytest.mark.slow
def test_what_does_not_fit_a_tokenizer_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"holds no config.json: train there first"):
    loop.train(_config(tmp_path, 2, tmp_path / "nowhere"), tmp_path / "a")
  config = _config(tmp_path, 2)
  config.data.media.size = 16
  with pytest.raises(ValueError, match=r"data.media has examples of shape \(16, 16, 1\)"):
    loop.train(config, tmp_path / "b")
  config = _config(tmp_path, 2, tmp_path / "b/tokenizer")
  loop.train(config, tmp_path / "c")
  with pytest.raises(ValueError, match="trained 'latentlm', and no latent tokenizer"):
    loop.train(_config(tmp_path, 2, tmp_path / "c"), tmp_path / "d")
