"""The reference forms against the equation written head by head; checks of the arguments."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.diff_attention import diff_attention, diff_attention_decode

FORMS = ("naive", "two_call", "four_call", "xla")


def _inputs(heads=4, kv_heads=2, shared=False):
  rng = np.random.default_rng(0)
  maps = () if shared else (2,)
  shapes = (2, 7, heads, 2, 5), (2, 9, kv_heads, *maps, 5), (2, 9, kv_heads, 6), (heads,)
  return [rng.normal(size=s) for s in shapes]


def _by_head(q, k, v, lam, offset, gain, eps):
  """Explicit rows of explicit heads: query head `n` reads key head `n // (N / K)` alone."""
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, t, n in np.ndindex(*q.shape[:3]):
    at, end = n // (q.shape[2] // v.shape[2]), offset + t + 1
    maps = []
    for m in range(2):
      keys = k[b, :end, at] if k.ndim == 4 else k[b, :end, at, m]
      scores = np.exp(0.3 * (keys @ q[b, t, n, m]))
      maps.append(scores / scores.sum())
    row = (maps[0] - lam[n] * maps[1]) @ v[b, :end, at]
    out[b, t, n] = 0.8 * gain * row / np.sqrt(np.mean(row**2) + eps)
  return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
  "heads,kv_heads,shared",
  [(2, 2, False), (4, 2, False), (6, 2, True), (4, 1, True), (3, 1, False), (8, 2, False)],
)
def test_diff_05_equals_the_equation(form, heads, kv_heads, shared):
  q, k, v, lam = _inputs(heads, kv_heads, shared)
  gain = np.linspace(0.5, 2, 6)
  want = _by_head(q, k, v, lam, 2, gain, 1e-3)
  with jax.enable_x64(True):
    args = [jnp.asarray(x) for x in (q, k, v, lam)]
    options = dict(scale=0.3, q_offset=2, gain=jnp.asarray(gain), eps=1e-3, post_scale=0.8)
    got = diff_attention(*args, **options, implementation=form)
  np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("form", FORMS[1:])
def test_diff_01_forms_agree_in_every_gradient(form):
  with jax.enable_x64(True):
    args = [jnp.asarray(x) for x in _inputs()]

    def gradients(implementation):
      op = lambda *a: diff_attention(*a, q_offset=2, eps=1e-3, implementation=implementation)
      return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(op(*a))), range(4)))(*args)

    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), gradients(form), gradients("naive")
    )


def test_diff_01_one_rounding_is_no_worse_than_two():
  """The difference in float32, where two calls round both of its terms."""
  rng = np.random.default_rng(0)
  shapes = (1, 200, 2, 2, 32), (1, 200, 2, 2, 32), (1, 200, 2, 64)
  q, k, v = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
  run = lambda x, form: np.asarray(
    diff_attention(*x, jnp.float32(0.8), scale=0.2, implementation=form), np.float64
  )
  want = run([x.astype(jnp.float32) for x in (q, k, v)], "naive")
  error = {form: np.linalg.norm(run((q, k, v), form) - want) for form in ("xla", "two_call")}
  assert error["xla"] <= error["two_call"]


@pytest.mark.parametrize(
  "change,match",
  [
    (dict(k=jnp.zeros((2, 9, 2, 3, 5))), "k is laid out"),
    (dict(v=jnp.zeros((2, 9, 3, 6))), "v is laid out"),
    (dict(lam=jnp.zeros(3)), "lam has shape"),
    (dict(lengths=jnp.zeros(3, int)), "lengths has shape"),
    (dict(lengths=jnp.zeros(2)), "integer"),
    (dict(gain=jnp.zeros(6)), "eps"),
    (dict(post_scale=0.5), "eps"),
    (dict(window=0), "window=0"),
    (dict(window=3, causal=False), "causal=False"),
    (dict(segment_ids=jnp.zeros((2, 7), int)), "kv_segment_ids"),
    (dict(kv_segment_ids=jnp.zeros((2, 9), int)), "give both"),
    (dict(implementation="flash"), "implementation='flash'"),
  ],
  ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_rejects_arguments_that_disagree(change, match):
  names = ("q", "k", "v", "lam")
  args = {n: jnp.asarray(x, jnp.float32) for n, x in zip(names, _inputs(), strict=True)}
  with pytest.raises(ValueError, match=match):
    inspect.unwrap(diff_attention)(**args | change)  # Past the test suite's shape checks.


def test_decoding_rejects_a_split_into_nothing():
  q, k, v, lam = (jnp.asarray(x, jnp.float32) for x in _inputs())
  with pytest.raises(ValueError, match="num_splits=0"):
    diff_attention_decode(q[:, 0], k, v, lam, num_splits=0)
