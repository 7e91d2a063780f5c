"""Decoding costs what it should: one program, caches where they lie, states that do not grow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import models, sample

_VOCAB, _SIZES = 31, dict(num_layers=2, embed_dim=64, num_heads=2)
BOTH = pytest.mark.parametrize("name", ["transformer", "retnet"])


_fork = jax.jit(lambda cache, indices: cache.fork(indices))
_prefill = jax.jit(lambda stepper, *args: stepper.prefill(*args, 9))
_step = jax.jit(lambda stepper, token, cache: stepper.step(token, cache))


@functools.cache
def _stepper(name):
  config = models.build_config(dict(name=name, **_SIZES), vocab_size=_VOCAB)
  model = models.LanguageModel(config)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
  return sample.TokenStepper(model, params, np.zeros(0, np.int32), np.int32(0))


@pytest.mark.usefixtures("empty_jit_cache")
def test_a_decode_step_compiles_once_and_its_state_keeps_its_bytes():
  stepper, programs, held = _stepper("retnet").unstacked(), [], []
  step = jax.jit(lambda stepper, *args: stepper.step(*args), donate_argnums=2)
  cache = models.init_cache(stepper.model.config, 2, 1)  # The room that is asked for is unused.
  for _ in range(40):
    _, cache = step(stepper, jnp.array([3, 5]), cache)
    programs.append(step._cache_size())
    held.append(cache.num_bytes)
  assert set(programs) == {1} and len(set(held)) == 1
  np.testing.assert_array_equal(cache.lengths, 40)


@BOTH
def test_the_loop_writes_caches_where_they_are(name):
  """All of a donated cache comes back in its own memory, and no second one is held meanwhile."""
  stepper = _stepper(name).unstacked()
  capacity = 500
  keys, arrays = sample.row_keys(0, np.arange(2)), (jnp.ones((2, 7), jnp.int32), jnp.array([7, 4]))
  greedy = sample.token_sampler(greedy=True)
  begin = functools.partial(sample.begin, capacity=capacity, num_items=2)
  _, carry = jax.eval_shape(begin, stepper, greedy, *arrays, keys, 90)
  held = sample.advance.lower(stepper, greedy, carry, num_items=5).compile().memory_analysis()
  cache = carry.cache.num_bytes
  assert held.alias_size_in_bytes >= cache > 50_000
  assert held.temp_size_in_bytes < 0.5 * cache


@BOTH
def test_unstacked_layers_are_the_same_model(name):
  stepper = _stepper(name)
  apart = stepper.unstacked()
  assert len(apart.model.config.decoder.stages) == 2
  size = lambda params: sum(x.size for x in jax.tree.leaves(params))
  assert size(apart.params) == size(stepper.params)
  prompts, lengths = jnp.array([[4, 9, 2, 7], [1, 3, 0, 0]]), jnp.array([4, 2])
  caches = []
  for s in (stepper, apart):
    logits, cache = _prefill(s, prompts, lengths)
    more, cache = _step(s, jnp.array([5, 6]), cache)
    caches.append((logits, more, _fork(cache, jnp.array([1, 0, 1]))))
  (logits, more, stacked), (logits_apart, more_apart, fork) = caches
  np.testing.assert_allclose(logits_apart, logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(more_apart, more, rtol=1e-5, atol=1e-5)
  for r in range(2):
    layer = jax.tree.map(lambda x, r=r: np.asarray(x)[r], stacked.stages[0][0])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), fork.stages[r][0], layer
    )
  # What has nothing stacked is left alone.
  assert apart.unstacked().model == apart.model
  with pytest.raises(ValueError, match="make a stage of each"):
    models.language_model.Stage(stepper.model.config.decoder.stages[0].pattern, 2, stacked=False)


@BOTH
def test_a_fresh_cache_is_what_it_is_without_being_told(name):
  stepper = _stepper(name)
  model, variables = stepper.model, {"params": stepper.params}
  tokens, lengths = jnp.array([[4, 9, 2, 7, 7], [1, 3, 0, 0, 0]]), jnp.array([5, 2])
  cache = models.init_cache(model.config, 2, 8)
  options = dict(lengths=lengths, cache=cache)
  both = lambda variables: [
    model.apply(variables, tokens, **options, fresh=fresh) for fresh in (True, False)
  ]
  told, not_told = jax.jit(both)(variables)
  for row, n in enumerate(np.asarray(lengths)):
    got, want = (np.asarray(x.logits)[row, :n] for x in (told, not_told))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  _, a = _step(stepper, jnp.array([5, 6]), told.cache)
  _, b = _step(stepper, jnp.array([5, 6]), not_told.cache)
  np.testing.assert_array_equal(a.lengths, b.lengths)
  want, _ = _step(stepper, jnp.array([8, 8]), b)
  got, _ = _step(stepper, jnp.array([8, 8]), a)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
