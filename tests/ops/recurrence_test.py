"""Linear recurrences and RWKV's average, held to their definitions token by token."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops

SCANS = pytest.mark.parametrize("scan", ["sequential", "associative"])


def _close(got, want, tol=1e-4):
  """Each leaf within `tol` of the largest entry of what it should be."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    b = np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol * np.abs(b).max(initial=1e-30))


def _grads(f, weights, *args):
  """Outputs, and gradients of their weighted sum, so that none is summed away."""
  out = f(*args)
  loss = lambda *args: sum(
    jnp.vdot(w, y) for w, y in zip(weights, jax.tree.leaves(f(*args)), strict=True)
  )
  return out, jax.grad(loss, tuple(range(len(args))))(*args)


def _weights(key, shapes):
  return [jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes)]


@SCANS
@pytest.mark.parametrize("length", [1, 2, 13])
def test_recurrence_and_gradients_are_the_loops(key, scan, length):
  shape = (2, length, 3, 5)
  keys = jax.random.split(key, 4)
  decay = jax.random.uniform(keys[0], shape).at[:, ::4].set(0)
  x, first = jax.random.normal(keys[1], shape), jax.random.normal(keys[2], (2, 3, 5))

  def loop(decay, x, state):
    states = []
    for t in range(length):
      state = decay[:, t] * state + x[:, t]
      states.append(state)
    return jnp.stack(states, 1)

  ours = functools.partial(ops.linear_recurrence, scan=scan)
  weights = _weights(keys[3], [shape])
  run = lambda f: jax.jit(functools.partial(_grads, f, weights))(decay, x, first)
  _close(run(ours), run(loop), 1e-5)


def _definition(decay, bonus, k, v, segment_ids=None):
  """Equation 16 as it stands: all weights of a token, over the tokens of its document."""
  t = jnp.arange(k.shape[1])
  gap = t[:, None] - t
  exponent = k[:, None] - decay * (gap[..., None] - 1)  # B T S C
  exponent = jnp.where((gap == 0)[..., None], (k + bonus)[:, None], exponent)
  seen = jnp.broadcast_to(gap >= 0, (k.shape[0], *gap.shape))
  if segment_ids is not None:
    seen &= segment_ids[:, :, None] == segment_ids[:, None]
  weights = jax.nn.softmax(jnp.where(seen[..., None], exponent, -jnp.inf), axis=2)
  return jnp.einsum("BTSC,BSC->BTC", weights, v)


def _inputs(key, length=13, channels=6, scale=1.0):
  keys = jax.random.split(key, 4)
  decay = jnp.exp(jax.random.normal(keys[0], (channels,)))
  bonus = jax.random.normal(keys[1], (channels,))
  k, v = (jax.random.normal(x, (3, length, channels)) for x in keys[2:])
  return decay, bonus, scale * k, v


@SCANS
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_wkv_and_gradients_are_the_definitions(key, scan, documents, scale):
  """With exponents that float32 cannot raise e to, too."""
  args = _inputs(key, scale=scale)
  ids = jnp.array([[1] * 13, [1] * 4 + [2] * 9, [1] + [2] * 5 + [1] * 7]) if documents else None
  if documents:  # An id that comes back is another document.
    unique = ids.at[2, 6:].set(3)
  weights = _weights(key, [args[-1].shape])
  ours = lambda *a: ops.wkv(*a, segment_ids=ids, scan=scan)[0]
  got = jax.jit(functools.partial(_grads, ours, weights))(*args)
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(a, np.float64)) for a in args]
    want_of = lambda *a: _definition(*a, unique if documents else None)
    want = jax.jit(functools.partial(_grads, want_of, [np.float64(w) for w in weights]))(*wide)
  _close(got, want, 1e-4 if scale == 1 else 1e-3)


@SCANS
def test_wkv_goes_on_from_a_ragged_pass(key, scan):
  """Rows of 0 to 13 valid tokens, padding full of NaN; the rest follows, then by single tokens."""
  decay, bonus, k, v = _inputs(key)
  length = k.shape[1]
  rows = length + 1
  k, v = (jnp.broadcast_to(x[:1], (rows, *x.shape[1:])) for x in (k, v))
  lengths = jnp.arange(rows)
  padded = (jnp.arange(length) >= lengths[:, None])[..., None]
  spoilt = [jnp.where(padded, jnp.nan, x) for x in (k, v)]
  run = jax.jit(functools.partial(ops.wkv, decay, bonus, scan=scan))
  want, _ = run(k, v)
  first, state = run(*spoilt, lengths=lengths)
  _close(jnp.where(padded, 0, first), jnp.where(padded, 0, want), 1e-5)
  for t in range(length):
    # Rows that have no token left get their last one again.
    here = jnp.minimum(lengths + t, length - 1)
    token = [x[0, here][:, None] for x in (k, v)]
    out, state = run(*token, initial_state=state)
    _close(out[: length - t, 0], want[0, here[: length - t]], 1e-5)


def test_gradients_cross_a_split(key):
  """Through the state, and in spite of a maximum that no gradient goes through."""
  args = _inputs(key)
  weights = _weights(key, [args[-1].shape])

  def halves(decay, bonus, k, v):
    first, state = ops.wkv(decay, bonus, k[:, :5], v[:, :5])
    # A state's scale is a choice: another one changes no gradient either.
    state = dataclasses.replace(
      state,
      numerator=state.numerator * jnp.e,
      denominator=state.denominator * jnp.e,
      exponent=state.exponent - 1,
    )
    rest, _ = ops.wkv(decay, bonus, k[:, 5:], v[:, 5:], initial_state=state)
    return jnp.concatenate([first, rest], 1)

  whole = lambda *a: ops.wkv(*a)[0]
  run = lambda f: jax.jit(functools.partial(_grads, f, weights))(*args)
  _close(run(halves), run(whole))


@SCANS
def test_the_future_changes_no_bit_of_the_past(key, scan):
  decay, bonus, k, v = _inputs(key)
  run = jax.jit(functools.partial(ops.wkv, decay, bonus, scan=scan))
  want = run(k, v)[0]
  for t in (1, 6, 12):
    got = run(k.at[:, t].add(50), v.at[:, t].add(1))[0]
    np.testing.assert_array_equal(got[:, :t], want[:, :t])
    assert np.abs(got[:, t:] - want[:, t:]).max() > 0.1


def test_states_are_float32(key):
  decay, bonus, k, v = _inputs(key)
  out, state = ops.wkv(decay, bonus, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
  assert out.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
