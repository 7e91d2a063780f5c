"""Media drawn by a trained model: latents of every row as the tokenizer has them."""

import types

import jax
import latent_cases as cases
import numpy as np

from experiments.configs.latentlm import models
from latentlab import sample
from latentlab.layers.latent_heads import SolverSettings
from latentlab.sample import latent
from latentlab.train import latents
from latentlab.train.state import unbox
from latentlab.train.tasks import build_task


def _trained(data, condition, stop):
  """A task over data, and parameters."""
  config = models.get_config("row=latentlm,smoke")
  config.latents.update(stop=stop)
  config.latents.head.update(depth=1)
  config.data.condition = condition
  config.model.update(num_layers=1, embed_dim=16)
  task = build_task(config, 0, data.summary)
  return task, jax.jit(lambda key: unbox(task.init(key)))(jax.random.key(0))


def test_runs_of_different_lengths_are_each_in_the_tokenizers_units(tmp_path):
  """`z std + mean` of what was drawn, whose rows end where the model says so."""
  data = cases.data(tmp_path, condition="none", stop="token", counts=(2, 5) * 3)
  task, params = _trained(data, "none", "token")
  generator = task.generator(params, data)
  prompts, _ = generator.prompts(6)
  keys, settings = jax.random.split(jax.random.key(1), 6), SolverSettings(num_steps=2)
  runs, _ = generator.runs(prompts, settings, keys)
  items = [latent.prompt_items(task.model.config, p) for p in prompts]
  drawn = latent.generate_items(
    task.model, params, items, settings=settings, key=keys, **generator.limits
  )
  want = latent.drawn_latents(drawn, "image")
  assert len({len(run) for run in want}) > 1
  mean, std = data.summary["mean"], data.summary["std"]
  for run, z in zip(runs, want, strict=True):
    np.testing.assert_allclose(run, z * std + mean, rtol=1e-5, atol=1e-5)


def test_captions_open_no_run(tmp_path, monkeypatch):
  """However much a model would like to: then it would caption with latents, and no text."""
  data = cases.data(tmp_path, condition="both", stop="fixed")
  task, params = _trained(data, "both", "fixed")
  special = task.model.config.tokens
  means = np.ones((2, 4, cases.DIM), np.float32)
  stand_in = latents.TrainedTokenizer(types.SimpleNamespace(config=None), {}, 2)
  stand_in.__dict__["posterior"] = lambda media: (means, None)
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: stand_in)
  bias = np.zeros(special.vocab_size, np.float32)
  bias[special.begin(0)], bias[ord("a")] = 2e6, 1e6
  greedy = sample.token_sampler(greedy=True).replace(filters=(sample.LogitBias(bias),))
  texts = task.generator(params, data).captions(
    np.zeros((2, 4, 4, 1)), jax.random.key(0), 3, greedy
  )
  assert texts == ["aaa", "aaa"]
