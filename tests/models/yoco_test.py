"""YOCO's must-show list: one cache, early exit, layouts, and what a cross-decoder costs."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab.layers import AttentionConfig, Context, RingCache, Shared, initializers
from latentlab.models import (
  LanguageModel,
  build_config,
  decode_step,
  init_cache,
  num_params,
  prefill,
  score_prompts,
  unstack,
)
from latentlab.ops import Mask
from latentlab.sample import generate, token_sampler

VOCAB = 23
SIZES = dict(name="yoco", num_layers=4, embed_dim=32, num_heads=4, num_kv_heads=2, unroll=1)
VARIANTS = {
  "gated": dict(num_self_heads=2),
  "window": dict(self_attention="sliding_window", window=5),
  "diff_both": dict(
    self_attention="diff_sliding_window", window=4, cross_attention="diff_attention"
  ),
  "diff_v2_cross": dict(cross_attention="diff_attention_v2", num_self_kv_heads=1),
  "no_self": dict(num_self_layers=0),
  "unstacked": dict(layout="unstacked"),
  "interleaved": dict(layout="interleaved"),
}


@functools.cache
def _model(variant, **fields):
  model = LanguageModel(build_config(SIZES | VARIANTS[variant] | fields, VOCAB))
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens))["params"]
  # Larger than at the start, so that attention prefers some keys to others.
  return model, jax.tree.map(lambda x: 2 * x if x.ndim > 3 else x, params)


def _tokens(length, batch=2):
  return jax.random.randint(jax.random.key(7), (batch, length), 0, VOCAB)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens):
  return model.apply({"params": params}, tokens).logits


_prefill = jax.jit(prefill, static_argnames=("model", "max_length", "early_exit", "tile"))
_step = jax.jit(decode_step, static_argnums=0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_yoco_05_06_early_exit_slices_and_tokens_are_one_pass(variant):
  """Of ragged prompts, in slices of any sizes, then token by token."""
  model, params = _model(variant)
  tokens = np.asarray(_tokens(21))
  want = np.asarray(_logits(model, params, tokens))
  lengths = np.array([9, 6])
  got, _ = _prefill(model, params, tokens[:, :9], lengths, max_length=21)
  np.testing.assert_allclose(got, want[[0, 1], lengths - 1], rtol=2e-5, atol=2e-5)
  cache = init_cache(model.config, 2, 21)
  start = np.zeros(2, int)
  for sizes in ((4, 1), (1, 3), (4, 2)):
    piece = np.zeros((2, 4), int)
    for row, size in enumerate(sizes):
      piece[row, :size] = tokens[row, start[row] : start[row] + size]
    got, cache = _prefill(model, params, piece, np.array(sizes), cache=cache)
    start += sizes
    np.testing.assert_allclose(got, want[[0, 1], start - 1], rtol=2e-5, atol=2e-5)
  np.testing.assert_array_equal(start, lengths)
  for _ in range(11):
    token = tokens[[0, 1], start]
    got, cache = _step(model, params, token, cache)
    np.testing.assert_allclose(got, want[[0, 1], start], rtol=5e-5, atol=5e-5)
    start += 1


@pytest.mark.parametrize("variant", ["gated", "diff_both"])
def test_yoco_06_early_exit_by_tiles_is_full_prefill_bit_for_bit(variant):
  model, params = _model(variant)
  tokens, lengths = _tokens(21, batch=3), np.array([21, 16, 6])
  options = dict(max_length=24, tile=8)
  early, full = (
    _prefill(model, params, tokens, lengths, early_exit=e, **options) for e in (True, False)
  )
  jax.tree.map(np.testing.assert_array_equal, early, full)
  pairs = [_logits(model, params, tokens[np.array(rows)]) for rows in ([0, 1], [2, 2])]
  want = jnp.concatenate(pairs)[jnp.arange(3), lengths - 1]
  np.testing.assert_allclose(early[0], want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variant", ["gated", "diff_both"])
def test_yoco_06_greedy_continuations_do_not_depend_on_early_exit(variant):
  model, params = _model(variant)
  tokens, lengths = _tokens(9), np.array([9, 4])
  sampler = token_sampler(greedy=True)
  options = dict(sampler=sampler, key=jax.random.key(0), max_new_tokens=8)
  got = generate(model, params, tokens, lengths, **options).tokens
  text, rows = np.zeros((2, 21), np.int32), np.arange(2)
  text[:, :9] = tokens
  for i in range(8):
    logits = _logits(model, params, jnp.asarray(text))
    text[rows, lengths + i] = logits[rows, lengths + i - 1].argmax(-1)
  for row, n in enumerate(lengths):
    np.testing.assert_array_equal(got[row], text[row, n : n + 8])


@pytest.mark.parametrize("cross_attention", ["attention", "diff_attention"])
def test_positions_of_an_earlier_pass_are_not_taken_for_slots(cross_attention):
  """A cache with gaps between positions decodes by them, whether or not the token tells its own."""
  model, params = _model("no_self", cross_attention=cross_attention)
  tokens, positions = _tokens(9), jnp.broadcast_to(3 * jnp.arange(9), (2, 9))
  run = jax.jit(lambda t, p, c: model.apply({"params": params}, t, p, cache=c))
  cache = run(tokens[:, :8], positions[:, :8], init_cache(model.config, 2, 9)).cache
  told = jnp.full((2, 1), 8)
  got, want = run(tokens[:, 8:], None, cache), run(tokens[:, 8:], told, cache)
  np.testing.assert_allclose(got.logits, want.logits, atol=2e-5)


def test_yoco_06_prompt_log_probabilities_need_the_whole_cross_decoder():
  model, params = _model("gated")
  whole, lengths = _tokens(21), jnp.array([9, 5])
  tokens = whole[:, :9]
  with pytest.raises(ValueError, match="early_exit=True"):
    score_prompts(model, params, tokens, early_exit=True)
  got, last, cache = jax.jit(score_prompts, static_argnums=0)(model, params, tokens, lengths)
  logits = _logits(model, params, whole)[:, :9]
  want = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], 2)[..., 0]
  want = jnp.where(jnp.arange(1, 9) < lengths[:, None], want, 0)
  np.testing.assert_allclose(got[:, 1:], want, atol=2e-5)
  np.testing.assert_array_equal(got[:, 0], 0)
  np.testing.assert_allclose(last, logits[jnp.arange(2), lengths - 1], atol=2e-5)
  np.testing.assert_array_equal(cache.lengths, lengths)


def _products(model, length, early_exit):
  """Rows that each layer's feed-forward multiplies, read from the traced program."""
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  run = functools.partial(prefill, model, early_exit=early_exit)
  jaxpr = jax.make_jaxpr(run)(nn.unbox(params), tokens)
  width, rows = model.config.decoder.stages[0].pattern[0].feed_forward.mlp_dim, []

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape[-1] == width:
        rows.append(eqn.outvars[0].aval.size // width)
      for sub in jax.extend.core.jaxprs_in_params(eqn.params):
        visit(sub)

  visit(jaxpr.jaxpr)
  return rows


def test_yoco_06_cross_layers_run_for_one_row():
  """Rows of the feed-forward's first two products: of every layer N, or N and 1 by halves."""
  model, params = _model("gated")
  flat = LanguageModel(unstack(model.config, params)[0])
  assert _products(flat, 32, early_exit=False) == [32, 32] * 4
  assert _products(flat, 32, early_exit=True) == [32, 32] * 2 + [1, 1] * 2


def _numbers(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("num_layers", [4, 10])
def test_yoco_07_cache_sizes_are_the_law(num_layers):
  """`2 h_kv d N`, and half of the layers' states or windows; whatever the cross layers are."""
  batch, length, d, kv, window = 3, 40, 8, 2, 5
  half = num_layers // 2
  gated = build_config(SIZES | dict(num_layers=num_layers, num_self_heads=2), VOCAB)
  cache = jax.eval_shape(lambda: init_cache(gated, batch, length))
  assert _numbers((cache.shared.k, cache.shared.v)) == batch * 2 * kv * d * length
  assert _numbers(cache.stages) == batch * half * 2 * 16 * 16
  assert {x.dtype for x in jax.tree.leaves(cache.stages)} == {jnp.dtype("float32")}
  # Beside them stand a position of each slot, and lengths of the rows.
  assert _numbers(cache) == _numbers((cache.shared.k, cache.shared.v, cache.stages)) + batch * (
    length + 2
  )
  ring = build_config(
    SIZES | dict(num_layers=num_layers, self_attention="sliding_window", window=window), VOCAB
  )
  cache = jax.eval_shape(lambda: init_cache(ring, batch, length))
  assert _numbers((cache.shared.k, cache.shared.v)) == batch * 2 * kv * d * length
  (ring,) = cache.stages[0]
  assert isinstance(ring, RingCache)
  assert _numbers((ring.k, ring.v)) == batch * half * 2 * window * 4 * d
  assert not jax.tree.leaves(cache.stages[1])


def test_yoco_07_decoding_writes_one_row():
  model, params = _model("gated")
  _, cache = _prefill(model, params, _tokens(9), np.array([9, 9]), max_length=21)
  _, after = _step(model, params, jnp.array([1, 2]), cache)
  for name in ("k", "v", "positions"):
    old, new = getattr(cache.shared, name), getattr(after.shared, name)
    changed = np.asarray(old != new).reshape(2, 21, -1).any(-1)
    np.testing.assert_array_equal(changed, np.arange(21) == [[9], [9]])


@pytest.mark.parametrize("variant", ["gated", "diff_both"])
def test_yoco_08_shared_kernels_have_the_sum_of_all_layers_gradients(variant):
  """By differences of fourth order along a direction; one layer's share alone is far off."""
  model, params = _model(variant)
  tokens, shared = _tokens(8), params["decoder"]["shared_kv"]
  weight = jax.random.normal(jax.random.key(2), (2, 8, VOCAB))

  @jax.jit
  @jax.value_and_grad
  def loss_and_gradient(shared):
    own = params | dict(decoder=params["decoder"] | dict(shared_kv=shared))
    return jnp.sum(weight * model.apply({"params": own}, tokens).logits)

  loss = lambda shared: loss_and_gradient(shared)[0]
  _, grads = loss_and_gradient(shared)
  for name in ("k_proj", "v_proj"):
    kernel = shared[name]["kernel"]
    direction = jax.random.normal(jax.random.key(3), kernel.shape)
    near, far = (
      (loss(shared | {name: dict(kernel=kernel + e * direction)}) for e in (h, -h))
      for h in (0.005, 0.01)
    )
    want = (8 * (next(near) - next(near)) - (next(far) - next(far))) / 0.06
    np.testing.assert_allclose(jnp.sum(grads[name]["kernel"] * direction), want, rtol=1e-2)


def test_yoco_05_no_token_sees_a_later_one():
  tokens = _tokens(21)
  for variant in ("gated", "window", "diff_both", "unstacked", "interleaved"):
    model, params = _model(variant)
    other = tokens.at[:, 7].set((tokens[:, 7] + 1) % VOCAB)
    a, b = (_logits(model, params, t) for t in (tokens, other))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (np.abs(a[:, 7:] - b[:, 7:]).max((0, 2)) > 0).all()


def test_yoco_04_a_window_ends_where_it_says():
  """Key `i - C + 1` is the oldest that query `i` sees; a window as long as the text is causal."""
  x = jax.random.normal(jax.random.key(2), (1, 11, 16))
  shared = Shared(16, jnp.float32, initializers.make("fan_in", num_layers=1, embed_dim=16))

  def layer(mask):
    return AttentionConfig(4, 4, num_kv_heads=2, mask=mask).module(shared, name="mixer")

  def outputs(mask, x):
    return layer(mask).apply({"params": params}, x, context)[0][0]

  context = Context(jnp.arange(11)[None], in_place=True)
  params = nn.unbox(layer(Mask("causal")).init(jax.random.key(1), x, context))["params"]
  window = Mask("sliding_window", 4)
  influence = jax.jit(jax.jacobian(functools.partial(outputs, window)))(x)[:, :, 0]  # T D S D
  distance = np.arange(11)[:, None] - np.arange(11)
  np.testing.assert_array_equal(np.abs(influence).max((1, 3)) > 0, (distance >= 0) & (distance < 4))
  for size in (11, 20):
    got = outputs(Mask("sliding_window", size), x)
    np.testing.assert_allclose(got, outputs(Mask("causal"), x), atol=1e-5)
  assert np.abs(outputs(window, x) - outputs(Mask("causal"), x)).max() > 1e-2


def test_packed_documents_are_rows_of_their_own():
  rows = _tokens(21)  # Of which the first 5 and the first 8 are documents.
  tokens = jnp.concatenate([rows[0, :5], rows[1, :8]])[None]
  ids = jnp.array([[1] * 5 + [2] * 8])
  for variant in ("gated", "diff_both", "unstacked"):
    model, params = _model(variant)
    run = jax.jit(lambda p: model.apply({"params": p}, tokens, segment_ids=ids).logits)  # noqa: B023
    packed, alone = run(params)[0], _logits(model, params, rows)
    np.testing.assert_allclose(packed[:5], alone[0, :5], atol=2e-5)
    np.testing.assert_allclose(packed[5:], alone[1, :8], atol=2e-5)


# Non-embedding parameters; the papers' D, L and heads are the presets'.
@pytest.mark.parametrize(
  "name, preset, billions, digits",
  [
    ("yoco", "3b", 2.83, 2),
    ("diff_transformer", "830m", 0.679, 2),
    ("diff_transformer", "1b4", 1.208, 2),
    ("diff_transformer", "2b8", 2.52, 2),
    ("diff_transformer", "6b8", 6.45, 2),  # 6.442 at 8/3 D, which we round up to 32.
    ("diff_transformer", "13b1", 12.59, 2),  # 12.58.
    ("diff_transformer", "3b", 3.171, 3),
  ],
)
def test_yoco_10_diff_08_sizes_are_the_papers(name, preset, billions, digits):
  count = num_params(build_config(dict(name=name, preset=preset), vocab_size=100_288))
  assert round((count["body"] + count["norms"]) / 1e9, digits) == round(billions, digits)


@pytest.mark.parametrize("num_self_layers", range(4))
def test_yoco_10_every_ratio_is_built(num_self_layers):
  config = build_config(SIZES | dict(num_self_layers=num_self_layers), VOCAB)
  shared = [b.mixer.kind for s in config.decoder.stages for b in s.pattern * s.repeats]
  assert shared == ["retention"] * num_self_layers + ["attention"] * (4 - num_self_layers)
  assert num_params(config)["total"] > 0


def test_yoco_10_a_feed_forward_of_3d_has_a_transformers_parameters():
  """Exactly with a window's projections; 6 % more with gated retention's, of 12 layers."""
  sizes = dict(num_layers=12, embed_dim=768, num_heads=12)
  body = lambda **fields: num_params(build_config(sizes | fields, 100))["body"]
  transformer = 12 * 12 * 768**2
  window = body(name="yoco", self_attention="sliding_window")
  # Self layers 4 + 9, cross layers 2 + 9 and one pair of shared projections: 12 on average.
  assert window == transformer + 2 * 768**2
  gated = body(name="yoco", num_self_heads=3)
  assert gated == window + 6 * (768**2 + 768 * 3)
  assert round(gated / transformer, 2) == 1.06


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(self_attention="mamba"), "self_attention='mamba'"),
    (dict(cross_attention="retention"), "cross_attention='retention'"),
    (dict(layout="parallel"), "layout='parallel'"),
    (dict(num_self_layers=4), "num_self_layers=4"),
    (dict(layout="interleaved", num_self_layers=1), "num_self_layers=1"),
    (dict(num_self_heads=5), "num_self_heads=5"),
    (dict(num_self_heads=0), "num_self_heads=0"),
    (dict(num_kv_heads=0), "num_kv_heads=0"),
    (dict(mlp_dim=0), "mlp_dim=0"),
    (dict(positions="alibi"), "'retention' with positions 'alibi'"),
    (dict(self_attention="sliding_window", window=0), "size=0"),
    (dict(tau=0.0), "tau"),
  ],
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    build_config(SIZES | fields, VOCAB)


def test_a_decoder_refuses_stages_that_do_not_fit_its_shared_keys():
  decoder = build_config(SIZES, VOCAB).decoder
  replace = functools.partial(dataclasses.replace, decoder)
  for fields, message in (
    (dict(num_self_stages=0), "mixers with shared_kv=True"),
    (dict(num_self_stages=2), "num_self_stages=2"),
    (dict(shared_kv=None), "belong to a decoder with shared_kv"),
    (dict(cross_input="tokens"), "cross_input"),
    (dict(shared_kv=dataclasses.replace(decoder.shared_kv, num_kv_heads=4)), "are others"),
  ):
    with pytest.raises(ValueError, match=message):
      replace(**fields)
