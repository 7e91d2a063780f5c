import numpy as np
import pytest

from latentlab.data import packing


def _naive_first_fit(lengths, capacity):
  bins = []
  for item, length in enumerate(lengths):
    for members in bins:
      if sum(lengths[i] for i in members) + length <= capacity:
        members.append(item)
        break
    else:
      bins.append([item])
  return bins


@pytest.mark.parametrize("seed", range(5))
def test_first_fit(seed):
  lengths = np.random.default_rng(seed).integers(1, 20, 60).tolist()
  assert packing.first_fit(lengths, 19) == _naive_first_fit(lengths, 19)
  assert packing.first_fit(lengths, 50) == _naive_first_fit(lengths, 50)


def test_first_fit_of_nothing():
  assert packing.first_fit([], 4) == []


@pytest.mark.parametrize("length", [0, 6])
def test_first_fit_refuses(length):
  with pytest.raises(ValueError, match=r"\[1, capacity=5\]"):
    packing.first_fit([3, length], 5)


def test_pack():
  examples = [np.array(e) for e in ([9, 1, 2, 3], [9, 4, 5, 6], [9, 7])]
  weights = [np.array(w) for w in ([5, 0, 1, 1], [5, 0, 0, 1], [5, 2])]
  got = packing.pack(examples, 5, pad_id=0, weights=weights)
  want = {
    "inputs": [[9, 1, 2, 9, 0], [9, 4, 5, 0, 0]],
    "targets": [[1, 2, 3, 7, 0], [4, 5, 6, 0, 0]],
    "positions": [[0, 1, 2, 0, 0], [0, 1, 2, 0, 0]],
    "segment_ids": [[1, 1, 1, 2, 0], [1, 1, 1, 0, 0]],
    "weights": [[0, 1, 1, 2, 0], [0, 0, 1, 0, 0]],
  }
  assert {k: v.tolist() for k, v in got.items()} == want
  assert got["weights"].dtype == np.float32 and got["inputs"].dtype == np.int32
  unweighted = packing.pack(examples, 5, pad_id=0)["weights"]
  np.testing.assert_array_equal(unweighted, got["segment_ids"] > 0)


def test_segments():
  starts = np.array([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0]], bool)
  segment_ids, positions = packing.segments(starts)
  assert segment_ids.tolist() == [[1, 1, 1, 2, 3], [1, 1, 2, 2, 2]]
  assert positions.tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]
