"""The AR-hit split against its definition, target by target."""

import numpy as np
import pytest

from latentlab.eval.recall import completes_ngram


def _slowly(inputs, targets, segment_ids, order):
  out = np.zeros(inputs.shape, bool)
  for b, t in np.ndindex(*inputs.shape):
    document = [s for s in range(t + 1) if segment_ids[b, s] == segment_ids[b, t]]
    text = [inputs[b, s] for s in document] + [targets[b, t]]
    grams = [tuple(text[i : i + order]) for i in range(len(text) - order + 1)]
    out[b, t] = bool(grams) and grams[-1] in grams[:-1]
  return out


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("vocab", [2, 4])
def test_matches_the_definition(order, vocab):
  rng = np.random.default_rng(order)
  ids = rng.integers(0, vocab, (7, 48))
  # Documents of all lengths, down to one token, and padding behind the last of a row.
  segment_ids = 1 + np.cumsum(rng.random((7, 47)) < 0.1, axis=1)
  segment_ids[3, 15:] = 0
  args = ids[:, :-1], ids[:, 1:], segment_ids
  got, want = completes_ngram(*args, order), _slowly(*args, order)
  np.testing.assert_array_equal(got, want)
  assert 0 < want.mean() < 1


def test_by_hand():
  text = np.array([[*b"abcabxab"]])
  got = completes_ngram(text[:, :-1], text[:, 1:], np.ones((1, 7), int), 2)
  assert got[0].tolist() == [False, False, False, True, False, False, True]


def test_an_ngram_of_another_row_or_document_is_not_seen():
  ids = np.array([[1, 2, 3, 1, 2], [1, 2, 3, 3, 3]])
  segments = np.array([[1, 1, 1, 2], [1, 1, 1, 1]])
  got = completes_ngram(ids[:, :-1], ids[:, 1:], segments, 2)
  np.testing.assert_array_equal(got, [[False] * 4, [False, False, False, True]])
