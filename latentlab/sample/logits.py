"""Filters of logits, and the sampler that draws a token behind them.

A filter maps logits to logits and may remember something per row (`init`, `apply`, `update`).
Filters run in the order in which they are given, and the order matters: top-p after a temperature
is not a temperature after top-p. Filters that say what may come (`LogitBias`, `TokenAutomaton`)
stand before those that keep the best of it (`TopK`, `TopP`, `MinP`); otherwise the best could all
be forbidden, and nothing would be left. `token_sampler` builds the usual chain.
"""

import abc
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from latentlab.sample.protocol import Draw
from latentlab.typing import Array, Float, Int, Key


class Filter(struct.PyTreeNode, abc.ABC):
  """Maps logits to logits; this base remembers nothing.

  Attributes:
    forbids: Whether it can set the logit of any token, the best too, to `-inf`.
    truncates: Whether it keeps the best tokens only (the best one always).
  """

  forbids: ClassVar[bool] = False
  truncates: ClassVar[bool] = False

  def init(self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Any:
    """What rows remember after their prompts; every leaf has a leading axis of `B`."""
    del prompts, lengths
    return ()

  @abc.abstractmethod
  def apply(self, logits: Float[Array, "B vocab"], row_state: Any) -> Float[Array, "B vocab"]:
    """The filtered logits; `-inf` forbids a token."""

  def update(self, row_state: Any, tokens: Int[Array, " B"]) -> Any:
    """What rows remember after `tokens`."""
    del tokens
    return row_state


class Temperature(Filter):
  """Divides logits by `value`: below 1 sharpens, above 1 flattens."""

  value: Any = 1.0

  def __post_init__(self):
    _check(self, "value", lambda x: x > 0, "must be positive; for 0 use greedy sampling")

  def apply(self, logits, row_state):
    return logits / self.value


class TopK(Filter):
  """Keeps the `k` best tokens, and those tied with the last of them."""

  truncates: ClassVar[bool] = True
  k: int = struct.field(pytree_node=False, default=50)

  def __post_init__(self):
    _check(self, "k", lambda x: x >= 1 and x == int(x), "must be a whole number of at least 1")

  def apply(self, logits, row_state):
    k = min(self.k, logits.shape[-1])
    return _keep(logits, logits >= jax.lax.top_k(logits, k)[0][:, -1:])


class TopP(Filter):
  """Keeps the fewest best tokens whose mass reaches `p`, and those tied with the last of them.

  Nucleus sampling, https://arxiv.org/abs/1904.09751, section 3.1.
  """

  truncates: ClassVar[bool] = True
  p: Any = 0.95

  def __post_init__(self):
    _check(self, "p", lambda x: 0 < x <= 1, "must be in (0, 1]; 1 keeps every token")

  def apply(self, logits, row_state):
    best_first = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(best_first, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # Rounded sums reach 1 before the tail does, so p = 1 is no comparison.
    kept = (before < self.p) | (jnp.asarray(self.p) >= 1)
    last = jnp.min(best_first, axis=-1, keepdims=True, where=kept, initial=jnp.inf)
    return _keep(logits, logits >= last)


class MinP(Filter):
  """Keeps tokens at least `p` times as probable as the best one.

  https://arxiv.org/abs/2407.01082, section 3.
  """

  truncates: ClassVar[bool] = True
  p: Any = 0.05

  def __post_init__(self):
    _check(self, "p", lambda x: 0 <= x <= 1, "must be in [0, 1]; 0 keeps every token")

  def apply(self, logits, row_state):
    return _keep(logits, logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.p))


class LogitBias(Filter):
  """Adds `bias`, one value per token (`[vocab]`, or `[B, vocab]` per row); `-inf` forbids."""

  forbids: ClassVar[bool] = True
  bias: Any

  @classmethod
  def ban(cls, tokens: Iterable[int], vocab_size: int) -> "LogitBias":
    """Forbids `tokens`.

    Raises:
      ValueError: a token is not in the vocabulary, or nothing is left.
    """
    banned = np.unique(np.asarray(list(tokens), np.int64))
    if banned.size and not 0 <= banned.min() <= banned.max() < vocab_size:
      raise ValueError(f"tokens={banned.tolist()} are not all in a vocabulary of {vocab_size=}")
    if banned.size == vocab_size:
      raise ValueError(f"all of {vocab_size=} tokens are banned; leave one")
    bias = np.zeros(vocab_size, np.float32)
    bias[banned] = -np.inf
    return cls(bias)

  def apply(self, logits, row_state):
    return logits + self.bias


class RepetitionPenalty(Filter):
  """Makes what is among a row's last tokens less probable, its prompt's included.

  A positive logit is divided by `penalty`, a negative one multiplied: CTRL,
  https://arxiv.org/abs/1909.05858, section 4.1. The row's memory is a window of tokens and not a
  flag per token, so that it need not know the vocabulary.

  Attributes:
    penalty: 1 does nothing; the paper's is 1.2.
    window: How many tokens back it looks.
  """

  penalty: Any = 1.2
  window: int = struct.field(pytree_node=False, default=64)

  # Past every vocabulary, where mode="drop" loses it.
  _NONE: ClassVar[int] = np.iinfo(np.int32).max

  def __post_init__(self):
    _check(self, "penalty", lambda x: x > 0, "must be positive; 1 does nothing")
    _check(self, "window", lambda x: x >= 1, "must be at least 1 token")

  def init(self, prompts, lengths):
    index = lengths[:, None] - self.window + jnp.arange(self.window)
    recent = jnp.take_along_axis(prompts, jnp.maximum(index, 0), axis=1)
    return jnp.where(index >= 0, recent, self._NONE).astype(jnp.int32)

  def apply(self, logits, row_state):
    rows = jnp.arange(logits.shape[0])[:, None]
    seen = jnp.zeros(logits.shape, bool).at[rows, row_state].set(True, mode="drop")
    penalised = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
    return jnp.where(seen, penalised, logits)

  def update(self, row_state, tokens):
    return jnp.concatenate([row_state[:, 1:], tokens[:, None].astype(jnp.int32)], axis=1)


class TokenAutomaton(Filter):
  """Lets through what a finite automaton over tokens accepts next.

  An accepting state allows a stop token. The automaton starts behind the prompt.

  Attributes:
    transitions: Int `[S, vocab]`: the state after reading a token in a state, -1 where the token is
      forbidden. A leaf, so that a large table is an argument of the program and no constant in it.
    start: The state behind the prompt: an int, or one per row.
  """

  forbids: ClassVar[bool] = True
  transitions: Any
  start: Any = 0

  def __post_init__(self):
    # In numpy, and for concrete tables alone: transformations rebuild filters around other leaves.
    if not isinstance(self.transitions, np.ndarray):
      return
    t = self.transitions
    if t.ndim != 2 or not np.issubdtype(t.dtype, np.integer) or not t.size:
      raise ValueError(f"transitions must be ints of [states, vocab], got {t.shape=}, {t.dtype=}")
    if t.min() < -1 or t.max() >= len(t):
      raise ValueError(
        f"transitions lead from {t.min()} to {t.max()}; states are 0..{len(t) - 1}, and -1 forbids"
      )
    dead = np.flatnonzero((t < 0).all(axis=1))
    if dead.size:
      raise ValueError(
        f"states {dead[:8].tolist()} allow no token, and a row in one could not go "
        "on; let an accepting state read a stop token and stay"
      )

  def init(self, prompts, lengths):
    del lengths
    return jnp.broadcast_to(jnp.asarray(self.start, jnp.int32), prompts.shape[:1])

  def apply(self, logits, row_state):
    return _keep(logits, jnp.asarray(self.transitions)[row_state] >= 0)

  def update(self, row_state, tokens):
    return jnp.asarray(self.transitions)[row_state, tokens].astype(jnp.int32)


class TokenSampler(struct.PyTreeNode):
  """Draws a token from logits behind a chain of filters.

  Attributes:
    filters: The chain; the first one sees the model's logits.
    greedy: Take the best token instead of drawing one.
  """

  filters: tuple[Filter, ...] = ()
  greedy: bool = struct.field(pytree_node=False, default=False)

  def __post_init__(self):
    truncating = None
    for f in self.filters if isinstance(self.filters, tuple) else ():
      if getattr(f, "forbids", False) and truncating:
        raise ValueError(
          f"{type(f).__name__} stands behind {truncating} in filters and could "
          "forbid all that is left; put it in front"
        )
      truncating = type(f).__name__ if getattr(f, "truncates", False) else truncating

  def init(self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"]) -> tuple[Any, ...]:
    return tuple(f.init(prompts, lengths) for f in self.filters)

  def __call__(
    self, logits: Float[Array, "B vocab"], row_state: tuple[Any, ...], keys: Key[Array, " B"]
  ) -> tuple[Draw, tuple[Any, ...]]:
    logits = filtered = logits.astype(jnp.float32)
    for f, state in zip(self.filters, row_state, strict=True):
      filtered = f.apply(filtered, state)
    if self.greedy:
      tokens = jnp.argmax(filtered, axis=-1)
    else:
      # One call per row: noise drawn for the whole batch would tie a row to its place in it.
      tokens = jax.vmap(jax.random.categorical)(keys, filtered)
    tokens = tokens.astype(jnp.int32)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
    state = tuple(f.update(s, tokens) for f, s in zip(self.filters, row_state, strict=True))
    return Draw(tokens, log_prob), state


def token_sampler(
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  repetition_penalty: float | None = None,
  constraints: Iterable[Filter] = (),
  greedy: bool = False,
) -> TokenSampler:
  """The usual chain: constraints, repetition penalty, temperature, top-k, top-p, min-p.

  The order is that of transformers' `generate`, whose settings therefore carry over. `None` leaves
  a filter out. Greedy sampling takes constraints and the penalty, and ignores the rest.
  """
  filters = [*constraints]
  if repetition_penalty is not None:
    filters.append(RepetitionPenalty(repetition_penalty))
  if not greedy:
    filters.append(Temperature(temperature))
    settings = ((TopK, top_k), (TopP, top_p), (MinP, min_p))
    filters += [make(value) for make, value in settings if value is not None]
  return TokenSampler(tuple(filters), greedy)


def _keep(logits: Array, kept: Array) -> Array:
  return jnp.where(kept, logits, -jnp.inf)


def _check(setting: Filter, name: str, valid, remedy: str) -> None:
  """Checks a Python number; inside a transformation a setting is a tracer, or anything at all."""
  value = getattr(setting, name)
  if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
    return
  if not math.isfinite(value) or not valid(value):
    raise ValueError(f"{type(setting).__name__}.{name}={value} {remedy}")
