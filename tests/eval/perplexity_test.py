"""Perplexity against its definition, and the runner's table."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.configs import common
from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab import ops
from latentlab.eval import perplexity
from latentlab.models import registry
from latentlab.models.language_model import LanguageModel
from latentlab.train.tasks import build_task

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


@pytest.mark.parametrize("order", [2, 3])
def test_splits_the_loss_by_recall(data, params, order):
  task = types.SimpleNamespace(model=_Bigram())
  sizes = dict(seq_length=2 * LENGTH)
  got = dict(perplexity.Evaluator(task, data, _compile, recall_order=order, **sizes).run(params))
  plain = dict(perplexity.Evaluator(task, data, _compile, **sizes).run(params))
  parts = {"recall": [], "other": []}
  for batch in data.eval_batches("validation", **sizes):
    losses = _Bigram().apply(
      {"params": params},
      batch["inputs"],
      batch["targets"],
      batch["positions"],
      method="token_losses",
    )
    for row, t in zip(*np.nonzero(batch["weights"]), strict=True):
      tokens = [*batch["inputs"][row, : t + 1], batch["targets"][row, t]]
      tokens = tokens[t - batch["positions"][row, t] :]  # From the document's first.
      grams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
      part = "recall" if grams and grams[-1] in grams[:-1] else "other"
      parts[part].append(float(losses[row, t]))
  share = len(parts["recall"]) / sum(map(len, parts.values()))
  assert 0 < share < 0.9
  assert got["recall_share"] == pytest.approx(share)
  for part, losses in parts.items():
    assert got[f"{part}_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
  names = ("recall_share", "recall_loss", "other_loss")
  assert {k: v for k, v in got.items() if k not in names} == plain


@pytest.mark.parametrize("num_buckets", [5, LENGTH, 3 * LENGTH])
def test_buckets_of_positions_tile_the_window(data, params, num_buckets):
  """A curve of loss against position has each position once, whatever the number of points."""
  task = types.SimpleNamespace(model=_Bigram())
  got = dict(perplexity.Evaluator(task, data, _compile, num_buckets=num_buckets).run(params))
  names = [name.split("_")[1:] for name in got if name.startswith("position_")]
  covered = [p for first, last in names for p in range(int(first), int(last) + 1)]
  assert covered == list(range(LENGTH)) and len(names) == min(num_buckets, LENGTH)
  batches = [jax.tree.map(np.asarray, batch) for batch in data.eval_batches("validation")]
  for first, last in names:
    counts = losses = 0.0
    for batch in batches:
      inside = (batch["positions"] >= int(first)) & (batch["positions"] <= int(last))
      weights = batch["weights"] * inside
      args = (batch["inputs"], batch["targets"], batch["positions"])
      nll = _Bigram().apply({"params": params}, *args, method="token_losses")
      losses, counts = losses + float((nll * weights).sum()), counts + weights.sum()
    assert got[f"position_{first}_{last}"] == pytest.approx(losses / counts, rel=1e-5)


def test_uniform_predictions_cost_the_log_of_the_vocabulary(data, params):
  evaluator = perplexity.Evaluator(
    types.SimpleNamespace(model=_Bigram()), data, _compile, max_batches=1
  )
  got = dict(evaluator.run({"table": jnp.zeros_like(params["table"])}))
  assert got["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
  assert got["bits_per_byte"] == pytest.approx(np.log2(VOCAB), rel=1e-5)


def test_scores_the_last_targets_of_pieces_of_documents(data, params):
  """Each length by hand, window for window; longer contexts change the loss of equal targets."""
  tokens = data.splits["validation"].tokens
  starts = [*np.flatnonzero(tokens == data.tokenizer.bos_id), len(tokens)]
  pieces = [p for a, b in zip(starts, starts[1:], strict=False) for p in range(a, b - 24, 24)]
  found = {}
  for seq_length in (6, 12, 24):
    evaluator = perplexity.Evaluator(
      types.SimpleNamespace(model=_Bigram()),
      data,
      _compile,
      seq_length=seq_length,
      document_length=24,
      score_last=5,
    )
    found[seq_length] = dict(evaluator.run(params))["loss"]
    windows = np.stack([tokens[p + 24 - seq_length : p + 25] for p in pieces]).astype(np.int32)
    losses = _Bigram().apply(
      {"params": params},
      windows[:, :-1],
      windows[:, 1:],
      np.broadcast_to(np.arange(seq_length), (len(windows), seq_length)),
      method="token_losses",
    )
    assert found[seq_length] == pytest.approx(float(losses[:, -5:].mean()), rel=1e-5)
  assert len({round(x, 3) for x in found.values()}) == 3


@pytest.fixture(scope="module")
def task(data):
  config = common.language_model()
  config.model = common.model(
    "transformer", num_layers=1, embed_dim=16, num_heads=2, positions="learned", max_length=16
  )
  config.data.seq_length = LENGTH
  return build_task(config, data.tokenizer.vocab_size)


def test_another_mask_for_one_evaluation(data, task):
  params = nn.unbox(task.init(jax.random.key(0)))
  # Initial scores are too small for a mask to show.
  params = jax.tree.map(lambda x: 20 * x, params)
  section = dict(type="perplexity", every_steps=1, max_batches=2)
  narrow = dict(mask="sliding_window", mask_size=2)
  runs = {"plain": {}, "same": dict(mask="causal"), "narrow": narrow}
  evals = {name: section | dict(model=model) for name, model in runs.items()}
  plain, same, got = (
    dict(e.evaluator.run(params)) for e in eval_lib.build(evals, task, data, _compile)
  )
  assert plain == same
  assert abs(got["loss"] - plain["loss"]) > 1e-3
  model = LanguageModel(
    registry.build_config(task.config.model.to_dict() | narrow, data.tokenizer.vocab_size)
  )
  total = weight = 0.0
  for batch in data.eval_batches("validation", 2):
    batch = jax.tree.map(jnp.asarray, batch)
    losses = model.apply(
      {"params": params},
      batch["inputs"],
      batch["targets"],
      segment_ids=batch["segment_ids"],
      method="token_losses",
    )
    total += float((losses * batch["weights"]).sum())
    weight += float(batch["weights"].sum())
  assert got["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(model=dict(mask_type="causal")), r"evals.x: .* does not: \['mask_type'\]; choose among"),
    (
      dict(model=dict(embed_dim=32)),
      r"evals.x: model={'embed_dim': 32} changes .* from .16,. to",
    ),
    (dict(model=dict(num_layers=2)), "model={'num_layers': 2} changes parameters"),
    (dict(model=dict(max_length=8)), "model={'max_length': 8} changes parameters"),
    (dict(model=dict(mask="sliding_window", mask_size=0)), "evals.x: "),
    (dict(seq_length=24), "seq_length=24 .* longer than the 16"),
    (dict(seq_length=8, document_length=12), "document_length=12 must be a multiple"),
    (dict(seq_length=8, score_last=9), "score_last=9"),
  ],
  ids=str,
)
def test_bad_protocols(data, task, fields, message):
  section = dict(type="perplexity", every_steps=1) | fields
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": section}, task, data, _compile)


def test_runner_names_what_it_measures(data, params):
  task = types.SimpleNamespace(model=_Bigram())
  evals = {"held_out": dict(type="perplexity", split="validation", every_steps=5, max_batches=2)}
  [evaluation] = eval_lib.build(evals, task, data, _compile)
  assert evaluation.every_steps == 5
  assert {"held_out/loss", "held_out/bits_per_byte"} <= evaluation.run(params).keys()


@pytest.mark.parametrize(
  "section, message",
  [
    (dict(every_steps=1), r"type=None is unknown; choose one of \[.*'perplexity'.*\]"),
    (dict(type="perplexity"), "every_steps=None must be a positive"),
    (
      dict(type="perplexity", every_steps=1, batches=3),
      r"\['batches'\]; choose among.*max_batches",
    ),
    (dict(type="perplexity", every_steps=1, split="test"), "split='test'"),
    (dict(type="perplexity", every_steps=1, num_buckets=0), "num_buckets=0"),
    (dict(type="perplexity", every_steps=1, recall_order=1), "recall_order=1 .* at least 2"),
    (dict(type="perplexity", every_steps=1, max_batches=-1), "max_batches=-1"),
    (dict(type="perplexity", every_steps=1, seq_length=25), "seq_length=25 .* longer than the 24"),
  ],
  ids=["type", "period", "field", "split", "buckets", "recall", "batches", "length"],
)
def test_bad_sections(data, section, message):
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": section}, types.SimpleNamespace(model=_Bigram()), data, _compile)
