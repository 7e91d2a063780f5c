"""Transformers of every position scheme: masks of inference, sizes, and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import ops
from latentlab.layers import AttentionConfig, RingCache, initializers
from latentlab.layers.attention import keys_seen
from latentlab.layers.common import Context, Shared
from latentlab.models import (
  LanguageModel,
  build_config,
  decode_step,
  flops_per_token,
  init_cache,
  num_params,
  prefill,
)

VOCAB, HALF = 23, 3
_DEPTH = dict(num_layers=1, embed_dim=8)
SIZES = dict(
  name="transformer", num_layers=2, embed_dim=16, num_heads=2, train_length=2 * HALF, unroll=1
)
SCHEMES = {
  "xpos": dict(positions="xpos"),
  "xpos_half": dict(positions="xpos", rope_layout="half", num_kv_heads=1),
  "xpos_decay": dict(positions="xpos", xpos_rotation=False),
  "xpos_center": dict(positions="xpos", xpos_center=20),
  "rope": dict(positions="rope"),
  "alibi": dict(positions="alibi"),
  "sinusoidal": dict(positions="sinusoidal"),
}
MASKS = ("blockwise_causal", "sliding_window")


@functools.cache
def _params(scheme):
  """Larger than at the start, so that attention prefers some keys to others."""
  model = LanguageModel(build_config(SIZES | SCHEMES[scheme], VOCAB))
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32)))["params"]
  return jax.tree.map(lambda x: 3 * x if x.ndim > 3 else x, params)


def _model(scheme, mask="causal"):
  config = build_config(SIZES | SCHEMES[scheme] | dict(mask=mask), VOCAB)
  return LanguageModel(config), _params(scheme)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, **options):
  return model.apply({"params": params}, tokens, **options).logits


def _tokens(length, batch=2):
  return jax.random.randint(jax.random.key(7), (batch, length), 0, VOCAB)


def _written_out(model, params, tokens):
  """All scores at once, by positions that the model is told."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return _logits(model, params, tokens, positions=positions)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scheme", ["xpos", "alibi"])
def test_lex_05_layers_of_windows_are_layers_of_the_mask(scheme, mask):
  model, params = _model(scheme, mask)
  tokens = _tokens(23)
  want = _written_out(model, params, tokens)
  np.testing.assert_allclose(_logits(model, params, tokens), want, atol=1e-4)
  causal = _logits(*_model(scheme), tokens)
  reach = 2 * HALF
  np.testing.assert_allclose(causal[:, :reach], want[:, :reach], atol=1e-4)
  assert np.abs(causal[:, reach:] - want[:, reach:]).max() > 1e-2


@functools.partial(jax.jit, static_argnums=0)
def _read(model, params, tokens, cache, positions=None):
  out = model.apply({"params": params}, tokens, positions, cache=cache)
  return out.logits, out.cache


@pytest.mark.slow
@pytest.mark.parametrize(
  "scheme, mask",
  [("xpos_half", "blockwise_causal"), ("xpos", "sliding_window"), ("alibi", "blockwise_causal")],
)
def test_lex_05_prefill_in_pieces_then_token_by_token_is_one_pass(scheme, mask):
  """Of two layers, at every token; the cache never exceeds the trained length."""
  model, params = _model(scheme, mask)
  tokens = np.asarray(_tokens(23))
  want = np.asarray(_written_out(model, params, tokens))
  for pieces in ((17,), (6, 11), (2, 6, 1, 11)):
    cache, start = init_cache(model.config, 2, 23), 0
    for size in (*pieces, *[1] * (23 - sum(pieces))):
      logits, cache = _read(model, params, tokens[:, start : start + size], cache)
      np.testing.assert_allclose(logits, want[:, start : start + size], atol=1e-4)
      start += size
    (ring,) = cache.stages[0]
    assert isinstance(ring, RingCache) and ring.k.shape[2] == 2 * HALF


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.usefixtures("empty_jit_cache")
def test_lex_05_ragged_prompts_of_every_length(mask):
  """Rows of 1 to 23 tokens in one padded batch, and then token by token."""
  length = 23
  model, params = _model("xpos", mask)
  tokens = np.broadcast_to(_tokens(length, 1), (length, length))
  want = np.asarray(_written_out(model, params, tokens[:2])[0])
  lengths = np.arange(1, length + 1)
  fill = jax.jit(functools.partial(prefill, model, max_length=60))
  logits, cache = fill(params, tokens, lengths)
  np.testing.assert_allclose(logits, want, atol=1e-4)
  step = jax.jit(functools.partial(decode_step, model))
  for t in range(1, length):
    logits, cache = step(params, tokens[0, (lengths - 1 + t).clip(max=length - 1)], cache)
    np.testing.assert_allclose(np.asarray(logits)[: length - t], want[t:], atol=1e-4)
  assert step._cache_size() == 1
  # More prompt behind prompts of different lengths, ragged again.
  _, cache = fill(params, tokens[:4, :9], np.array([1, 4, 7, 9]))
  more = np.stack([tokens[0, n : n + 8] for n in (1, 4, 7, 9)])
  lengths = np.array([8, 1, 5, 8])
  then = jax.jit(lambda *a, cache: prefill(model, *a, cache=cache))
  logits, _ = then(params, more, lengths, cache=cache)
  np.testing.assert_allclose(logits, want[np.array([8, 4, 11, 16])], atol=1e-4)


