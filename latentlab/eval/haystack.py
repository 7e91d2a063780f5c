"""Needles of words in real text, and the depths at which needles lie.

The protocol is that of YOCO (https://arxiv.org/abs/2405.05254, table 4 and the release): a
needle binds a random integer to a city, and the question ends just before the integer.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from latentlab.data import Tokenizer

LARGEST_NUMBER = 50_000

CITIES = tuple(
  "Accra Amsterdam Athens Auckland Baghdad Bangkok Beirut Berlin Bogota Boston Brussels Budapest "
  "Cairo Chicago Dakar Delhi Dublin Geneva Hanoi Havana Helsinki Istanbul Jakarta Karachi Kinshasa "
  "Lagos Lima Lisbon London Madrid Manila Melbourne Montreal Moscow Nairobi Osaka Oslo Paris "
  "Prague Quito Rome Santiago Seoul Shanghai Stockholm Sydney Tehran Tokyo Vienna Warsaw".split()
)


def check_depths(depths: Sequence[float]) -> dict[str, float]:
  """Depths by the names of their metrics, `depth_<percent>`.

  Raises:
    ValueError: there is none, one is no part of the hay, or two have one name.
  """
  names = [f"depth_{round(100 * depth)}" for depth in depths]
  if not names or min(depths) < 0 or max(depths) > 1 or len(set(names)) < len(names):
    raise ValueError(
      f"depths={tuple(depths)} must be parts of the hay, in [0, 1], at least one of them, and "
      "differ by a hundredth or more."
    )
  return dict(zip(names, map(float, depths), strict=True))


@dataclasses.dataclass(frozen=True)
class TextHaystack:
  """Prompts of text with needles in it, each of which ends where a number should follow.

  Attributes:
    tokens: The text that hay is cut from; it starts again where it ends.
    tokenizer: Its tokenizer.
    num_needles: Needles in the hay, each on a line of its own.
    num_queries: How many of them are asked for, each in a prompt of its own.
    length: Tokens of a prompt, at most.
  """

  tokens: np.ndarray
  tokenizer: Tokenizer
  num_needles: int
  num_queries: int
  length: int

  def __post_init__(self):
    if not 1 <= self.num_queries <= self.num_needles <= len(CITIES):
      raise ValueError(
        f"num_needles={self.num_needles} and num_queries={self.num_queries} must be at least 1, "
        f"with no more queries than needles, and no more needles than {len(CITIES)} cities."
      )
    longest = max(CITIES, key=lambda city: len(self._question(city)))
    needle = self._needle(longest, LARGEST_NUMBER)
    if (room := self.num_needles * len(needle) + len(self._question(longest)) + 1) > self.length:
      raise ValueError(
        f"needles and a question of {room} tokens do not fit into the {self.length} that "
        "seq_length leaves for a prompt; lengthen it, or use fewer needles."
      )
    if not len(self._hay):
      raise ValueError("the split has no text to make hay of; use another.")

  def prompts(self, rng: np.random.Generator, depth: float) -> tuple[list[np.ndarray], list[str]]:
    """Prompts that differ in their question alone, and the numbers that answer them.

    Args:
      rng: Draws the same needles, whatever `depth` is.
      depth: Part of the hay before the needle that is asked for first; the others lie anywhere.
    """
    cities = [CITIES[i] for i in rng.choice(len(CITIES), self.num_needles, replace=False)]
    numbers = rng.integers(1, LARGEST_NUMBER + 1, self.num_needles).tolist()
    needles = [self._needle(city, n) for city, n in zip(cities, numbers, strict=True)]
    asked = rng.permutation(self.num_needles)[: self.num_queries].tolist()
    questions = [self._question(cities[i]) for i in asked]
    size = self.length - 1 - sum(map(len, needles)) - max(map(len, questions))
    hay = np.take(self._hay, rng.integers(len(self._hay)) + np.arange(size), mode="wrap")
    before = rng.integers(0, size + 1, self.num_needles)
    before[asked[0]] = round(depth * size)
    gaps = self._gaps(hay)
    before = gaps[np.searchsorted(gaps, before, side="right") - 1]
    context = [np.array([self.tokenizer.bos_id])]
    done = 0
    for i in np.argsort(before, kind="stable").tolist():
      context += [hay[done : before[i]], needles[i]]
      done = before[i]
    context = np.concatenate([*context, hay[done:]])
    prompts = [np.concatenate([context, question]) for question in questions]
    return prompts, [str(numbers[i]) for i in asked]

  @functools.cached_property
  def _hay(self) -> np.ndarray:
    return self.tokens[self.tokens != self.tokenizer.bos_id].astype(np.int32)

  @functools.cached_property
  def _spaced(self) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that begin, and that end with a space or a new line."""
    table = self.tokenizer.token_bytes
    begins, ends = ([b[end].isspace() for b in table] for end in (slice(1), slice(-1, None)))
    return np.array(begins), np.array(ends)

  def _gaps(self, hay: np.ndarray) -> np.ndarray:
    """Places between two words, the hay's begin and its end among them."""
    begins, ends = self._spaced
    between = begins[hay[1:]] | ends[hay[:-1]]
    return np.concatenate([[0], 1 + np.flatnonzero(between), [len(hay)]])

  def _needle(self, city: str, number: int) -> np.ndarray:
    return self.tokenizer.encode(f"\nThe secret number of {city} is {number}.\n")

  def _question(self, city: str) -> np.ndarray:
    return self.tokenizer.encode(
      f"\nWhat is the secret number of {city}? The secret number of {city} is"
    )
