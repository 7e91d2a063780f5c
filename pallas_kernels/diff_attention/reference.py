"""Differential attention written out (https://arxiv.org/abs/2410.05258, equations 1 and 3).

`naive` materialises both softmax maps and is what every other implementation is held to. `two_call`
and `four_call` build the difference from plain attention calls, as the paper's code does for want
of a fused kernel: one wide call per map, and two per map with the values split in halves. All take
the arguments of every implementation: the static `Options`, the arrays, and `Visibility`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.visibility import (
  HIDDEN,
  MaskOptions,
  Visibility,
  softmax_dtype,
  visible,
  without_padding,
)

Result = Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N 2"]]


@dataclasses.dataclass(frozen=True)
class Options(MaskOptions):
  """What is known when a call is traced; see `api.diff_attention`.

  Attributes:
    scale: Multiplies the scores.
    eps: Of the headwise norm; `None` for no norm.
    post_scale: Multiplies the norm's output.
    return_lse: Also return the log-sum-exp of both maps.
  """

  scale: float = 1.0
  eps: float | None = None
  post_scale: float = 1.0
  return_lse: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.eps is None and self.post_scale != 1:
      raise ValueError(f"post_scale={self.post_scale} is of the headwise norm; give its eps too.")


def naive(
  options: Options,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  gain: Float[Array, "V"] | None,
  visibility: Visibility,
) -> Result:
  """Both maps in full, subtracted, then one product with the values."""
  dtype = softmax_dtype(q.dtype)
  k, v = without_padding(k, v, visibility.lengths)
  seen = visible(options, visibility, q.shape[1], k.shape[1])
  maps, lse = zip(*[_softmax(options, *qk, seen) for qk in _maps(q, k)], strict=True)
  lam = per_token(lam, q).swapaxes(1, 2)[..., None]
  weights = (maps[0] - lam * maps[1]).astype(v.dtype)
  out = _weigh(weights, v, dtype)
  return result(options, out, jnp.stack(lse, axis=-1), gain, v.dtype)


def two_call(
  options: Options,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  gain: Float[Array, "V"] | None,
  visibility: Visibility,
) -> Result:
  """Two plain attentions, whose outputs are rounded before they are subtracted."""
  return _of_calls(1, options, q, k, v, lam, gain, visibility)


def four_call(
  options: Options,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  gain: Float[Array, "V"] | None,
  visibility: Visibility,
) -> Result:
  """Four plain attentions, as calls need whose keys and values are equally wide."""
  if v.shape[-1] % 2:
    raise NotImplementedError(f"Halves of the values need an even width, not {v.shape=}.")
  return _of_calls(2, options, q, k, v, lam, gain, visibility)


def _of_calls(parts, options, q, k, v, lam, gain, visibility):
  k, v = without_padding(k, v, visibility.lengths)
  seen = visible(options, visibility, q.shape[1], k.shape[1])

  def attention(q, k, v):
    weights, lse = _softmax(options, q, k, seen)
    return _weigh(weights.astype(v.dtype), v, weights.dtype).astype(v.dtype), lse

  outs, lses = [], []
  for qk in _maps(q, k):
    halves, lse = zip(*[attention(*qk, x) for x in jnp.split(v, parts, axis=-1)], strict=True)
    outs.append(jnp.concatenate(halves, axis=-1).astype(lse[0].dtype))
    lses.append(lse[0])
  out = outs[0] - per_token(lam, q)[..., None] * outs[1]
  return result(options, out, jnp.stack(lses, axis=-1), gain, v.dtype)


def _maps(q, k):
  """Queries and keys of either map; `B S K H` keys serve both."""
  return [(q[:, :, :, m], k if k.ndim == 4 else k[:, :, :, m]) for m in range(2)]


def _softmax(options, q, k, seen):
  """One map, `B N T S`, and its log-sum-exp, `B T N`; a row that sees no key is zero."""
  dtype = softmax_dtype(q.dtype)
  batch, length, heads, dim = q.shape
  q = q.reshape(batch, length, k.shape[2], -1, dim)
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=dtype) * options.scale
  scores = jnp.where(seen[:, None, None], scores, HIDDEN).reshape(batch, heads, length, -1)
  seen = seen.any(axis=-1)[:, None]
  maps = jnp.where(seen[..., None], jax.nn.softmax(scores, axis=-1), 0)
  lse = jnp.where(seen, jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
  return maps, lse.swapaxes(1, 2)


def _weigh(weights, v, dtype):
  batch, heads, length, _ = weights.shape
  weights = weights.reshape(batch, v.shape[2], -1, *weights.shape[2:])
  out = jnp.einsum("BKGTS,BSKV->BTKGV", weights, v, preferred_element_type=dtype)
  return out.reshape(batch, length, heads, -1)


def decode_naive(
  options: Options,
  q: Float[Array, "B N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B N"],
  gain: Float[Array, "V"] | None,
  lengths: Int[Array, "B"] | None,
  num_splits: int | None = None,
) -> Float[Array, "B N V"]:
  """`naive` of one query, which is the last valid key's; all keys at once, whatever was asked."""
  del num_splits
  options, visibility = last_query(options, lengths, q.shape[0], k.shape[1])
  lam = lam[:, None] if lam.ndim == 2 else lam
  return naive(options, q[:, None], k, v, lam, gain, visibility)[:, 0]


