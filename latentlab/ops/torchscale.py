"""What torchscale divides the rows of retention by, form by form, for parity with it.

Its parallel, recurrent and chunkwise forms (`multiscale_retention.py`) have three different row
scalars, all of them detached, so that they agree only behind a head norm with an epsilon of zero.
The recurrent form's is `decay_scale`. Release 0.3.0 has the paper's normaliser in its parallel form
(`decay_scale` and the absolute value of the sum); what is here is its later state, a sum of
absolute values. The chunkwise form is the same in both.
"""

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.typing import Array, Float, Int

_MAX_SUM = 5e4  # What keeps float16 finite.


def parallel_row_scale(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  log_decay: Float[Array, "N"],
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N"]:
  """`s_n clip(sum_m |R_nm| / s_n, 1, 5e4)` of the decayed scores `R`, with `s_n` of `decay_scale`.

  Args:
    q: Queries, rotated.
    k: Keys, scaled, then rotated.
    log_decay: `log gamma` per head.
    segment_ids: Packed documents.
  """
  place = np.arange(q.shape[1])
  decay = _decays(log_decay, place[:, None] - place)[None]
  if segment_ids is not None:
    same = segment_ids[:, :, None] == segment_ids[:, None]
    decay = jnp.where(same[:, None], decay, 0)
  scores = jnp.abs(_scores(q, k)) * decay
  norm = jnp.sqrt(decay.sum(-1))
  scale = norm * jnp.clip(scores.sum(-1) / norm, 1, _MAX_SUM)
  return jax.lax.stop_gradient(scale.swapaxes(1, 2))


def chunkwise_row_scale(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  log_decay: Float[Array, "N"],
  chunk_size: int,
) -> Float[Array, "B T N"]:
  """`s_j max(inner, cross)`, with `j` the place in a chunk: what aligns the two parts of a row.

  `inner` is the clamped sum of the chunk's absolute scores over `s_j`, `cross` the clamped greatest
  column of the state that enters it, over the sum of a chunk's decays.

  Args:
    q: Queries, rotated.
    k: Keys, scaled, then rotated.
    v: Values.
    log_decay: `log gamma` per head.
    chunk_size: Tokens of a chunk. The last is padded.
  """
  batch, length = q.shape[:2]
  padding = [(0, 0), (0, -length % chunk_size), (0, 0), (0, 0)]
  # M chunks, each a row of its own batch.
  q, k, v = (
    jnp.pad(x, padding).reshape(-1, chunk_size, *x.shape[2:]).astype(jnp.float32) for x in (q, k, v)
  )
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  place = np.arange(chunk_size)
  decay = _decays(log_decay, place[:, None] - place)
  norm = jnp.sqrt(decay.sum(-1))
  inner = jnp.maximum((jnp.abs(_scores(q, k)) * decay).sum(-1) / norm, 1)

  leave = decay[:, -1] / decay[:, -1].sum(-1, keepdims=True)
  update = jnp.einsum("BCNH,NC,BCNV->BNHV", k, leave, v)
  update = update.reshape(batch, -1, *update.shape[1:]).swapaxes(0, 1)
  carry = _decays(log_decay, np.array(chunk_size))[:, None, None]
  _, entering = jax.lax.scan(
    lambda state, x: (carry * state + x, state), jnp.zeros_like(update[0]), update
  )
  cross = jnp.maximum(jnp.abs(entering).sum(-2).max(-1), 1).swapaxes(0, 1)  # B M N

  scale = norm * jnp.maximum(inner, cross.reshape(-1, cross.shape[-1], 1))
  scale = scale.swapaxes(1, 2).reshape(batch, -1, scale.shape[1])[:, :length]
  return jax.lax.stop_gradient(scale)


def _decays(log_decay: Float[Array, "N"], gap: np.ndarray) -> Float[Array, "N ..."]:
  """`gamma^gap` per head, zero where the gap is negative."""
  log_decay = log_decay.astype(jnp.float32).reshape(-1, *[1] * gap.ndim)
  powers = jnp.where(gap == 0, 1, jnp.exp(log_decay * np.maximum(gap, 1)))
  return jnp.where(gap >= 0, powers, 0)


def _scores(q, k):
  k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
  return jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
