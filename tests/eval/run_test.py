"""Evaluations as a run has them: from its config, on a mesh, and of its checkpoint."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments.configs import common
from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab.models import registry
from latentlab.train import loop, metrics
from latentlab.train.tasks import build_task

EVALS = {
  "quantised": dict(type="perplexity", max_batches=2, recall_order=2, model=dict(logit_bits=4)),
  "needles": dict(type="needles", num_samples=3, model=dict(logit_bits=6)),
  "mass": dict(type="attention_mass", num_samples=3, depths=(0.0, 0.5)),
  "activations": dict(type="activations", max_batches=2),
  "shots": dict(type="many_shot", num_samples=2, num_permutations=3, num_queries=2),
}


@pytest.mark.slow
def test_every_evaluation_of_a_run(tmp_path):
  c = common.smoke(common.language_model())
  c.model = common.model("diff_transformer", num_layers=1, embed_dim=16, num_heads=2)
  c.data.update(source="synthetic", task="multi_needle", seq_length=48)
  c.data.task_options.update(num_needles=3, num_queries=2, key_length=1)
  c.evals = {k: section | dict(every_steps=2) for k, section in EVALS.items()}
  c.train_steps = c.checkpoint_steps = c.log_steps = 2
  c.mesh.update(data=4, tensor=2)
  loop.train(c, tmp_path)
  line = metrics.read_metrics(tmp_path / "metrics.jsonl")[-1]
  run = loop.load(tmp_path)
  assert run.config.data.task_options.num_needles == 3
  params = jax.tree.map(np.asarray, run.params)
  for e in EVALS:
    assert any(name.startswith(f"eval/{e}/") for name in line)
  # Rows that an evaluation makes lie on a mesh as they do on one device.
  rows = {k: run.config.evals[k].to_dict() for k in ("needles", "mass", "shots")}
  for e in eval_lib.build(rows, run.task, run.data, jax.jit):
    for metric, value in e.run(params).items():
      assert line[f"eval/{metric}"] == pytest.approx(value, rel=1e-3, abs=1e-6), metric
  plain = {"plain": EVALS["quantised"] | dict(every_steps=1, model=dict(logit_bits=None))}
  [plain] = eval_lib.build(plain, run.task, run.data, jax.jit)
  assert plain.run(params)["plain/loss"] != pytest.approx(line["eval/quantised/loss"], rel=1e-6)


def _shapes_alone(fn):
  """Traces what an evaluation would compile, and hands out zeros."""

  def run(*args):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))

  return run


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_model_can_be_asked(name, tmp_path):
  """Retrieval, in symbols and in text, and classification ask nothing of a model but tokens."""
  (tmp_path / "a.txt").write_text("One line and another. " * 40)
  c = common.language_model()
  c.model = common.model(name, num_layers=2, embed_dim=32)
  if "num_heads" in c.model:
    c.model.num_heads = 2
  if name == "hyena":
    c.model.mlp_dim = 32
  c.data.update(path=str(tmp_path / "a.txt"), seq_length=160, cache_dir=str(tmp_path))
  data = data_lib.build(c.data.to_dict(), batch_size=4)
  task = build_task(c, data.tokenizer.vocab_size)
  params = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
  )
  evals = {
    "symbols": dict(type="needles", num_samples=1),
    "text": dict(type="needles", hay="text", split="train", num_samples=1),
    "shots": dict(type="many_shot", num_samples=1, num_permutations=1),
  }
  sections = {k: section | dict(every_steps=1) for k, section in evals.items()}
  for e in eval_lib.build(sections, task, data, _shapes_alone):
    assert e.run(params)[f"{e.name}/accuracy"] == 0