def test_lex_05_forked_rows_go_on_as_their_source():
  model, params = _model("xpos", "blockwise_causal")
  tokens = _tokens(14)
  want = _written_out(model, params, tokens)
  _, cache = _read(model, params, tokens[:, :11], init_cache(model.config, 2, 20))
  rows = jnp.array([1, 0, 1])
  cache = cache.fork(rows).grow(40)
  for t in range(11, 14):
    logits, cache = _read(model, params, tokens[rows, t : t + 1], cache)
    np.testing.assert_allclose(logits[:, 0], want[rows, t], atol=1e-4)


@pytest.mark.parametrize(
  "scheme, mask", [("xpos_decay", "causal"), ("xpos_center", "blockwise_causal")]
)
def test_lex_02_every_xpos_is_the_same_by_cache_and_in_place(scheme, mask):
  model, params = _model(scheme, mask)
  tokens = _tokens(15)
  want = _written_out(model, params, tokens)
  np.testing.assert_allclose(_logits(model, params, tokens), want, atol=1e-4)
  logits, cache = _read(model, params, tokens[:, :10], init_cache(model.config, 2, 15))
  np.testing.assert_allclose(logits, want[:, :10], atol=1e-4)
  for t in range(10, 15):
    logits, cache = _read(model, params, tokens[:, t : t + 1], cache)
    np.testing.assert_allclose(logits[:, 0], want[:, t], atol=1e-4)


def test_lex_02_a_center_changes_nothing():
  tokens = _tokens(15)
  centered = LanguageModel(build_config(SIZES | SCHEMES["xpos_center"], VOCAB))
  want = _logits(*_model("xpos"), tokens)
  np.testing.assert_allclose(_logits(centered, _params("xpos"), tokens), want, atol=1e-4)


def test_lex_04_decoding_a_million_tokens_in():
  """A cache filled at the start goes on at a million as if it were near, in bfloat16 too."""
  for dtype, tolerance in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.1)):
    config = build_config(SIZES | dict(positions="xpos", dtype=dtype), VOCAB)
    model, params, tokens = LanguageModel(config), _params("xpos"), _tokens(9)
    want = _logits(model, params, tokens)
    far = jnp.broadcast_to(2**20 + jnp.arange(9), (2, 9))
    cache = init_cache(config, 2, 9)
    logits, cache = _read(model, params, tokens[:, :5], cache, far[:, :5])
    np.testing.assert_allclose(logits, want[:, :5], atol=tolerance)
    for t in range(5, 9):
      logits, cache = _read(model, params, tokens[:, t : t + 1], cache, far[:, t : t + 1])
      np.testing.assert_allclose(logits[:, 0], want[:, t], atol=tolerance)


def test_lex_08_no_scheme_costs_parameters_or_matmuls():
  for sizes, length in (
    (dict(preset="lex"), 1024),
    (dict(num_layers=3, embed_dim=64, num_heads=4), 64),
  ):
    schemes = [x for name, x in SCHEMES.items() if name != "xpos_half"]
    configs = [
      build_config(dict(name="transformer", train_length=length) | sizes | x, 32_000)
      for x in schemes
    ]
    assert len({num_params(c)["total"] for c in configs}) == 1
    assert len({flops_per_token(c, 4 * length) for c in configs}) == 1
    assert configs[0].decoder.stages[0].pattern[0].mixer.positions.scale_base == length / 2
  # The paper's model: 12 L d^2, and blocks that see one and a half of their size on average.
  assert num_params(build_config(dict(name="transformer", preset="lex"), 32_000))["body"] == (
    12 * 24 * 1024**2
  )
  blocks, full = (
    build_config(SIZES | dict(mask=m), VOCAB).decoder.flops_per_token(100)
    for m in ("blockwise_causal", "causal")
  )
  assert full - blocks == pytest.approx(2 * 4 * (50 - 1.5 * HALF) * 16)
  assert keys_seen(ops.Mask("full"), 100) == 100


