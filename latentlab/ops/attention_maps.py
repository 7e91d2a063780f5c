"""Attention written out as maps, for evaluations that look at scores or change them.

Quantised logits are those of section 3.7 of the Differential Transformer
(https://arxiv.org/abs/2410.05258, figure 8), which leaves the granularity of the scale open: here a
head's map of one row has a scale of its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.ops.attention import Mask, decayed, visible_keys
from latentlab.typing import Array, Bool, Float, Int
from pallas_kernels.visibility import HIDDEN


class AttentionMaps(NamedTuple):
  """What a layer's softmax attention computed, in float32.

  Attributes:
    logits: Scores of `M` maps before the softmax. Differential attention has two maps a head, the
      first ones of all heads, then the second ones.
    weights: What multiplies the values; signed where it is a difference of two maps.
    visible: Which keys a query sees; elsewhere scores mean nothing and weights are zero.
  """

  logits: Float[Array, "B M T S"]
  weights: Float[Array, "B N T S"]
  visible: Bool[Array, "#B 1 T S"]


def attention_maps(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  *,
  mask: Mask = Mask("causal"),  # noqa: B008 (frozen)
  positions: Int[Array, "#B T"] | None = None,
  kv_positions: Int[Array, "#B S"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  kv_valid: Bool[Array, "B S"] | None = None,
  allowed: Bool[Array, "#B T S"] | None = None,
  key_bias: Float[Array, "#B S"] | None = None,
  slopes: Float[Array, "N"] | None = None,
  decay: Float[np.ndarray, "H"] | None = None,
  logit_bits: int | None = None,
) -> AttentionMaps:
  """The maps of `ops.attention`, whose arguments these are, whole: `B N T S` at once.

  Args:
    q: Queries.
    k: Keys.
    mask: See `ops.attention`.
    positions: See there.
    kv_positions: See there.
    segment_ids: See there.
    kv_segment_ids: See there; the queries' if `None`.
    kv_valid: See there.
    allowed: See there.
    key_bias: See there.
    slopes: See there.
    decay: See there.
    logit_bits: Rounds logits as `quantize` does.
  """
  length, kv_length, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
  positions = jnp.arange(length)[None] if positions is None else positions
  kv_positions = jnp.arange(kv_length)[None] if kv_positions is None else kv_positions
  if segment_ids is not None and kv_segment_ids is None:
    kv_segment_ids = segment_ids
  dtype = jnp.promote_types(q.dtype, jnp.float32)

  def product(q, k):
    k = jnp.repeat(k, groups, axis=2)
    return jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=dtype)

  if decay is None:
    logits = product(q, k)
  else:
    logits = decayed(product, q, k, positions, kv_positions, decay, axis=2)
  if key_bias is not None:
    logits += jnp.where(key_bias > -jnp.inf, key_bias, 0).astype(dtype)[:, None, None, :]
  if slopes is not None:
    distance = (positions[:, :, None] - kv_positions[:, None, :])[:, None]
    logits -= slopes.astype(dtype)[:, None, None] * distance.astype(dtype)
  visible = visible_keys(
    mask,
    positions,
    kv_positions,
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    kv_valid=kv_valid,
    allowed=allowed,
    key_bias=key_bias,
  )[:, None]
  if logit_bits is not None:
    logits = quantize(logits, visible, logit_bits)
  weights = jax.nn.softmax(jnp.where(visible, logits, HIDDEN), axis=-1)
  return AttentionMaps(logits, jnp.where(visible, weights, 0), visible)


def quantize(
  logits: Float[Array, "B N T S"], visible: Bool[Array, "#B 1 T S"], bits: int
) -> Float[Array, "B N T S"]:
  """Logits rounded to `bits` with a sign, on a scale up to the largest visible one of their map.

  Raises:
    ValueError: fewer than two bits.
  """
  if bits < 2:
    raise ValueError(f"logit_bits={bits} must be at least 2: one is the sign")
  largest = jnp.max(jnp.where(visible, jnp.abs(logits), 0), axis=(-2, -1), keepdims=True)
  step = jnp.where(largest > 0, largest, 1) / (2 ** (bits - 1) - 1)
  return jnp.round(logits / step) * step
