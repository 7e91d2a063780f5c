"""The diagonal state space: with one real mode it is retention, and its filter is S4D's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops


@pytest.mark.parametrize("context", ["whole", "lengths", "documents"])
@pytest.mark.parametrize("chunk_size", [3, 16])
def test_one_real_mode_is_retention(key, chunk_size, context):
  """Outputs, state and all gradients: that of the initial state, and through the final one."""
  batch, length, heads, dim, value_dim = 3, 10, 2, 4, 5
  keys = jax.random.split(key, 6)
  q, k = (jax.random.normal(x, (batch, length, heads, dim)) for x in keys[:2])
  v = jax.random.normal(keys[2], (batch, length, heads, value_dim))
  state = jax.random.normal(keys[3], (batch, heads, dim, value_dim))
  weights = (jax.random.normal(keys[4], v.shape), jax.random.normal(keys[5], state.shape))
  log_decay = jnp.log(jnp.array([0.9, 0.5]))
  options = {
    "whole": {},
    "lengths": dict(lengths=jnp.array([10, 4, 6])),
    "documents": dict(
      segment_ids=jnp.array([[1] * 10, [1] * 3 + [2] * 7, [1, 2, 2, 2, 1, 1, 1, 3, 3, 3]])
    ),
  }[context]
  valid = jnp.arange(length) < options.get("lengths", jnp.full(batch, length))[:, None]
  seen = valid[..., None, None]  # What comes out of padding is nobody's.

  def retention(q, k, v, log_decay, state):
    out, state = ops.retention(q, k, v, log_decay, initial_state=state, **options)
    return jnp.where(seen, out, 0), state

  def ours(q, k, v, log_decay, state):
    one = jnp.ones((heads, 1))
    modes = ops.Modes(log_decay[:, None], 0 * one, 0.5 * one, 0 * one)
    out, state = ops.state_space_attention(
      q,
      k,
      v,
      modes,
      jnp.zeros(heads),
      initial_state=jnp.stack([state, 0 * state], axis=2),
      chunk_size=chunk_size,
      **options,
    )
    return jnp.where(seen, out, 0), state[:, :, 0]

  def run(f, *args):
    loss = lambda *args: sum(jnp.vdot(w, y) for w, y in zip(weights, f(*args), strict=True))
    return f(*args), jax.grad(loss, range(5))(*args)

  args = (q, k, v, log_decay, state)
  got, want = (jax.jit(functools.partial(run, f))(*args) for f in (ours, retention))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_the_filter_is_the_sampled_exponential(key):
  """A step held constant: `integral of 2 Re c e^{a s}` over the step, by quadrature."""
  log_step, decay, angle = np.log([0.3]), np.array([[0.5, 0.7]]), np.array([[0.0, 3.0]])
  real, imag = np.array([[0.4, -1.0]]), np.array([[0.2, 0.5]])
  modes = ops.discretise(*(jnp.float32(x) for x in (log_step, decay, angle, real, imag)))
  a, c = -decay + 1j * angle, real + 1j * imag
  middle = (np.arange(20_000) + 0.5) / 20_000 * 0.3
  want = [
    2 * (c[..., None] * np.exp(a[..., None] * (middle + 0.3 * t))).real.sum(1).mean(-1) * 0.3
    for t in range(6)
  ]
  np.testing.assert_allclose(modes.filter(6), want, rtol=1e-4, atol=1e-5)


def test_a_chunk_has_a_token():
  x = jnp.zeros((1, 2, 1, 2))
  one = jnp.ones((1, 1))
  with pytest.raises(ValueError, match="chunk_size=0"):
    ops.state_space_attention(x, x, x, ops.Modes(one, one, one, one), jnp.zeros(1), chunk_size=0)
