"""The retention layer's normalisers against the paper's three literal steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

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


def _run(config, params, x, cache=None, start=0):
  positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape[:2])
  module = config.module(SHARED, name="mixer")
  return module.apply({"params": params}, x, Context(positions), cache)


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
  decay = np.where(gap >= 0, np.exp(np.asarray(log_decay, np.float64)[:, None, None] * gap), 0)
  if normalization != "none":
    decay = decay / np.sqrt(decay.sum(-1, keepdims=True))
  scores = scores * decay
  if normalization == "paper":
    scores = scores / np.maximum(np.abs(scores.sum(-1, keepdims=True)), 1)
  return np.einsum("bnts,bnsv,nvd->btd", scores, v, p["out_proj"]["kernel"])


@pytest.mark.parametrize("normalization", ["none", "decay", "paper"])
@pytest.mark.parametrize("decay", ["linspace", "one"])
def test_normalizations_are_the_papers(key, normalization, decay):
  config = dataclasses.replace(BASE, normalization=normalization, decay=decay)
  x = 3 * jax.random.normal(key, (2, 11, 16))
  params = _params(config, key, x)
  want = _literal(params, x, config.log_decay, normalization)
  got, _ = jax.jit(lambda p, x: _run(config, p, x))(params, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
  # And one token at a time, with z carried beside the state.
  cache, step = (
    config.init_cache(2, 0, jnp.float32),
    jax.jit(lambda p, x, cache, t: _run(config, p, x, cache, t)),
  )
  for t in range(x.shape[1]):
    got, cache = step(params, x[:, t : t + 1], cache, t)
    np.testing.assert_allclose(got[:, 0], want[:, t], rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("head_norm", ["rms", "group"])
def test_normalizations_agree_behind_a_norm_without_epsilon(key, head_norm):
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
