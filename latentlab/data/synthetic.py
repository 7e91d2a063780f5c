"""Tasks made in memory: copy, reversal, recall, needles in hay, classification from examples.

Rows are printable bytes, so a sample can be read: `copy` is `<bos>qzt>qzt`, `reversal` is
`<bos>qzt>tzq`, and `associative_recall` is `<bos>aKcZ>cZaK`, keys in lower case and values in
upper case, where every key is asked once. `multi_needle` and `many_shot` are told below; their
fields are `config.data.task_options`. Only the answers carry weight.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

_LOWER = np.arange(ord("a"), ord("z") + 1, dtype=np.int32)
_UPPER = np.arange(ord("A"), ord("Z") + 1, dtype=np.int32)
_DIGITS = np.arange(ord("0"), ord("9") + 1, dtype=np.int32)
_ASK, _NEEDLE, _QUERY = ord(">"), ord("#"), ord("?")

Row = tuple[np.ndarray, np.ndarray]
"""Symbols after `<bos>`, and which of them are answers."""


@runtime_checkable
class Task(Protocol):
  """Makes rows; its fields are the task's options."""

  @property
  def shortest(self) -> int:
    """The fewest symbols that hold one question."""

  def __call__(self, rng: np.random.Generator, length: int) -> Row:
    """A row of at most `length` symbols, which is at least `shortest`."""


def check_length(task: Task, length: int, what: str) -> None:
  """Raises a `ValueError` where a row of `what` holds no question of a task."""
  if length < task.shortest:
    raise ValueError(
      f"seq_length={length} of {what} is too short for {task}; it needs at least {task.shortest}."
    )


