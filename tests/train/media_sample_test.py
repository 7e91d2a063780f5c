"""Media drawn by a trained model: latents of every row as the tokenizer has them."""

import jax
import latent_cases as cases
import numpy as np

from experiments.configs.latentlm import models
from latentlab.layers.latent_heads import SolverSettings
from latentlab.sample import latent
from latentlab.train.state import unbox
from latentlab.train.tasks import build_task


def test_runs_of_different_lengths_are_each_in_the_tokenizers_units(tmp_path):
  """`z std + mean` of what was drawn, whose rows end where the model says so."""
  data = cases.data(tmp_path, condition="none", stop="token", counts=(2, 5) * 3)
  config = models.get_config("row=latentlm,smoke")
  config.latents.update(stop="token")
  config.latents.head.update(depth=1)
  config.data.condition = "none"
  config.model.update(num_layers=1, embed_dim=16)
  task = build_task(config, 0, data.summary)
  params = jax.jit(lambda key: unbox(task.init(key)))(jax.random.key(0))
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
