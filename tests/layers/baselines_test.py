"""The mixers that RetNet is compared with, each held to its own definition in float64.

Outputs and all gradients; then what every mixer of the decoder owes: causality, documents,
padding, and a pass that goes on from another.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab.layers import (
  BlockConfig,
  Context,
  FeedForwardConfig,
  H3Config,
  HyenaConfig,
  LinearAttentionConfig,
  PositionConfig,
  RwkvConfig,
  Shared,
  initializers,
)

WIDTH, LENGTH = 12, 11
SHARED = Shared(
  embed_dim=WIDTH,
  dtype=jnp.float32,
  init=initializers.make("fan_in", num_layers=1, embed_dim=WIDTH),
)
_HYENA = dict(embed_dim=WIDTH, filter_length=9, filter_dim=5, filter_features=5)
MIXERS = {
  "linear_attention": LinearAttentionConfig(num_heads=3, head_dim=4, chunk_size=4),
  "linear_attention_rope": LinearAttentionConfig(3, 4, PositionConfig("rope"), chunk_size=4),
  "rwkv": RwkvConfig(WIDTH, num_layers=3),
  "h3": H3Config(num_heads=3, head_dim=4, state_dim=6, max_step=1.0),
  "h3_chunks": H3Config(num_heads=3, head_dim=4, state_dim=6, max_step=1.0, chunk_size=4),
  "hyena": HyenaConfig(**_HYENA),
  "hyena_direct": HyenaConfig(**_HYENA, order=3, method="direct"),
}
ALL = pytest.mark.parametrize("name", MIXERS)
# Arithmetic that leaks the rounding of later tokens into earlier ones, and no more.
BY_FFT = ("hyena",)


def _linear_attention(config, p, x, turn):
  q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, p[f"{n}_proj"]["kernel"]) for n in "qkv")
  q, k = (jnp.where(a > 0, a + 1, jnp.exp(a)) for a in (q, k))
  scores = lambda q, k: jnp.tril(jnp.einsum("BTNH,BSNH->BNTS", q, k))
  weights = scores(turn(q), turn(k)) / (scores(q, k).sum(-1, keepdims=True) + config.eps)
  return jnp.einsum("BNTS,BSNV,NVD->BTD", weights, v, p["out_proj"]["kernel"])


def _turned(x):
  """RoPE on interleaved pairs, as products of complex numbers."""
  dim = x.shape[-1]
  theta = 10_000.0 ** (-jnp.arange(0, dim, 2) / dim)
  z = (x[..., ::2] + 1j * x[..., 1::2]) * jnp.exp(
    1j * jnp.arange(x.shape[1])[:, None, None] * theta
  )
  return jnp.stack([z.real, z.imag], -1).reshape(x.shape)


def _rwkv(config, p, x):
  before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  mixed = lambda n: (p[f"{n}_mix"] * x + (1 - p[f"{n}_mix"]) * before) @ p[f"{n}_proj"]["kernel"]
  r, k, v = mixed("r"), mixed("k"), mixed("v")
  # Equation 16, sums and all, of every pair of a token and one before it.
  gap = np.arange(x.shape[1])[:, None] - 1 - np.arange(x.shape[1])
  past = jnp.exp(k[:, None] - jnp.exp(p["log_decay"]) * np.maximum(gap, 0)[..., None])
  past, now = jnp.where((gap >= 0)[..., None], past, 0), jnp.exp(p["bonus"] + k)
  out = (jnp.einsum("BTSD,BSD->BTD", past, v) + now * v) / (past.sum(2) + now)
  return jax.nn.sigmoid(r) * out @ p["out_proj"]["kernel"]


def _h3(config, p, x):
  """Both state spaces as recurrences over states, the diagonal one over complex numbers."""
  q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, p[f"{n}_proj"]["kernel"]) for n in "qkv")
  batch = len(x)
  taps = p["shift"].reshape(config.state_dim, *k.shape[2:])
  a = -jnp.exp(p["log_decay"]) + 1j * p["angle"]
  step = jnp.exp(p["log_step"])[:, None]
  decay = jnp.exp(step * a)
  held = (p["real"] + 1j * p["imag"]) * (decay - 1) / a
  last = jnp.zeros((batch, *taps.shape), k.dtype)
  state = jnp.zeros((batch, *a.shape, config.head_dim, config.head_dim), decay.dtype)

  def step(carry, token):
    (last, state), (q, k, v) = carry, token
    last = jnp.concatenate([k[:, None], last[:, :-1]], 1)  # The shift, by its matrix's action.
    shifted = (taps * last).sum(1)
    kv = jnp.einsum("BNH,BNV->BNHV", shifted, v)
    state = decay[..., None, None] * state + kv[:, :, None]
    y = 2 * (held[..., None, None] * state).sum(2).real + p["skip"][:, None, None] * kv
    return (last, state), jnp.einsum("BNH,BNHV->BNV", q, y)

  tokens = [jnp.swapaxes(a, 0, 1) for a in (q, k, v)]
  _, out = jax.lax.scan(step, (last, state), tokens)
  return jnp.einsum("TBNV,NVD->BTD", out, p["out_proj"]["kernel"])


def _hyena(config, p, x):
  z = x @ p["in_proj"]["kernel"]
  taps = p["short_filter"]
  pad = jnp.pad(z, ((0, 0), (len(taps) - 1, 0), (0, 0)))
  z = sum(taps[j] * pad[:, len(taps) - 1 - j :][:, : x.shape[1]] for j in range(len(taps)))
  *gates, v = jnp.split(z + p["short_bias"], config.order + 1, axis=-1)
  t = np.arange(x.shape[1])[:, None]  # Distances, for each of which the network has an output.
  bands = (config.filter_features - 1) // 2
  f = np.linspace(1e-4, bands - 1, bands)
  turn = np.exp(-2j * np.pi * f * t / config.filter_length)
  h = np.concatenate([t / (config.filter_length - 1), turn.real, turn.imag], axis=1)
  for i in range(1 + config.filter_layers):
    h = jnp.sin(p["filter_frequency"] * (h @ p[f"filter_{i}"] + p[f"filter_bias_{i}"]))
  h = h @ p["filter_out"]
  # The fastest window is down to 1 % after `fast_decay` of the length, the slowest after its own.
  rates = np.linspace(1 / config.slow_decay, 1 / config.fast_decay, h.shape[-1])
  h *= 0.01 ** (t / (config.filter_length - 1) * rates)
  filters = jnp.split(h, config.order - 1, axis=-1)
  biases = jnp.split(p["bias"], config.order - 1)
  gap = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
  for gate, h, bias in zip(reversed(gates[1:]), filters, biases, strict=True):
    u = gate * v
    v = jnp.einsum("TSC,BSC->BTC", jnp.where((gap >= 0)[..., None], h[gap], 0), u) + bias * u
  return gates[0] * v @ p["out_proj"]["kernel"]


DEFINITIONS = {
  "linear_attention": functools.partial(_linear_attention, turn=lambda x: x),
  "linear_attention_rope": functools.partial(_linear_attention, turn=_turned),
  "rwkv": _rwkv,
  "h3": _h3,
  "h3_chunks": _h3,
  "hyena": _hyena,
  "hyena_direct": _hyena,
}


@functools.cache
def _params(name):
  """Initial values, moved a little, so that nothing is where it started by chance."""
  x = jnp.zeros((1, 2, WIDTH))
  module = MIXERS[name].module(SHARED, name="mixer")
  init = jax.jit(lambda key: module.init(key, x, Context(jnp.arange(2)[None])))
  rng = np.random.default_rng(2)
  return jax.tree.map(
    lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32),
    nn.unbox(init(jax.random.key(1)))["params"],
  )


@functools.partial(jax.jit, static_argnums=0)
def _run(name, params, x, cache=None, positions=None, **context):
  if positions is None:
    positions = jnp.arange(x.shape[1])[None]
  module = MIXERS[name].module(SHARED, name="mixer")
  return module.apply({"params": params}, x, Context(positions, **context), cache)


def _input(key, batch=2):
  return jax.random.normal(key, (batch, LENGTH, WIDTH))


def _close(got, want, tol, message=""):
  want = np.asarray(want, np.float64)
  np.testing.assert_allclose(got, want, rtol=tol, atol=tol * np.abs(want).max(), err_msg=message)


@ALL
def test_outputs_and_gradients_are_the_definitions(key, name):
  x, weights = _input(key), _input(jax.random.key(7))

  def run(f, weights, params, x):
    weighed = lambda *a: (jnp.vdot(weights, out := f(*a)), out)
    return jax.grad(weighed, (0, 1), has_aux=True)(params, x)

  got = jax.jit(functools.partial(run, lambda p, x: _run(name, p, x)[0], weights))(_params(name), x)
  with jax.enable_x64(True):
    args = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a, np.float64)), (weights, _params(name), x)
    )
    definition = functools.partial(DEFINITIONS[name], MIXERS[name])
    want = jax.jit(functools.partial(run, definition))(*args)
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert np.abs(b).max() > 0, path
    _close(a, b, 2e-4, jax.tree_util.keystr(path))


@ALL
def test_every_split_equals_one_pass(key, name):
  """Rows of 1 to 11 valid tokens, padding full of NaN, one cache; then token by token."""
  params, x = _params(name), jnp.broadcast_to(_input(key, 1), (LENGTH, LENGTH, WIDTH))
  want = _run(name, params, x[:2])[0][0]
  lengths = jnp.arange(1, LENGTH + 1)
  padded = (jnp.arange(LENGTH) >= lengths[:, None])[..., None]
  cache = MIXERS[name].init_cache(LENGTH, LENGTH, jnp.float32).grow(2 * LENGTH)
  out, cache = _run(name, params, jnp.where(padded, jnp.nan, x), cache, lengths=lengths)
  _close(jnp.where(padded, 0, out), jnp.where(padded, 0, want), 1e-4)
  for t in range(LENGTH - 1):
    here = jnp.minimum(lengths + t, LENGTH - 1)  # A row without a token left gets its last again.
    out, cache = _run(name, params, x[0, here][:, None], cache, positions=(lengths + t)[:, None])
    rows = LENGTH - 1 - t
    _close(out[:rows, 0], want[here[:rows]], 1e-4)


@ALL
def test_passes_of_several_tokens_go_on(key, name):
  params, x = _params(name), _input(key)
  want, _ = _run(name, params, x)
  cache = MIXERS[name].init_cache(2, LENGTH, jnp.float32)
  for start, stop in ((0, 5), (5, 8), (8, 11)):
    positions = jnp.arange(start, stop)[None]
    out, cache = _run(name, params, x[:, start:stop], cache, positions=positions)
    _close(out, want[:, start:stop], 1e-4)


@ALL
def test_the_future_changes_nothing_of_the_past(key, name):
  params, x = _params(name), _input(key)
  want, _ = _run(name, params, x)
  for t in (1, 6, 10):
    got, _ = _run(name, params, x.at[:, t].add(1))
    if name in BY_FFT:
      _close(got[:, :t], want[:, :t], 1e-5)
    else:
      np.testing.assert_array_equal(got[:, :t], want[:, :t])
    assert np.abs(got[:, t:] - want[:, t:]).max() > 1e-3


@ALL
def test_packed_documents_equal_documents_alone(key, name):
  params, x = _params(name), _input(key)
  ids = jnp.array([[1] * 4 + [2] * 5 + [1] * 2, [1] * 7 + [2] * 4])
  places = jnp.array([[*range(4), *range(5), *range(2)], [*range(7), *range(4)]])
  got, _ = _run(name, params, x, positions=places, segment_ids=ids)
  for row, start, stop in ((0, 0, 4), (0, 4, 9), (0, 9, 11), (1, 0, 7), (1, 7, 11)):
    # All are causal, so what follows a document does not matter, and one shape serves.
    alone, _ = _run(name, params, jnp.roll(x, -start, axis=1))
    _close(got[row, start:stop], alone[row, : stop - start], 1e-4)


@ALL
def test_caches_fork_and_states_are_float32(key, name):
  params, x = _params(name), _input(key)
  cache = MIXERS[name].init_cache(2, LENGTH, jnp.bfloat16)
  sizes = {a.shape for a in jax.tree.leaves(cache)}
  if not name.startswith("hyena"):  # All others remember the same however long the text is.
    longer = MIXERS[name].init_cache(2, 1000, jnp.bfloat16)
    assert {a.shape for a in jax.tree.leaves(longer)} == sizes
    assert {a.dtype for a in jax.tree.leaves(cache)} <= {
      jnp.dtype(jnp.float32),
      jnp.dtype(jnp.bfloat16),
    }
  cache = MIXERS[name].init_cache(2, LENGTH, jnp.float32)
  _, cache = _run(name, params, x[:, :5], cache, positions=jnp.arange(5)[None])
  more = jnp.flip(x[:, :1], 0)
  want, _ = _run(name, params, more, cache, positions=jnp.full((2, 1), 5))
  got, _ = _run(
    name,
    params,
    jnp.flip(more, 0),
    cache.reorder(jnp.array([1, 0])),
    positions=jnp.full((2, 1), 5),
  )
  _close(jnp.flip(got, 0), want, 1e-5)


def test_a_token_too_many_is_not_lost_in_silence(key):
  params, x = _params("hyena"), _input(key)
  cache = MIXERS["hyena"].init_cache(2, LENGTH, jnp.float32)
  _, cache = _run("hyena", params, x, cache, lengths=jnp.array([LENGTH, LENGTH - 1]))
  out, _ = _run("hyena", params, x[:, :1], cache)
  assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


@ALL
def test_a_mask_of_scores_is_refused(key, name):
  context = Context(jnp.arange(LENGTH)[None], allowed=jnp.ones((1, LENGTH, LENGTH), bool))
  with pytest.raises(ValueError, match="no score matrix"):
    MIXERS[name].module(SHARED, name="mixer").apply({"params": _params(name)}, _input(key), context)


@pytest.mark.parametrize("name", ["linear_attention", "rwkv", "h3", "hyena"])
@pytest.mark.parametrize("positions", ["rope", "xpos", "alibi"])
def test_pairs_without_meaning_are_refused(name, positions):
  config = functools.partial(
    {
      "linear_attention": LinearAttentionConfig,
      "rwkv": RwkvConfig,
      "h3": H3Config,
      "hyena": HyenaConfig,
    }[name],
    *{"linear_attention": (3, 4), "rwkv": (WIDTH, 1), "h3": (3,), "hyena": (WIDTH, 9)}[name],
    positions=PositionConfig(positions),
  )
  block = lambda: BlockConfig(config(), FeedForwardConfig(8))
  if (name, positions) == ("linear_attention", "rope"):
    block()
    return
  with pytest.raises(ValueError, match=f"'{name}' with positions '{positions}'"):
    block()


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: H3Config(2, state_dim=5), "state_dim=5"),
    (lambda: H3Config(2, min_step=0.2), "min_step=0.2"),
    (lambda: HyenaConfig(8, 8, order=1), "order=1"),
    (lambda: HyenaConfig(8, 8, filter_features=4), "filter_features=4"),
    (lambda: HyenaConfig(8, 8, method="dft"), "method='dft'"),
    (lambda: HyenaConfig(8, 1), "filter_length=1"),
  ],
)
def test_bad_fields_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_rwkv_starts_with_slow_and_fast_channels():
  """As the release has it, from e^-5 to e^3 a token in the first layer and in the last."""
  config = RwkvConfig(WIDTH, num_layers=3)
  for layer in (0, 2):
    context = Context(jnp.arange(2)[None], layer=layer)
    module = config.module(SHARED, name="mixer")
    init = jax.jit(functools.partial(module.init, x=jnp.zeros((1, 2, WIDTH)), context=context))
    p = nn.unbox(init(jax.random.key(0)))["params"]
    np.testing.assert_allclose(p["log_decay"][jnp.array([0, -1])], [-5, 3], atol=1e-5)
    np.testing.assert_allclose(
      jnp.sort(p["bonus"])[::4], math.log(0.3) + np.array([-0.5, 0, 0.5]), rtol=1e-5
    )
    np.testing.assert_allclose(p["v_mix"] - p["k_mix"], 0.3 * layer / 2, atol=1e-6)
    np.testing.assert_allclose(p["r_mix"] ** 2, p["k_mix"], atol=1e-5)