@pytest.mark.parametrize("scheme", ["xpos", "rope", "alibi", "sinusoidal"])
def test_lex_10_padding_on_either_side_changes_nothing_but_for_sinusoidal(scheme):
  """Absolute embeddings see where the padding ends: the property that they lack (table 1)."""
  model, params = _model(scheme)
  tokens = _tokens(9)
  want = _logits(model, params, tokens)
  padded = jnp.pad(tokens, ((0, 0), (5, 3)), constant_values=11)
  hidden = jnp.pad(jnp.zeros((2, 9)), ((0, 0), (5, 3)), constant_values=-jnp.inf)
  got = _logits(model, params, padded, key_bias=hidden)[:, 5:14]
  if scheme == "sinusoidal":
    assert np.abs(got - want).max() > 1e-2
  else:
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_sizes_of_masks_and_decay_follow_the_trained_length():
  build = lambda **fields: build_config(SIZES | dict(train_length=7) | fields, VOCAB)
  mixer = lambda config: config.decoder.stages[0].pattern[0].mixer
  assert mixer(build(mask="blockwise_causal")).mask.size == 4  # Rounded up: an odd length too.
  assert mixer(build(mask="sliding_window")).mask.size == 7
  assert mixer(build(mask="sliding_window", mask_size=2)).mask.size == 2
  assert mixer(build(positions="xpos")).positions.scale_base == 3.5
  assert mixer(build(positions="xpos", xpos_scale_base=9.0)).positions.scale_base == 9
  for fields, message in (
    (dict(positions="xpos", train_length=None), "needs train_length"),
    (dict(mask="blockwise_causal", train_length=None), "size=None"),
    (dict(mask="banded"), "kind='banded'"),
    (dict(mask="full"), "mask='full'"),
  ):
    with pytest.raises(ValueError, match=message):
      build(**fields)


@pytest.mark.parametrize("affine, eps", [(True, 1e-5), (False, 0.3)])
def test_a_norm_of_each_head_follows_attention(affine, eps):
  """By hand, from the heads of attention without it."""
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  shared = Shared(embed_dim=8, dtype=jnp.float32, init=initializers.make("linear", **_DEPTH))
  context = Context(positions=jnp.arange(5)[None], in_place=True)
  apply = lambda mixer, params: jax.jit(lambda p: mixer.apply({"params": p}, x, context)[0])(params)
  norm = dict(head_norm=True, head_norm_affine=affine, head_norm_eps=eps)
  plain, normed = (
    AttentionConfig(num_heads=2, head_dim=4, **fields).module(shared, name="mixer")
    for fields in ({}, norm)
  )
  params = nn.unbox(jax.jit(lambda key: normed.init(key, x, context))(jax.random.key(1)))["params"]
  assert ("head_norm" in params) == affine
  kernel, scale = params["out_proj"]["kernel"], jnp.array([0.5, 2.0, -1.0, 3.0] if affine else 1.0)
  if affine:
    params["head_norm"] = {"scale": scale}
  as_it_is = {"kernel": np.eye(8, dtype=np.float32).reshape(2, 4, 8)}
  heads = apply(plain, params | {"out_proj": as_it_is})
  heads = np.float64(heads).reshape(2, 5, 2, 4)
  heads /= np.sqrt(np.square(heads).mean(-1, keepdims=True) + eps)
  want = np.einsum("btnh,nhd->btd", heads * np.float64(scale), np.float64(kernel))
  np.testing.assert_allclose(apply(normed, params), want, atol=1e-5)


def test_a_norm_of_each_head_decodes():
  norm = dict(head_norm=True, head_norm_affine=False, head_norm_eps=0.1)
  config = build_config(SIZES | norm, VOCAB)
  mixer = config.decoder.stages[0].pattern[0].mixer
  assert {field: getattr(mixer, field) for field in norm} == norm
  model, tokens = LanguageModel(config), _tokens(6)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens))["params"]
  want = _logits(model, params, tokens)
  cache, pieces = init_cache(config, 2, 6), []
  for begin, end in ((0, 3), (3, 4), (4, 6)):
    logits, cache = _read(model, params, tokens[:, begin:end], cache)
    pieces.append(logits)
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=1e-5)
