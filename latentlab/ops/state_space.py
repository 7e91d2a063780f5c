"""A diagonal state space over outer products of keys and values (H3, arXiv 2212.14052, section 3).

A head's state space is a filter of time that all pairs of its key and value features share,

  filter_t = 2 Re sum_m c_m lambda_m^t,   o_t = q_t . sum_{s<=t} filter_{t-s} k_s v_s^T,

so that, with `F_ts = filter_{t-s}`, it is `(Q K^T * F) V` within a chunk, as retention's parallel
form is with its decay, and a state `S_m = sum_s lambda_m^{t-s} k_s^T v_s` for each mode across
chunks. Complex numbers are pairs of real ones in here: a state has `X = 2 M` real modes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from latentlab.typing import Array, Float, Int
from pallas_kernels.common import vary_alike
from pallas_kernels.retention.reference import document_starts, state_dtype, valid_tokens


@struct.dataclass
class Modes:
  """The modes of each head's state space, discretised.

  Attributes:
    log_decay: `log |lambda|`, below 0.
    angle: `arg lambda`.
    real: Real part of the weight `c`.
    imag: Its imaginary part.
  """

  log_decay: Float[Array, "N M"]
  angle: Float[Array, "N M"]
  real: Float[Array, "N M"]
  imag: Float[Array, "N M"]

  def powers(self, t: Float[Array, "*B"]) -> Float[Array, "*B N M 2"]:
    """`lambda^t`, as real and imaginary parts."""
    t = t[..., None, None]
    size = jnp.exp(self.log_decay * t)
    return jnp.stack([size * jnp.cos(self.angle * t), size * jnp.sin(self.angle * t)], axis=-1)

  def read(self, powers: Float[Array, "*B N M 2"]) -> Float[Array, "*B N M 2"]:
    """`2 c lambda^t` with its imaginary part negated, whose product with a state is real."""
    a, b = powers[..., 0], powers[..., 1]
    c, d = self.real, self.imag
    return 2 * jnp.stack([a * c - b * d, -(a * d + b * c)], axis=-1)

  def filter(self, length: int) -> Float[Array, "T N"]:
    """The filter's first taps."""
    return self.read(self.powers(jnp.arange(length, dtype=jnp.float32)))[..., 0].sum(-1)


def discretise(
  log_step: Float[Array, " N"],
  decay: Float[Array, "N M"],
  angle: Float[Array, "N M"],
  real: Float[Array, "N M"],
  imag: Float[Array, "N M"],
) -> Modes:
  """The zero-order hold of `s' = a s + u`, `y = 2 Re c s` (S4D, arXiv 2206.11893, section 3.1).

  Args:
    log_step: Log of the step of each head.
    decay: `-Re a`, above 0.
    angle: `Im a`.
    real: `Re c`.
    imag: `Im c`.
  """
  step = jnp.exp(log_step)[:, None]
  log_decay, turn = -decay * step, angle * step
  # c (e^{a step} - 1) / a, in real arithmetic.
  grown_real = jnp.exp(log_decay) * jnp.cos(turn) - 1
  grown_imag = jnp.exp(log_decay) * jnp.sin(turn)
  square = decay**2 + angle**2
  held_real = (-grown_real * decay + grown_imag * angle) / square
  held_imag = (-grown_imag * decay - grown_real * angle) / square
  return Modes(
    log_decay, turn, real * held_real - imag * held_imag, real * held_imag + imag * held_real
  )


