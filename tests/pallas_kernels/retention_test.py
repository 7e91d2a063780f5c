"""Each form of retention against the equation written out in float64, and the recurrent one."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.retention import IMPLEMENTATIONS, retention, retention_decode

NAMES = ("out", "state", "dq", "dk", "dv", "dlog_decay", "dstate")
FAST = ("xla", "parallel")


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
def test_equals_the_equation_in_float64(per_token):
  lengths = np.array([7, 4])
  segment_ids = np.array([[0] * 3 + [1] * 2 + [0] * 3, [5] * 6 + [6] * 2])
  args = _inputs(2, 8, 2, 1, 3, 4, per_token)
  with jax.enable_x64(True):
    args = _float64(args)
    want = _outputs_and_grads(lambda *a: _naive(*a, lengths=lengths, segment_ids=segment_ids), args)
    options = dict(lengths=jnp.asarray(lengths), segment_ids=jnp.asarray(segment_ids))
    for implementation in IMPLEMENTATIONS:
      op = _op(implementation, chunk_size=3, **options)
      _assert_close(_outputs_and_grads(op, args), want, 1e-12)


@pytest.mark.parametrize(
  "length,chunk",
  [(1, 1), (2, 16), (15, 16), (16, 16), (17, 16), (53, 16), (13, 1), (65, 64), (12, None)],
)
def test_matches_recurrent(length, chunk):
  args = _inputs(2, length, 3, 3, 5, 7, seed=length)
  want = _outputs_and_grads(_op("recurrent"), args)
  _assert_close(_outputs_and_grads(_op("xla", chunk_size=chunk), args), want)
  if length in (1, 53):
    _assert_close(_outputs_and_grads(_op("parallel", chunk_size=chunk), args), want)


def test_chunk_size_changes_nothing():
  args = _inputs(2, 37, 3, 3, 5, 7)
  want = _outputs_and_grads(_op("xla"), args)
  for chunk in (1, 5, 37):
    _assert_close(_outputs_and_grads(_op("xla", chunk_size=chunk), args), want)


def test_shares_key_heads_in_consecutive_groups():
  args = _inputs(2, 19, 6, 2, 4, 3)
  want = _outputs_and_grads(
    lambda q, k, v, *a: _op("xla")(q, jnp.repeat(k, 3, 2), jnp.repeat(v, 3, 2), *a), args
  )
  for implementation in IMPLEMENTATIONS:
    _assert_close(_outputs_and_grads(_op(implementation, chunk_size=8), args), want)


@pytest.mark.parametrize("implementation", FAST)
def test_decay_extremes(implementation):
  gammas = np.array([1, 1 - 2.0**-24, 511 / 512, 0.5, 1e-3, 0])
  q, k, v, _, state = _inputs(1, 37, 6, 6, 4, 3)
  with np.errstate(divide="ignore"):
    log_decay = jnp.asarray(np.log(gammas), jnp.float32)
  args = (q, k, v, log_decay, state)
  got = _outputs_and_grads(_op(implementation, chunk_size=16), args)
  _assert_close(got, _outputs_and_grads(_op("recurrent"), args), 2e-5)
  q, k, v, state = (np.asarray(x, np.float64) for x in (q, k, v, state))
  pairs = np.tril(np.einsum("BTNH,BSNH->BNTS", q, k))
  want = np.einsum("BNTS,BSNV->BTNV", pairs, v) + np.einsum("BTNH,BNHV->BTNV", q, state)
  np.testing.assert_allclose(got[0][:, :, 0], want[:, :, 0], atol=1e-4)  # Linear attention.
  want = np.einsum("BTNH,BTNH->BTN", q, k)[..., None] * v
  np.testing.assert_allclose(got[0][:, :, 5], want[:, :, 5], atol=1e-5)  # Each token alone.


@pytest.mark.parametrize("implementation", FAST)
def test_token_gates_saturate_and_mix(implementation):
  """A gate of -inf, or of -1e30, forgets what precedes it and blurs nothing that follows."""
  q, k, v, log_decay, state = _inputs(2, 41, 2, 1, 4, 3, per_token=True)
  kind = np.random.default_rng(2).integers(0, 5, log_decay.shape)
  kind[1] = np.minimum(kind[1] + 1, 4)  # The second row meets no -inf, whose totals stay finite.
  log_decay = jnp.asarray(
    np.select([kind == 0, kind == 1, kind == 2], [-np.inf, -1e30, 0], log_decay), jnp.float32
  )
  args = (q, k, v, log_decay, state)
  _assert_close(
    _outputs_and_grads(_op(implementation, chunk_size=16), args),
    _outputs_and_grads(_op("recurrent"), args),
  )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("padded,packed", [(True, False), (False, True), (True, True)])
def test_lengths_and_documents_match_recurrent(per_token, padded, packed):
  args = _inputs(4, 37, 2, 1, 3, 5, per_token)
  starts = np.array([[37, 37, 37], [3, 4, 30], [16, 18, 32], [15, 17, 37]])
  ids = np.sum(np.arange(37)[:, None] >= starts[:, None], -1) % 2  # An id returns.
  options = dict(
    lengths=jnp.array([37, 20, 16, 0]) if padded else None,
    segment_ids=jnp.asarray(ids) if packed else None,
  )
  _assert_close(
    _outputs_and_grads(_op("xla", chunk_size=16, **options), args),
    _outputs_and_grads(_op("recurrent", **options), args),
  )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_as_if_absent(implementation):
  """A padded row ends in the state of the row cut short, even where the padding holds NaN."""
  q, k, v, log_decay, state = _inputs(1, 20, 2, 2, 3, 5)
  run = functools.partial(
    retention, log_decay=log_decay, initial_state=state, chunk_size=8, implementation=implementation
  )
  want_out, want_state = run(q[:, :11], k[:, :11], v[:, :11])
  k, v = (x.at[:, 11:].set(jnp.nan) for x in (k, v))
  out, state = run(q, k, v, lengths=jnp.array([11]))
  np.testing.assert_allclose(out[:, :11], want_out, atol=1e-5)
  np.testing.assert_allclose(state, want_state, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_documents_are_isolated(implementation):
  q, k, v, log_decay, state = _inputs(1, 21, 2, 2, 3, 5)
  ids = jnp.asarray([[7] * 9 + [3] * 5 + [7] * 7])
  out, end = retention(
    q,
    k,
    v,
    log_decay,
    initial_state=state,
    segment_ids=ids,
    chunk_size=8,
    implementation=implementation,
  )
  for lo, hi, first in ((0, 9, state), (9, 14, None), (14, 21, None)):
    alone = [x[:, lo:hi] for x in (q, k, v)]
    want, last = retention(*alone, log_decay, initial_state=first, implementation="recurrent")
    np.testing.assert_allclose(out[:, lo:hi], want, atol=1e-5)
  np.testing.assert_allclose(end, last, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_causal_bit_for_bit(implementation):
  q, k, v, log_decay, _ = _inputs(1, 20, 2, 2, 3, 5)
  run = jax.jit(
    lambda q, k, v: retention(q, k, v, log_decay, chunk_size=8, implementation=implementation)[0]
  )
  changed = run(*(x.at[:, 13].add(1) for x in (q, k, v)))
  assert (changed[:, :13] == run(q, k, v)[:, :13]).all()
  assert (changed[:, 13:] != run(q, k, v)[:, 13:]).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize("per_token", [False, True])
def test_prefill_then_decode_equals_one_pass_at_any_split(per_token):
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


@pytest.mark.parametrize(
  "implementation,length,head_dim",
  [("xla", 63, 60), ("xla", 500, 100), ("parallel", 63, 60), ("recurrent", 63, 60)],
)
def test_bfloat16_is_within_half_a_percent(implementation, length, head_dim):
  args = _inputs(1, length, 2, 2, head_dim, 24)
  gammas = jnp.asarray(np.log([31 / 32, 1 - 2.0**-12]), jnp.float32)
  q, k, v = (x.astype(jnp.bfloat16) for x in (args[0], args[1] * head_dim**-0.5, args[2]))
  op = lambda q, k, v, s: retention(q, k, v, gammas, initial_state=s, implementation=implementation)
  got = _outputs_and_grads(op, (q, k, v, args[4]))
  assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
  with jax.enable_x64(True):  # Of the same rounded inputs.
    want = _outputs_and_grads(op, _float64([q, k, v, args[4]]))
  for name, a, b in zip(("out", "state", "dq", "dk", "dv", "ds"), got, want, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b)
    assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b), name


def test_long_run_stays_finite_and_bounded():
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


def test_no_tokens_leave_the_state():
  q, k, v, log_decay, state = _inputs(2, 0, 3, 1, 4, 5)
  for implementation in IMPLEMENTATIONS:
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
