"""The cache of masks with an end: what it holds after every token, and that it stays small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.layers import AttentionConfig, Context, RingCache, Shared, initializers
from latentlab.layers.cache import EMPTY
from latentlab.ops import Mask

BLOCKS, WINDOW = Mask("blockwise_causal", 3), Mask("sliding_window", 5)
both = pytest.mark.parametrize("mask", [BLOCKS, WINDOW], ids=lambda m: m.kind)


def _cache(mask, batch=2, max_length=100):
  return RingCache.empty(batch, max_length, 1, 2, 4, jnp.float32, mask=mask)


def _tokens(start, stop):
  """Keys and values that tell their position."""
  positions = np.broadcast_to(np.arange(start, stop), (2, stop - start))
  k = np.broadcast_to(positions[..., None, None], (*positions.shape, 1, 2))
  return jnp.asarray(k, jnp.float32), jnp.asarray(k.repeat(2, -1), jnp.float32), positions


def _held(cache, row=0):
  positions = np.asarray(cache.positions[row])
  slots = positions != EMPTY
  np.testing.assert_array_equal(cache.k[row, slots, 0, 0], positions[slots])
  np.testing.assert_array_equal(cache.v[row, slots, 0, 3], positions[slots])
  return sorted(positions[slots].tolist())


def _wanted(mask, length):
  """By the rule in words: when the cache is full, its oldest block (or token) goes first."""
  held, drop = [], mask.size if mask.kind == "blockwise_causal" else 1
  for t in range(length):
    held = held[drop if len(held) == mask.reach else 0 :] + [t]
  return held


@both
def test_lex_05_the_cache_drops_before_it_would_overflow(mask):
  cache = _cache(mask)
  append = jax.jit(RingCache.append)
  assert cache.positions.shape[1] == mask.reach
  for t in range(3 * mask.reach + 2):
    k, v, positions = _tokens(t, t + 1)
    cache = append(cache, k, v, jnp.asarray(positions))
    assert _held(cache) == _wanted(mask, t + 1)
    assert cache.valid.sum(1).max() <= mask.reach
  assert not cache.overflowed.any()


@pytest.mark.slow
@both
@pytest.mark.parametrize("pieces", [(17,), (1, 16), (6, 5, 4, 2), (2, 14, 1)], ids=str)
def test_lex_05_pieces_of_any_size_leave_the_same(mask, pieces):
  cache, start = _cache(mask), 0
  for size in pieces:
    k, v, positions = _tokens(start, start + size)
    cache, start = cache.append(k, v, jnp.asarray(positions)), start + size
  assert _held(cache) == _wanted(mask, 17)
  k, v, positions = cache.unrolled()
  assert positions.shape == (2, mask.reach)
  missing = mask.reach - len(_wanted(mask, 17))
  order = np.asarray(positions)
  np.testing.assert_array_equal(order[0, order[0] != EMPTY], _wanted(mask, 17))
  assert (order[:, :missing] == EMPTY).all()


@both
def test_lex_05_rows_of_different_lengths(mask):
  cache = _cache(mask)
  k, v, positions = _tokens(0, 9)
  cache = cache.append(k, v, jnp.asarray(positions), jnp.array([9, 2]))
  assert (_held(cache, 0), _held(cache, 1)) == (_wanted(mask, 9), [0, 1])
  k, v, _ = _tokens(0, 4)
  positions = jnp.array([[9, 10, 11, 12], [2, 3, 4, 5]])
  k = jnp.broadcast_to(positions[..., None, None], k.shape).astype(jnp.float32)
  cache = cache.append(k, k.repeat(2, -1), positions, jnp.array([0, 4]))
  assert (_held(cache, 0), _held(cache, 1)) == (_wanted(mask, 9), _wanted(mask, 6))
  np.testing.assert_array_equal(cache.lengths, [9, 6])
  forked = cache.fork(jnp.array([1, 1, 0]))
  assert [_held(forked, r) for r in range(3)] == [_wanted(mask, n) for n in (6, 6, 9)]
  assert forked.mask == mask
  assert _held(cache.reorder(jnp.array([1, 0])), 0) == _wanted(mask, 6)


@both
def test_a_short_ring_grows_up_to_the_reach_and_says_when_it_is_full(mask):
  cache = _cache(mask, max_length=4)
  k, v, positions = _tokens(0, 4)
  cache = cache.append(k, v, jnp.asarray(positions))
  assert not cache.overflowed.any()
  grown = cache.grow(1000)
  assert grown.positions.shape[1] == mask.reach and grown.grow(7) is grown
  k, v, positions = _tokens(4, 12)
  assert cache.append(k, v, jnp.asarray(positions)).overflowed.all()
  grown = grown.append(k, v, jnp.asarray(positions))
  assert _held(grown) == _wanted(mask, 12) and not grown.overflowed.any()
  with pytest.raises(ValueError, match="max_length=2"):
    cache.grow(2)
  with pytest.raises(ValueError, match="KVCache"):
    _cache(Mask("causal"))


@pytest.mark.parametrize("field", ["allowed", "key_bias"])
def test_slots_that_are_used_again_have_no_names(field):
  shared = Shared(8, jnp.float32, initializers.make("normal", num_layers=1, embed_dim=8))
  config = AttentionConfig(2, 4, mask=BLOCKS)
  context = Context(
    jnp.zeros((2, 1), jnp.int32),
    **{field: jnp.ones((2, 1, 6), bool) if field == "allowed" else jnp.zeros((2, 6))},
  )
  cache = config.init_cache(2, 6, jnp.float32)
  assert isinstance(cache, RingCache)
  with pytest.raises(ValueError, match=f"{field} names no key"):
    config.module(shared, name="mixer").init(
      jax.random.key(0), jnp.zeros((2, 1, 8)), context, cache
    )
