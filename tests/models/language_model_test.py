"""Both models: one pass, prefill and decode are one function; and the presets' sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab.models import (
  LanguageModel,
  build_config,
  decode_step,
  flops_per_token,
  init_cache,
  num_params,
  prefill,
)

VOCAB = 23
SIZES = dict(num_layers=2, embed_dim=32, num_heads=4, unroll=1)
VARIANTS = {
  "transformer": dict(name="transformer", **SIZES, num_kv_heads=2),
  "transformer_xpos": dict(name="transformer", **SIZES, positions="xpos", xpos_scale_base=8.0),
  "transformer_alibi": dict(name="transformer", **SIZES, positions="alibi"),
  "transformer_sinusoidal": dict(name="transformer", **SIZES, positions="sinusoidal"),
  "transformer_learned": dict(
    name="transformer", **SIZES, positions="learned", max_length=32, tie_embeddings=True
  ),
  "transformer_window": dict(name="transformer", **SIZES, mask="sliding_window", mask_size=3),
  "transformer_blockwise": dict(name="transformer", **SIZES, mask="blockwise_causal", mask_size=3),
  "retnet": dict(name="retnet", **SIZES, chunk_size=4),
  "retnet_paper": dict(name="retnet", **SIZES, normalization="paper", decay="pow2"),
  "retnet_decay": dict(name="retnet", **SIZES, normalization="decay", gate=False),
}
ALL = pytest.mark.parametrize("name", VARIANTS)
BOTH = pytest.mark.parametrize("name", ["transformer", "retnet"])


@functools.cache
def _model(name):
  model = LanguageModel(build_config(VARIANTS[name], vocab_size=VOCAB))
  tokens = jnp.zeros((1, 2), jnp.int32)
  return model, nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens))["params"]


def _tokens(key, batch=2, length=11):
  return jax.random.randint(key, (batch, length), 0, VOCAB)


@functools.partial(jax.jit, static_argnums=0)
def _one_pass(model, params, tokens, positions=None, segment_ids=None):
  return model.apply({"params": params}, tokens, positions, segment_ids).logits


@pytest.mark.slow
@ALL
@pytest.mark.usefixtures("empty_jit_cache")
def test_retnet_04_prefill_and_decode_equal_one_pass_at_every_split(key, name):
  """All splits in one ragged batch, so a prompt's padding is not seen either."""
  model, params = _model(name)
  length = 11
  tokens = np.broadcast_to(_tokens(key, 1, length), (length, length))
  want = np.asarray(_one_pass(model, params, tokens[:2])[0])
  lengths = np.arange(1, length + 1)
  logits, cache = jax.jit(functools.partial(prefill, model, max_length=2 * length))(
    params, tokens, lengths
  )
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)
  step = jax.jit(functools.partial(decode_step, model))
  for t in range(1, length):
    logits, cache = step(params, tokens[0, (lengths - 1 + t).clip(max=length - 1)], cache)
    np.testing.assert_allclose(np.asarray(logits)[: length - t], want[t:], rtol=1e-4, atol=1e-4)
  assert step._cache_size() == 1  # One program, however long the sequence.
  np.testing.assert_array_equal(cache.lengths, lengths + length - 1)


@pytest.mark.parametrize("name", ["transformer_xpos", "transformer_blockwise", "retnet_paper"])
def test_prefill_in_pieces_equals_one_pass(key, name):
  model, params = _model(name)
  tokens = _tokens(key)
  want = _one_pass(model, params, tokens)
  cache = init_cache(model.config, 2, 11)
  more = jax.jit(lambda p, t, cache: prefill(model, p, t, cache=cache))
  for start, stop in ((0, 4), (4, 8), (8, 11)):
    logits, cache = more(params, tokens[:, start:stop], cache)
    np.testing.assert_allclose(logits, want[:, stop - 1], rtol=1e-4, atol=1e-4)


@BOTH
def test_forked_and_reordered_rows_go_on_as_their_source(key, name):
  model, params = _model(name)
  tokens = _tokens(key, 2, 6)
  step = jax.jit(functools.partial(decode_step, model))
  _, cache = jax.jit(functools.partial(prefill, model, max_length=9))(
    params, tokens, jnp.array([6, 3])
  )
  indices, more = jnp.array([1, 0, 1]), jnp.array([4, 5, 6])
  logits, forked = step(params, more, cache.fork(indices))
  for row, (source, token) in enumerate(zip(indices, more, strict=True)):
    alone, _ = step(params, jnp.array([token, token]), cache)
    np.testing.assert_allclose(logits[row], alone[source], rtol=1e-5, atol=1e-5)
  order = jnp.array([2, 0, 1])
  again, _ = step(params, more[order], forked.reorder(order))
  straight, _ = step(params, more, forked)
  np.testing.assert_allclose(again, straight[order], rtol=1e-5, atol=1e-5)


@ALL
def test_retnet_05_the_future_changes_no_bit_of_the_past(key, name):
  """Through head norms, feed-forwards and all: bit for bit, and in the gradient too."""
  model, params = _model(name)
  tokens = _tokens(key)
  want = _one_pass(model, params, tokens)
  for t in (3, 7, 10):
    changed = tokens.at[:, t].set((tokens[:, t] + 1) % VOCAB)
    got = _one_pass(model, params, changed)
    np.testing.assert_array_equal(got[:, :t], want[:, :t])
    assert np.abs(got[:, t:] - want[:, t:]).max() > 1e-4


