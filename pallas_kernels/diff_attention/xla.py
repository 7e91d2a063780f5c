"""Differential attention by blocks of queries, in jax.numpy: the product path without a kernel.

A block sees a stretch of keys known when the call is traced; what causality or the window hide from
all of it is neither read nor multiplied. Since it sees its keys all at once, both maps are
normalised before they meet the values: the difference is one map, and one product with them. The
backward has `dO V^T` at hand just as whole, and takes its row terms from there (README.md). Neither
pass holds more than a block's rows of a map, so memory is linear in the length.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common import vary_alike
from pallas_kernels.diff_attention import reference
from pallas_kernels.diff_attention.reference import Options
from pallas_kernels.visibility import HIDDEN, Visibility, sweep

BLOCK_SIZE = 64  # Queries; the fastest on CPUs, forward and backward.


def blockwise(
  options: Options,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  gain: Float[Array, "V"] | None,
  visibility: Visibility,
  *,
  block_size: int = BLOCK_SIZE,
) -> reference.Result:
  """The implementation "xla", `block_size` queries at a time."""
  (batch, length, heads, _, dim), kv_heads = q.shape, v.shape[2]
  k, v = reference.without_padding(k, v, visibility.lengths)
  k = k if k.ndim == 5 else k[:, :, :, None]
  # Heads before length, so that all products are plain batched matmuls.
  lam = reference.per_token(lam, q).reshape(batch, length, kv_heads, -1, 1)
  lam = lam.transpose(0, 2, 3, 1, 4)
  q = q.reshape(batch, length, kv_heads, -1, 2, dim).transpose(0, 2, 4, 3, 1, 5)
  k = k.transpose(0, 2, 3, 1, 4)
  v = v.transpose(0, 2, 1, 3)[:, :, None]
  # One axis for B and K: Z 2 G T H, Z M S H of M maps, Z 1 S V and Z G T 1.
  q, k, v, lam = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, lam))
  leaves, tree = jax.tree.flatten((q, k, v, lam, visibility))
  operands = jax.tree.unflatten(tree, vary_alike(*leaves))
  out, lse = _attend(options, block_size, *operands)
  out = out.reshape(batch, heads, length, -1).swapaxes(1, 2)
  lse = lse.reshape(batch, kv_heads, 2, -1, length).transpose(0, 4, 1, 3, 2)
  lse = lse.reshape(batch, length, heads, 2)
  return reference.result(options, out, lse, gain, v.dtype)


def decode(
  options: Options,
  q: Float[Array, "B N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B N"],
  gain: Float[Array, "V"] | None,
  lengths: Int[Array, "B"] | None,
  num_splits: int | None = None,
) -> Float[Array, "B N V"]:
  """One query per row over a cache, in `num_splits` parts (one if `None`)."""
  batch, heads, _, dim = q.shape
  k, v = reference.without_padding(k, v, lengths)
  k = k if k.ndim == 5 else k[:, :, :, None]
  q = q.reshape(batch, v.shape[2], -1, 2, dim)
  options, visibility = reference.last_query(options, lengths, batch, k.shape[1])
  num_splits = min(num_splits or 1, k.shape[1])
  bounds = [k.shape[1] * i // num_splits for i in range(num_splits + 1)]
  parts = []
  for start, stop in itertools.pairwise(bounds):
    seen = reference.visible(options, visibility, 1, stop - start, kv_start=start)
    keys = jnp.broadcast_to(k[:, start:stop], (batch, stop - start, *q.shape[1:2], 2, dim))
    scores = _contract("BKGMH,BSKMH->BKGMS", q, keys) * options.scale
    scores = jnp.where(seen[:, None, None], scores, HIDDEN)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(scores > HIDDEN, jnp.exp(scores - top), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _contract("BKGMS,BSKV->BKGMV", weights.astype(v.dtype), v[:, start:stop])
    parts.append((out, top, total))
  return reference.merge(options, *(jnp.stack(x) for x in zip(*parts, strict=True)), lam, gain, v)


def with_gradient(kernel: Callable[..., Float[Array, "B N V"]]) -> Callable[..., Any]:
  """A kernel of decoding, given the gradient of `decode`, whose arguments it takes."""

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
  def run(options, num_splits, arrays):
    return kernel(options, *arrays, num_splits)

  def forward(options, num_splits, arrays):
    return run(options, num_splits, arrays), arrays

  def backward(options, num_splits, arrays, d_out):
    *learned, lengths = arrays
    _, pullback = jax.vjp(lambda *x: decode(options, *x, lengths, num_splits), *learned)
    return ((*pullback(d_out), None),)

  run.defvjp(forward, backward)

  @functools.wraps(kernel)
  def op(options, q, k, v, lam, gain, lengths, num_splits=None):
    leaves, tree = jax.tree.flatten((q, k, v, lam, gain, lengths))
    return run(options, num_splits, jax.tree.unflatten(tree, vary_alike(*leaves)))

  return op


def _contract(letters, x, y):
  dtype = reference.softmax_dtype(x.dtype)
  return jnp.einsum(letters, x, y, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, block_size, q, k, v, lam, visibility):
  """The difference, `Z G T V`, and the log-sum-exps, `Z 2 G T 1`, in the softmax's dtype."""
  return _forward(options, block_size, q, k, v, lam, visibility)[0]


