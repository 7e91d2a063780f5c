"""Tasks made in memory: copy, reversal, associative recall.

Rows are printable bytes, so a sample can be read: `copy` is `<bos>qzt>qzt`, `reversal` is
`<bos>qzt>tzq`, and `associative_recall` is `<bos>aKcZ>cZaK`, keys in lower case and values in
upper case, where every key is asked once. Only the answers carry weight.
"""

from collections.abc import Callable

import numpy as np

_LOWER = np.arange(ord("a"), ord("z") + 1, dtype=np.int32)
_UPPER = np.arange(ord("A"), ord("Z") + 1, dtype=np.int32)
_ASK = ord(">")

Row = tuple[np.ndarray, np.ndarray]
"""Symbols after `<bos>`, and which of them are answers."""


def copy(rng: np.random.Generator, length: int) -> Row:
  """A random string, then the same string."""
  payload = rng.choice(_LOWER, (length - 1) // 2)
  return _asked(payload, payload)


def reversal(rng: np.random.Generator, length: int) -> Row:
  """A random string, then the string backwards."""
  payload = rng.choice(_LOWER, (length - 1) // 2)
  return _asked(payload, payload[::-1])


def associative_recall(rng: np.random.Generator, length: int) -> Row:
  """Pairs of a key and a value, then the keys in another order, each to be answered."""
  num_pairs = min((length - 1) // 4, len(_LOWER))
  pairs = np.stack([rng.permutation(_LOWER)[:num_pairs], rng.choice(_UPPER, num_pairs)], axis=1)
  symbols, answers = _asked(pairs.ravel(), rng.permutation(pairs).ravel())
  answers[2 * num_pairs + 1 :: 2] = False  # The keys are given.
  return symbols, answers


TASKS: dict[str, Callable[[np.random.Generator, int], Row]] = {
  "copy": copy,
  "reversal": reversal,
  "associative_recall": associative_recall,
}

SHORTEST = 5
"""The fewest symbols that hold one question of every task."""


def _asked(question: np.ndarray, answer: np.ndarray) -> Row:
  symbols = np.concatenate([question, [_ASK], answer]).astype(np.int32)
  return symbols, np.arange(len(symbols)) > len(question)
