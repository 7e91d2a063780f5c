"""Perplexity against its definition, and the runner's table."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab import ops
from latentlab.eval import perplexity

VOCAB, LENGTH = 258, 12


class _Bigram(nn.Module):
  """Logits from the last token; a model as far as an evaluator needs one."""

  config = types.SimpleNamespace(context_limit=2 * LENGTH)

  @nn.compact
  def token_losses(self, tokens, targets, positions=None, segment_ids=None):
    if positions is None:  # As a model counts them.
      positions = ops.document_positions(segment_ids)
    table = self.param("table", nn.initializers.normal(1.0), (VOCAB, VOCAB))
    scale = 1 + 0.1 * positions[..., None]
    log_probs = jax.nn.log_softmax(table[tokens] * scale)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "docs"
  path.mkdir()
  for i in range(40):
    text = f"Document {i}: h\u00e4lf of it is h\u00e9ld out. " * (1 + i % 5)
    (path / f"{i}.txt").write_text(text)
  return data_lib.build(
    dict(path=str(path), seq_length=LENGTH, validation_fraction=0.5, cache_dir=str(path.parent)),
    batch_size=8,
  )


@pytest.fixture(scope="module")
def params():
  return {"table": jax.random.normal(jax.random.key(0), (VOCAB, VOCAB))}


def _compile(fn):
  return jax.jit(fn)


def test_matches_the_definition(data, params):
  evaluator = perplexity.Evaluator(
    types.SimpleNamespace(model=_Bigram()), data, _compile, num_buckets=3
  )
  got = dict(evaluator.run(params))
  nll, position, num_bytes = [], [], 0
  for batch in data.eval_batches("validation"):
    losses = _Bigram().apply(
      {"params": params},
      batch["inputs"],
      batch["targets"],
      batch["positions"],
      method="token_losses",
    )
    valid = batch["weights"] > 0
    nll.append(np.asarray(losses, np.float64)[valid])
    position.append(batch["positions"][valid])
    num_bytes += data.tokenizer.byte_lengths[batch["targets"][valid]].sum()
  nll, position = np.concatenate(nll), np.concatenate(position)
  assert not (np.array([b["weights"].all() for b in data.eval_batches("validation")])).all()
  assert num_bytes == data.summary["validation_bytes"]  # Every byte is asked once.
  want = {
    "loss": nll.mean(),
    "perplexity": np.exp(nll.mean()),
    "bits_per_byte": nll.sum() / np.log(2) / num_bytes,
  }
  for first in (0, 4, 8):
    inside = (first <= position) & (position < first + 4)
    want[f"position_{first}_{first + 3}"] = nll[inside].mean()
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-5), name


def test_uniform_predictions_cost_the_log_of_the_vocabulary(data, params):
  evaluator = perplexity.Evaluator(
    types.SimpleNamespace(model=_Bigram()), data, _compile, max_batches=1
  )
  got = dict(evaluator.run({"table": jnp.zeros_like(params["table"])}))
  assert got["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
  assert got["bits_per_byte"] == pytest.approx(np.log2(VOCAB), rel=1e-5)


def test_runner_names_what_it_measures(data, params):
  task = types.SimpleNamespace(model=_Bigram())
  evals = {"held_out": dict(type="perplexity", split="validation", every_steps=5, max_batches=2)}
  [evaluation] = eval_lib.build(evals, task, data, _compile)
  assert evaluation.every_steps == 5
  assert {"held_out/loss", "held_out/bits_per_byte"} <= evaluation.run(params).keys()


@pytest.mark.parametrize(
  "section, message",
  [
    (dict(every_steps=1), r"type=None is unknown; choose one of \[.*'perplexity'\]"),
    (dict(type="perplexity"), "every_steps=None must be a positive"),
    (
      dict(type="perplexity", every_steps=1, batches=3),
      r"\['batches'\]; choose among.*max_batches",
    ),
    (dict(type="perplexity", every_steps=1, split="test"), "split='test'"),
    (dict(type="perplexity", every_steps=1, num_buckets=0), "num_buckets=0"),
    (dict(type="perplexity", every_steps=1, max_batches=-1), "max_batches=-1"),
    (dict(type="perplexity", every_steps=1, seq_length=25), "seq_length=25 .* longer than the 24"),
  ],
  ids=["type", "period", "field", "split", "buckets", "batches", "length"],
)
def test_bad_sections(data, section, message):
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": section}, types.SimpleNamespace(model=_Bigram()), data, _compile)