def _forward(options, block_size, q, k, v, lam, visibility):
  def block(keys, carry, start, q, lam):
    scores = _scores(options, q, k, visibility, start, keys)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # Held, lest XLA repeat the exponential, and the division for each score.
    maps = jax.lax.optimization_barrier(jnp.exp(scores - top))
    total = jnp.sum(maps, axis=-1, keepdims=True)
    total = jnp.where(top > HIDDEN, total, jnp.inf)  # A row of hidden scores weighs nothing.
    maps = maps * jax.lax.optimization_barrier(1 / total)
    out = _product("R S, S V -> R V", _rows(_difference(maps, lam, v.dtype), 1), v[..., keys, :])
    return carry, (out.reshape(*lam.shape[:-1], -1), top + jnp.log(total))

  _, (out, lse) = sweep(options, block_size, k.shape[-2], block, (), q, lam)
  # Kept with the other sign where no key is seen: any score less infinity makes a map of zeros.
  return (out, jnp.where(lse == jnp.inf, -lse, lse)), (q, k, v, lam, visibility, lse)


def _backward(options, block_size, residuals, cotangents):
  q, k, v, lam, visibility, lse = residuals
  d_out, d_lse = cotangents
  d_out = d_out.astype(v.dtype)

  def block(keys, carry, start, q, lam, lse, d_out, d_lse):
    d_k, d_v = carry
    maps = jnp.exp(_scores(options, q, k, visibility, start, keys) - lse)
    d_rows = _rows(d_out, 1)
    d_maps = _product("R V, S V -> R S", d_rows, v[..., keys, :])
    d_maps = d_maps.reshape(-1, 1, *maps.shape[2:])
    row_terms = jnp.sum(maps * d_maps, axis=-1, keepdims=True)
    weights = jnp.stack([jnp.ones_like(lam), -lam], axis=1)
    d_scores = maps * (weights * (d_maps - row_terms) + d_lse)
    d_scores = _rows((options.scale * d_scores).astype(q.dtype), k.shape[1])
    d_q = _product("R S, S H -> R H", d_scores, k[..., keys, :]).reshape(q.shape)
    # Kept features before length until the end, which is how the CPU's matmuls are faster.
    d_k = d_k.at[..., keys].add(_product("R H, R S -> H S", _rows(q, k.shape[1]), d_scores))
    difference = _rows(_difference(maps, lam, v.dtype), 1)
    d_v = d_v.at[..., keys].add(_product("R V, R S -> V S", d_rows, difference))
    return (d_k, d_v), (d_q.astype(q.dtype), -row_terms[:, 1])

  zeros = [jnp.zeros_like(x.swapaxes(-1, -2), lse.dtype) for x in (k, v)]
  rows = (q, lam, lse, d_out, d_lse)
  zeros = vary_alike(*zeros, d_out)[:2]
  carry, (d_q, d_lam) = sweep(options, block_size, k.shape[-2], block, zeros, *rows)
  d_k, d_v = (d.swapaxes(-1, -2).astype(x.dtype) for d, x in zip(carry, (k, v), strict=True))
  return d_q, d_k, d_v, d_lam, None


_attend.defvjp(_forward, _backward)


def _scores(options, q, k, visibility, start, keys):
  """`Z 2 G R S`, of the queries from `start` on and a slice of the keys."""
  length = q.shape[-2]
  scores = _product("R H, S H -> R S", _rows(q, k.shape[1]), k[..., keys, :]) * options.scale
  scores = scores.reshape(*q.shape[:-1], -1)
  seen = reference.visible(
    options, visibility, length, keys.stop - keys.start, start=start, kv_start=keys.start
  )
  if len(seen) > 1:
    seen = jnp.repeat(seen, len(q) // len(seen), axis=0)
  return jnp.where(seen[:, None, None], scores, HIDDEN)


def _difference(maps, lam, dtype):
  return (maps[:, 0] - lam * maps[:, 1]).astype(dtype)[:, None]


def _rows(x, maps):
  """`Z ... R X` as `Z M R X`: queries that meet the same keys are rows of one product."""
  return x.reshape(len(x), maps, -1, x.shape[-1])


def _product(letters, x, y):
  """A product per key head and map: `ZM` before each operand's letters."""
  letters = letters.replace(" ", "").replace(",", ",ZM").replace("->", "->ZM")
  return _contract(f"ZM{letters}", x, y)
