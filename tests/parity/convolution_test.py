"""Causal layers of tokenizers beside torch's convolutions, outputs and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.layers.convolution import CausalLayer, CausalStack, ConvShared

torch = pytest.importorskip("torch")
F = torch.nn.functional


def _check(layer, reference, names):
  """Outputs, and gradients by inputs and parameters, of a layer and of torch's function."""
  rng = np.random.default_rng(0)
  model = CausalStack((layer,), ConvShared(init_std=0.3, layer_scale=0.5))
  x = rng.normal(size=(2, 12, layer.in_features)).astype(np.float32)
  params = jax.jit(model.init)(jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape) * 0.3, jnp.float32), params)
  y = jax.jit(model.apply)({"params": params}, x)
  target = rng.normal(size=y.shape).astype(np.float32)
  loss = lambda params, x: (model.apply({"params": params}, x) * target).sum()
  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)

  flat = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    .split("/", 1)[1]
    .removesuffix("/value"): p
    for path, p in jax.tree.leaves_with_path(params)
  }
  assert set(flat) == set(names)
  tensors = {name: torch.tensor(np.asarray(p), requires_grad=True) for name, p in flat.items()}
  inputs = torch.tensor(x, requires_grad=True)
  want = reference(inputs.transpose(1, 2), tensors).transpose(1, 2)
  (want * torch.tensor(target)).sum().backward()
  close = lambda a, b, name: np.testing.assert_allclose(
    a, b.detach().numpy(), rtol=1e-3, atol=1e-4, err_msg=name
  )
  close(y, want, "y")
  close(grads[1], inputs.grad, "dx")
  of_params = dict(zip(flat, jax.tree.leaves(grads[0]), strict=True))
  for name in names:
    close(of_params[name], tensors[name].grad, name)


@pytest.mark.parametrize("kernel_size, stride", [(7, 1), (8, 4)])
def test_causal_convolution(kernel_size, stride):
  def reference(x, p):
    kernel = p["conv/kernel"].permute(2, 1, 0)
    return F.conv1d(F.pad(x, (kernel_size - stride, 0)), kernel, p["conv/bias"], stride)

  layer = CausalLayer("layer", "conv", 3, 5, kernel_size, stride)
  _check(layer, reference, ("conv/bias", "conv/kernel"))


@pytest.mark.parametrize("kernel_size, stride", [(8, 4), (5, 2)])
def test_transposed_convolution_trimmed_on_the_right(kernel_size, stride):
  def reference(x, p):
    # Torch's kernel meets the outputs in order, Linen's in reverse.
    kernel = p["conv/kernel"].flip(0).permute(1, 2, 0)
    y = F.conv_transpose1d(x, kernel, p["conv/bias"], stride)
    return y[..., : x.shape[-1] * stride]

  layer = CausalLayer("layer", "transposed", 3, 5, kernel_size, stride)
  _check(layer, reference, ("conv/bias", "conv/kernel"))


def test_convnext_block():
  """RMSNorm, causal depthwise filters, scale; RMSNorm, GELU MLP, scale; each with a residual."""

  def norm(x, scale):
    x = x.transpose(1, 2)
    return (F.rms_norm(x, x.shape[-1:], eps=1e-5) * scale).transpose(1, 2)

  def reference(x, p):
    # The first tap of `ops.short_convolution` meets the token itself, torch's last one does.
    kernel = p["mixer_kernel"].flip(0).T[:, None]
    y = F.pad(norm(x, p["mixer_norm/scale"]), (6, 0))
    y = F.conv1d(y, kernel, p["mixer_bias"], groups=6)
    x = x + p["mixer_scale"][:, None] * y
    y = norm(x, p["feed_forward_norm/scale"]).transpose(1, 2)
    y = F.gelu(y @ p["in_proj/kernel"] + p["in_proj/bias"])
    y = y @ p["out_proj/kernel"] + p["out_proj/bias"]
    return x + p["feed_forward_scale"][:, None] * y.transpose(1, 2)

  names = ("mixer_kernel", "mixer_bias", "mixer_norm/scale", "mixer_scale")
  names += ("feed_forward_norm/scale", "feed_forward_scale")
  names += tuple(f"{layer}/{p}" for layer in ("in_proj", "out_proj") for p in ("kernel", "bias"))
  _check(CausalLayer("layer", "block", 6, 6, 7), reference, names)
