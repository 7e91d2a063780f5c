"""Softmax attention in jax.numpy: with all scores at once, and by blocks of queries.

`naive` is what every other form is held to. `blockwise` is the product path without a kernel: of
the causal square it computes the keys that a block of queries sees, and its memory is linear in the
length, for the backward recomputes a block's weights from the log-sum-exps of its rows. Both take
the arguments of every implementation: the static `Options`, the arrays, and `Visibility`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.common import target_platform, vary_alike
from pallas_kernels.visibility import (
  HIDDEN,
  MaskOptions,
  Visibility,
  softmax_dtype,
  sweep,
  visible,
  without_padding,
)

BLOCK_SIZE = 64  # Queries; the fastest on CPUs, forward and backward.

Result = tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]


@dataclasses.dataclass(frozen=True)
class Options(MaskOptions):
  """What is known when a call is traced; see `api.flash_attention`.

  Attributes:
    scale: Multiplies the scores.
    return_lse: Whether the log-sum-exps are wanted, and not outputs alone.
  """

  scale: float = 1.0
  return_lse: bool = False


def naive(
  options: Options,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  visibility: Visibility,
) -> Result:
  """All scores at once."""
  k, v = without_padding(k, v, visibility.lengths)
  (batch, length, heads, dim), (kv_length, kv_heads) = q.shape, k.shape[1:3]
  q = q.reshape(batch, length, kv_heads, -1, dim)
  scores = _contract("BTKGH,BSKH->BKGTS", q, k) * options.scale
  seen = visible(options, visibility, length, kv_length)[:, None, None]
  scores = jnp.where(seen, scores, HIDDEN)
  seen = seen.any(axis=-1)
  weights = jnp.where(seen[..., None], jax.nn.softmax(scores, axis=-1), 0)
  out = _contract("BKGTS,BSKV->BTKGV", weights.astype(v.dtype), v).astype(v.dtype)
  lse = jnp.where(seen, jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
  return out.reshape(batch, length, heads, -1), jnp.moveaxis(lse, 3, 1).reshape(q.shape[:2] + (-1,))


def blockwise(
  options: Options,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  visibility: Visibility,
  *,
  block_size: int = BLOCK_SIZE,
) -> Result:
  """The implementation "xla", `block_size` queries at a time."""
  (batch, length, heads, dim), kv_heads = q.shape, k.shape[2]
  k, v = without_padding(k, v, visibility.lengths)
  # Heads before length, so that all products are plain batched matmuls, and one axis for B and K.
  q = q.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
  q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2)))
  leaves, tree = jax.tree.flatten((q, k, v, visibility))
  out, lse = _attend(options, block_size, *jax.tree.unflatten(tree, vary_alike(*leaves)))
  out = out.reshape(batch, heads, length, -1).swapaxes(1, 2)
  return out, lse.reshape(batch, heads, length).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, block_size, q, k, v, visibility):
  """Outputs `Z G T V` and log-sum-exps `Z G T 1` of queries `Z G T H` and keys `Z S H`."""
  return _forward(options, block_size, q, k, v, visibility)[0]


def _forward(options, block_size, q, k, v, visibility):
  def block(keys, carry, start, q):
    scores = _scores(options, q, k, visibility, start, keys)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(top > HIDDEN, total, jnp.inf)  # A row of hidden scores weighs nothing.
    out = _contract("ZGTS,ZSV->ZGTV", weights.astype(v.dtype), v[:, keys])
    return carry, ((out / total).astype(v.dtype), top + jnp.log(total))

  _, (out, lse) = sweep(options, block_size, k.shape[1], block, (), q)
  # Kept with the other sign where no key is seen: any score less infinity makes a row of zeros.
  return (out, jnp.where(lse == jnp.inf, -lse, lse)), (q, k, v, visibility, out, lse)


def _backward(options, block_size, residuals, cotangents):
  q, k, v, visibility, out, lse = residuals
  d_out, d_lse = cotangents
  row_terms = jnp.sum(d_out.astype(lse.dtype) * out, axis=-1, keepdims=True) - d_lse

  def block(keys, carry, start, q, lse, d_out, row_terms):
    d_k, d_v = carry
    weights = jnp.exp(_scores(options, q, k, visibility, start, keys) - lse)
    d_weights = _contract("ZGTV,ZSV->ZGTS", d_out, v[:, keys])
    d_scores = (options.scale * weights * (d_weights - row_terms)).astype(q.dtype)
    d_q = _contract("ZGTS,ZSH->ZGTH", d_scores, k[:, keys])
    # Kept features before length until the end, which is how the CPU's matmuls are faster.
    d_k = d_k.at[..., keys].add(_contract("ZGTH,ZGTS->ZHS", q, d_scores))
    d_v = d_v.at[..., keys].add(_contract("ZGTV,ZGTS->ZVS", d_out, weights.astype(v.dtype)))
    return (d_k, d_v), d_q.astype(q.dtype)

  zeros = [jnp.zeros_like(x.swapaxes(1, 2), lse.dtype) for x in (k, v)]
  carry = vary_alike(*zeros, d_out)[:2]
  rows = (q, lse, d_out.astype(v.dtype), row_terms)
  carry, d_q = sweep(options, block_size, k.shape[1], block, carry, *rows)
  d_k, d_v = (d.swapaxes(1, 2).astype(x.dtype) for d, x in zip(carry, (k, v), strict=True))
  return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _scores(options, q, k, visibility, start, keys):
  """`Z G R S`, of the queries from `start` on and a slice of the keys."""
  scores = _contract("ZGRH,ZSH->ZGRS", q, k[:, keys])
  if options.scale != 1:
    scores *= options.scale
  seen = visible(options, visibility, q.shape[2], keys.stop - keys.start, start, keys.start)
  if len(seen) > 1:
    seen = jnp.repeat(seen, len(q) // len(seen), axis=0)
  return jnp.where(seen[:, None], scores, HIDDEN)


def _contract(equation: str, x: Array, y: Array) -> Array:
  dtype = softmax_dtype(x.dtype)
  if target_platform() == "cpu":  # Its compiler lacks some products of bfloat16 into float32.
    x, y = x.astype(dtype), y.astype(dtype)
  return jnp.einsum(equation, x, y, preferred_element_type=dtype)
