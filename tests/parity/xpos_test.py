"""xPos is torchscale's, whose author wrote the paper: outputs, gradients, and a growing cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops

torch = pytest.importorskip("torch", reason="parity with torchscale needs torch")
xpos = pytest.importorskip(
  "torchscale.component.xpos_relative_position",
  reason="needs `pip install --no-deps torchscale==0.3.0`",
)


@pytest.mark.parametrize("length", [1, 9, 40])
@pytest.mark.parametrize("role", ["query", "key"])
def test_lex_03_scaled_and_rotated_as_torchscale_does(length, role):
  """Its scale's origin is half of the length, rounded up, and its rotation's is the first token."""
  x = np.random.default_rng(0).normal(size=(2, length, 3, 8)).astype(np.float32)
  flat = torch.tensor(x.transpose(0, 2, 1, 3).reshape(6, length, 8), requires_grad=True)
  want = xpos.XPOS(8, scale_base=24)(flat, downscale=role == "key")
  cotangent = torch.tensor(np.random.default_rng(1).normal(size=want.shape), dtype=torch.float32)
  want.backward(cotangent)
  rows = lambda t: t.detach().numpy().reshape(2, 3, length, 8).transpose(0, 2, 1, 3)
  center = -(-length // 2)
  got, pull = jax.vjp(
    lambda x: ops.apply_xpos(x, jnp.arange(length)[None], role=role, scale_base=24, center=center),
    jnp.asarray(x),
  )
  np.testing.assert_allclose(got, rows(want), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    pull(jnp.asarray(rows(cotangent)))[0], rows(flat.grad), rtol=1e-5, atol=1e-5
  )


def test_lex_02_attention_over_a_cache_is_torchscales():
  """It keeps bare keys and applies xPos to all of them anew at every step, about a moving origin.

  Ours are rotated once, and their scale is that of a tile: the same outputs.
  """
  rng = np.random.default_rng(2)
  q, k, v = (rng.normal(size=(1, 50, 1, 8)).astype(np.float32) for _ in range(3))
  module, decay = xpos.XPOS(8, scale_base=6), ops.xpos_decay(8, scale_base=6)
  rotate = lambda x, positions: ops.apply_rope(jnp.asarray(x), jnp.asarray(positions)[None])
  cached, places = rotate(k, np.arange(50)), np.arange(50)

  @jax.jit
  def attend(q, t):
    return ops.attention(
      rotate(q, t[None]),
      cached,
      jnp.asarray(v),
      positions=t[None, None],
      kv_positions=jnp.asarray(places)[None],
      decay=decay,
    )

  for t in (0, 1, 7, 30, 49):
    keys = module(torch.tensor(k[:, : t + 1, 0]), offset=0, downscale=True)
    query = module(torch.tensor(q[:, t : t + 1, 0]), offset=t)
    weights = torch.softmax(query @ keys.mT, -1)
    want = (weights @ torch.tensor(v[:, : t + 1, 0])).numpy()
    np.testing.assert_allclose(attend(q[:, t : t + 1], jnp.int32(t))[:, :, 0], want, atol=2e-5)
