"""The retention layer's normalisers against the paper's three literal steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import ops
from latentlab.layers import Context, RetentionConfig, Shared, initializers

BASE = RetentionConfig(
  num_heads=3,
  head_dim=8,
  value_head_dim=12,
  decay="linspace",
  gate=False,
  head_norm="none",
  chunk_size=4,
)
SHARED = Shared(
  embed_dim=16, dtype=jnp.float32, init=initializers.make("fan_in", num_layers=1, embed_dim=16)
)


def _run(config, params, x, cache=None, start=0, **context):
  positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
  module = config.module(SHARED, name="mixer")
  return module.apply({"params": params}, x, Context(positions, **context), cache)


def _params(config, key, x):
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  return nn.unbox(config.module(SHARED, name="mixer").init(key, x, Context(positions)))["params"]


def _literal(params, x, log_decay, normalization):
  """Section 2.2 step by step in float64: decay mask, its row scale, the row sum's clamp."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  q, k, v = (np.einsum("btd,dnh->bnth", x, p[f"{n}_proj"]["kernel"]) for n in "qkv")
  length, dim = x.shape[1], q.shape[-1]
  theta = 10_000.0 ** -np.linspace(0, 1, dim // 2)
  turn = np.exp(1j * np.arange(length)[:, None] * theta)
  as_complex = lambda z: (z[..., ::2] + 1j * z[..., 1::2]) * turn
  scores = np.einsum("bnti,bnsi->bnts", as_complex(q), as_complex(k).conj()).real * dim**-0.5
  gap = np.arange(length)[:, None] - np.arange(length)
  decay = np.exp(np.asarray(log_decay, np.float64)[:, None, None] * np.maximum(gap, 1))
  decay = np.where(gap > 0, decay, gap == 0)
  if normalization != "none":
    decay = decay / np.sqrt(decay.sum(-1, keepdims=True))
  scores = scores * decay
  if normalization == "paper":
    scores = scores / np.maximum(np.abs(scores.sum(-1, keepdims=True)), 1)
  return np.einsum("bnts,bnsv,nvd->btd", scores, v, p["out_proj"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["none", "decay", "paper"])
@pytest.mark.parametrize("decay", ["linspace", "one"])
def test_retnet_07_normalizations_are_the_papers_in_every_form(key, normalization, decay):
  config = dataclasses.replace(BASE, normalization=normalization, decay=decay)
  x = 3 * jax.random.normal(key, (2, 11, 16))
  params = _params(config, key, x)
  want = _literal(params, x, config.log_decay, normalization)
  for form in ("parallel", "recurrent", "xla"):
    of_form = dataclasses.replace(config, implementation=form)
    got, _ = jax.jit(lambda p, x, c=of_form: _run(c, p, x))(params, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=form)
  # And one token at a time, with z carried beside the state.
  cache, step = (
    config.init_cache(2, 0, jnp.float32),
    jax.jit(lambda p, x, cache, t: _run(config, p, x, cache, t)),
  )
  for t in range(x.shape[1]):
    got, cache = step(params, x[:, t : t + 1], cache, t)
    np.testing.assert_allclose(got[:, 0], want[:, t], rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("head_norm", ["rms", "group"])
def test_retnet_07_normalizations_agree_behind_a_norm_without_epsilon(key, head_norm):
  x = jax.random.normal(key, (2, 11, 16))
  outs = []
  for normalization in ("none", "decay", "paper"):
    config = dataclasses.replace(
      BASE, normalization=normalization, head_norm=head_norm, head_norm_eps=0.0
    )
    params = _params(config, key, x)
    outs.append(_run(config, params, x)[0])
  np.testing.assert_allclose(outs[1], outs[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(outs[2], outs[0], rtol=1e-4, atol=1e-5)


def test_gate_and_affine_add_their_parameters(key):
  x = jax.random.normal(key, (1, 3, 16))
  config = dataclasses.replace(BASE, gate=True, head_norm="rms", head_norm_affine=True)
  params = _params(config, key, x)
  assert params["gate_proj"]["kernel"].shape == (16, 3, 12)
  assert params["head_norm"]["scale"].shape == (12,)


def test_a_mask_of_scores_is_refused(key):
  x = jax.random.normal(key, (1, 3, 16))
  params = _params(BASE, key, x)
  context = Context(jnp.arange(3)[None], allowed=jnp.ones((1, 3, 3), bool))
  with pytest.raises(ValueError, match="no score matrix"):
    BASE.module(SHARED, name="mixer").apply({"params": params}, x, context)


def test_retnet_07_the_row_scale_has_no_gradient_of_its_own(key):
  """As if it were a number that is given; behind an epsilon of zero, as if it were not there."""
  x = 3 * jax.random.normal(key, (1, 7, 16))
  config = dataclasses.replace(BASE, normalization="paper")
  params = _params(config, key, x)

  def by_hand(p, stop):
    q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, p[f"{n}_proj"]["kernel"]) for n in "qkv")
    q, k = config.positions.rotate(q, k * 8**-0.5, jnp.arange(7)[None])
    gap = np.arange(7)[:, None] - np.arange(7)
    decay = jnp.where(gap >= 0, jnp.exp(config.log_decay[:, None, None] * np.maximum(gap, 0)), 0)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * decay
    scale = jnp.maximum(jnp.abs(scores.sum(-1)), jnp.sqrt(decay.sum(-1)))[..., None]
    scores = scores / (jax.lax.stop_gradient(scale) if stop else scale)
    out = jnp.einsum("BNTS,BSNV,NVD->BTD", scores, v, p["out_proj"]["kernel"])
    return jnp.sum(jnp.sin(out))

  grad = lambda f: jax.jit(jax.grad(f))(params)
  loss = lambda c: lambda p: jnp.sum(jnp.sin(_run(c, p, x)[0]))
  got, want = grad(loss(config)), grad(lambda p: by_hand(p, True))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
  jax.tree.map(close, got, want)
  through = grad(lambda p: by_hand(p, False))
  assert np.abs(through["q_proj"]["kernel"] - got["q_proj"]["kernel"]).max() > 0.1
  behind = dict(head_norm="rms", head_norm_eps=0.0)
  raw = dataclasses.replace(config, normalization="none")
  jax.tree.map(close, *(grad(loss(dataclasses.replace(c, **behind))) for c in (config, raw)))


def test_retnet_07_the_scale_of_values_does_not_matter(key):
  x = jax.random.normal(key, (2, 9, 16))
  for normalization in ("none", "paper"):
    config = dataclasses.replace(BASE, head_norm="group", normalization=normalization)
    params = _params(config, key, x)
    larger = params | {"v_proj": {"kernel": 1e3 * params["v_proj"]["kernel"]}}
    run = jax.jit(lambda p, c=config: _run(c, p, x)[0])
    want, got = run(params), run(larger)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max())


def _torchscale(q, k, v, log_decay, chunk=None):
  """The rows of torchscale's parallel or chunkwise form, step by step, in float64."""
  q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
  g, (_, _, length, _) = np.exp(np.asarray(log_decay, np.float64)), q.shape
  size = chunk or length
  gap = np.arange(size)[:, None] - np.arange(size)
  mask = np.where(gap >= 0, g[:, None, None] ** np.maximum(gap, 0), 0)
  norm = np.sqrt(mask.sum(-1, keepdims=True))
  if chunk is None:
    scores = q @ k.swapaxes(-1, -2) * mask / norm
    scores = scores / np.clip(np.abs(scores).sum(-1, keepdims=True), 1, 5e4)
    return (scores @ v).swapaxes(1, 2)
  leave, total = mask[:, -1:], mask[:, -1].sum(-1)[:, None, None]
  state, scale, outs = np.zeros((*q.shape[:2], q.shape[3], v.shape[3])), 1.0, []
  for start in range(0, length, size):
    a, b, c = (x[:, :, start : start + size] for x in (q, k, v))
    n = a.shape[2]
    scores = a @ b.swapaxes(-1, -2) * (mask / norm)[:, :n, :n]
    inner = np.maximum(np.abs(scores).sum(-1, keepdims=True), 1)
    enter = g[:, None] ** (np.arange(n) + 1) / norm[:, :n, 0] * total[:, 0]
    both = np.maximum(inner, scale)
    out = scores / inner @ c / (both / inner)
    outs.append(out + a * enter[..., None] @ (state / scale) / (both / scale))
    if n == size:
      decayed = c * leave.swapaxes(-1, -2) / total
      state = state * g[:, None, None] ** size + b.swapaxes(-1, -2) @ decayed
      scale = np.maximum(np.abs(state).sum(-2, keepdims=True).max(-1, keepdims=True), 1)
  return np.concatenate(outs, 2).swapaxes(1, 2)


@pytest.mark.parametrize("chunk", [None, 4, 11, 16])
@pytest.mark.parametrize("size", [0.3, 3, 1e4])
def test_torchscales_rows_are_a_scale_of_ours(key, chunk, size):
  draw = lambda seed, dim: jax.random.normal(jax.random.fold_in(key, seed), (2, 11, 3, dim))
  q, k, v, log_decay = size * draw(0, 4), draw(1, 4), draw(2, 6), ops.log_decay_rates(3)
  want = _torchscale(q, k, v, log_decay, chunk)
  raw, _ = ops.retention(q, k, v, log_decay)
  if chunk is None:
    scale = ops.parallel_row_scale(q, k, log_decay)
  else:
    scale = ops.chunkwise_row_scale(q, k, v, log_decay, chunk)
  np.testing.assert_allclose(raw / scale[..., None], want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_torchscales_parallel_rows_know_documents(key):
  x = jax.random.normal(key, (1, 9, 16))
  config = dataclasses.replace(BASE, normalization="torchscale", chunk_size=None)
  params = _params(config, key, x)
  ids = jnp.array([[0] * 4 + [1] * 5])
  packed, _ = jax.jit(lambda x: _run(config, params, x, segment_ids=ids))(x)
  alone = jax.jit(lambda x: _run(config, params, x)[0])
  np.testing.assert_allclose(packed[:, :4], alone(x)[:, :4], atol=1e-5)
  # The second document's rotations start elsewhere, which only their differences could tell.
  np.testing.assert_allclose(packed[:, 4:], alone(jnp.roll(x, -4, 1))[:, :5], atol=1e-5)
  with pytest.raises(ValueError, match="leave chunk_size out"):
    _run(dataclasses.replace(config, chunk_size=4), params, x, segment_ids=ids)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("head_norm", ["rms", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_ends_in_its_kernel_as_one_pass_does(key, gate, head_norm, dtype):
  config = dataclasses.replace(BASE, head_norm=head_norm, gate=gate, head_norm_eps=1e-2)
  assert config.ends_in_kernel
  assert not dataclasses.replace(config, normalization="paper").ends_in_kernel
  assert not dataclasses.replace(config, head_norm_affine=True).ends_in_kernel
  shared = dataclasses.replace(SHARED, dtype=jnp.dtype(dtype))
  x = jax.random.normal(key, (2, 5, 16))
  params = _params(config, key, x)

  def apply(x, cache, start):
    context = Context(start + jnp.arange(x.shape[1])[None])
    return config.module(shared, name="mixer").apply({"params": params}, x, context, cache)

  run = jax.jit(apply)
  want, _ = run(x, None, 0)
  _, cache = run(x[:, :4], config.init_cache(2, 0, dtype), 0)
  got, _ = run(x[:, 4:], cache, 4)
  tolerance = 1e-5 if dtype == "float32" else 1e-2
  want = np.asarray(want[:, 4:], np.float32)
  assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
  calls = []  # And the kernel is told to.
  real = ops.retention_decode
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ops, "retention_decode", lambda *a, **k: calls.append(k) or real(*a, **k))
    jax.eval_shape(lambda x: apply(x, cache, 4), x[:, 4:])  # Traced anew.
  assert (calls[0]["gate"] is not None) == gate
  assert calls[0]["norm_eps"] == (1e-2 if head_norm == "rms" else None)


def test_shared_key_heads_are_repeated_ones(key):
  x = jax.random.normal(key, (2, 6, 16))
  few = dataclasses.replace(BASE, num_kv_heads=1, gate=True, head_norm="rms")
  many = dataclasses.replace(few, num_kv_heads=None)
  params = _params(few, key, x)
  assert params["k_proj"]["kernel"].shape == (16, 1, 8)
  repeated = params | {
    n: {"kernel": jnp.repeat(params[n]["kernel"], 3, axis=1)} for n in ("k_proj", "v_proj")
  }
  want, _ = jax.jit(lambda p: _run(many, p, x))(repeated)
  run = jax.jit(lambda x, cache, start: _run(few, params, x, cache, start))
  out, cache = run(x[:, :5], few.init_cache(2, 0, jnp.float32), 0)
  np.testing.assert_allclose(out, want[:, :5], atol=1e-5)
  np.testing.assert_allclose(run(x[:, 5:], cache, 5)[0], want[:, 5:], atol=1e-5)


def test_retnet_03_a_custom_decay_of_one_adds_up_and_of_zero_forgets(key):
  x = jax.random.normal(key, (1, 6, 16))
  config = dataclasses.replace(BASE, decay="custom", decay_values=(1.0, 0.0, 0.5))
  params = _params(config, key, x)
  want = _literal(params, x, config.log_decay, "none")
  got, _ = jax.jit(lambda x: _run(config, params, x))(x)
  np.testing.assert_allclose(got, want, atol=1e-4)
  for fields in (
    dict(decay="custom"),
    dict(decay="custom", decay_values=(0.5,)),
    dict(decay="pow2", decay_values=(0.5, 0.5, 0.5)),
    dict(decay="const"),
    dict(num_kv_heads=2),
  ):
    with pytest.raises(ValueError, match="decay_value|num_kv_heads"):
      dataclasses.replace(BASE, **fields)
  with pytest.raises(ValueError, match=r"\[0, 1\]"):
    dataclasses.replace(BASE, decay="custom", decay_values=(0.5, 1.5, 1.0)).log_decay  # noqa: B018
