"""The loop: against full passes, against itself in blocks and in other batches, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from latentlab import models, sample

_VOCAB = 29
_SIZES = dict(num_layers=2, embed_dim=32, num_heads=2)
_LENGTHS = np.array([5, 1, 3])
_DRAWN = sample.token_sampler(temperature=1.2, min_p=0.01, repetition_penalty=1.1)


def _make(name, **fields):
  config = models.build_config({"name": name, **_SIZES, **fields}, vocab_size=_VOCAB)
  model = models.LanguageModel(config)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  # At initialisation logits are nearly flat; sharper ones make a wrong cache show in the argmax.
  return model, jax.tree.map(lambda x: 3 * x, params)


@pytest.fixture(scope="module", params=["transformer", "retnet"])
def language_model(request):
  return _make(request.param)


@pytest.fixture(scope="module")
def small():
  return _make("retnet", num_layers=1, embed_dim=16, num_heads=1)


@pytest.fixture(scope="module")
def prompts():
  return np.random.default_rng(0).integers(1, _VOCAB, (3, 5))


def _equal(a, b):
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.lengths, b.lengths)
  np.testing.assert_array_equal(a.finished, b.finished)
  np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-4)


def _rows(generated, rows):
  return jax.tree.map(lambda x: x[rows], generated)


def _joined(blocks):
  blocks = list(blocks)
  return sample.Generated(
    tokens=np.concatenate([b.tokens for b in blocks], 1),
    lengths=sum(b.lengths for b in blocks),
    finished=blocks[-1].finished,
    log_probs=np.concatenate([b.log_probs for b in blocks], 1),
  )


def test_greedy_equals_full_passes(language_model, prompts):
  model, params = language_model
  new = 12
  got = sample.generate(
    model, params, prompts, _LENGTHS, sampler=sample.token_sampler(greedy=True),
    key=jax.random.key(0), max_new_tokens=new)
  # Right padding is invisible to causal models, so one width serves every step.
  full = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens).logits))
  tokens = np.zeros((3, 5 + new), np.int32)
  tokens[:, :5] = np.where(np.arange(5) < _LENGTHS[:, None], prompts, 0)
  rows = np.arange(3)
  for i in range(new):
    log_probs = np.asarray(full(tokens))[rows, _LENGTHS + i - 1]
    tokens[rows, _LENGTHS + i] = log_probs.argmax(-1)
    np.testing.assert_allclose(got.log_probs[:, i], log_probs.max(-1), rtol=1e-3, atol=1e-3)
  expected = np.stack([row[n : n + new] for row, n in zip(tokens, _LENGTHS, strict=True)])
  np.testing.assert_array_equal(got.tokens, expected)
  assert (got.lengths == new).all() and not got.finished.any()
  assert len(np.unique(expected)) > 3  # Not stuck on one token.


def test_rows_do_not_depend_on_the_batch(language_model, prompts):
  model, params = language_model
  keys = sample.row_keys(7, np.arange(3))
  kwargs = dict(sampler=_DRAWN, max_new_tokens=10, stop_tokens=(3,))
  together = sample.generate(model, params, prompts, _LENGTHS, key=keys, **kwargs)
  for i in range(3):
    alone = sample.generate(
      model, params, prompts[i : i + 1], _LENGTHS[i : i + 1], key=keys[i : i + 1], **kwargs)
    _equal(alone, _rows(together, slice(i, i + 1)))
  narrow = sample.generate(
    model, params, prompts[1:2, :1], key=keys[1:2], **kwargs)  # Without the padding.
  _equal(narrow, _rows(together, slice(1, 2)))
  turned = [2, 0, 1]
  _equal(sample.generate(
    model, params, prompts[turned], _LENGTHS[turned], key=keys[np.array(turned)], **kwargs),
    _rows(together, np.array(turned)))
  one_key = sample.generate(model, params, prompts, _LENGTHS, key=jax.random.key(7), **kwargs)
  _equal(one_key, together)


@pytest.mark.parametrize("block_size", [1, 4])
def test_stream_equals_generate(small, prompts, block_size):
  kwargs = dict(sampler=_DRAWN, key=jax.random.key(3), max_new_tokens=13)
  expected = sample.generate(*small, prompts, _LENGTHS, **kwargs)
  blocks = list(sample.stream(*small, prompts, _LENGTHS, block_size=block_size, **kwargs))
  assert [b.tokens.shape[1] for b in blocks[:-1]] == [block_size] * (len(blocks) - 1)
  _equal(_joined(blocks), expected)


def test_stream_ends_with_its_rows(small, prompts):
  kwargs = dict(sampler=_DRAWN, key=jax.random.key(3), max_new_tokens=400, stop_tokens=(2, 5, 7))
  blocks = list(sample.stream(*small, prompts, _LENGTHS, block_size=8, **kwargs))
  assert blocks[-1].finished.all() and len(blocks) < 50
  joined, expected = _joined(blocks), sample.generate(*small, prompts, _LENGTHS, **kwargs)
  width = joined.tokens.shape[1]
  _equal(joined, expected.replace(
    tokens=expected.tokens[:, :width], log_probs=expected.log_probs[:, :width]))


def test_stop_tokens_finish_rows(small, prompts):
  kwargs = dict(sampler=_DRAWN, key=jax.random.key(11), max_new_tokens=30, pad_id=_VOCAB - 1)
  free = sample.generate(*small, prompts, _LENGTHS, **kwargs)
  stops = (int(free.tokens[0, 4]), int(free.tokens[2, 9]))
  got = sample.generate(*small, prompts, _LENGTHS, stop_tokens=stops, **kwargs)
  for row in range(3):
    hits = np.flatnonzero(np.isin(free.tokens[row], stops))
    length = hits[0] + 1 if hits.size else 30
    assert got.lengths[row] == length and got.finished[row] == bool(hits.size)
    np.testing.assert_array_equal(got.tokens[row, :length], free.tokens[row, :length])
    np.testing.assert_allclose(
      got.log_probs[row, :length], free.log_probs[row, :length], rtol=1e-4, atol=1e-4)
    assert (got.tokens[row, length:] == _VOCAB - 1).all() and not got.log_probs[row, length:].any()
  assert got.lengths.min() < got.lengths.max()


def test_a_carry_can_be_saved_and_continued(language_model, prompts):
  model, params = language_model
  stepper = sample.TokenStepper(model, params, np.array([3], np.int32))
  keys = sample.row_keys(5, np.arange(3))
  arrays = jnp.asarray(prompts), jnp.asarray(_LENGTHS), keys
  first, carry = sample.begin(stepper, _DRAWN, *arrays, 12, capacity=17, num_items=5)
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  saved = jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), carry)
  expected = jax.tree.map(np.asarray, sample.advance(stepper, _DRAWN, carry, num_items=9)[0])
  restored = carry.replace(**{
    f: jax.tree.map(jnp.asarray, getattr(saved, f)) for f in saved.__dataclass_fields__})
  restored = restored.replace(keys=jax.random.wrap_key_data(restored.keys, impl="threefry2x32"))
  got, carry = sample.advance(stepper, _DRAWN, restored, num_items=9)
  _equal(got, expected)
  assert (np.maximum(first.lengths + got.lengths, 0) <= 12).all()  # The budget, not 5 + 9.
  _equal(_joined([first, got]), _padded(sample.generate(
    model, params, prompts, _LENGTHS, sampler=_DRAWN, key=keys, max_new_tokens=12,
    stop_tokens=(3,)), 14))


def _padded(generated, width):
  widen = lambda x: np.pad(x, [(0, 0), (0, width - x.shape[1])])
  return generated.replace(
    tokens=widen(generated.tokens), log_probs=widen(generated.log_probs))


def test_automaton_constrains_generation(small, prompts):
  # Even, odd, ..., even: ends by token 0 behind an even token only.
  even = np.arange(_VOCAB) % 2 == 0
  transitions = np.stack([np.where(even, -1, 1), np.where(even, 0, -1)])
  transitions[0, 0] = 0
  automaton = sample.TokenAutomaton(transitions, start=np.array([0, 1, 0]))
  sampler = sample.token_sampler(constraints=[automaton])
  got = sample.generate(
    *small, prompts, _LENGTHS, sampler=sampler, key=jax.random.key(0), max_new_tokens=40,
    stop_tokens=(0,))
  for row, start in enumerate((0, 1, 0)):
    state = start
    for token in got.tokens[row, : got.lengths[row]]:
      assert transitions[state, token] >= 0
      state = transitions[state, token]


def test_one_compilation(small, prompts):
  for i in range(3):
    sampler = sample.token_sampler(temperature=0.5 + 0.1 * i, top_p=0.8 + 0.05 * i)
    kwargs = dict(sampler=sampler, key=jax.random.key(i), max_new_tokens=9, stop_tokens=(i,))
    if i == 1:
      sizes = sample.begin._cache_size(), sample.advance._cache_size()
    sample.generate(*small, prompts, np.roll(_LENGTHS, i), pad_id=i, **kwargs)
    for _ in sample.stream(*small, prompts, _LENGTHS, block_size=2, **kwargs):
      pass
  assert (sample.begin._cache_size(), sample.advance._cache_size()) == sizes


def test_carry_is_donated(small, prompts):
  stepper = sample.TokenStepper(*small, np.zeros(0, np.int32))
  _, carry = sample.begin(
    stepper, _DRAWN, jnp.asarray(prompts), jnp.asarray(_LENGTHS), sample.row_keys(0, np.arange(3)),
    8, capacity=13, num_items=4)
  sample.advance(stepper, _DRAWN, carry, num_items=4)
  assert all(x.is_deleted() for x in jax.tree.leaves(carry.cache))


class _LatentStepper(struct.PyTreeNode):
  """A model of vectors: features are the running sum of all items, a negative sum ends a row."""

  pad: float = -7.0

  def prefill(self, prompts, lengths, capacity):
    valid = (jnp.arange(prompts.shape[1]) < lengths[:, None])[..., None]
    total = (prompts * valid).sum(axis=1)
    return total, total

  def step(self, item, cache):
    return cache + item["z"], cache + item["z"]

  def ends(self, item):
    return item["z"].sum(axis=-1) < -1.0


class _LatentSampler(struct.PyTreeNode):
  def init(self, prompts, lengths):
    return jnp.zeros_like(lengths)

  def __call__(self, features, row_state, keys):
    z = 0.5 * features + jax.vmap(lambda k: jax.random.normal(k, features.shape[1:]))(keys)
    item = {"z": z, "count": row_state}
    return sample.Draw(item, -0.5 * jnp.square(z).sum(-1)), row_state + 1


def test_items_may_be_latents():
  prompts, lengths = jnp.ones((4, 2, 3)), jnp.array([2, 1, 2, 1])
  stepper, sampler = _LatentStepper(), _LatentSampler()
  keys = sample.row_keys(2, np.arange(4))
  whole, _ = sample.begin(stepper, sampler, prompts, lengths, keys, 8, capacity=10, num_items=8)
  assert whole.tokens["z"].shape == (4, 8, 3) and whole.tokens["count"].shape == (4, 8)
  first, carry = sample.begin(stepper, sampler, prompts, lengths, keys, 8, capacity=10, num_items=3)
  second, _ = sample.advance(stepper, sampler, carry, num_items=5)
  z = np.concatenate([first.tokens["z"], second.tokens["z"]], axis=1)
  np.testing.assert_allclose(z, whole.tokens["z"], rtol=1e-5)
  for row, n in enumerate(whole.lengths):
    np.testing.assert_array_equal(whole.tokens["count"][row, :n], np.arange(n))
    assert (whole.tokens["z"][row, n:] == -7).all() and (whole.tokens["count"][row, n:] == -7).all()


@pytest.mark.parametrize("change, message", [
  (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
  (dict(lengths=np.array([1, 0, 2])), r"rows \[1\] .* bos_id"),
  (dict(lengths=np.array([1, 6, 2])), "exceeds the width"),
  (dict(lengths=np.array([1, 2])), "one length per row"),
  (dict(key=sample.row_keys(0, np.arange(2))), "one key per row"),
  (dict(prompts=np.full((3, 5), _VOCAB)), "vocab_size=29"),
])
def test_errors_come_before_compilation(small, prompts, change, message):
  before = sample.begin._cache_size()
  args = dict(
    prompts=prompts, lengths=_LENGTHS, sampler=_DRAWN, key=jax.random.key(0), max_new_tokens=4)
  for function in (sample.generate, sample.stream):
    with pytest.raises(ValueError, match=message):
      function(*small, **(args | change))
  assert sample.begin._cache_size() == before


def test_context_is_checked_where_positions_end(prompts):
  small, params = _make(
    "transformer", num_layers=1, embed_dim=8, num_heads=1, positions="learned", max_length=16)
  kwargs = dict(sampler=_DRAWN, key=jax.random.key(0))
  with pytest.raises(ValueError, match="at most 11 new tokens"):
    sample.generate(small, params, prompts, max_new_tokens=12, **kwargs)
  got = sample.generate(small, params, prompts, max_new_tokens=11, **kwargs)
  assert np.isfinite(got.log_probs).all()
