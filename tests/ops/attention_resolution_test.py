"""Attention resolution: its properties, and scores by distance against a loop over pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops
from latentlab.ops import Mask


def _definition(s):
  """Equation 3 in float64, the score behind the last distance being minus infinity."""
  e = np.exp(np.append(s, -np.inf) - np.max(s))
  return (e[:-1] * (e[:-1] - e[1:])).sum() / e.sum() ** 2


def test_lex_06_resolution_is_equation_3_and_bounded():
  scores = np.random.default_rng(0).normal(size=(50, 30)) * np.linspace(0.1, 30, 50)[:, None]
  got = ops.attention_resolution(jnp.asarray(scores, jnp.float32))
  np.testing.assert_allclose(got, [_definition(s) for s in scores], atol=1e-5)
  squares = np.square(jax.nn.softmax(scores)).sum(-1)
  assert (got <= squares + 1e-6).all() and (squares <= 1 + 1e-6).all()
  shifted = ops.attention_resolution(jnp.asarray(scores + 500, jnp.float32))
  np.testing.assert_allclose(shifted, got, atol=1e-4)


def test_lex_06_resolution_of_plain_cases():
  resolution = lambda s: float(ops.attention_resolution(jnp.asarray(s, jnp.float32)))
  # The last distance has none behind it, which is all that is left of a constant.
  assert resolution(np.zeros(400)) == pytest.approx(1 / 400**2, abs=1e-7)
  assert resolution([80.0, *np.zeros(50)]) == pytest.approx(1)
  assert resolution([0, 0.3, 0.6, 0.9]) == pytest.approx(_definition(np.arange(4) * 0.3))
  # Further keys with larger scores: only where a score follows the last may terms be negative.
  rising = np.arange(40) * 0.05
  p = np.exp(rising) / np.exp(rising).sum()
  assert (p[:-1] * (p[:-1] - p[1:])).sum() < 0
  halves = (p[0] ** 2 + p[-1] ** 2 + (np.diff(p) ** 2).sum()) / 2
  assert resolution(rising) == pytest.approx(halves, abs=1e-6)
  assert np.isfinite(resolution([3e38, -3e38]))
  seen = jnp.arange(6) < 4
  part = ops.attention_resolution(jnp.asarray([0.5, 0.1, 0.2, 0.0, 7.0, 9.0]), seen)
  assert float(part) == pytest.approx(_definition(np.array([0.5, 0.1, 0.2, 0.0])), abs=1e-6)


@pytest.mark.parametrize("dim, rope, xpos", [(64, 0.4116, 0.4207), (128, 0.6603, 0.6751)])
def test_lex_07_resolution_of_the_theoretical_curve(dim, rope, xpos):
  for scale_base, want in ((np.inf, rope), (512, xpos)):
    curve = jnp.asarray(ops.xpos_curve(2048, dim, scale_base=scale_base), jnp.float32)
    assert float(ops.attention_resolution(curve)) == pytest.approx(want, abs=5e-5)


MASKS = (Mask("causal"), Mask("blockwise_causal", 3), Mask("sliding_window", 4))


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.kind)
def test_lex_06_scores_by_distance_are_those_of_a_loop(mask):
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(2, 11, 4, 6)), rng.normal(size=(2, 11, 2, 6))
  ids = np.array([[1] * 5 + [2] * 6, [1] * 11])
  inside = np.array([[*range(5), *range(6)], range(11)])
  valid = np.arange(11) < np.array([[11], [8]])
  slopes, decay = ops.alibi_slopes(4), ops.xpos_decay(6, scale_base=4)
  got = jax.jit(
    lambda q, k: ops.scores_by_distance(
      q,
      k,
      mask=mask,
      segment_ids=jnp.asarray(ids),
      valid=jnp.asarray(valid),
      slopes=slopes,
      decay=decay,
    )
  )(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32))
  scores, counts = np.zeros((4, 11)), np.zeros(11)
  for b, i, j in np.ndindex(2, 11, 11):
    n, p, r = i - j, inside[b, i], inside[b, j]
    seen = {
      "causal": True,
      "blockwise_causal": p // 3 - r // 3 <= 1,
      "sliding_window": p - r < 4,
    }[mask.kind]
    if n < 0 or ids[b, i] != ids[b, j] or not (valid[b, i] and valid[b, j] and seen):
      continue
    counts[n] += 1
    for h in range(4):
      scores[h, n] += (q[b, i, h] * k[b, j, h // 2] * np.exp(n * decay)).sum()
      scores[h, n] -= float(slopes[h]) * n
  np.testing.assert_array_equal(got.counts, counts)
  np.testing.assert_allclose(got.scores, scores, atol=1e-4)