@ALL
def test_packed_documents_equal_documents_alone(key, name):
  model, params = _model(name)
  tokens = _tokens(key)
  segment_ids = jnp.array([[0] * 4 + [1] * 5 + [2] * 2] * 2)
  positions = jnp.array([[*range(4), *range(5), *range(2)]] * 2)
  got = _one_pass(model, params, tokens, positions=positions, segment_ids=segment_ids)
  for start, stop in ((0, 4), (4, 9), (9, 11)):
    # Causal models: what follows a document does not matter, so one shape serves all three.
    alone = _one_pass(model, params, jnp.roll(tokens, -start, axis=1))
    np.testing.assert_allclose(got[:, start:stop], alone[:, : stop - start], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["transformer", "transformer_xpos", "transformer_alibi", "retnet"])
def test_relative_positions_do_not_care_for_the_origin(key, name):
  model, params = _model(name)
  tokens = _tokens(key)
  positions = jnp.broadcast_to(jnp.arange(11), tokens.shape)
  want = _one_pass(model, params, tokens)
  got = _one_pass(model, params, tokens, positions=positions + 100)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_absolute_positions_do(key):
  model, params = _model("transformer_sinusoidal")
  tokens = _tokens(key)
  shifted = jnp.broadcast_to(jnp.arange(11), tokens.shape) + 100
  got = _one_pass(model, params, tokens, positions=shifted)
  assert np.abs(got - _one_pass(model, params, tokens)).max() > 1e-2


@pytest.mark.slow
@BOTH
def test_losses_and_their_gradients_equal_those_of_the_logits(key, name):
  model, params = _model(name)
  chunked = LanguageModel(dataclasses.replace(model.config, loss_chunk_size=7))
  tokens, targets = _tokens(key), _tokens(jax.random.key(3))

  def naive(p):
    log_probs = jax.nn.log_softmax(model.apply({"params": p}, tokens).logits)
    return -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]

  def ours(m):
    return lambda p: m.apply({"params": p}, tokens, targets, method="token_losses")

  def both(losses):
    mean = lambda p: ((x := losses(p)).mean(), x)
    return jax.jit(jax.grad(mean, has_aux=True))(params)

  want_grads, want = both(naive)
  for m in (model, chunked):
    grads, losses = both(ours(m))
    np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, want_grads
    )


def test_retnet_12_decode_memory_is_constant_for_retnet_and_linear_for_the_transformer():
  size = lambda name, length: init_cache(_model(name)[0].config, 2, length).num_bytes
  assert size("retnet", 64) == size("retnet", 4096)
  # 2 layers, 2 rows, k and v of 2 heads of 8 in float32, and a position.
  assert size("transformer", 4096) - size("transformer", 64) == 4032 * 2 * 2 * (2 * 2 * 8 * 4 + 4)


def test_more_tokens_than_room_are_not_lost_in_silence(key):
  model, params = _model("transformer")
  fill = jax.jit(functools.partial(prefill, model, max_length=3))
  _, cache = fill(params, _tokens(key, 2, 3), jnp.array([3, 2]))
  step = jax.jit(functools.partial(decode_step, model))
  logits = np.asarray(step(params, jnp.array([1, 1]), cache)[0])
  assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()
  with pytest.raises(ValueError, match="max_length=2"):
    prefill(model, params, _tokens(key, 2, 3), max_length=2)


def test_positions_beyond_the_learned_ones_are_not_clipped_in_silence(key):
  model, params = _model("transformer_learned")
  assert np.isnan(_one_pass(model, params, _tokens(key, 1, 33))[0, 32]).all()
  assert np.isfinite(_one_pass(model, params, _tokens(key, 1, 32))).all()


@pytest.mark.parametrize(
  "preset, body",
  [("200m", 201e6), ("1b3", 1.21e9), ("2b7", 2.52e9), ("6b7", 6.44e9), ("13b", 12.6e9)],
)
def test_retnet_10_preset_bodies_have_the_papers_sizes(preset, body):
  counts = {
    name: num_params(build_config(dict(name=name, preset=preset), vocab_size=1000))
    for name in ("transformer", "retnet")
  }
  config = build_config(dict(name="retnet", preset=preset), vocab_size=1000).decoder
  for count in counts.values():
    assert count["body"] == 12 * config.num_layers * config.embed_dim**2
    assert abs(count["body"] / body - 1) < 0.01
    assert count["norms"] < 0.001 * count["body"]
  assert counts["transformer"]["total"] == counts["retnet"]["total"]
  mixer = config.stages[0].pattern[0].mixer
  assert (mixer.head_dim, mixer.value_head_dim) == (256, 512)


def test_removing_the_gate_reverts_to_the_transformers_split():
  config = build_config(
    dict(name="retnet", preset="200m", gate=False, value_factor=1.0), vocab_size=10
  )
  block = config.decoder.stages[0].pattern[0]
  assert (block.mixer.value_head_dim, block.feed_forward.mlp_dim) == (256, 4096)
  assert num_params(config)["body"] == 12 * 16 * 1024**2


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(name="lstm"), r"choose one of \['diff_transformer', 'diff_transformer_v2', 'h3'"),
    (dict(name="retnet", preset="9b"), "unknown config.model.preset='9b'"),
    (dict(name="retnet", preset="1b3", num_head=3), "num_heads"),
    (dict(name="transformer", num_layers=2), r"lacks \['embed_dim', 'num_heads'\]"),
    (dict(name="transformer", num_layers=1, embed_dim=10, num_heads=3), "num_heads=3"),
  ],
)
def test_bad_model_sections_say_what_is_possible(fields, message):
  with pytest.raises(ValueError, match=message):
    build_config(fields, vocab_size=10)


def test_flops_are_those_of_the_matmuls():
  config = build_config(dict(name="transformer", preset="200m"), vocab_size=1000)
  body = 12 * 16 * 1024**2
  attention = 16 * 4 * 1024 * 1024  # 2 products of L/2 keys of width d, multiply and add.
  assert flops_per_token(config, 2048) == 2 * body + attention + 2 * 1024 * 1000
