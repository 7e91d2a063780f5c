"""The forms of retention against the equation written out in float64; dispatch; argument checks."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.retention import IMPLEMENTATIONS, retention, retention_decode
from pallas_kernels.retention.gates import RESET
from pallas_kernels.retention.segments import entering_states

NAMES = ("out", "state", "dq", "dk", "dv", "dlog_decay", "dstate")
FORMS = ("xla", "parallel", "recurrent")


def _inputs(batch, length, heads, kv_heads, head_dim, value_dim, per_token=False, seed=0):
  rng = np.random.default_rng(seed)
  decay_shape = (batch, length, heads) if per_token else (heads,)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return (
    draw(batch, length, heads, head_dim),
    draw(batch, length, kv_heads, head_dim),
    draw(batch, length, kv_heads, value_dim),
    jnp.asarray(-rng.exponential(0.2, size=decay_shape), jnp.float32),
    draw(batch, heads, head_dim, value_dim),
  )


def _naive(q, k, v, log_decay, state, lengths=None, segment_ids=None):
  """Explicit sums over all pairs of tokens, and none of the forms' tricks."""
  (batch, length, heads, _), groups = q.shape, q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
  decay = jnp.exp(jnp.broadcast_to(log_decay, (batch, length, heads)))
  outs, states = [], []
  for b in range(batch):
    s, row = state[b], []
    for t in range(length):
      if lengths is None or t < lengths[b]:
        if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
          s = jnp.zeros_like(s)
        s = decay[b, t, :, None, None] * s + k[b, t, :, :, None] * v[b, t, :, None, :]
      row.append(jnp.sum(q[b, t, :, :, None] * s, 1))
    outs.append(jnp.stack(row))
    states.append(s)
  return jnp.stack(outs), jnp.stack(states)


def _outputs_and_grads(op, args, seed=1):
  """Both outputs, and the gradients of a sum that weighs both of them at random."""

  def weighed(*args):
    out = op(*args)
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=x.shape) for x in out]
    return sum(jnp.sum(x * w) for x, w in zip(out, weights, strict=True)), out

  (_, out), grads = jax.jit(jax.value_and_grad(weighed, range(len(args)), has_aux=True))(*args)
  return *out, *grads


def _assert_close(got, want, tolerance=1e-5):
  for name, a, b in zip(NAMES, got, want, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(b).all() and a.shape == b.shape, name
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()), err_msg=name)


def _op(implementation, **options):
  return lambda *a: retention(*a[:4], initial_state=a[4], implementation=implementation, **options)


def _float64(args):
  return [jnp.asarray(np.asarray(x, np.float64)) for x in args]


@pytest.mark.parametrize("per_token", [False, True])
def test_retnet_01_equals_the_equation_in_float64(per_token):
  lengths = np.array([7, 4])
  segment_ids = np.array([[0] * 3 + [1] * 2 + [0] * 3, [5] * 6 + [6] * 2])
  args = _inputs(2, 8, 2, 1, 3, 4, per_token)
  with jax.enable_x64(True):
    args = _float64(args)
    args[3] = (
      args[3].at[..., 0].set(0).at[(slice(None), slice(3, 6), 1) if per_token else 1].set(-jnp.inf)
    )
    want = _outputs_and_grads(lambda *a: _naive(*a, lengths=lengths, segment_ids=segment_ids), args)
    options = dict(lengths=jnp.asarray(lengths), segment_ids=jnp.asarray(segment_ids))
    for implementation in FORMS:
      op = _op(implementation, chunk_size=3, **options)
      _assert_close(_outputs_and_grads(op, args), want, 1e-12)


def test_retnet_02_chunk_size_changes_nothing():
  args = _inputs(2, 37, 3, 3, 5, 7)
  want = _outputs_and_grads(_op("xla"), args)
  for chunk in (1, 5, 37):
    _assert_close(_outputs_and_grads(_op("xla", chunk_size=chunk), args), want)


@pytest.mark.parametrize("per_token", [False, True])
def test_retnet_04_prefill_then_decode_equals_one_pass_at_any_split(per_token):
  """Rows of different lengths, each continuing from its own end."""
  q, k, v, log_decay, state = _inputs(2, 10, 4, 2, 3, 5, per_token)
  want, want_state = retention(q, k, v, log_decay, initial_state=state, implementation="recurrent")
  prefill = jax.jit(functools.partial(retention, chunk_size=4))
  traces = []

  @jax.jit
  def step(*args):
    traces.append(args)
    return retention_decode(*args)

  rows = np.arange(2)
  for split in (1, 3, 4, 5, 8, 9):
    lengths = np.array([split, max(1, split - 3)])
    out, carried = prefill(q, k, v, log_decay, initial_state=state, lengths=jnp.asarray(lengths))
    for b, length in enumerate(lengths):
      np.testing.assert_allclose(out[b, :length], want[b, :length], atol=1e-5)
    for i in range(10 - split):
      at = lengths + i
      g = log_decay[rows, at] if per_token else log_decay
      out, carried = step(q[rows, at], k[rows, at], v[rows, at], g, carried)
      np.testing.assert_allclose(out, want[rows, at], atol=1e-5)
  np.testing.assert_allclose(carried[0], want_state[0], atol=1e-5)
  assert len(traces) == 1  # A constant state: nothing recompiles as the text grows.


