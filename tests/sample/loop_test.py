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
_NEW, _BLOCK = 30, 4
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
  return _make("transformer", num_layers=1, embed_dim=16, num_heads=1)


@pytest.fixture(scope="module")
def prompts():
  return np.random.default_rng(0).integers(1, _VOCAB, (3, 5))


def _settings(key=3, stop_tokens=(_VOCAB, _VOCAB), **changes):
  """Of calls whose programs are the same, since compiling is what takes time here."""
  return (
    dict(sampler=_DRAWN, key=jax.random.key(key), max_new_tokens=_NEW, stop_tokens=stop_tokens)
    | changes
  )


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
    model,
    params,
    prompts,
    _LENGTHS,
    sampler=sample.token_sampler(greedy=True),
    key=jax.random.key(0),
    max_new_tokens=new,
  )
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
      model, params, prompts[i : i + 1], _LENGTHS[i : i + 1], key=keys[i : i + 1], **kwargs
    )
    _equal(alone, _rows(together, slice(i, i + 1)))
  turned = [2, 0, 1]
  _equal(
    sample.generate(
      model, params, prompts[turned], _LENGTHS[turned], key=keys[np.array(turned)], **kwargs
    ),
    _rows(together, np.array(turned)),
  )
  one_key = sample.generate(model, params, prompts, _LENGTHS, key=jax.random.key(7), **kwargs)
  _equal(one_key, together)


def test_stream_equals_generate(small, prompts):
  expected = sample.generate(*small, prompts, _LENGTHS, **_settings())
  blocks = list(sample.stream(*small, prompts, _LENGTHS, block_size=_BLOCK, **_settings()))
  assert [b.tokens.shape for b in blocks] == [(3, _BLOCK)] * 7 + [(3, 2)]
  assert [b.log_probs.shape for b in blocks] == [(3, _BLOCK)] * 7 + [(3, 2)]
  _equal(_joined(blocks), expected)


@pytest.mark.usefixtures("empty_jit_cache")
def test_prompts_in_slices_are_prompts_at_once(language_model, prompts):
  model, params = language_model
  more = sample.loop._read_more
  settings = dict(sampler=_DRAWN, key=jax.random.key(2), max_new_tokens=7, block_size=_BLOCK)
  rows = np.concatenate([prompts, prompts[::-1, :4]], axis=1)  # 9 tokens: four slices and a tail.
  read, programs = [], []
  for lengths in np.array([[9, 1, 4], [6, 8, 7], [2, 2, 9]]):
    want = _joined(sample.stream(model, params, rows, lengths, **settings))
    slices = sample.stream(
      model, params, rows, lengths, prefill_size=2, on_read=read.append, **settings
    )
    _equal(_joined(slices), want)
    programs.append(more._cache_size())
  # Shorter ones run the same programs, for rooms of caches come in whole slices.
  short = rows[:, :8], np.array([8, 8, 1])
  list(sample.stream(model, params, *short, prefill_size=2, **settings))
  programs.append(more._cache_size())
  assert read == [2] * 15 and len(set(programs)) == 1


def test_slices_divide_prompts(small, prompts):
  keys = sample.row_keys(0, np.arange(3))
  arrays = jnp.asarray(prompts), jnp.asarray(_LENGTHS), keys
  stepper = sample.TokenStepper(*small, np.zeros(0, np.int32))
  with pytest.raises(ValueError, match="size=2; pad them"):
    sample.begin_in_slices(stepper, _DRAWN, *arrays, 4, capacity=12, size=2)


def test_stop_tokens_finish_rows(small, prompts):
  free = sample.generate(*small, prompts, _LENGTHS, **_settings(11))
  stops = (int(free.tokens[0, 4]), int(free.tokens[2, 9]))
  settings = _settings(11, stops, pad_id=_VOCAB - 1)
  got = sample.generate(*small, prompts, _LENGTHS, **settings)
  for row in range(3):
    hits = np.flatnonzero(np.isin(free.tokens[row], stops))
    length = hits[0] + 1 if hits.size else _NEW
    assert got.lengths[row] == length and got.finished[row] == bool(hits.size)
    np.testing.assert_array_equal(got.tokens[row, :length], free.tokens[row, :length])
    np.testing.assert_allclose(
      got.log_probs[row, :length], free.log_probs[row, :length], rtol=1e-4, atol=1e-4
    )
    assert (got.tokens[row, length:] == _VOCAB - 1).all() and not got.log_probs[row, length:].any()
  assert got.lengths.min() < got.lengths.max()


def test_stream_ends_with_its_rows(small, prompts):
  free = sample.generate(*small, prompts[:, ::-1], np.full(3, 5), **_settings(1))
  settings = _settings(1, (int(free.tokens[0, 2]), int(free.tokens[1, 5])))
  settings["key"] = sample.row_keys(jax.random.key(1), np.array([0, 1, 0]))
  rows = prompts[[0, 1, 0], ::-1]
  blocks = list(sample.stream(*small, rows, np.full(3, 5), block_size=_BLOCK, **settings))
  assert blocks[-1].finished.all() and len(blocks) <= 2
  joined = _joined(blocks)
  expected = sample.generate(*small, rows, np.full(3, 5), **settings)
  _equal(_padded(joined, _NEW), expected)


