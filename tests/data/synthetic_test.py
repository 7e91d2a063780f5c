import numpy as np
import pytest

from latentlab import data
from latentlab.data import synthetic


def _rows(task, seq_length=32, count=3, seed=0):
  built = data.build(dict(source="synthetic", task=task, seq_length=seq_length), 8)
  iterator = built.train_iterator(seed)
  for _ in range(count):
    batch = next(iterator)
    for inputs, targets, weights in zip(
      *(batch[k] for k in ("inputs", "targets", "weights")), strict=True
    ):
      assert inputs[0] == built.tokenizer.bos_id
      yield built.tokenizer.decode(targets), built.tokenizer.decode(targets[weights > 0])


@pytest.mark.parametrize("seq_length", [5, 6, 7, 32])
@pytest.mark.parametrize(("task", "step"), [("copy", 1), ("reversal", -1)])
def test_copy_and_reversal(task, step, seq_length):
  for text, answers in _rows(task, seq_length):
    question, answer = text.split(">")
    assert len(question) == (seq_length - 1) // 2
    assert answers == answer == question[::step]


@pytest.mark.parametrize("seq_length", [5, 9, 31, 32, 200])
def test_associative_recall(seq_length):
  for text, answers in _rows("associative_recall", seq_length):
    question, asked = text.split(">")
    memory = dict(zip(question[::2], question[1::2], strict=True))
    assert len(memory) == len(question) // 2 == min((seq_length - 1) // 4, 26)
    assert sorted(asked[::2]) == sorted(memory)
    assert answers == asked[1::2] == "".join(memory[k] for k in asked[::2])


@pytest.mark.parametrize("task", synthetic.TASKS)
def test_rows_are_many_and_hang_on_the_seed(task):
  first, again, other = (list(_rows(task, seed=s)) for s in (0, 0, 1))
  assert first == again
  assert len(set(first) | set(other)) == len(first) + len(other)


def test_the_largest_seed():
  assert len(set(_rows("copy", seed=2**32 - 1))) == 24


def test_validation_is_not_training():
  built = data.build(dict(source="synthetic", task="copy", seq_length=32), 1024)
  batches = [next(iter(built.eval_batches(split)))["inputs"] for split in ("train", "validation")]
  train, validation = ({row.tobytes() for row in b} for b in batches)
  assert not train & validation
  np.testing.assert_array_equal(batches[0].shape, (1024, 32))
