"""Differential attention on a TPU (https://arxiv.org/abs/2410.05258), in Mosaic TPU.

A grid step takes a tile of queries and a tile of keys of one head, both maps of it; `tpu_tiles` has
the way over them, `tpu_forward` and `tpu_backward` the kernels, README.md their sizes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.common import vary_alike
from pallas_kernels.diff_attention import reference
from pallas_kernels.diff_attention.blocks import TpuBlocks
from pallas_kernels.diff_attention.reference import Options, Visibility
from pallas_kernels.diff_attention.tpu_backward import backward
from pallas_kernels.diff_attention.tpu_forward import forward
from pallas_kernels.diff_attention.tpu_tiles import LN2, Call, refuse_unless_served


def diff_attention(
  options: Options,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  gain: Float[Array, "V"] | None,
  visibility: Visibility,
  *,
  blocks: TpuBlocks | None = None,
) -> reference.Result:
  """The implementation "pallas_tpu"; `blocks` overrides the tile sizes.

  Raises:
    NotImplementedError: The dtypes are not the matrix unit's.
  """
  refuse_unless_served(q, k, v)
  (batch, length, heads, _, head_dim), (_, kv_length, kv_heads, value_dim) = q.shape, v.shape
  blocks = blocks or TpuBlocks.for_sizes(length, kv_length, head_dim, value_dim)
  blocks.check(length, kv_length)
  call = Call(
    options,
    *(batch, length, kv_length, heads, kv_heads, head_dim, value_dim),
    shared_keys=k.ndim == 4,
    padded=visibility.lengths is not None,
    documents=visibility.segment_ids is not None,
  )
  k, v = reference.without_padding(k, v, visibility.lengths)
  offset, limit = visibility.q_offset, visibility.lengths
  bounds = {
    "offset": jnp.full(batch, options.q_offset) if offset is None else offset,
    "limit": jnp.full(batch, kv_length) if limit is None else jnp.minimum(limit, kv_length),
  }
  if call.documents:
    bounds |= {"ids": visibility.segment_ids, "kv_ids": visibility.kv_segment_ids}
  bounds = {name: x.astype(jnp.int32) for name, x in bounds.items()}
  operands = dict(q=q, k=k, v=v, lam=reference.per_token(lam, q))
  if options.eps is not None:
    ones = jnp.ones(value_dim, jnp.float32)
    operands["gain"] = ones if gain is None else gain.astype(jnp.float32)
  leaves, tree = jax.tree.flatten((operands, bounds))
  out, lse = _attend(call, blocks, *jax.tree.unflatten(tree, vary_alike(*leaves)))
  return (out, lse) if options.return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(call, blocks, operands, bounds):
  """Outputs and, if they are to be returned, log-sum-exps."""
  outs = forward(call, blocks.fwd, operands, bounds, save=False)
  return outs["out"], outs.get("lse")


def _attend_fwd(call, blocks, operands, bounds):
  outs = forward(call, blocks.fwd, operands, bounds, save=True)
  lse = outs["lse"] if call.options.return_lse else None
  return (outs["out"], lse), (operands, bounds, outs)


def _attend_bwd(call, blocks, residuals, cotangents):
  operands, bounds, outs = residuals
  d_out, d_lse = cotangents
  lam, dtype = operands["lam"], operands["v"].dtype
  wide = lambda x: x.astype(jnp.float32)
  out, out2 = wide(outs.get("difference", outs["out"])), wide(outs["out2"])
  grads = {}
  if call.options.eps is not None:
    norm = functools.partial(reference.headwise_norm, call.options)
    _, pullback = jax.vjp(norm, out, operands["gain"])
    d_out, grads["gain"] = pullback(wide(d_out))
  d_out = d_out.astype(dtype)
  delta2 = jnp.sum(wide(d_out) * out2, axis=-1)
  delta1 = jnp.sum(wide(d_out) * out, axis=-1) + lam * delta2
  terms = jnp.stack([delta1, -lam * delta2], axis=-1)
  if d_lse is not None:
    terms -= d_lse
  # A row that sees no key has hidden scores alone, which are far enough below any number.
  lse = jnp.where(outs["lse"] == -jnp.inf, 0, outs["lse"])
  rows = jnp.concatenate([lse / LN2, terms, lam[..., None]], axis=-1)
  d_q, d_k, d_v = backward(call, blocks, operands, d_out, rows, bounds)
  return grads | dict(q=d_q, k=d_k, v=d_v, lam=-delta2), None


_attend.defvjp(_attend_fwd, _attend_bwd)
