"""Differential attention written out (https://arxiv.org/abs/2410.05258, equations 1 and 3).

`naive` materialises both softmax maps and is what every other implementation is held to. `two_call`
and `four_call` build the difference from plain attention calls, as the paper's code does for want
of a fused kernel: one wide call per map, and two per map with the values split in halves. All take
the arguments of every implementation: the static `Options`, the arrays, and `Visibility`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

# Finite, since a row of -inf would turn to NaN, and its gradient with it.
HIDDEN = float(jnp.finfo(jnp.float32).min)

Result = Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N 2"]]


@dataclasses.dataclass(frozen=True)
class Options:
  """What is known when a call is traced; see `api.diff_attention`.

  Attributes:
    scale: Multiplies the scores.
    causal: A query sees no later key.
    window: It sees the last `window` keys alone, its own among them.
    q_offset: Position of the first query among the keys; `None` where `Visibility` has one per row.
    eps: Of the headwise norm; `None` for no norm.
    post_scale: Multiplies the norm's output.
    return_lse: Also return the log-sum-exp of both maps.
  """

  scale: float = 1.0
  causal: bool = True
  window: int | None = None
  q_offset: int | None = 0
  eps: float | None = None
  post_scale: float = 1.0
  return_lse: bool = False

  def __post_init__(self):
    if self.window is not None and (self.window < 1 or not self.causal):
      raise ValueError(f"window={self.window} is at least 1, of causal={self.causal} attention.")
    if self.eps is None and self.post_scale != 1:
      raise ValueError(f"post_scale={self.post_scale} is of the headwise norm; give its eps too.")


class Visibility(NamedTuple):
  """The arrays that decide which keys a query sees; `None` hides nothing.

  Attributes:
    q_offset: Position of each row's first query, where `Options.q_offset` is `None`.
    segment_ids: Documents of the queries, which see their own keys alone.
    kv_segment_ids: Documents of the keys, given with `segment_ids`.
    lengths: Valid keys per row.
  """

  q_offset: Int[Array, "B"] | None = None
  segment_ids: Int[Array, "B T"] | None = None
  kv_segment_ids: Int[Array, "B S"] | None = None
  lengths: Int[Array, "B"] | None = None


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


def visible(
  options: Options,
  visibility: Visibility,
  length: int,
  kv_length: int,
  start: int | Int[Array, ""] = 0,
  kv_start: int = 0,
) -> Bool[Array, "#B {length} {kv_length}"]:
  """Which keys of a stretch the queries of a stretch see.

  Args:
    options: Of the call.
    visibility: Of the call, for all of its tokens.
    length: Of the stretch of queries.
    kv_length: Of the stretch of keys.
    start: The stretch's first query; alone of these it may be traced.
    kv_start: The stretch's first key.
  """
  kv_index = kv_start + jnp.arange(kv_length)
  seen = jnp.ones((1, length, kv_length), bool)
  if options.causal:
    offset = options.q_offset if visibility.q_offset is None else visibility.q_offset[:, None]
    position = jnp.atleast_2d(offset + start + jnp.arange(length))[..., None]
    seen &= kv_index <= position
    if options.window is not None:
      seen &= position - kv_index < options.window
  if visibility.segment_ids is not None:
    # Clipped one by one, where a slice that hangs over the end would move.
    ids = jnp.take(visibility.segment_ids, start + jnp.arange(length), axis=1, mode="clip")
    kv_ids = visibility.kv_segment_ids[:, kv_start : kv_start + kv_length]
    seen &= ids[:, :, None] == kv_ids[:, None]
  if visibility.lengths is not None:
    seen &= kv_index < visibility.lengths[:, None, None]
  return seen


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


def without_padding(
  k: Float[Array, "B S ..."], v: Float[Array, "B S ..."], lengths: Int[Array, "B"] | None
) -> tuple[Float[Array, "B S ..."], Float[Array, "B S ..."]]:
  """Zeros in place of padded keys and values: what they hold is not ours to trust.

  A weight of zero does not hide a NaN.
  """
  if lengths is None:
    return k, v
  valid = jnp.arange(k.shape[1]) < lengths[:, None]
  return tuple(jnp.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, 0) for x in (k, v))


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


def softmax_dtype(dtype: DTypeLike) -> jnp.dtype:
  """float32 for the scores and statistics of any input but float64, which tests alone use."""
  return jnp.promote_types(dtype, jnp.float32)
