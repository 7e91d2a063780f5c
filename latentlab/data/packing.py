"""Packing: several documents or examples in one row, told apart by segment ids.

Segment ids start at 1; 0 is padding. Positions restart with every segment.
"""

from collections.abc import Sequence

import numpy as np


def segments(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Segment ids and positions of rows `[b, T]` whose segments open where `starts` is true.

  A row's first segment opens with the row, marked or not: its beginning may lie in another row.
  """
  columns = np.arange(starts.shape[1])
  opened = np.where(starts, columns, 0)
  positions = columns - np.maximum.accumulate(opened, axis=1)
  return 1 + np.cumsum(opened > 0, axis=1), positions


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Fills bins: each length goes, in order, to the first bin that has room for it.

  Args:
    lengths: Sizes of the items.
    capacity: Size of a bin.

  Returns:
    Items by bin, by number.
  """
  if len(lengths) and not 0 < min(lengths) <= max(lengths) <= capacity:
    raise ValueError(
      f"every length must lie in [1, {capacity=}]; got {min(lengths)=}, "
      f"{max(lengths)=}: cut or drop those examples."
    )
  room = np.full(len(lengths), capacity)  # An untouched bin follows the open ones.
  bins: list[list[int]] = []
  for item, length in enumerate(lengths):
    place = int(np.argmax(room[: len(bins) + 1] >= length))
    if place == len(bins):
      bins.append([])
    bins[place].append(item)
    room[place] -= length
  return bins


def pack(
  examples: Sequence[np.ndarray],
  seq_length: int,
  pad_id: int,
  weights: Sequence[np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Packs whole examples, none of them cut, into rows of the batch format.

  Args:
    examples: Token ids, each with its `<bos>`; one of n tokens fills n - 1 places.
    seq_length: Places of a row.
    pad_id: Fills the rest.
    weights: How much each token counts as a target (0 for a prompt's); all 1 if `None`. The first
      token of an example is no target.

  Returns:
    inputs, targets, positions, segment_ids and weights of all rows, `[rows, seq_length]`.
  """
  bins = first_fit([len(e) - 1 for e in examples], seq_length)
  shape = (len(bins), seq_length)
  out = {
    name: np.full(shape, fill, np.int32)
    for name, fill in (
      ("inputs", pad_id),
      ("targets", pad_id),
      ("positions", 0),
      ("segment_ids", 0),
    )
  }
  out["weights"] = np.zeros(shape, np.float32)
  for row, members in enumerate(bins):
    begin = 0
    for segment, item in enumerate(members, 1):
      tokens = np.asarray(examples[item])
      place = np.s_[row, begin : begin + len(tokens) - 1]
      out["inputs"][place], out["targets"][place] = tokens[:-1], tokens[1:]
      out["positions"][place] = np.arange(len(tokens) - 1)
      out["segment_ids"][place] = segment
      out["weights"][place] = 1.0 if weights is None else weights[item][1:]
      begin += len(tokens) - 1
  return out
