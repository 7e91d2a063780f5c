"""Accuracy and spread against a count over the rows that the model is shown."""

import collections
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab.eval import many_shot

LENGTH = 64


class Reader(nn.Module):
  """Says the label of the same item if it was among the last `reach` tokens, and else the last."""

  reach: int = LENGTH
  config = types.SimpleNamespace(context_limit=2 * LENGTH)

  def hidden(self, tokens):
    before = jnp.roll(tokens, 1, axis=1)
    t = jnp.arange(tokens.shape[1])
    inside = (t < t[:, None]) & (t > t[:, None] - self.reach)
    match = (tokens[:, :, None] == tokens[:, None]) & (before[:, :, None] == before[:, None])
    place = jnp.where(match & inside, t, -1).max(-1)
    place = jnp.where(place < 0, t - 3, place)
    return jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), place, axis=1)[..., None], None

  def logits(self, hidden):
    return jax.nn.one_hot(hidden[..., 0], 258)


def _data(**options):
  section = dict(source="synthetic", task="many_shot", task_options=options, seq_length=LENGTH)
  return data_lib.build(section, batch_size=8)


def _run(data, reach=LENGTH, **fields):
  """The metrics, and every row that was asked: examples, query, its label, and what was said."""
  rows = []

  def compile(fn):
    compiled = jax.jit(fn)

    def record(params, batch):
      right = np.asarray(compiled(params, batch))
      for tokens, place, answer, ok in zip(*batch.values(), right, strict=True):
        if place:
          text = data.tokenizer.decode(tokens[: place + 1])
          assert tokens[0] == 256 and (tokens[place + 1 :] == 257).all()
          examples = re.findall(r"([a-z]{2})([A-Z])", text)
          assert len(text) == 3 * len(examples) + 2
          rows.append((tuple(examples), text[-2:], chr(answer), bool(ok)))
      return right

    return record

  task = types.SimpleNamespace(model=Reader(reach))
  return dict(many_shot.Evaluator(task, data, compile, **fields).run({})), rows


def test_matches_a_count():
  options = dict(shots=(5, 16), num_permutations=3, num_samples=2, num_queries=5, seed=1)
  got, rows = _run(_data(), reach=20, **options)
  assert len(rows) == 2 * 3 * 2 * 5
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for examples, query, answer, ok in rows:
    mapping = dict(examples)
    assert mapping[query] == answer and all(mapping[item] == label for item, label in examples)
    said = dict(examples[-6:]).get(query, examples[-1][1])  # The last 20 tokens.
    assert ok == (said == answer)
    found[tuple(sorted(examples))][examples].append((query, ok))
  assert len(found) == 4  # Two samples with each number of examples.
  want = {}
  for shots in (5, 16):
    orders = [by for key, by in found.items() if len(key) == shots]
    scores = []
    for by_order in orders:
      assert len(by_order) == 3
      assert len({tuple(query for query, _ in asked) for asked in by_order.values()}) == 1
      scores.append([np.mean([ok for _, ok in asked]) for asked in by_order.values()])
    want[f"accuracy_shots_{shots}"] = np.mean(scores)
    want[f"spread_shots_{shots}"] = np.mean([max(s) - min(s) for s in scores])
  want |= dict(accuracy=want["accuracy_shots_16"], spread=want["spread_shots_16"])
  want |= dict(best=np.mean([max(s) for s in scores]), worst=np.mean([min(s) for s in scores]))
  assert got == pytest.approx(want)
  assert 0 < got["spread"] < 1 and got["accuracy"] < 1
  again, _ = _run(_data(), reach=20, **options)
  other, _ = _run(_data(), reach=20, **options | dict(seed=2))
  assert again == got != other


def test_a_model_that_reads_them_all_is_always_right():
  got, rows = _run(_data())
  assert {len(row[0]) for row in rows} == {5, 10, 20}  # 1 + 3 * 20 + 2 tokens fit.
  for name, value in got.items():
    assert value == ("spread" not in name), name


def test_classes_take_turns():
  options = dict(num_items=6, num_classes=3)
  _, rows = _run(_data(**options), order="alternating", shots=(18,))
  orders = {row[0] for row in rows}
  assert len(orders) == 4 * 10
  for examples in orders:
    labels = [label for _, label in examples]
    assert all(len(set(labels[i : i + 3])) == 3 for i in range(16))
    assert sorted(collections.Counter(examples).values()) == [3] * 6
  mixed, _ = _run(_data(**options), shots=(18,))
  assert mixed["accuracy"] == 1


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_samples=0), "num_samples=0"),
    (dict(num_permutations=0), "num_permutations=0"),
    (dict(seed=-1), "seed=-1"),
    (dict(order="sorted"), "order='sorted' .* must be one of"),
    (dict(shots=(0, 4)), r"shots=\(0, 4\) .* must lie in \[1, 20\]"),
    (dict(shots=(21,)), r"shots=\(21,\)"),
    (dict(seq_length=5), r"shots=\(\)"),
    (dict(seq_length=129), "seq_length=129 .* longer than the 128"),
  ],
  ids=str,
)
def test_bad_fields(fields, message):
  section = dict(type="many_shot", every_steps=1) | fields
  task = types.SimpleNamespace(model=Reader())
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": section}, task, _data(), jax.jit)