# What every implementation shares.


def last_query(
  options: Options, lengths: Int[Array, "B"] | None, batch: int, kv_length: int
) -> tuple[Options, Visibility]:
  """Decoding as attention: each row's query is that of its last valid key."""
  if lengths is None:
    lengths = jnp.full(batch, kv_length)
  options = dataclasses.replace(options, causal=True, q_offset=None)
  return options, Visibility(q_offset=lengths - 1, lengths=lengths)


def merge(
  options: Options,
  sums: Float[Array, "P B K G 2 V"],
  tops: Float[Array, "P B K G 2 1"],
  totals: Float[Array, "P B K G 2 1"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B N"],
  gain: Float[Array, "V"] | None,
  v: Float[Array, "B S K V"],
) -> Float[Array, "B N V"]:
  """Decoding's output from what `P` parts of the keys made of both maps.

  Each map is merged before the two are subtracted: their maxima differ.

  Args:
    options: Of the call.
    sums: Of each part's values, weighed by the exponentials of the scores less their maximum.
    tops: That maximum.
    totals: Sums of the weights; zero where a part has no visible key.
    lam: See `api.diff_attention_decode`.
    gain: See there.
    v: The values, whose dtype the output has.
  """
  weights = jnp.exp(tops - jnp.max(tops, axis=0))
  total = jnp.sum(weights * totals, axis=0)
  maps = jnp.sum(weights * sums, axis=0) / jnp.where(total > 0, total, 1)
  maps = maps.reshape(v.shape[0], -1, 2, v.shape[-1])
  out = maps[:, :, 0] - lam[..., None].astype(maps.dtype) * maps[:, :, 1]
  return headwise_norm(options, out, gain).astype(v.dtype)


def per_token(
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  q: Float[Array, "B T N 2 H"],
) -> Float[Array, "B T N"]:
  """Lambda of each token and head; autodiff of this sums its gradient."""
  return jnp.broadcast_to(lam, q.shape[:3]).astype(softmax_dtype(q.dtype))


def result(
  options: Options,
  out: Float[Array, "B T N V"],
  lse: Float[Array, "B T N 2"],
  gain: Float[Array, "V"] | None,
  dtype: DTypeLike,
) -> Result:
  """Normalises, rounds once, and returns what was asked for."""
  out = headwise_norm(options, out, gain).astype(dtype)
  return (out, lse) if options.return_lse else out


def headwise_norm(
  options: Options, out: Float[Array, "*shape V"], gain: Float[Array, "... V"] | None
) -> Float[Array, "*shape V"]:
  """Equation 3: each head by its own root mean square, in the dtype given."""
  if options.eps is None:
    return out
  out = out * jax.lax.rsqrt(jnp.mean(jnp.square(out), axis=-1, keepdims=True) + options.eps)
  return options.post_scale * (out if gain is None else out * gain.astype(out.dtype))
