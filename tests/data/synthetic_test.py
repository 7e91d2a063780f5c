import re

import numpy as np
import pytest

from latentlab import data
from latentlab.data import synthetic


def _rows(task, seq_length=32, count=3, seed=0, **options):
  section = dict(source="synthetic", task=task, task_options=options, seq_length=seq_length)
  built = data.build(section, 8)
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


@pytest.mark.parametrize(
  "seq_length, options",
  [
    (30, {}),  # No hay at all.
    (64, dict(num_needles=1, num_queries=1)),
    (97, dict(num_needles=5, num_queries=3, key_length=1, value_length=3)),
    (97, dict(num_needles=26, num_queries=2, key_length=1, value_length=1, mixed=True)),
  ],
  ids=str,
)
def test_needles_are_found_where_they_lie(seq_length, options):
  sizes = dict(num_needles=4, num_queries=2, key_length=2, value_length=2) | options
  needles, queries, key_length, value_length = (sizes[name] for name in list(sizes)[:4])
  hay = "[a-zA-Z0-9]" if sizes.get("mixed") else "[a-z]"
  pair = rf"([A-Z]{{{key_length}}})(\d{{{value_length}}})"
  for text, answers in _rows("multi_needle", seq_length, **options):
    assert len(text) == seq_length
    context, *asked = text.split("?")
    memory = dict(re.findall(f"#{pair}", context))
    assert len(memory) == needles  # Keys differ.
    assert re.fullmatch(f"{hay}*", re.sub(f"#{pair}", "", context))
    asked = [re.fullmatch(pair, query).groups() for query in asked]
    assert len(dict(asked)) == queries
    assert all(memory[key] == value for key, value in asked)
    assert answers == "".join(value for _, value in asked)


def test_needles_lie_anywhere_and_are_asked_for_in_any_order():
  task = synthetic.MultiNeedle(num_needles=3, num_queries=2, mixed=True)
  rows = [task.haystack(np.random.default_rng(i), 100) for i in range(400)]
  begins = np.concatenate([row.needles[:, 0] for row in rows])
  # 75 symbols of hay and 3 needles of 5: begins are from 0 to 85, in the mean in the middle.
  assert begins.min() < 3 and begins.max() > 82 and abs(begins.mean() - 42.5) < 4
  later = np.mean([row.needles[0, 0] > row.needles[1, 0] for row in rows])
  assert 0.4 < later < 0.6


@pytest.mark.parametrize("depth, before", [(0.0, 0), (0.25, 10), (1.0, 40)])
def test_the_needle_at_a_depth(depth, before):
  task = synthetic.MultiNeedle(num_needles=3, num_queries=2)
  for seed in range(20):
    row = task.haystack(np.random.default_rng(seed), 65, depth)
    text = "".join(map(chr, row.symbols))
    assert text.index("?") == 55
    assert [len(x) for x in (row.answers, row.needles)] == [2, 2]
    for places, (begin, value, end) in zip(row.answers, row.needles, strict=True):
      assert text[begin] == "#" and end == begin + 5
      assert text[begin + 1 : end] == text[places[0] - 2 : places[-1] + 1]
      assert [text[i] for i in places] == list(text[value:end])
    hay_before = [c for c in text[: row.needles[0, 0]] if c.islower()]
    assert len(hay_before) == before
    other = task.haystack(np.random.default_rng(seed), 65, 0.5)
    letters = lambda symbols: sorted(symbols.tolist())  # noqa: E731
    assert letters(row.symbols) == letters(other.symbols)


@pytest.mark.parametrize("options", [{}, dict(num_items=5, num_classes=3, item_length=1)], ids=str)
def test_many_shot_scores_the_labels_of_items_seen_before(options):
  items, classes, size = (dict(num_items=8, num_classes=4, item_length=2) | options).values()
  mappings = set()
  for text, answers in _rows("many_shot", 120, **options):
    examples = re.findall(rf"([a-z]{{{size}}})([A-Z])", text)
    assert len(examples) == 120 // (size + 1)
    mapping, known = {}, ""
    for item, label in examples:
      known += label if item in mapping else ""
      assert mapping.setdefault(item, label) == label
    assert answers == known
    assert len(mapping) <= items and len(set(mapping.values())) <= classes
    mappings.add(tuple(sorted(mapping.items())))
  assert len(mappings) == 24
  shown = synthetic.ManyShot(**options).mapping(np.random.default_rng(0))
  counts = np.unique(shown[:, -1], return_counts=True)[1]
  assert len(counts) == classes and counts.max() - counts.min() <= 1
  assert len(np.unique(shown[:, :-1], axis=0)) == items


@pytest.mark.parametrize(
  "task, options, message",
  [
    ("copy", dict(num_items=3), r"task_options of copy has no field \['num_items'\]"),
    ("multi_needle", dict(num_needles=0), "data.task_options: num_needles=0 must be a whole"),
    ("multi_needle", dict(value_length=1.5), "value_length=1.5 must be a whole"),
    ("multi_needle", dict(num_queries=5), "num_queries=5 asks for more than num_needles=4"),
    ("multi_needle", dict(num_needles=27, key_length=1), "different keys of key_length=1"),
    ("many_shot", dict(num_classes=9), "num_classes=9 must be at most num_items=8"),
    ("many_shot", dict(num_items=27, item_length=1), "num_items=27 are more than the strings"),
    (
      "multi_needle",
      dict(num_needles=6),
      "seq_length=32 of config.data is too short for .* at least 40",
    ),
  ],
  ids=str,
)
def test_bad_options(task, options, message):
  section = dict(source="synthetic", task=task, task_options=options, seq_length=32)
  with pytest.raises(ValueError, match=message):
    data.build(section, 8)


def test_options_of_a_task_that_is_not_there():
  with pytest.raises(ValueError, match="task_options={'num_items': 3} are of a synthetic task"):
    data.DataConfig(task_options=dict(num_items=3))


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
