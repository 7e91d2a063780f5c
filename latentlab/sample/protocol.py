"""What the sampling loop asks of a model and of a sampler; tokens and latents are both items.

One step is `(features, row state, row key) -> (item, row state)`. Features are what a model hands
over after reading an item (logits, or a hidden vector for a diffusion head); an item is a pytree of
`[B, ...]` arrays: a token, a latent vector, or a latent with a flag. The loop never looks inside.
"""

from typing import Any, Protocol, runtime_checkable

from flax import struct

from latentlab.typing import Array, Bool, Float, Int, Key

Features = Any
Item = Any
RowState = Any
Cache = Any


@struct.dataclass
class Draw:
  """One item per row.

  Attributes:
    item: What was drawn.
    log_prob: Its log-probability or log-density under the model itself, before any filter.
  """

  item: Item
  log_prob: Float[Array, " B"]


@runtime_checkable
class Sampler(Protocol):
  """Draws the next item of each row. A row may look at nothing of another row.

  A sampler is a pytree (`flax.struct`) and an argument of the compiled loop: fields that shape the
  program are static, the others are leaves, so that a new temperature compiles nothing.
  """

  def init(self, prompts: Item, lengths: Int[Array, " B"]) -> RowState:
    """What rows remember after their prompts; every leaf has a leading axis of `B`."""

  def __call__(
    self, features: Features, row_state: RowState, keys: Key[Array, " B"]
  ) -> tuple[Draw, RowState]:
    """One draw per row from that row's features, state and key."""


@runtime_checkable
class Stepper(Protocol):
  """A model with its parameters, as the loop sees it. A pytree, for the same reason.

  Attributes:
    pad: What a finished row emits; broadcast over an item.
  """

  pad: Item

  def prefill(
    self, prompts: Item, lengths: Int[Array, " B"], capacity: int
  ) -> tuple[Features, Cache]:
    """Features behind each prompt, and a cache with room for `capacity` items."""

  def extend(
    self, prompts: Item, lengths: Int[Array, " B"], cache: Cache
  ) -> tuple[Features, Cache]:
    """Reads more of each prompt, nothing where a length is 0; features of such rows are void."""

  def step(self, item: Item, cache: Cache) -> tuple[Features, Cache]:
    """Reads one item per row."""

  def ends(self, item: Item) -> Bool[Array, " B"]:
    """Rows that this item finishes."""
