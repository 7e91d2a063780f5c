"""Our time mixing is that of transformers' RWKV: outputs and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab.layers import Context, RwkvConfig, Shared, initializers

torch = pytest.importorskip("torch", reason="parity with RWKV needs torch and transformers")
pytest.importorskip("transformers", reason="parity with RWKV needs transformers")

# Ours by theirs; kernels are transposed, and their mixes have two axes more.
NAMES = {
  "time_decay": ("log_decay",),
  "time_first": ("bonus",),
  "time_mix_key": ("k_mix",),
  "time_mix_value": ("v_mix",),
  "time_mix_receptance": ("r_mix",),
  "key.weight": ("k_proj", "kernel"),
  "value.weight": ("v_proj", "kernel"),
  "receptance.weight": ("r_proj", "kernel"),
  "output.weight": ("out_proj", "kernel"),
}


def test_outputs_and_gradients_are_theirs(key):
  from transformers.models.rwkv.modeling_rwkv import RwkvConfig as TheirConfig
  from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

  width, length = 12, 17
  init = initializers.make("fan_in", num_layers=3, embed_dim=width)
  shared = Shared(embed_dim=width, dtype=jnp.float32, init=init)
  module = RwkvConfig(width, num_layers=3).module(shared, name="mixer")
  context = Context(jnp.arange(length)[None], layer=1)
  keys = jax.random.split(key, 3)
  x, weights = (jax.random.normal(k, (2, length, width)) for k in keys[:2])
  params = nn.unbox(module.init(keys[2], x, context))["params"]

  def loss(params, x):
    out, _ = module.apply({"params": params}, x, context)
    return jnp.vdot(out, weights), out

  (_, out), (d_params, d_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

  theirs = RwkvSelfAttention(TheirConfig(hidden_size=width, num_hidden_layers=3, vocab_size=5))
  theirs_by_name = dict(theirs.named_parameters())
  assert theirs_by_name.keys() == NAMES.keys()
  for name, p in theirs_by_name.items():
    ours = _get(params, NAMES[name])
    p.data = torch.tensor(np.asarray(ours.T)).reshape(p.shape)
  their_x = torch.tensor(np.asarray(x), requires_grad=True)
  their_out, _ = theirs(their_x)
  (their_out * torch.tensor(np.asarray(weights))).sum().backward()

  _close(out, their_out.detach(), "outputs")
  _close(d_x, their_x.grad, "inputs")
  for name, p in theirs_by_name.items():
    _close(_get(d_params, NAMES[name]).T, p.grad.reshape(_get(params, NAMES[name]).T.shape), name)


def _get(tree, path):
  for name in path:
    tree = tree[name]
  return tree


def _close(got, want, name):
  want = want.numpy()
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name)