@dataclasses.dataclass(frozen=True)
class Copy:
  """A random string, then the same string."""

  @property
  def shortest(self) -> int:
    return 3

  def __call__(self, rng: np.random.Generator, length: int) -> Row:
    payload = rng.choice(_LOWER, (length - 1) // 2)
    return _asked(payload, payload)


@dataclasses.dataclass(frozen=True)
class Reversal:
  """A random string, then the string backwards."""

  @property
  def shortest(self) -> int:
    return 3

  def __call__(self, rng: np.random.Generator, length: int) -> Row:
    payload = rng.choice(_LOWER, (length - 1) // 2)
    return _asked(payload, payload[::-1])


@dataclasses.dataclass(frozen=True)
class AssociativeRecall:
  """Pairs of a key and a value, then the keys in another order, each to be answered."""

  @property
  def shortest(self) -> int:
    return 5

  def __call__(self, rng: np.random.Generator, length: int) -> Row:
    num_pairs = min((length - 1) // 4, len(_LOWER))
    pairs = np.stack([rng.permutation(_LOWER)[:num_pairs], rng.choice(_UPPER, num_pairs)], axis=1)
    symbols, answers = _asked(pairs.ravel(), rng.permutation(pairs).ravel())
    answers[2 * num_pairs + 1 :: 2] = False  # The keys are given.
    return symbols, answers


class Haystack(NamedTuple):
  """A row of needles in hay, and where things lie in it.

  Attributes:
    symbols: After `<bos>`.
    answers: Places of the answers' symbols, a line for each query.
    needles: Where the needle asked for begins, its value begins, and it ends; a line for each
      query.
  """

  symbols: np.ndarray
  answers: np.ndarray
  needles: np.ndarray


@dataclasses.dataclass(frozen=True)
class MultiNeedle:
  """Needles in hay, some of which are asked for: `<bos>qz#AB12wx#CD34r?AB12?CD34`.

  Hay is of random letters in lower case. A needle is a mark, a key in upper case and a value of
  digits, and lies anywhere. A query is another mark and a key, and the value is the answer. Keys
  differ, and none is asked for twice. A row has the whole length that it may have.

  Attributes:
    num_needles: Needles in the hay.
    num_queries: How many of them are asked for.
    key_length: Symbols of a key.
    value_length: Symbols of a value.
    mixed: Whether hay has the keys' and values' symbols too, so that the mark alone tells a needle.
  """

  num_needles: int = 4
  num_queries: int = 2
  key_length: int = 2
  value_length: int = 2
  mixed: bool = False

  def __post_init__(self):
    _check_counts(self)
    if self.num_queries > self.num_needles:
      raise ValueError(
        f"num_queries={self.num_queries} asks for more than num_needles={self.num_needles}; lower "
        "it, or add needles."
      )
    if self.num_needles > len(_UPPER) ** self.key_length:
      raise ValueError(
        f"num_needles={self.num_needles} have no different keys of key_length={self.key_length}; "
        "lengthen the keys."
      )

  @property
  def needle_length(self) -> int:
    return 1 + self.key_length + self.value_length

  @property
  def shortest(self) -> int:
    return (self.num_needles + self.num_queries) * self.needle_length

  def __call__(self, rng: np.random.Generator, length: int) -> Row:
    row = self.haystack(rng, length)
    answers = np.zeros(length, bool)
    answers[row.answers] = True
    return row.symbols, answers

  def haystack(self, rng: np.random.Generator, length: int, depth: float | None = None) -> Haystack:
    """A row of `length` symbols.

    Args:
      rng: Draws the same symbols, whatever `depth` is.
      length: Symbols of the row.
      depth: Part of the hay before the needle that is asked for first; random if `None`.
    """
    n, size = self.num_needles, self.needle_length
    codes = rng.choice(len(_UPPER) ** self.key_length, n, replace=False)
    keys = _UPPER[codes[:, None] // len(_UPPER) ** np.arange(self.key_length) % len(_UPPER)]
    pairs = np.concatenate([keys, rng.choice(_DIGITS, (n, self.value_length))], axis=1)
    marked = lambda mark, rows: np.insert(rows, 0, mark, axis=1)
    alphabet = np.concatenate([_LOWER, _UPPER, _DIGITS]) if self.mixed else _LOWER
    hay = rng.choice(alphabet, length - self.shortest)
    before = rng.integers(0, len(hay) + 1, n)  # Hay before each needle.
    asked = rng.permutation(n)[: self.num_queries]
    if depth is not None:
      before[asked[0]] = round(depth * len(hay))
    order = np.argsort(before, kind="stable")
    needles = marked(_NEEDLE, pairs[order]).ravel()
    context = np.insert(hay, np.repeat(before[order], size), needles)
    begins = before + size * np.argsort(order)  # Each needle, behind those that come earlier.
    symbols = np.concatenate([context, marked(_QUERY, pairs[asked]).ravel()]).astype(np.int32)
    queries = len(context) + size * np.arange(self.num_queries)
    return Haystack(
      symbols,
      answers=queries[:, None] + np.arange(1 + self.key_length, size),
      needles=begins[asked, None] + np.array([0, 1 + self.key_length, size]),
    )


@dataclasses.dataclass(frozen=True)
class ManyShot:
  """Classification from examples: `<bos>qzAwrBqzAkbC`, each an item and its label.

  Every row has a mapping of its own, from items, strings in lower case, to labels, letters in upper
  case; classes have as many items as each other, or one more. Items are drawn with replacement. The
  answers are the labels of items that the row has shown before: the others are anyone's guess.

  Attributes:
    num_items: Items of a row.
    num_classes: Labels of a row.
    item_length: Symbols of an item.
  """

  num_items: int = 8
  num_classes: int = 4
  item_length: int = 2

  def __post_init__(self):
    _check_counts(self)
    if not self.num_classes <= min(self.num_items, len(_UPPER)):
      raise ValueError(
        f"num_classes={self.num_classes} must be at most num_items={self.num_items}, and at most "
        f"{len(_UPPER)}."
      )
    if self.num_items > len(_LOWER) ** self.item_length:
      raise ValueError(
        f"num_items={self.num_items} are more than the strings of item_length={self.item_length}; "
        "lengthen the items."
      )

  @property
  def example_length(self) -> int:
    return self.item_length + 1

  @property
  def shortest(self) -> int:
    # With one more example than items, some item comes twice.
    return (self.num_items + 1) * self.example_length

  def __call__(self, rng: np.random.Generator, length: int) -> Row:
    examples = self.mapping(rng)
    shown = rng.integers(0, self.num_items, length // self.example_length)
    known = np.ones(len(shown), bool)
    known[np.unique(shown, return_index=True)[1]] = False
    answers = np.zeros((len(shown), self.example_length), bool)
    answers[:, -1] = known
    return examples[shown].ravel(), answers.ravel()

  def mapping(self, rng: np.random.Generator) -> np.ndarray:
    """Different items with their labels behind them, `[num_items, example_length]`."""
    codes = rng.choice(len(_LOWER) ** self.item_length, self.num_items, replace=False)
    items = _LOWER[codes[:, None] // len(_LOWER) ** np.arange(self.item_length) % len(_LOWER)]
    labels = rng.permutation(_UPPER)[: self.num_classes]
    classes = rng.permutation(np.arange(self.num_items) % self.num_classes)
    return np.concatenate([items, labels[classes, None]], axis=1)


TASKS: dict[str, type[Task]] = {
  "copy": Copy,
  "reversal": Reversal,
  "associative_recall": AssociativeRecall,
  "multi_needle": MultiNeedle,
  "many_shot": ManyShot,
}


def make(name: str, options: Mapping[str, Any]) -> Task:
  """The task that `config.data.task` and `config.data.task_options` name.

  Raises:
    ValueError: a name or an option is unknown, or an option's value is bad.
  """
  if name not in TASKS:
    raise ValueError(f"data.task={name!r} is unknown; choose from {list(TASKS)}.")
  known = [field.name for field in dataclasses.fields(TASKS[name])]
  if unknown := sorted(set(options) - set(known)):
    raise ValueError(f"data.task_options of {name} has no field {unknown}; choose from {known}.")
  try:
    return TASKS[name](**options)
  except ValueError as e:
    raise ValueError(f"data.task_options: {e}") from e


def _asked(question: np.ndarray, answer: np.ndarray) -> Row:
  symbols = np.concatenate([question, [_ASK], answer]).astype(np.int32)
  return symbols, np.arange(len(symbols)) > len(question)


def _check_counts(task: Any) -> None:
  for field in dataclasses.fields(task):
    value = getattr(task, field.name)
    if field.type is int and (not isinstance(value, int) or value < 1):
      raise ValueError(f"{field.name}={value!r} must be a whole number of at least 1.")
