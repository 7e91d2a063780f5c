"""Our differential attention is that of the original release's mathematics, by the release's names.

The reference is written from the equations (section 2 of the paper) in float64, with the key and
value heads of each pair of maps looked up one by one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import interop
from latentlab.layers import Context, DiffAttention, DiffAttentionConfig, Shared, initializers

torch = pytest.importorskip("torch", reason="the release's reference needs torch")

WIDTH, HEAD_DIM, LENGTH, EPS, BASE = 20, 6, 9, 1e-5, 10_000.0
TABLE = interop.diff_transformer.ATTENTION


def _reference(weights, x, heads, kv_heads, depth):
  """`Y` of equations 1 to 3, head by head."""

  def rope(x):
    angles = BASE ** -(torch.arange(HEAD_DIM // 2, dtype=x.dtype) / (HEAD_DIM // 2))
    angles = torch.arange(LENGTH)[:, None] * angles
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.stack(turned, -1).flatten(-2)

  def project(name, *sizes):  # B heads T features.
    return (x @ weights[f"{name}_proj.weight"].T).unflatten(-1, sizes).moveaxis(1, -2)

  q, k = rope(project("q", 2 * heads, HEAD_DIM)), rope(project("k", 2 * kv_heads, HEAD_DIM))
  v = project("v", kv_heads, 2 * HEAD_DIM)
  causal = torch.ones(LENGTH, LENGTH).tril().bool()

  def map_of(query, key):
    scores = q[:, query] @ k[:, key].mT / math.sqrt(HEAD_DIM)
    return torch.where(causal, scores, -math.inf).softmax(-1)

  lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
  first, second = (
    torch.exp((weights[f"lambda_q{m}"] * weights[f"lambda_k{m}"]).sum()) for m in (1, 2)
  )
  lam = first - second + lambda_init
  outs = []
  for i in range(heads):
    group = i // (heads // kv_heads)
    maps = map_of(2 * i, 2 * group) - lam * map_of(2 * i + 1, 2 * group + 1)
    out = maps @ v[:, group]
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPS)
    outs.append((1 - lambda_init) * weights["subln.weight"] * out)
  return torch.cat(outs, -1) @ weights["out_proj.weight"].T


def _module(heads, kv_heads):
  init = initializers.make("linear", num_layers=1, embed_dim=WIDTH)
  config = DiffAttentionConfig(heads, HEAD_DIM, kv_heads, head_norm_eps=EPS)
  return DiffAttention(config, Shared(WIDTH, jnp.float32, init))


def _state(heads, kv_heads):
  """What the release's module holds, by names and shapes of its constructor."""
  rng = np.random.default_rng(0)
  rows = dict(q=2 * heads * HEAD_DIM, k=2 * kv_heads * HEAD_DIM, v=2 * kv_heads * HEAD_DIM)
  shapes = {f"{name}_proj.weight": (size, WIDTH) for name, size in rows.items()}
  shapes["out_proj.weight"] = (WIDTH, 2 * heads * HEAD_DIM)
  shapes |= {f"lambda_{name}": (HEAD_DIM,) for name in ("q1", "k1", "q2", "k2")}
  shapes["subln.weight"] = (2 * HEAD_DIM,)
  state = {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}
  state["subln.weight"] += 1
  return {name: x.astype(np.float32) for name, x in state.items()}


@pytest.mark.parametrize(
  "heads, kv_heads, depth", [(3, 3, 0), (4, 2, 5), (3, 1, 2), (4, 1, 9)], ids=str
)
def test_outputs_and_every_gradient_are_the_releases(heads, kv_heads, depth):
  module, context = (
    _module(heads, kv_heads),
    Context(jnp.arange(LENGTH)[None], layer=depth, in_place=True),
  )
  rng = np.random.default_rng(1)
  x, weight = (rng.normal(size=(2, LENGTH, WIDTH)).astype(np.float32) for _ in range(2))
  shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(x), context)["params"]
  state = _state(heads, kv_heads)
  params = interop.import_weights(TABLE, state, nn.unbox(shapes))

  @jax.jit
  def ours(params, x):
    run = lambda p, x: module.apply({"params": p}, x, context)[0]
    return run(params, x), *jax.grad(lambda *a: (run(*a) * weight).sum(), (0, 1))(params, x)

  out, grads, dx = ours(params, jnp.asarray(x))
  leaves = {name: torch.tensor(x, dtype=torch.float64) for name, x in (state | dict(x=x)).items()}
  for leaf in leaves.values():
    leaf.requires_grad_()
  want = _reference(leaves, leaves["x"], heads, kv_heads, depth)
  (want * torch.tensor(weight)).sum().backward()
  want = want.detach().numpy()
  np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
  found = interop.export_weights(TABLE, grads) | dict(x=np.asarray(dx))
  assert found.keys() == leaves.keys()
  for name, got in found.items():
    grad = leaves[name].grad.numpy()
    assert np.abs(grad).max() > 1e-4, name
    np.testing.assert_allclose(got, grad, rtol=1e-3, atol=2e-5 * np.abs(grad).max(), err_msg=name)


def test_a_module_goes_there_and_back_bit_for_bit():
  state = _state(4, 2)
  module, context = _module(4, 2), Context(jnp.arange(LENGTH)[None])
  x = jnp.zeros((1, LENGTH, WIDTH))
  shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x, context)["params"])
  params = interop.import_weights(TABLE, state, shapes)
  back = interop.export_weights(TABLE, params)
  assert back.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)
  with pytest.raises(ValueError, match=r"missing \['subln.weight'\]"):
    interop.import_weights(TABLE, {k: x for k, x in state.items() if k != "subln.weight"}, shapes)
