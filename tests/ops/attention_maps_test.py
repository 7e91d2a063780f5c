"""Attention written out as maps: the weights of `ops.attention`, and logits of few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops


def _inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (2, 9, 4, 6))
  k, v = (jax.random.normal(key, (2, 9, 2, 6)) for key in keys[1:])
  return q, k, v


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "alibi", "xpos", "bias"])
def test_maps_give_attentions_outputs(kind):
  q, k, v = _inputs()
  options = dict(
    causal=dict(),
    window=dict(mask=ops.Mask("sliding_window", 3)),
    documents=dict(segment_ids=jnp.array([[1] * 4 + [2] * 5] * 2)),
    alibi=dict(slopes=ops.alibi_slopes(4)),
    xpos=dict(decay=ops.xpos_decay(6, gamma=0.4, scale_base=8.0, layout="half")),
    bias=dict(key_bias=jnp.where(jnp.arange(9) == 2, -jnp.inf, 0.5 * jnp.arange(9.0))[None]),
  )[kind]
  maps = jax.jit(lambda q, k: ops.attention_maps(q, k, **options))(q, k)
  got = jnp.einsum("BNTS,BSNV->BTNV", maps.weights, jnp.repeat(v, 2, axis=2))
  np.testing.assert_allclose(got, ops.attention(q, k, v, **options), atol=2e-5)
  assert not maps.weights[~jnp.broadcast_to(maps.visible, maps.weights.shape)].any()


def test_logits_of_few_bits_are_on_a_grid_of_their_own_map():
  q, k, _ = _inputs()
  exact = ops.attention_maps(q, k).logits
  visible = np.tri(9, dtype=bool)
  for bits in (16, 8, 4):
    coarse = ops.attention_maps(q, k, logit_bits=bits).logits
    largest = np.abs(np.where(visible, exact, 0)).max((-2, -1), keepdims=True)
    step = largest / (2 ** (bits - 1) - 1)
    error = np.abs(coarse - exact)
    assert (error <= 0.5001 * step + 1e-6).all() and error.max() > 0.1 * step.min()
    steps = np.asarray(coarse / step)
    np.testing.assert_allclose(steps, np.round(steps), atol=2e-2)


@pytest.mark.parametrize("bits", [16, 8, 2])
def test_logits_that_are_all_zero_stay_so(bits):
  zeros = jnp.zeros((1, 3, 1, 4))
  maps = jax.jit(lambda x: ops.attention_maps(x, x, logit_bits=bits))(zeros)
  np.testing.assert_array_equal(maps.logits, 0)
  np.testing.assert_allclose(maps.weights[0, 0], np.tri(3) / np.arange(1, 4)[:, None], atol=1e-6)


def test_one_bit_is_refused():
  zeros = jnp.zeros((1, 3, 1, 4))
  with pytest.raises(ValueError, match="logit_bits=1"):
    ops.attention_maps(zeros, zeros, logit_bits=1)
