"""Differential attention on Hopper GPUs (https://arxiv.org/abs/2410.05258), in Mosaic GPU.

What the kernels take and give; `gpu_forward` and `gpu_backward` hold them, README.md their sizes.
"""

import functools

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

from pallas_kernels import mosaic_gpu
from pallas_kernels.common import vary_alike
from pallas_kernels.diff_attention import gpu_backward, reference
from pallas_kernels.diff_attention.blocks import GpuBlocks
from pallas_kernels.diff_attention.gpu_forward import forward
from pallas_kernels.diff_attention.reference import Options, Visibility


def diff_attention(
  options: Options,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  gain: Float[Array, "V"] | None,
  visibility: Visibility,
  *,
  blocks: GpuBlocks | None = None,
) -> reference.Result:
  """The implementation "pallas_gpu"; `blocks` overrides the tile sizes.

  Raises:
    NotImplementedError: The kernels cannot serve these arguments, or this device.
  """
  mosaic_gpu.refuse_unless_supported()
  refuse_unless_served(options, q, k, v)
  blocks = blocks or GpuBlocks.for_shapes(q.shape[-1], v.shape[-1])
  k, v = reference.without_padding(k, v, visibility.lengths)
  if options.eps is not None:
    gain = jnp.ones(v.shape[-1]) if gain is None else gain
    gain = options.post_scale * gain.astype(jnp.float32)
  operands = dict(q=q, k=k, v=v, lam=reference.per_token(lam, q))
  if gain is not None:
    operands["gain"] = gain
  operands = dict(zip(operands, vary_alike(*operands.values()), strict=True))
  out, lse = _attend(options, blocks, operands, visibility)
  return (out, lse) if options.return_lse else out


def refuse_unless_served(options: Options, q: Array, k: Array, v: Array) -> None:
  """Raises `NotImplementedError`, with the reason, where the kernels have no tiles for these."""
  dim, value_dim = q.shape[-1], v.shape[-1]
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f"The tensor cores multiply bfloat16 or float16, all of one: {q.dtype=} {k.dtype=} {v.dtype=}"
    )
  if dim not in (64, 96, 128) or value_dim % 64 or value_dim > 2 * dim:
    raise NotImplementedError(
      f"Tiles are made for heads of 64, 96 or 128 and values of 64 to twice that, not {dim=} "
      f"{value_dim=}."
    )
  if options.scale <= 0:
    raise NotImplementedError(
      f"The greatest score is found before the scaling; scale={options.scale} is not positive."
    )
  if 0 in (*q.shape, *v.shape):
    raise NotImplementedError(f"No tile to visit in {q.shape=} {v.shape=}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, blocks, operands, visibility):
  """Outputs and, if they are to be returned, log-sum-exps."""
  outs = forward(options, blocks, **_operands(operands), visibility=visibility, save=False)
  return _results(options, operands, outs)


def _operands(operands):
  return {"gain": None} | operands


def _results(options, operands, outs):
  (batch, length, heads, *_), value_dim = operands["q"].shape, operands["v"].shape[-1]
  out = outs["out"][:, :length].reshape(batch, length, heads, value_dim)
  if not options.return_lse:
    return out, None
  return out, outs["lse"][..., :length].transpose(0, 3, 1, 2)


def _forward(options, blocks, operands, visibility):
  outs = forward(options, blocks, **_operands(operands), visibility=visibility, save=True)
  return _results(options, operands, outs), (operands, visibility, outs)


def _backward(options, blocks, residuals, cotangents):
  operands, visibility, outs = residuals
  (d_out, d_lse), (q, k, v, lam) = cotangents, (operands[x] for x in ("q", "k", "v", "lam"))
  (batch, length, heads, *_), value_dim = q.shape, v.shape[-1]

  def per_head(x):
    return x[:, :length].reshape(batch, length, heads, value_dim)

  difference, out2 = per_head(outs["difference"]), per_head(outs["out2"])
  grads = {}
  if options.eps is not None:
    norm = lambda gain, x: reference.headwise_norm(options, x, gain)
    scaled = operands["gain"] / options.post_scale
    _, pullback = jax.vjp(norm, scaled, difference)
    d_gain, d_out = pullback(d_out.astype(jnp.float32))
    grads["gain"] = d_gain / options.post_scale
  d_out = d_out.astype(v.dtype)

  # sum_j P_mj G_j of a query, from the outputs that were saved (README.md).
  delta2 = (d_out * out2).sum(axis=-1)
  delta1 = (d_out * difference).sum(axis=-1) + lam * delta2
  deltas = jnp.stack([delta1, delta2], axis=-1)
  d_lse = jnp.zeros_like(deltas) if d_lse is None else d_lse
  terms = gpu_backward.row_terms(outs["lse"], d_lse, lam, deltas)
  args = options, blocks, q, k, v, d_out, terms, visibility
  d_k, d_v = gpu_backward.backward_dkv(*args)
  grads |= dict(q=gpu_backward.backward_dq(*args), k=d_k, v=d_v, lam=-delta2)
  return grads, None


_attend.defvjp(_forward, _backward)
