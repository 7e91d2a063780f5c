"""Gated retention as a layer: its definition, saturated gates, padding, and long decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab.layers import Context, PositionConfig, RetentionConfig, Shared
from latentlab.layers.initializers import make
from latentlab.models import LanguageModel, build_config
from pallas_kernels.retention import reference, retention

WIDTH, LENGTH = 12, 19
GATED = RetentionConfig(
  num_heads=2,
  head_dim=6,
  value_head_dim=6,
  positions=PositionConfig("rope", grid="linspace"),
  decay="gated",
  head_norm_eps=1e-5,
)
SHARED = Shared(WIDTH, jnp.float32, make("fan_in", num_layers=2, embed_dim=WIDTH))


def _init(config=GATED, length=LENGTH):
  x = jax.random.normal(jax.random.key(0), (2, length, WIDTH))
  module = config.module(SHARED, name="mixer")
  params = jax.jit(module.init)(jax.random.key(1), x, _context(length))["params"]
  return module, nn.unbox(params), x


def _context(length=LENGTH, **fields):
  return Context(jnp.arange(length)[None], in_place=True, **fields)


def test_yoco_01_the_layer_is_its_definition():
  """Equations 4, 6 and 8, token by token, in float64; the token itself is not decayed."""
  module, params, x = _init()
  got, _ = jax.jit(lambda p, x: module.apply({"params": p}, x, _context()))(params, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  project = lambda name: np.tensordot(x, p[name]["kernel"], 1)
  angles = np.arange(LENGTH)[:, None] * 10_000.0 ** -np.linspace(0, 1, 3)
  cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

  def turn(a):
    one, two = a[..., ::2], a[..., 1::2]
    return np.stack([one * cos - two * sin, two * cos + one * sin], axis=-1).reshape(a.shape)

  q, k, v = turn(project("q_proj")), turn(project("k_proj")) / np.sqrt(6), project("v_proj")
  gamma = (1 / (1 + np.exp(-project("decay_proj")))) ** (1 / 16)
  want = np.zeros_like(v)
  for b in range(2):
    for n in range(2):
      state = np.zeros((6, 6))
      for t in range(LENGTH):
        state = gamma[b, t, n] * state + np.outer(k[b, t, n], v[b, t, n])
        want[b, t, n] = q[b, t, n] @ state
  want /= np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
  gate = project("gate_proj")
  want *= gate / (1 + np.exp(-gate))
  np.testing.assert_allclose(got, np.tensordot(want, p["out_proj"]["kernel"], 2), atol=2e-5)


@pytest.mark.parametrize("logit", [1e3, -1e3])
def test_yoco_02_saturated_gates_in_every_form(logit):
  """All open: linear attention. All shut: a token sees itself alone. Gradients are finite."""
  keys = jax.random.split(jax.random.key(2), 4)
  q, k, v, d_out = (jax.random.normal(key, (1, 40, 2, 8)) for key in keys)
  logits = jnp.full((1, 40, 2), logit)

  def run(form, logits):
    log_decay = jax.nn.log_sigmoid(logits) / 16
    out = form(q, k, v, log_decay)
    out = out[0] if isinstance(out, tuple) else out
    return jnp.sum(out * d_out), out

  scores = jnp.einsum("BTNH,BSNH->BNTS", q, k)
  seen = jnp.tri(40) if logit > 0 else jnp.eye(40)
  want = jnp.einsum("BNTS,BSNV->BTNV", scores * seen, v)
  forms = (reference.recurrent, lambda *a: retention(*a, chunk_size=16))
  grads = []
  for form in forms:
    grad, out = jax.jit(jax.grad(lambda x, f=form: run(f, x), has_aux=True))(logits)
    # exp(-1000 / 16) is no exact zero.
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    grads.append(grad)
  assert all(np.isfinite(g).all() for g in grads)
  np.testing.assert_allclose(*grads, atol=1e-5)


def test_yoco_03_padding_neither_decays_nor_writes():
  module, params, x = _init()
  run = jax.jit(lambda x, **k: module.apply({"params": params}, x, **k))
  cache = GATED.init_cache(2, LENGTH, jnp.float32)
  lengths = jnp.array([19, 11])
  _, padded = run(x, context=_context(lengths=lengths), cache=cache)
  _, alone = run(x[:, :11], context=_context(11), cache=cache)
  np.testing.assert_allclose(padded.state[1], alone.state[1], atol=1e-5)
  nothing = _context(lengths=jnp.zeros(2, jnp.int32))
  _, same = run(x, context=nothing, cache=padded)
  np.testing.assert_array_equal(same.state, padded.state)


def test_yoco_11_a_float32_state_does_not_drift_over_16k_steps():
  """Beside one of bfloat16, whose drift the assertion's message tells."""
  length = 2**14
  keys = jax.random.split(jax.random.key(3), 4)
  q, k, v = (jax.random.normal(key, (1, length, 1, 4)) for key in keys[:3])
  log_decay = jax.nn.log_sigmoid(8 + jax.random.normal(keys[3], (1, length, 1))) / 16

  def decode(dtype):
    def step(state, token):
      out, state = reference.decode(*token, state.astype(jnp.float32))
      return state.astype(dtype), out

    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, log_decay))
    _, out = jax.lax.scan(step, jnp.zeros((1, 1, 4, 4), dtype), tokens)
    return out[:, 0, 0]

  want = jax.jit(retention)(q, k, v, log_decay)[0][0, :, 0]
  late = slice(length // 2, None)
  norm = np.linalg.norm(want[late])
  drift = {
    dtype: np.linalg.norm((jax.jit(decode, static_argnums=0)(dtype) - want)[late]) / norm
    for dtype in ("float32", "bfloat16")
  }
  assert drift["float32"] < 1e-4 and drift["bfloat16"] > 30 * drift["float32"], drift


@pytest.mark.slow
def test_yoco_11_a_thousand_steps_in_bfloat16_are_finite():
  sizes = dict(num_layers=2, embed_dim=16, num_heads=2, dtype="bfloat16", unroll=1)
  model = LanguageModel(build_config(dict(name="yoco") | sizes, 17))
  tokens = jnp.cumsum(jax.random.randint(jax.random.key(4), (8, 33), 0, 3), 1) % 17
  params = nn.unbox(jax.jit(model.init)(jax.random.key(5), tokens))["params"]

  def loss(params):
    nll = model.apply({"params": params}, tokens[:, :-1], tokens[:, 1:], method="token_losses")
    return nll.mean()

  def step(params, _):
    value, grads = jax.value_and_grad(loss)(params)
    # Rates so high that scales grow.
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

  _, losses = jax.jit(lambda p: jax.lax.scan(step, p, length=1000))(params)
  assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
  "fields, message",
  [(dict(tau=0.0), "tau=0.0"), (dict(normalization="paper"), "normalization='paper'")],
)
def test_bad_fields_are_named(fields, message):
  sizes = dict(num_heads=1, head_dim=4, value_head_dim=4, decay="gated")
  with pytest.raises(ValueError, match=message):
    RetentionConfig(**sizes | fields)
