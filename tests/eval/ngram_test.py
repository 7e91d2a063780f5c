import collections
import math
import zlib

import numpy as np
import pytest

from latentlab import data as data_lib
from latentlab.eval import ngram


def _counts(data, n):
  return collections.Counter(data[i : i + n] for i in range(len(data) - n + 1))


def _brute_force(train, order, smoothing):
  """The recursions of the module's docstring, one dictionary and one byte at a time."""
  tables = {}
  for n in range(1, order + 1):
    if smoothing == "kneser_ney" and n < order:
      tables[n] = collections.Counter(gram[1:] for gram in _counts(train, n + 1))
    else:
      tables[n] = _counts(train, n)

  def discount(n, count):
    n1, n2, n3, n4 = (sum(c == k for c in tables[n].values()) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 + 2 * n2 else 0
    low, high = {1: (n1, n2), 2: (n2, n3)}.get(count, (n3, n4))
    return max(min(count, 3) - (min(count, 3) + 1) * y * high / max(low, 1), 0.1)

  def probability(context, byte):
    if context is None:
      return 1 / 256
    n = len(context) + 1
    below = probability(context[1:] if context else None, byte)
    followers = {g: c for g, c in tables[n].items() if g[:-1] == context}
    if not followers:
      return below
    c, h, t = followers.get(context + byte, 0), sum(followers.values()), len(followers)
    if smoothing == "witten_bell":
      return (c + t * below) / (h + t)
    kept = c - discount(n, c) if c else 0
    return (kept + below * sum(discount(n, c) for c in followers.values())) / h

  return probability


def _text(seed, size, symbols=b"\x00ab c\xff"):
  rng = np.random.default_rng(seed)
  return bytes(
    rng.choice(np.frombuffer(symbols, np.uint8), size, p=[0.05, 0.4, 0.25, 0.15, 0.1, 0.05])
  )


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_matches_brute_force(order, smoothing):
  train, text = _text(0, 150), _text(1, 40) + b"never seen \x00\x00\x00\x00\xff\xff\xff\xff"
  probability = _brute_force(train, order, smoothing)
  bits = [
    -math.log2(probability(text[max(0, i - order + 1) : i], text[i : i + 1]))
    for i in range(len(text))
  ]
  got = ngram.bits_per_byte(train, text, order, smoothing)
  assert got == pytest.approx(np.mean(bits), rel=1e-12)


@pytest.mark.parametrize("smoothing", ["kneser_ney", "witten_bell"])
@pytest.mark.parametrize("train", [b"aaaaaaa", b"abababab", b"abcde", b"aabbccddaabbccdd"])
def test_probabilities_sum_to_one(train, smoothing):
  for context in (b"ab", b"zz"):
    before = 2 * ngram.bits_per_byte(train, context, 3, smoothing)
    after = (3 * ngram.bits_per_byte(train, context + bytes([b]), 3, smoothing) for b in range(256))
    total = sum(2 ** (before - bits) for bits in after)
    assert total == pytest.approx(1, rel=1e-9)


def test_zero_bytes_are_not_missing_context():
  """The context of zeros is the number 0, which must not be confused with no context."""
  train = b"\x00\x00\x00a" * 50
  assert ngram.bits_per_byte(train, b"\x00\x00\x00a" * 50, 4) < 0.2


def test_the_longest_order():
  text = b"the quick brown fox " * 30
  bits = [ngram.bits_per_byte(text, text, n, "witten_bell") for n in (1, 3, 8)]
  assert bits[2] < bits[1] < bits[0]


def test_text_shorter_than_the_order():
  train = b"abcabcabd"
  p = _brute_force(train, 5, "kneser_ney")(b"", b"a")
  assert ngram.bits_per_byte(train, b"a", 5) == pytest.approx(-math.log2(p))


def test_zlib():
  data = b"hello hello hello"
  assert ngram.zlib_bits_per_byte(data) == 8 * len(zlib.compress(data, 9)) / len(data)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((b"abc", b"a", 0), "order=0"),
    ((b"abc", b"a", 9), "order=9"),
    ((b"ab", b"a", 3), "len\\(train_bytes\\)=2"),
    ((b"abc", b"", 1), "len\\(eval_bytes\\)=0"),
    ((b"abc", b"a", 1, "laplace"), "smoothing='laplace'"),
  ],
)
def test_errors(args, message):
  with pytest.raises(ValueError, match=message):
    ngram.bits_per_byte(*args)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "'synthetic' has no raw bytes"),
    ({"split": "test"}, "split='test'"),
    ({"num_batches": 0}, "num_batches=0"),
    ({"max_batches": -1}, "max_batches=-1"),
  ],
)
def test_an_evaluation_without_text_fails_at_once(fields, message):
  data = data_lib.build(dict(source="synthetic", seq_length=8), batch_size=2)
  with pytest.raises(ValueError, match=message):
    ngram.Evaluator(None, data, None, **{"num_batches": 1, "seed": 0, **fields})
