"""The sampling loop: one compiled program for prompts and continuation, or compiled blocks.

`begin` reads the prompts and draws a first block of items, `advance` draws the next block; both
fill it in a loop that ends early when every row has finished. `generate` is one large `begin`,
`stream` is a `begin` and many `advance`, and since they share the loop they agree item by item.
Long prompts are read by `begin_in_slices`, in memory and programs that do not grow with them.
Everything that a block hands to the next one is in a `Carry`, which can be saved and continued.

Randomness belongs to rows: the key of draw `i` of a row is `fold_in(row key, i)`, so a sample
depends neither on the batch it is drawn in nor on where blocks end.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from latentlab.models import LanguageModel, decode_step, prefill, unstack
from latentlab.sample.protocol import Cache, Features, Item, RowState, Sampler, Stepper
from latentlab.typing import Array, Bool, Float, Int, Key, Params


@struct.dataclass
class Generated:
  """A block of items.

  Attributes:
    tokens: The items, `[B, n, ...]`. A stop token is the last item of its row; padding follows.
    lengths: Items per row, its stop token included.
    finished: Rows that have met a stop token, in this block or before.
    log_probs: Log-probability of each item under the model; 0 on padding.
  """

  tokens: Item
  lengths: Int[Array, " B"]
  finished: Bool[Array, " B"]
  log_probs: Float[Array, "B n"]


@struct.dataclass
class Carry:
  """What the loop needs to go on; a pytree of arrays, to be saved like any other.

  Attributes:
    features: What the next item is drawn from.
    cache: The model's memory, which holds every item drawn so far.
    row_state: The sampler's.
    keys: Key of each row.
    num_drawn: Items drawn so far.
    budget: Items that may be drawn, and have room in the cache.
    finished: Rows that have met a stop token.
  """

  features: Features
  cache: Cache
  row_state: RowState
  keys: Key[Array, " B"]
  num_drawn: Int[Array, ""]
  budget: Int[Array, ""]
  finished: Bool[Array, " B"]


class TokenStepper(struct.PyTreeNode):
  """A language model as the loop sees it: items are tokens, features are logits.

  Attributes:
    model: The model.
    params: Its parameters.
    stop_tokens: Tokens that finish a row.
    pad: The token that finished rows emit.
  """

  model: LanguageModel = struct.field(pytree_node=False)
  params: Params
  stop_tokens: Any
  pad: Any = 0

  def unstacked(self) -> "TokenStepper":
    """The same, with parameters and caches of each layer on their own (`models.unstack`)."""
    config, params = unstack(self.model.config, self.params)
    return self.replace(model=LanguageModel(config), params=params)

  def prefill(
    self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"], capacity: int
  ) -> tuple[Float[Array, "B vocab"], Cache]:
    return prefill(self.model, self.params, prompts, lengths, capacity)

  def extend(
    self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
  ) -> tuple[Float[Array, "B vocab"], Cache]:
    return prefill(self.model, self.params, prompts, lengths, cache=cache)

  def step(self, item: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B vocab"], Cache]:
    return decode_step(self.model, self.params, item, cache)

  def ends(self, item: Int[Array, " B"]) -> Bool[Array, " B"]:
    return jnp.isin(item, self.stop_tokens)


def row_keys(
  seed: int | Key[Array, ""], row_ids: Int[Array, " B"] | np.ndarray
) -> Key[Array, " B"]:
  """Keys of rows by their ids: the same id gives the same sample in whatever batch it is drawn.

  An int makes a threefry key whatever jax's default is, because the noise that `rbg` draws under
  `vmap` depends on the batch.
  """
  key = jax.random.key(seed, impl="threefry2x32") if isinstance(seed, int) else seed
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(row_ids))


@functools.partial(jax.jit, static_argnames=("capacity", "num_items"))
def begin(
  stepper: Stepper,
  sampler: Sampler,
  prompts: Item,
  lengths: Int[Array, " B"],
  keys: Key[Array, " B"],
  budget: int | Int[Array, ""],
  *,
  capacity: int,
  num_items: int,
) -> tuple[Generated, Carry]:
  """Reads prompts and draws up to `num_items` items behind them.

  Args:
    stepper: The model.
    sampler: The sampler.
    prompts: Prompts, padded on the right.
    lengths: Items of each prompt, at least 1.
    keys: Row keys.
    budget: Items that may be drawn in this block and all later ones.
    capacity: Room of the cache: the prompts' width and the budget together.
    num_items: Size of the block.

  Returns:
    The block, and what `advance` continues from.
  """
  features, cache = stepper.prefill(prompts, lengths, capacity)
  carry = _carry(sampler, features, cache, prompts, lengths, keys, budget)
  return _fill(stepper, sampler, carry, num_items)


def begin_in_slices(
  stepper: Stepper,
  sampler: Sampler,
  prompts: Item,
  lengths: Int[Array, " B"],
  keys: Key[Array, " B"],
  budget: int | Int[Array, ""],
  *,
  capacity: int,
  size: int,
  on_read: Callable[[int], None] | None = None,
) -> Carry:
  """Reads prompts in slices of `size` items, and draws nothing yet.

  Two programs serve all prompts of one batch and capacity: one for the first slice, and one for
  all others, which extends the cache in place.

  Args:
    stepper: The model.
    sampler: The sampler.
    prompts: Prompts, padded on the right to a multiple of `size`.
    lengths: Items of each prompt, at least 1.
    keys: Row keys.
    budget: Items that may be drawn.
    capacity: Room of the cache, for every prompt and the budget behind it.
    size: Items of a slice.
    on_read: Called with the slice's size behind each.

  Returns:
    What `advance` continues from.
  """
  width = jax.tree.leaves(prompts)[0].shape[1]
  if width % size:
    raise ValueError(f"prompts of {width} items are no multiple of slices of {size=}; pad them")
  features = cache = None
  for start in range(0, width, size):
    part = jax.tree.map(lambda x, start=start: x[:, start : start + size], prompts)
    valid = jnp.clip(lengths - start, 0, size)
    if cache is None:
      features, cache = _read_first(stepper, part, valid, capacity=capacity)
    else:
      features, cache = _read_more(stepper, part, valid, features, cache)
    if on_read is not None:
      jax.block_until_ready(features)
      on_read(size)
  return _carry(sampler, features, cache, prompts, lengths, keys, budget)


@functools.partial(jax.jit, static_argnames=("capacity",))
def _read_first(stepper, prompts, lengths, *, capacity):
  return stepper.prefill(prompts, lengths, capacity)


@functools.partial(jax.jit, donate_argnames=("features", "cache"))
def _read_more(stepper, prompts, lengths, features, cache):
  new, cache = stepper.extend(prompts, lengths, cache)
  # A row whose prompt has ended keeps what it ended with.
  return _select(lengths > 0, new, features), cache


def _carry(sampler, features, cache, prompts, lengths, keys, budget) -> Carry:
  return Carry(
    features=features,
    cache=cache,
    row_state=sampler.init(prompts, lengths),
    keys=keys,
    num_drawn=jnp.int32(0),
    budget=jnp.asarray(budget, jnp.int32),
    finished=jnp.zeros(keys.shape, bool),
  )


@functools.partial(jax.jit, static_argnames=("num_items",), donate_argnames=("carry",))
def advance(
  stepper: Stepper, sampler: Sampler, carry: Carry, *, num_items: int
) -> tuple[Generated, Carry]:
  """Draws up to `num_items` more items; fewer where the budget or every row is at its end.

  The carry is donated: copy what you want to keep of it (`jax.device_get`) before the call.
  """
  return _fill(stepper, sampler, carry, num_items)


def generate(
  model: LanguageModel,
  params: Params,
  prompts: Int[Array, "B T"] | np.ndarray,
  lengths: Int[Array, " B"] | np.ndarray | None = None,
  *,
  sampler: Sampler,
  key: Key[Array, ""] | Key[Array, " B"],
  max_new_tokens: int,
  stop_tokens: tuple[int, ...] = (),
  pad_id: int = 0,
) -> Generated:
  """Continues a batch of prompts in one compiled program.

  It compiles once for each shape of the prompts and each `max_new_tokens`; prompts of one fixed
  width, with their `lengths`, therefore compile once.

  Args:
    model: The model.
    params: Its parameters.
    prompts: Prompts, padded on the right.
    lengths: Tokens of each prompt, at least 1; all of them if `None`.
    sampler: The sampler, such as `token_sampler(top_p=0.9)`.
    key: A typed key, which row `i` folds `i` into, or a key per row (see `row_keys`).
    max_new_tokens: Tokens to draw at most.
    stop_tokens: Tokens that finish a row.
    pad_id: What finished rows emit.

  Returns:
    Tokens, lengths, finished rows and log-probabilities.

  Raises:
    ValueError: a prompt is empty, or prompt and continuation exceed the model's context.
  """
  stepper, arrays, capacity = _prepare(
    model, params, prompts, lengths, key, max_new_tokens, stop_tokens, pad_id
  )
  sizes = dict(capacity=capacity, num_items=max_new_tokens)
  generated, _ = begin(stepper.unstacked(), sampler, *arrays, max_new_tokens, **sizes)
  return generated


def stream(
  model: LanguageModel,
  params: Params,
  prompts: Int[Array, "B T"] | np.ndarray,
  lengths: Int[Array, " B"] | np.ndarray | None = None,
  *,
  sampler: Sampler,
  key: Key[Array, ""] | Key[Array, " B"],
  max_new_tokens: int,
  block_size: int = 16,
  prefill_size: int | None = None,
  on_read: Callable[[int], None] | None = None,
  stop_tokens: tuple[int, ...] = (),
  pad_id: int = 0,
) -> Iterator[Generated]:
  """`generate` in blocks of `block_size` tokens, equal to it token by token.

  Two programs are compiled, for the first block and for all others. The last block may be shorter.
  Arguments are as in `generate` and are checked at once, not at the first block.

  Args:
    model: The model.
    params: Its parameters.
    prompts: Prompts.
    lengths: Their lengths.
    sampler: The sampler.
    key: A key, or one per row.
    max_new_tokens: Tokens to draw at most.
    block_size: Tokens of a block.
    prefill_size: Reads prompts that are longer in slices of this many tokens, so that memory beside
      the cache does not grow with them.
    on_read: Called behind each such slice with its size.
    stop_tokens: Tokens that finish a row.
    pad_id: What finished rows emit.
  """
  for name, size in (("block_size", block_size), ("prefill_size", prefill_size)):
    if size is not None and size < 1:
      raise ValueError(f"{name}={size} must be at least 1")
  stepper, arrays, capacity = _prepare(
    model, params, prompts, lengths, key, max_new_tokens, stop_tokens, pad_id
  )
  options = dict(block_size=block_size, prefill_size=prefill_size, on_read=on_read)

  def lazy() -> Iterator[Generated]:  # The copy of parameters waits for the first block, too.
    yield from blocks(stepper.unstacked(), sampler, arrays, max_new_tokens, capacity, **options)

  return lazy()


def blocks(
  stepper: Stepper,
  sampler: Sampler,
  arrays: tuple[Item, Int[Array, " B"], Key[Array, " B"]],
  max_new_tokens: int,
  capacity: int,
  *,
  block_size: int,
  prefill_size: int | None = None,
  on_read: Callable[[int], None] | None = None,
) -> Iterator[Generated]:
  """Blocks of `block_size` items, of any model and sampler; `stream` is of tokens.

  Args:
    stepper: The model.
    sampler: The sampler.
    arrays: Prompts, padded on the right; their lengths; keys of rows.
    max_new_tokens: Items to draw at most.
    capacity: Room of the cache.
    block_size: Items of a block.
    prefill_size: As in `stream`.
    on_read: As in `stream`.
  """
  prompts, *rest = arrays
  if prefill_size is None or prompts.shape[1] <= prefill_size:
    sizes = dict(capacity=capacity, num_items=block_size)
    block, carry = begin(stepper, sampler, *arrays, max_new_tokens, **sizes)
  else:
    padding = -prompts.shape[1] % prefill_size
    prompts = jnp.pad(prompts, ((0, 0), (0, padding)), constant_values=stepper.pad)
    # Of rooms of many sizes each would be a program.
    sizes = dict(size=prefill_size, capacity=-(-capacity // prefill_size) * prefill_size)
    carry = begin_in_slices(
      stepper, sampler, prompts, *rest, max_new_tokens, **sizes, on_read=on_read
    )
    block, carry = advance(stepper, sampler, carry, num_items=block_size)
  while max_new_tokens > block_size:
    yield block
    if bool(block.finished.all()):
      return
    max_new_tokens -= block_size
    block, carry = advance(stepper, sampler, carry, num_items=block_size)
  cut = (slice(None), slice(max_new_tokens))
  yield block.replace(
    tokens=jax.tree.map(lambda x: x[cut], block.tokens), log_probs=block.log_probs[cut]
  )


def _fill(
  stepper: Stepper, sampler: Sampler, carry: Carry, num_items: int
) -> tuple[Generated, Carry]:
  """Draws a block, item by item, and lets the model read each.

  The model reads the very last item in vain; in return a cache always holds what was emitted, and
  the sampler is compiled once. A while loop and no scan, because it has three ends: of the block,
  of the budget, and of every row.
  """

  def draw(carry: Carry):
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(carry.keys, carry.num_drawn)
    return sampler(carry.features, carry.row_state, keys)

  def unfinished(loop):
    i, carry, _ = loop
    return (i < num_items) & (carry.num_drawn < carry.budget) & ~carry.finished.all()

  def body(loop):
    i, carry, block = loop
    drawn, row_state = draw(carry)
    live = ~carry.finished
    item = _select(live, drawn.item, stepper.pad)
    block = block.replace(
      tokens=jax.tree.map(lambda old, new: old.at[:, i].set(new), block.tokens, item),
      lengths=block.lengths + live,
      log_probs=block.log_probs.at[:, i].set(jnp.where(live, drawn.log_prob, 0.0)),
    )
    features, cache = stepper.step(item, carry.cache)
    carry = carry.replace(
      features=features,
      cache=cache,
      row_state=row_state,
      num_drawn=carry.num_drawn + 1,
      finished=carry.finished | (live & stepper.ends(item)),
    )
    return i + 1, carry, block

  item = jax.eval_shape(draw, carry)[0].item
  empty = lambda x, pad: jnp.full((x.shape[0], num_items, *x.shape[1:]), pad, x.dtype)
  (batch_size,) = carry.finished.shape
  block = Generated(
    tokens=jax.tree.map(empty, item, jax.tree.broadcast(stepper.pad, item)),
    lengths=jnp.zeros(batch_size, jnp.int32),
    finished=carry.finished,
    log_probs=jnp.zeros((batch_size, num_items), jnp.float32),
  )
  _, carry, block = jax.lax.while_loop(unfinished, body, (jnp.int32(0), carry, block))
  return block.replace(finished=carry.finished), carry


def _select(live: Bool[Array, " B"], item: Item, pad: Item) -> Item:
  def select(x, pad):
    rows = live.reshape(live.shape + (1,) * (x.ndim - 1))
    return jnp.where(rows, x, jnp.asarray(pad, x.dtype))

  return jax.tree.map(select, item, jax.tree.broadcast(pad, item))


def _prepare(
  model: LanguageModel,
  params: Params,
  prompts,
  lengths,
  key,
  max_new_tokens: int,
  stop_tokens: tuple[int, ...],
  pad_id: int,
) -> tuple[TokenStepper, tuple[Array, Array, Array], int]:
  """Checks what a user can get wrong, before anything is compiled."""
  prompts = np.asarray(prompts, np.int32)
  batch_size, width = prompts.shape
  lengths = np.full(batch_size, width) if lengths is None else np.asarray(lengths)
  lengths = lengths.astype(np.int32)
  if max_new_tokens < 1:
    raise ValueError(f"{max_new_tokens=} must be at least 1")
  if lengths.shape != (batch_size,):
    raise ValueError(f"{lengths.shape=} must be one length per row of {prompts.shape=}")
  if not batch_size or lengths.min() < 1:
    raise ValueError(
      f"rows {np.flatnonzero(lengths < 1).tolist()} of {prompts.shape=} have no "
      "token to continue; begin every prompt with the tokenizer's bos_id"
    )
  if lengths.max() > width:
    raise ValueError(f"lengths.max()={lengths.max()} exceeds the width of {prompts.shape=}")
  vocab_size, limit = model.config.vocab_size, model.config.context_limit
  valid = prompts[np.arange(width) < lengths[:, None]]
  if valid.min() < 0 or valid.max() >= vocab_size:
    raise ValueError(
      f"prompts hold tokens from {valid.min()} to {valid.max()}, beyond the model's "
      f"{vocab_size=}; use the tokenizer that it was trained with"
    )
  if limit is not None and lengths.max() + max_new_tokens > limit:
    raise ValueError(
      f"a prompt of {lengths.max()} tokens and {max_new_tokens=} exceed the model's context of "
      f"{limit} ({model.config.positions} positions); shorten the prompt, or ask for at most "
      f"{max(limit - int(lengths.max()), 0)} new tokens"
    )
  if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
    raise ValueError(f"{key=} must be a typed key; make it by jax.random.key(seed)")
  keys = row_keys(key, np.arange(batch_size)) if key.ndim == 0 else key
  if keys.shape != (batch_size,):
    raise ValueError(f"{key.shape=} must be () or one key per row of {prompts.shape=}")
  stepper = TokenStepper(model, params, np.asarray(stop_tokens, np.int32), np.int32(pad_id))
  return stepper, (jnp.asarray(prompts), jnp.asarray(lengths), keys), width + max_new_tokens
