"""Causal convolutions against the sum that they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops

IDS = jnp.array([[1] * 11, [1] * 4 + [2] * 7, [3] * 2 + [1] * 4 + [3] * 5])  # Ids may come back.
RUNS = np.array([[0] * 11, [0] * 4 + [1] * 7, [0] * 2 + [1] * 4 + [2] * 5])


def _definition(x, kernel, history=None, runs=None):
  """`sum_j kernel_j x_{t-j}` in float64, each product on its own."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  reach = len(kernel) - 1
  if history is None:
    history = np.zeros((x.shape[0], reach, x.shape[2]))
  full = np.concatenate([history, x], axis=1)
  y = np.zeros_like(x)
  for b, t, j in np.ndindex(*x.shape[:2], len(kernel)):
    s = t - j
    if runs is not None and runs[b, max(s, 0)] != runs[b, t]:
      continue
    if runs is not None and s < 0 and runs[b, t] != 0:
      continue
    if s >= -reach:
      y[b, t] += kernel[j] * full[b, s + reach]
  return y


def _gradients(weights, x, kernel, runs=None):
  """Of the definition's weighted sum: it is linear in either argument."""
  weights, flip = np.asarray(weights, np.float64), lambda a: a[:, ::-1]
  d_x = flip(
    _definition(flip(weights), kernel, runs=None if runs is None else flip(runs).max() - flip(runs))
  )
  d_kernel = np.stack(
    [
      (
        weights * _definition(x, np.eye(len(kernel))[j][:, None] * np.ones(x.shape[-1]), runs=runs)
      ).sum((0, 1))
      for j in range(len(kernel))
    ]
  )
  return d_x, d_kernel


def _inputs(key, taps, length=11):
  keys = jax.random.split(key, 3)
  shape = (3, length, 5)
  return (
    jax.random.normal(keys[0], shape),
    jax.random.normal(keys[1], (taps, 5)),
    jax.random.normal(keys[2], shape),
  )


def _close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4, 11])
def test_short_is_the_sum(key, taps, documents):
  x, kernel, weights = _inputs(key, taps)
  ids, runs = (IDS, RUNS) if documents else (None, None)
  run = lambda x, kernel: ops.short_convolution(x, kernel, segment_ids=ids)[0]
  _close(jax.jit(run)(x, kernel), _definition(x, kernel, runs=runs))
  grads = jax.jit(jax.grad(lambda *a: jnp.vdot(weights, run(*a)), (0, 1)))(x, kernel)
  for got, want in zip(grads, _gradients(weights, x, kernel, runs), strict=True):
    _close(got, want)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_long_is_the_sum(key, length, documents):
  x, kernel, weights = _inputs(key, length, length)
  ids, runs = (IDS[:, -length:], RUNS[:, -length:]) if documents else (None, None)
  runs = None if runs is None else runs - runs[:, :1]
  run = functools.partial(ops.long_convolution, segment_ids=ids)
  _close(jax.jit(run)(x, kernel), _definition(x, kernel, runs=runs))
  grads = jax.jit(jax.grad(lambda *a: jnp.vdot(weights, run(*a)), (0, 1)))(x, kernel)
  for got, want in zip(grads, _gradients(weights, x, kernel, runs), strict=True):
    _close(got, want)


@pytest.mark.parametrize("taps", [2, 4])
def test_short_goes_on_from_a_ragged_pass(key, taps):
  """At every split, with padding full of NaN; the history reaches behind a pass of one token."""
  x, kernel, _ = _inputs(key, taps)
  length = x.shape[1]
  x = jnp.broadcast_to(x[:1], (length + 1, *x.shape[1:]))
  lengths = jnp.arange(length + 1)
  padded = (jnp.arange(length) >= lengths[:, None])[..., None]
  want = _definition(x[:1], kernel)[0]
  run = jax.jit(ops.short_convolution)
  got, history = run(jnp.where(padded, jnp.nan, x), kernel, lengths=lengths)
  _close(jnp.where(padded, 0, got), np.where(padded, 0, want))
  for t in range(length):
    here = np.minimum(lengths + t, length - 1)  # A row without a token left gets its last again.
    out, history = run(x[0, here][:, None], kernel, history=history)
    _close(out[: length - t, 0], want[here[: length - t]])


def test_the_history_is_the_first_documents(key):
  x, kernel, _ = _inputs(key, 4)
  history = jax.random.normal(jax.random.fold_in(key, 9), (3, 3, 5))
  got, _ = ops.short_convolution(x, kernel, history=history, segment_ids=IDS)
  _close(got, _definition(x, kernel, history, RUNS))


def test_short_is_causal_to_the_bit_and_long_to_rounding(key):
  x, kernel, _ = _inputs(key, 11)
  changed = x.at[:, 6].add(100)
  for op, same in (
    (lambda x: ops.short_convolution(x, kernel)[0], np.testing.assert_array_equal),
    (
      lambda x: ops.long_convolution(x, kernel),
      functools.partial(np.testing.assert_allclose, atol=1e-4),
    ),
  ):
    want, got = op(x), op(changed)
    same(got[:, :6], want[:, :6])
    assert np.abs(got[:, 6:] - want[:, 6:]).max() > 1


def test_long_keeps_its_input_dtype(key):
  x, kernel, _ = _inputs(key, 11)
  got = ops.long_convolution(x.astype(jnp.bfloat16), kernel)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(got), _definition(x, kernel), rtol=0.03, atol=0.1)
