"""Which targets could be recalled: those that complete an n-gram of their context.

Table 5 of YOCO (https://arxiv.org/abs/2405.05254) splits a language model's loss so, with n = 2, as
does table 6 of the Differential Transformer (https://arxiv.org/abs/2410.05258); both call the parts
AR-hit, and first occurrence or others. Every n-gram that comes again counts, however common it is.
"""

import numpy as np

from latentlab.typing import Bool, Int


def completes_ngram(
  inputs: Int[np.ndarray, "B T"],
  targets: Int[np.ndarray, "B T"],
  segment_ids: Int[np.ndarray, "B T"],
  order: int,
) -> Bool[np.ndarray, "B T"]:
  """Where a target ends an n-gram that stands in the same document's context already.

  Args:
    inputs: Tokens.
    targets: The tokens behind them.
    segment_ids: Documents; an n-gram lies in one document of one row.
    order: n, at least 2.
  """
  batch, length = inputs.shape
  rows = np.broadcast_to(np.arange(batch)[:, None], inputs.shape)
  # Numbers of the distinct n-grams so far, which grow by a token at a time: exact for any n.
  gram = np.zeros(inputs.shape, np.int64)
  whole = np.ones(inputs.shape, bool)
  for part in (rows, segment_ids, *(_back(inputs, n) for n in range(order - 1)), targets):
    gram = np.unique(gram * (part.max(initial=0) + 1) + part, return_inverse=True)[1]
    gram = gram.reshape(inputs.shape).astype(np.int64)
  for n in range(1, order - 1):
    whole &= (_back(segment_ids, n) == segment_ids) & (np.arange(length) >= n)
  places = np.flatnonzero(whole)  # In the order of reading.
  _, first = np.unique(gram.ravel()[places], return_index=True)
  again = np.zeros(inputs.size, bool)
  again[np.delete(places, first)] = True
  return again.reshape(inputs.shape)


def _back(x: Int[np.ndarray, "B T"], n: int) -> Int[np.ndarray, "B T"]:
  """What stood `n` places before."""
  return np.roll(x, n, axis=1)
