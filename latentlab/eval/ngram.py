"""Baselines for bits per byte: interpolated n-grams over bytes, and zlib.

An n-gram of order n predicts a byte from the n - 1 before it; every order is interpolated with the
one below, down to the uniform distribution over 256 bytes, so no byte is impossible. With `c` the
count of a context followed by a byte, `h` the context's, and `t` its number of distinct followers:

  Witten and Bell (1991): p_n = (c + t p_{n-1}) / (h + t).
  Kneser and Ney (1995), with the three discounts of Chen and Goodman (1999), equation 26:
    p_n = (c - d(c) + p_{n-1} sum d) / h, where orders below the highest count in how many distinct
    contexts a byte string occurs, not how often.

All positions are scored at once: n-grams are 64-bit numbers, counting is a sort, and looking up is
a binary search.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from latentlab.data import Data
from latentlab.typing import Params

_LONGEST = 8
"""Bytes of a 64-bit number."""


def bits_per_byte(
  train_bytes: bytes,
  eval_bytes: bytes,
  order: int,
  smoothing: str = "kneser_ney",
) -> float:
  """Mean code length of `eval_bytes` under an n-gram counted on `train_bytes`.

  Args:
    train_bytes: What the model is counted on.
    eval_bytes: What it predicts; the first bytes have shorter contexts.
    order: n; 1 is the unigram.
    smoothing: "kneser_ney", the stronger one, or "witten_bell".
  """
  if not 1 <= order <= _LONGEST:
    raise ValueError(f"{order=} is not in [1, {_LONGEST}].")
  if len(train_bytes) < order or not eval_bytes:
    raise ValueError(
      f"too little text: {len(train_bytes)=} must be at least {order=}, and "
      f"{len(eval_bytes)=} at least 1."
    )
  if smoothing not in ("kneser_ney", "witten_bell"):
    raise ValueError(f"{smoothing=} is unknown; choose 'kneser_ney' or 'witten_bell'.")
  train, text = (np.frombuffer(b, np.uint8) for b in (train_bytes, eval_bytes))
  p = np.full(len(text), 1 / 256)
  for n in range(1, min(order, len(text)) + 1):
    if smoothing == "kneser_ney" and n < order:
      followed = np.unique(_grams(train, n + 1))
      grams, counts = np.unique(followed & _low_bytes(n), return_counts=True)
    else:
      grams, counts = np.unique(_grams(train, n), return_counts=True)
    direct, backoff = _interpolation(grams, counts, smoothing, _grams(text, n))
    p[n - 1 :] = direct + backoff * p[n - 1 :]
  return float(-np.log2(p).mean())


def zlib_bits_per_byte(eval_bytes: bytes) -> float:
  """Size under `zlib -9`, which has seen nothing before."""
  return 8 * len(zlib.compress(eval_bytes, 9)) / len(eval_bytes)


class Evaluator:
  """N-grams counted on exactly the bytes that a run has seen, as baselines of its bits per byte.

  They do not depend on the parameters, so this is an evaluation for the end of a run. `zlib` and
  the n-gram of the whole training split are printed for honesty: neither is limited to what the run
  has had the time to read.
  """

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[..., Any],
    *,
    num_batches: int,
    seed: int,
    split: str = "validation",
    max_batches: int | None = None,
    orders: Sequence[int] = (1, 3, 5),
    whole_corpus: bool = True,
  ):
    """Checks the fields.

    Args:
      task: Not used; n-grams are of any task's data.
      data: Holds the splits.
      compile: Not used.
      num_batches: Training batches that count as seen: the run's steps.
      seed: Of the training batches: the run's.
      split: What is predicted.
      max_batches: How many of its batches, as in the perplexity evaluation; all if `None` or 0.
      orders: Orders of the n-grams.
      whole_corpus: Whether to count the highest order on the whole training split too.
    """
    del task, compile
    if not orders or not all(1 <= n <= _LONGEST for n in orders):
      raise ValueError(f"{orders=} of an ngram evaluation must lie in [1, {_LONGEST}].")
    if num_batches < 1 or (max_batches or 0) < 0:
      raise ValueError(
        f"{num_batches=} of an ngram evaluation must be at least 1, and "
        f"{max_batches=} not negative; 0 reads all."
      )
    data.raw_bytes(split, 0)  # Raises where there is no such split, or no text behind it.
    self._data, self._num_batches, self._seed = data, num_batches, seed
    self._split, self._max_batches, self._orders = split, max_batches or None, tuple(orders)
    self._whole_corpus = whole_corpus

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields the bytes seen, and bits per byte by baseline."""
    del params
    text = self._data.raw_bytes(self._split, self._max_batches)
    seen = self._data.seen_bytes(self._num_batches, self._seed)
    yield "seen_bytes", float(len(seen))
    for order in self._orders:
      yield f"bits_per_byte_order_{order}", bits_per_byte(seen, text, order)
    yield "bits_per_byte_zlib", zlib_bits_per_byte(text)
    if self._whole_corpus:
      whole, order = self._data.whole_corpus_bytes(), max(self._orders)
      yield f"bits_per_byte_whole_corpus_order_{order}", bits_per_byte(whole, text, order)


def _grams(text: np.ndarray, n: int) -> np.ndarray:
  """All byte strings of length `n`, first byte highest."""
  out = np.zeros(len(text) - n + 1, np.uint64)
  for i in range(n):
    out = out << np.uint64(8) | text[i : len(text) - n + 1 + i]
  return out


def _low_bytes(n: int) -> np.uint64:
  return np.uint64(2 ** (8 * n) - 1)


def _interpolation(grams, counts, smoothing, queries) -> tuple[np.ndarray, np.ndarray]:
  """For each query the order's own probability, and the weight of the order below."""
  contexts = grams >> np.uint64(8)
  first = np.flatnonzero(np.concatenate([[True], contexts[1:] != contexts[:-1]]))
  contexts = contexts[first]
  total = np.add.reduceat(counts, first)
  if smoothing == "witten_bell":
    kept, reserved = counts, np.diff(first, append=len(grams))
    total = total + reserved
  else:
    discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
    kept, reserved = counts - discounts, np.add.reduceat(discounts, first)
  # Scored once per distinct query, in order, which also makes the binary search quick.
  queries, inverse = np.unique(queries, return_inverse=True)
  gram, known_gram = _find(grams, queries)
  context, known_context = _find(contexts, queries >> np.uint64(8))
  direct = np.where(known_gram, kept[gram], 0) / total[context]
  backoff = np.where(known_context, reserved[context] / total[context], 1)
  return direct[inverse], backoff[inverse]


def _discounts(counts: np.ndarray) -> np.ndarray:
  """What a count of 1, of 2, and of 3 or more gives up."""
  n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
  y = n1 / max(n1 + 2 * n2, 1)
  ratios = np.array([2 * n2 / max(n1, 1), 3 * n3 / max(n2, 1), 4 * n4 / max(n3, 1)])
  discounts = np.array([1, 2, 3]) - y * ratios
  # Tiny corpora can make an estimate negative; some mass must remain for what was never seen.
  return np.maximum(discounts, 0.1)


def _find(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Places of `queries` in the sorted `keys`, and which of them are there."""
  place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
  return place, keys[place] == queries
