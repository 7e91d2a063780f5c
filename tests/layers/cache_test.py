"""Caches: rows can be forked, reordered and grown, and nothing is lost in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.layers import DecoderCache, KVCache, RetentionState
from latentlab.layers.cache import EMPTY


def _kv(key, batch=3, slots=4):
  cache = KVCache.empty(batch, slots, 2, 4, 6, jnp.float32)
  k, v = (jax.random.normal(key, (batch, 2, 2, dim)) for dim in (4, 6))
  return cache.append(k, v, jnp.tile(jnp.arange(2), (batch, 1))), k, v


def _decoder_cache(key):
  kv, *_ = _kv(key)
  state = RetentionState(state=jax.random.normal(key, (3, 2, 4, 6)), z=None)
  stack = lambda c: jax.tree.map(lambda x: jnp.stack([x, x + 1]), c)
  return DecoderCache(
    lengths=jnp.array([2, 3, 5]), stages=((stack(kv), stack(state)),), stacked=(True,)
  )


def test_append_writes_behind_each_row(key):
  cache, k, v = _kv(key)
  more = cache.append(k[:, :1] + 1, v[:, :1] + 1, jnp.full((3, 1), 7), jnp.array([1, 0, 1]))
  np.testing.assert_array_equal(more.lengths, [3, 2, 3])
  np.testing.assert_array_equal(more.k[:, :2], k)
  np.testing.assert_array_equal(more.k[0, 2], k[0, 0] + 1)
  np.testing.assert_array_equal(more.k[1, 2], 0)
  np.testing.assert_array_equal(more.positions[0], [0, 1, 7, EMPTY])
  np.testing.assert_array_equal(more.valid, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])


def test_overflow_is_seen_per_row(key):
  cache, k, v = _kv(key)
  for _ in range(2):
    cache = cache.append(k, v, jnp.zeros((3, 2), jnp.int32), jnp.array([2, 1, 0]))
  np.testing.assert_array_equal(cache.overflowed, [True, False, False])


@pytest.mark.parametrize("indices", [[2, 0, 1], [1, 1, 1]])
def test_reorder_moves_every_leaf(key, indices):
  cache = _decoder_cache(key)
  moved = cache.reorder(jnp.array(indices))
  np.testing.assert_array_equal(moved.lengths, np.array([2, 3, 5])[indices])
  for old, new in zip(jax.tree.leaves(cache.stages), jax.tree.leaves(moved.stages), strict=True):
    np.testing.assert_array_equal(new, np.asarray(old)[:, indices])


def test_fork_changes_the_number_of_rows(key):
  forked = _decoder_cache(key).fork(jnp.array([0, 0, 1, 2, 2]))
  assert forked.lengths.shape == (5,)
  assert all(x.shape[1] == 5 for x in jax.tree.leaves(forked.stages))
  with pytest.raises(ValueError, match="use fork"):
    _decoder_cache(key).reorder(jnp.array([0, 1]))


def test_batch_axis_serves_vmap(key):
  cache = _decoder_cache(key)
  rows = jax.vmap(lambda c: c, in_axes=(cache.batch_axis,))(cache)
  assert all(x.shape[0] == 3 for x in jax.tree.leaves(rows))


def test_grow_keeps_what_is_held(key):
  cache = _decoder_cache(key)
  grown = cache.grow(9)
  old, new = cache.stages[0][0], grown.stages[0][0]
  np.testing.assert_array_equal(new.k[:, :, :4], old.k)
  np.testing.assert_array_equal(new.positions[:, :, 4:], EMPTY)
  np.testing.assert_array_equal(grown.stages[0][1].state, cache.stages[0][1].state)
  with pytest.raises(ValueError, match="max_length=3"):
    cache.grow(3)
