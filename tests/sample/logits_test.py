"""Filters against their definitions in numpy, and draws against the distribution they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import sample

_VOCAB = 23


def _logits(batch_size=5, seed=0):
  return np.random.default_rng(seed).normal(0, 2, (batch_size, _VOCAB)).astype(np.float32)


def _kept(filter_, logits):
  logits = jnp.asarray(logits)
  out = np.asarray(jax.jit(lambda f, x: f.apply(x, ()))(filter_, logits))
  np.testing.assert_array_equal(out[np.isfinite(out)], np.asarray(logits)[np.isfinite(out)])
  return np.isfinite(out)


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True), dtype=np.float64)
  return e / e.sum(-1, keepdims=True)


def test_temperature_divides():
  logits = _logits()
  out = sample.Temperature(0.7).apply(jnp.asarray(logits), ())
  np.testing.assert_allclose(out, logits / 0.7, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 4, _VOCAB, 100])
def test_top_k_keeps_the_best(k):
  logits = _logits()
  rank = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
  np.testing.assert_array_equal(_kept(sample.TopK(k), logits), rank < k)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set(p):
  logits = _logits()
  for row, kept in zip(logits, _kept(sample.TopP(p), logits), strict=True):
    probs, size = _softmax(row), kept.sum()
    best = np.argsort(-row)
    assert set(np.flatnonzero(kept)) == set(best[:size])
    assert probs[kept].sum() >= p > probs[best[: size - 1]].sum()


def test_top_p_at_its_boundary():
  logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))  # Sums are exact.
  for p, size in ((0.5, 1), (0.50001, 2), (0.75, 2), (1e-6, 1)):
    assert _kept(sample.TopP(p), logits).sum() == size, p
  # 1 keeps what float32 sums round away.
  assert _kept(sample.TopP(1.0), np.array([[0.0, -50.0, -80.0]], np.float32)).all()


def test_ties_do_not_depend_on_the_order_of_tokens():
  logits = np.array([[1.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
  expected = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
  np.testing.assert_array_equal(_kept(sample.TopK(2), logits), expected)
  np.testing.assert_array_equal(_kept(sample.TopP(0.8), logits), expected)


@pytest.mark.parametrize("p", [0.0, 0.02, 0.3, 1.0])
def test_min_p_is_relative_to_the_best(p):
  logits = _logits()
  probs = _softmax(logits)
  expected = probs >= p * probs.max(-1, keepdims=True) * (1 - 1e-6)
  np.testing.assert_array_equal(_kept(sample.MinP(p), logits), expected)


def test_bias_bans():
  kept = _kept(sample.LogitBias.ban([3, 5], _VOCAB), _logits())
  assert not kept[:, [3, 5]].any() and kept.sum() == kept.size - 2 * len(kept)


def test_repetition_penalty_looks_back_over_the_prompt():
  prompts, lengths = jnp.array([[1, 2, 3, 4], [5, 6, 0, 0]]), jnp.array([4, 2])
  penalty = sample.RepetitionPenalty(2.0, window=3)
  logits = jnp.full((2, _VOCAB), -1.0).at[:, ::2].set(1.0)

  def penalised(state):
    return [set(np.flatnonzero(row)) for row in penalty.apply(logits, state) != logits]

  state = penalty.init(prompts, lengths)
  assert penalised(state) == [{2, 3, 4}, {5, 6}]  # Token 0 is padding there.
  state = penalty.update(state, jnp.array([7, 7]))
  assert penalised(state) == [{3, 4, 7}, {5, 6, 7}]
  out = penalty.apply(logits, state)
  assert out[0, 4] == 0.5 and out[0, 3] == -2.0


def test_automaton_is_followed():
  # (a b)* stop: state 0 reads a or stop, state 1 reads b, state 2 stays at stop.
  a, b, stop = 4, 9, 0
  transitions = np.full((3, _VOCAB), -1)
  transitions[0, a], transitions[1, b], transitions[0, stop], transitions[2, stop] = 1, 0, 2, 2
  sampler = sample.TokenSampler((sample.TokenAutomaton(transitions),))
  keys = sample.row_keys(0, np.arange(64))
  state = sampler.init(jnp.zeros((64, 1), jnp.int32), jnp.ones(64, jnp.int32))
  tokens, draw = [], jax.jit(sampler.__call__)
  for step in range(6):
    out, state = draw(
      jnp.asarray(_logits(64, step)), state, jax.vmap(jax.random.fold_in)(keys, jnp.full(64, step))
    )
    tokens.append(np.asarray(out.item))
  rows = {tuple(row) for row in np.stack(tokens, 1)}
  allowed = {(a, b) * n + (stop,) * (6 - 2 * n) for n in range(4)}
  assert rows <= allowed and len(rows) > 1


@pytest.mark.parametrize(
  "filters",
  [(), (sample.Temperature(0.5), sample.TopK(7), sample.TopP(0.9), sample.MinP(0.02))],
  ids=len,
)
def test_draws_follow_the_filtered_softmax(filters):
  logits, n = _logits(1), 20_000
  filtered = jnp.asarray(logits)
  for f in filters:
    filtered = f.apply(filtered, ())
  expected = n * _softmax(np.asarray(filtered))[0]
  draw, _ = jax.jit(sample.TokenSampler(filters).__call__)(
    jnp.broadcast_to(logits, (n, _VOCAB)), ((),) * len(filters), sample.row_keys(1, np.arange(n))
  )
  counts = np.bincount(draw.item, minlength=_VOCAB)
  assert not counts[expected == 0].any()
  used = expected > 5
  chi2 = (np.square(counts - expected)[used] / expected[used]).sum()
  dof = used.sum() - 1
  assert chi2 < dof + 4 * np.sqrt(2 * dof)
  np.testing.assert_allclose(
    draw.log_prob, np.log(_softmax(logits))[0, draw.item], rtol=1e-4, atol=1e-5
  )


def test_order_is_the_order_given():
  logits = jnp.asarray(_logits())
  hot, nucleus = sample.Temperature(3.0), sample.TopP(0.8)
  first = np.isfinite(nucleus.apply(hot.apply(logits, ()), ())).sum()
  last = np.isfinite(hot.apply(nucleus.apply(logits, ()), ())).sum()
  assert first > last
  names = [
    type(f).__name__
    for f in sample.token_sampler(
      top_k=3,
      top_p=0.9,
      min_p=0.1,
      repetition_penalty=1.1,
      constraints=[sample.LogitBias.ban([0], _VOCAB)],
    ).filters
  ]
  assert names == ["LogitBias", "RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP"]


@pytest.mark.usefixtures("empty_jit_cache")
def test_settings_are_leaves():
  @jax.jit
  def draw(sampler, logits):
    keys = sample.row_keys(0, np.arange(len(logits)))
    return sampler(logits, sampler.init(jnp.zeros((5, 1), int), jnp.ones(5, int)), keys)[0].item

  for t, p in ((0.5, 0.9), (0.8, 0.95), (1.3, 1.0)):
    draw(sample.token_sampler(temperature=t, top_p=p), jnp.asarray(_logits()))
  assert draw._cache_size() == 1


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: sample.Temperature(0), r"Temperature.value=0 .*greedy"),
    (lambda: sample.Temperature(float("nan")), "Temperature.value=nan"),
    (lambda: sample.TopK(0), "TopK.k=0"),
    (lambda: sample.TopP(1.5), r"TopP.p=1.5 must be in \(0, 1\]"),
    (lambda: sample.MinP(-0.1), "MinP.p=-0.1"),
    (lambda: sample.RepetitionPenalty(0.0), "penalty=0.0"),
    (lambda: sample.LogitBias.ban([_VOCAB], _VOCAB), "vocab_size=23"),
    (lambda: sample.LogitBias.ban(range(3), 3), "leave one"),
    (lambda: sample.TokenAutomaton(np.array([[0, 1], [-1, -1]])), r"states \[1\] allow no token"),
    (lambda: sample.TokenAutomaton(np.array([[0, 2], [0, 0]])), "states are 0..1"),
    (
      lambda: sample.TokenSampler((sample.TopK(3), sample.LogitBias(np.zeros(3)))),
      "LogitBias stands behind TopK",
    ),
  ],
)
def test_wrong_settings(make, message):
  with pytest.raises(ValueError, match=message):
    make()