def test_a_carry_can_be_saved_and_continued(small, prompts):
  settings = _settings(5)
  stepper = sample.TokenStepper(*small, np.array(settings["stop_tokens"], np.int32), np.int32(0))
  keys = sample.row_keys(settings["key"], np.arange(3))
  budget = 6
  arrays = jnp.asarray(prompts, jnp.int32), jnp.asarray(_LENGTHS, jnp.int32), keys
  first, carry = sample.begin(stepper, _DRAWN, *arrays, budget, capacity=5 + _NEW, num_items=_BLOCK)
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  saved = jax.tree.map(lambda x: np.array(jax.random.key_data(x) if is_key(x) else x), carry)
  second, _ = sample.advance(stepper, _DRAWN, carry, num_items=_BLOCK)
  assert all(x.is_deleted() for x in jax.tree.leaves(carry.cache))  # Donated.
  assert (second.lengths == budget - _BLOCK).all()
  restored = jax.tree.map(jnp.asarray, saved)
  restored = restored.replace(keys=jax.random.wrap_key_data(restored.keys))
  again, _ = sample.advance(stepper, _DRAWN, restored, num_items=_BLOCK)
  jax.tree.map(np.testing.assert_array_equal, again, second)
  whole = sample.generate(*small, prompts, _LENGTHS, **settings)
  _equal(
    jax.tree.map(lambda x: x[:, :budget] if x.ndim > 1 else x, _joined([first, again])),
    whole.replace(
      tokens=whole.tokens[:, :budget],
      log_probs=whole.log_probs[:, :budget],
      lengths=np.full(3, budget),
    ),
  )


def _padded(generated, width):
  widen = lambda x: np.pad(x, [(0, 0), (0, width - x.shape[1])])
  return generated.replace(tokens=widen(generated.tokens), log_probs=widen(generated.log_probs))


def test_automaton_constrains_generation(small, prompts):
  # Even, odd, ..., even; token 0, which is even, ends a row.
  even = np.arange(_VOCAB) % 2 == 0
  transitions = np.stack([np.where(even, 1, -1), np.where(even, -1, 0)])
  automaton = sample.TokenAutomaton(transitions, start=np.array([0, 1, 0]))
  got = sample.generate(
    *small,
    prompts,
    _LENGTHS,
    **_settings(0, (0,), sampler=sample.token_sampler(constraints=[automaton])),
  )
  for row, start in enumerate((0, 1, 0)):
    drawn = got.tokens[row, : got.lengths[row]]
    np.testing.assert_array_equal(drawn % 2, (np.arange(len(drawn)) + start) % 2)
  assert got.lengths.min() > 1


@pytest.mark.usefixtures("empty_jit_cache")
def test_one_compilation(small, prompts):
  for i in range(3):
    sampler = sample.token_sampler(
      temperature=0.5 + 0.1 * i, min_p=0.01 * i, repetition_penalty=1.1 + i
    )
    settings = _settings(i, (i, i + 1), sampler=sampler, pad_id=i)
    sample.generate(*small, np.roll(prompts, i), np.roll(_LENGTHS, i), **settings)
    for _ in sample.stream(*small, prompts, _LENGTHS, block_size=_BLOCK, **settings):
      pass
    if i == 0:
      sizes = sample.begin._cache_size(), sample.advance._cache_size()
  assert (sample.begin._cache_size(), sample.advance._cache_size()) == sizes


class _LatentStepper(struct.PyTreeNode):
  """A model of vectors: features are the running sum of all items, a negative sum ends a row."""

  pad: float = -7.0

  def prefill(self, prompts, lengths, capacity):
    valid = (jnp.arange(prompts.shape[1]) < lengths[:, None])[..., None]
    total = (prompts * valid).sum(axis=1)
    return total, total

  def extend(self, prompts, lengths, cache):
    total, _ = self.prefill(prompts, lengths, 0)
    return cache + total, cache + total

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
  carry = sample.begin_in_slices(stepper, sampler, prompts, lengths, keys, 8, capacity=10, size=1)
  sliced, _ = sample.advance(stepper, sampler, carry, num_items=8)
  np.testing.assert_allclose(sliced.tokens["z"], whole.tokens["z"], rtol=1e-5)
  for row, n in enumerate(whole.lengths):
    np.testing.assert_array_equal(whole.tokens["count"][row, :n], np.arange(n))
    assert (whole.tokens["z"][row, n:] == -7).all() and (whole.tokens["count"][row, n:] == -7).all()


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
    (dict(lengths=np.array([1, 0, 2])), r"rows \[1\] .* bos_id"),
    (dict(lengths=np.array([1, 6, 2])), "exceeds the width"),
    (dict(lengths=np.array([1, 2])), "one length per row"),
    (dict(key=sample.row_keys(0, np.arange(2))), "one key per row"),
    (dict(prompts=np.full((3, 5), _VOCAB)), "vocab_size=29"),
  ],
)
@pytest.mark.usefixtures("empty_jit_cache")
def test_errors_come_before_compilation(small, prompts, change, message):
  before = sample.begin._cache_size()
  args = dict(
    prompts=prompts, lengths=_LENGTHS, sampler=_DRAWN, key=jax.random.key(0), max_new_tokens=4
  )
  for function in (sample.generate, sample.stream):
    with pytest.raises(ValueError, match=message):
      function(*small, **(args | change))
  assert sample.begin._cache_size() == before


def test_context_is_checked_where_positions_end(prompts):
  fields = dict(num_layers=1, embed_dim=8, num_heads=1, max_length=16)
  for positions, limited in (("learned", True), ("sinusoidal", False), ("rope", False)):
    config = models.build_config(
      dict(name="transformer", positions=positions, **fields), vocab_size=_VOCAB
    )
    check = lambda new, model: sample.stream(
      model, {}, prompts, sampler=_DRAWN, key=jax.random.key(0), max_new_tokens=new
    )
    check(11, models.LanguageModel(config))  # Nothing is computed before the first block is asked.
    if limited:
      with pytest.raises(ValueError, match="max_new_tokens=12 .* at most 11 new tokens"):
        check(12, models.LanguageModel(config))
    else:
      check(12, models.LanguageModel(config))
