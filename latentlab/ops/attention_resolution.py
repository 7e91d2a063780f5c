"""Attention resolution: how well scores tell distances apart.

Section 3 of xPos (https://arxiv.org/abs/2212.10554): equation 3, and its estimate from texts by
equation 11. The paper does not say whether heads are averaged before the resolution is taken, nor
whether scores have the factor of the softmax; its table reaches 1.08, above the bound of the
equation as printed. Figures compare as orders and ratios, not as values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.ops.attention import Mask
from latentlab.ops.positions import document_positions
from latentlab.typing import Array, Bool, Float, Int


class Distances(NamedTuple):
  """Scores by distance, in float32 at least.

  Attributes:
    scores: Their sums, by head.
    counts: How many pairs of a query and a key are so far apart.
  """

  scores: Float[Array, "N T"]
  counts: Float[Array, "T"]


def attention_resolution(
  scores: Float[Array, "*L T"], seen: Bool[Array, "*#L T"] | None = None
) -> Float[Array, "*L"]:
  """`sum_n p_n (p_n - p_{n+1})` with `p = softmax(scores)` (eq. 3), between 0 and 1.

  No score follows the last one, so that `p` ends with 0.

  Args:
    scores: Expected score at each distance, from 0 on.
    seen: False at distances that no query sees; all are seen if `None`.
  """
  scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  weights = jax.nn.softmax(scores, axis=-1, where=seen)
  return jnp.sum(weights**2, -1) - jnp.sum(weights[..., :-1] * weights[..., 1:], -1)


def scores_by_distance(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  *,
  mask: Mask,
  segment_ids: Int[Array, "B T"] | None = None,
  valid: Bool[Array, "B T"] | None = None,
  slopes: Float[Array, "N"] | None = None,
  decay: Float[np.ndarray, "H"] | None = None,
) -> Distances:
  """Sums of the scores `e[i, i - n]` over rows and queries, by distance `n` (eq. 11).

  One distance after another: `T^2` products, and memory of `T`.

  Args:
    q: Queries, in place.
    k: Keys, in place.
    mask: Pairs that it hides do not count.
    segment_ids: Documents; nor do pairs of two of them.
    valid: False where a token is padding; nor do pairs with it.
    slopes: See `ops.attention`: ALiBi's bias is a part of the score.
    decay: See there.
  """
  (batch, length), dtype = q.shape[:2], jnp.promote_types(q.dtype, jnp.float32)
  q, k = q.astype(dtype), jnp.repeat(k.astype(dtype), q.shape[2] // k.shape[2], axis=2)
  ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
  valid = jnp.ones((batch, length), bool) if valid is None else valid
  rates = jnp.zeros(q.shape[3], dtype) if decay is None else jnp.asarray(decay, dtype)
  inside, column = document_positions(ids), lambda x: x.reshape(-1, 1, 1)

  def at(distance):
    back = lambda x: jnp.roll(x, distance, axis=1)
    pair = mask(column(inside), column(back(inside))).reshape(batch, length)
    pair &= (ids == back(ids)) & valid & back(valid) & (jnp.arange(length) >= distance)
    scores = jnp.einsum("BTNH,BTNH->BTN", q * jnp.exp(distance * rates), back(k))
    if slopes is not None:
      scores -= slopes * distance
    return jnp.where(pair[..., None], scores, 0).sum((0, 1)), pair.sum(dtype=dtype)

  scores, counts = jax.lax.map(at, jnp.arange(length))
  return Distances(scores.T, counts)