def test_retnet_09_long_run_stays_finite_and_bounded():
  q, k, v, _, _ = _inputs(1, 32768, 2, 2, 2, 3)
  gammas = np.array([0.5, 511 / 512])
  run = lambda name: jax.jit(functools.partial(retention, implementation=name))(
    q, k, v, jnp.asarray(np.log(gammas), jnp.float32)
  )
  (out, state), (want, want_state) = run("xla"), run("recurrent")
  np.testing.assert_allclose(out, want, rtol=0, atol=1e-4 * np.abs(want).max())
  np.testing.assert_allclose(state, want_state, rtol=0, atol=1e-4 * np.abs(want_state).max())
  writes = np.linalg.norm(k, axis=-1) * np.linalg.norm(v, axis=-1)
  assert (np.linalg.norm(state[0], axis=(1, 2)) <= writes.max() / (1 - gammas)).all()


@pytest.mark.parametrize("with_state", [True, False])
def test_states_that_enter_segments(with_state):
  """The states of the recurrence over what comes before, and their gradients."""
  _, k, v, gates, state = _inputs(2, 12, 4, 2, 3, 5, per_token=True)
  gates = gates.at[0, 3, 1].set(RESET).at[1, 8].set(RESET).at[1, 2, 0].set(0)
  cut = lambda x: x.reshape(2, 3, 4, *x.shape[2:])
  args = (k, v, gates, *([state] if with_state else []))

  def weighed(states, *args):
    weights = np.random.default_rng(2).normal(size=(2, 3, 4, 3, 5))
    return jnp.sum(weights * jnp.sin(states(*args)))

  def entering(k, v, gates, state=None):
    return entering_states(cut(k), cut(v), cut(gates), state)

  def recurrent(k, v, gates, state=None):
    zeros = jnp.zeros((2, 12, 4, 3), k.dtype)
    ends = lambda t: retention(
      *(x[:, :t] for x in (zeros, k, v, gates)), initial_state=state, implementation="recurrent"
    )
    return jnp.stack([ends(t)[1] for t in (0, 4, 8)], axis=1)

  np.testing.assert_allclose(entering(*args), recurrent(*args), atol=1e-5)
  got, want = (
    jax.jit(jax.grad(functools.partial(weighed, f), range(len(args))))(*args)
    for f in (entering, recurrent)
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_tokens_leave_the_state():
  q, k, v, log_decay, state = _inputs(2, 0, 3, 1, 4, 5)
  for implementation in FORMS:
    out, end = retention(q, k, v, log_decay, initial_state=state, implementation=implementation)
    assert out.shape == (2, 0, 3, 5)
    np.testing.assert_array_equal(end, state)


def test_dispatch(monkeypatch):
  args = _inputs(1, 4, 2, 2, 3, 3)[:4]

  def refuse(*_):
    raise NotImplementedError("Not today.")

  monkeypatch.setitem(IMPLEMENTATIONS, "parallel", refuse)
  want = retention(*args, implementation="recurrent")[0]
  np.testing.assert_array_equal(retention(*args, implementation=["parallel", "recurrent"])[0], want)
  with pytest.raises(ExceptionGroup, match="accepts") as caught:
    retention(*args, implementation="parallel")
  assert "Not today." in str(caught.value.exceptions)
  with pytest.raises(ValueError, match="implementation='flash'"):
    inspect.unwrap(retention)(*args, implementation="flash")


@pytest.mark.parametrize(
  "change,match",
  [
    (dict(k=jnp.zeros((1, 4, 3, 3))), "v.shape"),
    (dict(k=jnp.zeros((1, 4, 2, 5))), "k has shape"),
    (dict(log_decay=jnp.zeros(3)), "log_decay has shape"),
    (dict(lengths=jnp.zeros(2, int)), "lengths has shape"),
    (dict(initial_state=jnp.zeros((1, 2, 3, 4))), "initial_state has shape"),
    (dict(chunk_size=0), "chunk_size=0"),
  ],
  ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_rejects_arguments_that_disagree(change, match):
  q, k, v, log_decay, _ = _inputs(1, 4, 2, 2, 3, 3)
  args = dict(q=q, k=k, v=v, log_decay=log_decay) | change
  if args["k"].shape[2] == 3:
    args["v"] = jnp.zeros((1, 4, 3, 3))
  with pytest.raises(ValueError, match=match):
    inspect.unwrap(retention)(**args)  # Past the test suite's shape checks.
