"""What all forms of plain attention share: the equation they are held to, checks and dispatch."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from flash_attention_suite import Case

from pallas_kernels.flash_attention import flash_attention


def _explicit(q, k, v, seen):
  """The equation over every row, in numpy."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[3]))
  group = q.shape[2] // k.shape[2]
  for b, t, n in np.ndindex(*q.shape[:3]):
    keys = np.flatnonzero(seen[b, t])
    if keys.size:
      weights = np.exp(k[b, keys, n // group] @ q[b, t, n])
      out[b, t, n] = weights / weights.sum() @ v[b, keys, n // group]
  return out


def test_naive_is_the_equation():
  args = [jnp.concatenate([x, 1 - x]) for x in Case(5, 3, 6, 7, heads=4, kv_heads=2).args()]
  ids, kv_ids = np.array([[1, 1, 2, 2, 2], [1, 2, 2, 3, 3]]), np.array([[1] * 3 + [2] * 4] * 2)
  lengths = np.array([6, 3])
  t, s = np.arange(5)[:, None] + 2, np.arange(7)
  seen = (
    (s <= t) & (t - s < 4) & (ids[:, :, None] == kv_ids[:, None]) & (s < lengths[:, None, None])
  )
  options = dict(window=4, q_offset=2, lengths=jnp.asarray(lengths))
  options |= dict(segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(kv_ids))
  out = flash_attention(*args, implementation="naive", **options)
  np.testing.assert_allclose(out, _explicit(*args, seen), atol=1e-5)


@pytest.mark.parametrize(
  "name, options, reason",
  [
    ("splash", dict(return_lse=True), "no gradient"),
    ("splash", dict(lengths=jnp.array([3])), "lengths"),
    ("splash", dict(q_offset=jnp.int32(1)), "q_offset"),
    ("splash", dict(q_offset=-1), "without a key"),
    ("splash", dict(q_offset=3, window=3), "without a key"),
    ("cudnn", dict(), "the target is a cpu"),
  ],
)
def test_refusals_say_why(name, options, reason):
  args = Case(4, 8, 8, heads=1, kv_heads=1).args()
  with pytest.raises(ExceptionGroup) as error:
    flash_attention(*args, implementation=name, **options)
  assert reason in str(error.value.exceptions[0])


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(k=jnp.ones((1, 4, 3, 8))), "divide N"),
    (dict(v=jnp.ones((1, 5, 1, 8))), "v has shape"),
    (dict(lengths=jnp.ones((2,), jnp.int32)), "lengths has shape"),
    (dict(kv_segment_ids=jnp.ones((1, 4), jnp.int32)), "without segment_ids"),
    (dict(lengths=jnp.ones((1,))), "integer"),
    (dict(q=jnp.ones((1, 0, 2, 8))), "at least one"),
    (dict(window=0), "window=0"),
    (dict(window=2, causal=False), "causal=False"),
    (dict(implementation="fast"), "fast"),
  ],
)
def test_bad_arguments(change, message):
  q, k, v = Case(4, 8, 8, kv_heads=1).args()
  arguments = dict(q=q, k=k, v=v) | change
  with pytest.raises(ValueError, match=message):
    inspect.unwrap(flash_attention)(**arguments)  # Past the shape checks of the tests.
