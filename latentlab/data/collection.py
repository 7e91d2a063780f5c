"""Collections of media: named items with labels and captions, whatever they are made of.

Every choice hangs on a hash of the item's name and nothing else, as with texts (`sources.py`):
adding a file moves no other file.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from latentlab.data import sources

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Record:
  """What a source says of an item.

  Attributes:
    name: Decides the split; items of one name are in one.
    label: The name of its class; `None` for none.
    caption: A text; empty for none.
  """

  name: str
  label: str | None = None
  caption: str = ""


@dataclasses.dataclass(frozen=True)
class Collection:
  """Items by number, and how to make training examples of them.

  Attributes:
    kind: "image" or "audio".
    records: In any order.
    class_names: What labels name; a label's number is its place.
    shape: Of an example: `(H, W, C)`, or `(S, 1)`, to which shorter sounds are padded.
    read: The medium of an item as it is stored, float32 in [-1, 1].
    transform: Makes an example of it: at random with a generator, else as evaluations see it.
    digest: sha256 over names, labels, captions and contents of all items.
    sample_rate: Of sounds; 0 if unknown.
  """

  kind: str
  records: Sequence[Record]
  class_names: Sequence[str]
  shape: tuple[int, ...]
  read: Callable[[int], np.ndarray]
  transform: Callable[[np.ndarray, np.random.Generator | None], np.ndarray]
  digest: str
  sample_rate: int = 0

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """The number of each item's class, int32; -1 for none."""
    numbers = {name: i for i, name in enumerate(self.class_names)}
    return np.array(
      [NO_LABEL if r.label is None else numbers[r.label] for r in self.records], np.int32
    )

  def example(self, item: int, rng: np.random.Generator | None) -> np.ndarray:
    """An example of an item, not yet padded."""
    return self.transform(self.read(item), rng)


def class_names(records: Sequence[Record], given: Sequence[str] = ()) -> tuple[str, ...]:
  """The classes of records, in the order given; sorted, numbers by their value, if none is given.

  Raises:
    ValueError: a label is none of those given, or some items have a label and some have none.
  """
  unlabelled = [r.name for r in records if r.label is None]
  if unlabelled and len(unlabelled) < len(records):
    raise ValueError(
      f"data.path: {unlabelled[0]!r} has no label, as {len(unlabelled)} of {len(records)} items, "
      "and the others have one; label all or none."
    )
  if unlabelled:
    return tuple(given)
  found = {r.label for r in records}
  if not given:
    numeric = all(re.fullmatch(r"\d+", label) for label in found)
    return tuple(sorted(found, key=(lambda label: (int(label), label)) if numeric else None))
  if len(set(given)) < len(given):
    raise ValueError(f"data.class_names={tuple(given)} has a name twice.")
  for record in records:
    if record.label not in given:
      raise ValueError(
        f"data.path: {record.name!r} has the label {record.label!r}, which is not among "
        f"data.class_names={tuple(given)}; add it there, or leave data.class_names empty."
      )
  return tuple(given)


def split(
  names: Sequence[str], validation_fraction: float, pattern: str = ""
) -> dict[str, np.ndarray]:
  """Numbers of the items of "train" and "validation", each in the order of their names' hashes.

  A prefix of a split is therefore a random sample of it.

  Args:
    names: Of all items.
    validation_fraction: Items whose name's hash falls below it are validation, and at least one
      item is on each side; 0 for no validation split.
    pattern: Items in whose name this regular expression is found are validation instead.

  Raises:
    ValueError: a side would be empty, or a field is bad.
  """
  ranks = np.array([sources.rank(name) for name in names])
  order = np.lexsort((np.array(names), ranks))
  if pattern:
    try:
      matches = re.compile(pattern).search
    except re.error as e:
      raise ValueError(f"data.split_pattern={pattern!r} is no regular expression ({e}).") from e
    held_out = np.array([matches(name) is not None for name in names])[order]
    if held_out.all() or not held_out.any():
      raise ValueError(
        f"data.split_pattern={pattern!r} is found in {'every' if held_out.all() else 'no'} name, "
        f"{names[0]!r} for one; validation takes the names in which it is found."
      )
  else:
    count = int((ranks < validation_fraction).sum())
    if validation_fraction:
      if len(names) < 2:
        raise ValueError(
          f"data.path: {names[0]!r} is the only item and cannot be split; add items, or set "
          "data.validation_fraction=0."
        )
      count = min(max(count, 1), len(names) - 1)
    held_out = np.arange(len(names)) < count
  splits = {"train": order[~held_out], "validation": order[held_out]}
  return {name: members for name, members in splits.items() if len(members)}


def digest(records: Iterable[Record], contents: Iterable[bytes]) -> str:
  """sha256 over all that a collection was made of, in the order of names."""
  lines = sorted(
    (r.name, r.label or "", r.caption, hashlib.sha256(content).hexdigest())
    for r, content in zip(records, contents, strict=True)
  )
  return hashlib.sha256(repr(lines).encode("utf-8", "surrogateescape")).hexdigest()