def state_space_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T N H"],
  v: Float[Array, "B T N V"],
  modes: Modes,
  skip: Float[Array, " N"],
  *,
  initial_state: Float[Array, "B N X H V"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int = 128,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N X H V"]]:
  """`o_t = q_t . (skip k_t v_t^T + sum_{s<=t} filter_{t-s} k_s v_s^T)`, chunk by chunk.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    modes: Of the filter.
    skip: What a token's own product counts beside the filter.
    initial_state: State after the preceding tokens; zeros if `None`.
    lengths: Valid tokens per row (right padding); a padded token neither decays nor writes the
      state.
    segment_ids: Packed documents; the state restarts where the id changes, and the initial one
      belongs to the row's first.
    chunk_size: Tokens whose products are computed at once.

  Returns:
    The outputs in `v`'s dtype, and the float32 state after the last valid token.
  """
  if chunk_size < 1:
    raise ValueError(f"{chunk_size=} must be at least 1")
  (batch_size, length, num_heads, head_dim), dtype = q.shape, state_dtype(v.dtype)
  chunk = max(min(chunk_size, length), 1)
  valid = None if lengths is None else valid_tokens(lengths, length)
  if valid is not None:  # What a padded token holds is not ours to trust, and may be a NaN.
    k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
  runs = jnp.zeros((batch_size, length), jnp.int32)
  if segment_ids is not None:
    runs = jnp.cumsum(document_starts(segment_ids, valid), axis=1, dtype=jnp.int32)
  counts = jnp.full((batch_size,), length, jnp.int32) if lengths is None else lengths
  counts = jnp.clip(counts - np.arange(0, length, chunk)[:, None], 0, chunk)

  def split(x):
    # The last chunk is filled up with padding, which changes no state.
    x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    return jnp.moveaxis(x.reshape(batch_size, -1, chunk, *x.shape[2:]), 1, 0)

  inner = _toeplitz(modes.filter(chunk).at[0].add(skip).T)
  step = functools.partial(_chunk, modes, inner)
  tokens = (*map(split, (q, k, v, runs)), counts)
  first = jnp.zeros((batch_size,), jnp.int32)
  if length <= chunk:
    state = None if initial_state is None else initial_state.astype(dtype)
    (state, _), out = step((state, first), jax.tree.map(lambda x: x[0], tokens))
    return out.astype(v.dtype), state
  if initial_state is None:
    shape = (batch_size, num_heads, 2 * modes.angle.shape[-1], head_dim, v.shape[-1])
    initial_state = jnp.zeros(shape)
  state = vary_alike(initial_state.astype(dtype), q, k, v)[0]
  (state, _), out = jax.lax.scan(step, (state, first), tokens)
  out = jnp.moveaxis(out, 0, 1).reshape(batch_size, -1, num_heads, v.shape[-1])
  return out[:, :length].astype(v.dtype), state


def _chunk(modes, inner, carry, tokens):
  """One chunk: the state and the document that leave it, and its outputs."""
  (state, run), (q, k, v, runs, count) = carry, tokens
  chunk = q.shape[1]
  product = functools.partial(jnp.einsum, preferred_element_type=inner.dtype)

  # Heads before length: plain batched products.
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  inner = jnp.where((runs[:, :, None] == runs[:, None, :])[:, None], inner, 0)
  out = product("BNCD,BNDV->BNCV", product("BNCH,BNDH->BNCD", q, k) * inner, v)

  # From each token to the last valid one.
  places = jnp.arange(chunk)
  last = jnp.take_along_axis(runs, jnp.maximum(count - 1, 0)[:, None], axis=1)
  leave = modes.powers(jnp.maximum(count[:, None] - 1 - places, 0).astype(inner.dtype))
  leave = jnp.where((runs == last)[..., None, None], _flat(leave), 0)
  # A token of the chunk's padding is a copy, and k and v of a row's padding are zero.
  leave = jnp.where((places < count[:, None])[..., None, None], leave, 0)
  update = product("BCNX,BNCH,BNCV->BNXHV", leave, k, v)
  if state is None:
    return (update, last[:, 0]), out.swapaxes(1, 2)

  enter = _flat(modes.read(modes.powers(1 + places.astype(inner.dtype))))
  enter = jnp.where((runs == run[:, None])[..., None, None], enter, 0)
  out += product("BCNX,BNCH,BNXHV->BNCV", enter, q, state)
  a, b = jnp.moveaxis(modes.powers(count.astype(inner.dtype)), -1, 0)[..., None, None]
  real, imag = jnp.moveaxis(state.reshape(*state.shape[:2], -1, 2, *state.shape[3:]), 3, 0)
  kept = jnp.stack([a * real - b * imag, a * imag + b * real], axis=3).reshape(state.shape)
  kept = jnp.where((last == run[:, None])[..., None, None, None], kept, 0)
  return (kept + update, last[:, 0]), out.swapaxes(1, 2)


def _flat(modes: Float[Array, "*B M 2"]) -> Float[Array, "*B X"]:
  return modes.reshape(*modes.shape[:-2], -1)


def _toeplitz(taps: Float[Array, "N C"]) -> Float[Array, "N C C"]:
  """`F_ts = taps_{t-s}`, zero above the diagonal; by reshapes, whose gradient is no scatter."""
  heads, chunk = taps.shape
  # Copies of a row of 2 C entries, read as rows of 2 C - 1, shift by one from each to the next.
  zeros = jnp.zeros((heads, chunk), taps.dtype)
  row = jnp.concatenate([taps[:, :1], zeros, taps[:, :0:-1]], axis=1)
  rows = jnp.tile(row, (1, chunk))[:, : chunk * (2 * chunk - 1)]
  return rows.reshape(heads, chunk, 2 * chunk - 1)[..., :chunk]
