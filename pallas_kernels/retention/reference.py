"""The three forms of retention in jax.numpy (RetNet, https://arxiv.org/abs/2307.08621, section 2).

`chunkwise` (eq. 7) is the product path of every platform that has no kernel; `parallel` (eq. 5) is
its single-chunk case; `recurrent` (eq. 6) is on its own, and what the two are held to. All take
the arguments of `api.retention`, which checks them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from pallas_kernels.common import vary_alike

DEFAULT_CHUNK_SIZE = 64  # The fastest on CPUs, forward and backward.


def chunkwise(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B T N"],
  initial_state: Float[Array, "B N H V"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """Eq. 7: quadratic within chunks, all of them at once; a scan carries the state across them.

  With `S` the state that enters a chunk, `O = (Q K^T * inner) V + enter * (Q S)`, and the state
  that enters the next is `carry * S + (leave * K)^T V`. The last row of `inner` is `leave`, the
  last entry of `enter` is `carry`; all are zero across the start of a document.
  """
  (batch, length, heads, head_dim), (kv_heads, value_dim) = q.shape, v.shape[2:]
  chunk = max(1, min(chunk_size or DEFAULT_CHUNK_SIZE, length))
  num_chunks = max(1, -(-length // chunk))
  dtype, out_dtype = state_dtype(v.dtype), v.dtype

  def split(x, mode="constant"):
    x = jnp.pad(x, [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2), mode)
    return jnp.moveaxis(x.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

  def split_heads(x):  # Heads before length, so that all products below are plain batched matmuls.
    x = split(x).reshape(num_chunks, batch, chunk, kv_heads, -1, x.shape[-1])
    return x.transpose(0, 1, 3, 4, 2, 5)

  valid = None if lengths is None else valid_tokens(lengths, length)
  if valid is not None:  # What a padded token holds is not ours to trust, and may be a NaN.
    k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
  q, k, v = split_heads(q), split_heads(k)[:, :, :, 0], split_heads(v)[:, :, :, 0]

  if log_decay.ndim == 1:
    log_decay = log_decay.reshape(kv_heads, -1).astype(dtype)
    ends = np.array([length]) if lengths is None else jnp.minimum(lengths, length)
    ragged = lengths is not None or num_chunks * chunk != length
    inner, enter = _fixed_decay(log_decay, ends, num_chunks if ragged else 1, chunk)
  else:
    log_decay = log_decay if valid is None else jnp.where(valid[..., None], log_decay, 0)
    inner, enter = _token_decay(split_heads(log_decay.astype(dtype)[..., None])[..., 0])

  visible = np.tri(chunk, dtype=bool)
  if segment_ids is not None:
    runs = split(jnp.cumsum(document_starts(segment_ids, valid), 1), mode="edge")  # M B C
    before = jnp.pad(runs[:-1, :, -1], ((1, 0), (0, 0)))  # The initial state is of the first run.
    visible = (visible & (runs[..., :, None] == runs[..., None, :]))[:, :, None, None]
    enter = jnp.where((runs == before[..., None])[:, :, None, None], enter, 0)
  inner = jnp.where(visible, inner, 0)
  leave, carry = inner[..., -1, :], enter[..., -1]

  update = jnp.einsum(
    "mbkgch,mbkcv->mbkghv",
    (k[:, :, :, None] * leave[..., None]).astype(k.dtype),
    v,
    preferred_element_type=dtype,
  )
  carry = jnp.broadcast_to(carry, update.shape[:4])[..., None, None]
  if initial_state is None:
    state = jnp.zeros_like(update[0])
  else:
    state = initial_state.reshape(update.shape[1:]).astype(dtype)
  carry, update, state = vary_alike(carry, update, state)
  state, entering = jax.lax.scan(lambda s, x: (x[0] * s + x[1], s), state, (carry, update))

  scores = jnp.einsum("mbkgch,mbkdh->mbkgcd", q, k, preferred_element_type=dtype) * inner
  out = jnp.einsum(
    "mbkgcd,mbkdv->mbkgcv", scores.astype(out_dtype), v, preferred_element_type=dtype
  )
  out += jnp.einsum("mbkgch,mbkghv->mbkgcv", q * enter[..., None], entering)
  out = out.astype(out_dtype).transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, value_dim)
  return out[:, :length], state.reshape(batch, heads, head_dim, value_dim)


def parallel(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B T N"],
  initial_state: Float[Array, "B N H V"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """Eq. 5, `(Q K^T * D) V`: quadratic in T, whatever the chunk size asked for."""
  del chunk_size
  return chunkwise(q, k, v, log_decay, initial_state, lengths, segment_ids, max(1, q.shape[1]))


def recurrent(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B T N"],
  initial_state: Float[Array, "B N H V"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """Eq. 6, a scan over tokens, whatever the chunk size asked for."""
  del chunk_size
  (batch, length, heads, head_dim), value_dim = q.shape, v.shape[-1]
  valid = jnp.ones((batch, length), bool) if lengths is None else valid_tokens(lengths, length)
  start = jnp.zeros_like(valid) if segment_ids is None else document_starts(segment_ids, valid)
  log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
  k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
  # A padded token keeps the state and adds nothing to it: a decay of one, and k = v = 0.
  log_decay = jnp.where(valid[..., None], log_decay, 0)

  def step(state, token):
    *token, start = token
    out, state = decode(*token, jnp.where(start[:, None, None, None], 0, state))
    return state, out

  if initial_state is None:
    initial_state = jnp.zeros((batch, heads, head_dim, value_dim))
  state = vary_alike(initial_state.astype(state_dtype(v.dtype)), q, k, v, log_decay, start)[0]
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay, start))
  state, out = jax.lax.scan(step, state, tokens)
  return jnp.moveaxis(out, 0, 1), state


def decode(
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B N"],
  state: Float[Array, "B N H V"],
  gate: Float[Array, "B N V"] | None = None,
  norm_eps: float | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B N H V"]]:
  """One token of eq. 6, `S = exp(g) S + k^T v`, `o = q S`; then eq. 8's norm and gate, if asked."""
  dtype, groups = state_dtype(v.dtype), q.shape[1] // k.shape[1]
  decay = jnp.exp(log_decay.astype(dtype))[..., None, None]
  # The outer product per key head, shared by its group of query heads.
  update = jnp.repeat(k.astype(dtype)[..., None] * v.astype(dtype)[..., None, :], groups, axis=1)
  state = decay * state.astype(dtype) + update
  out = jnp.einsum("BNH,BNHV->BNV", q.astype(dtype), state)
  if norm_eps is not None:
    out *= jax.lax.rsqrt(jnp.square(out).mean(-1, keepdims=True) + norm_eps)
  if gate is not None:
    out *= jax.nn.silu(gate.astype(dtype))
  return out.astype(v.dtype), state


def state_dtype(dtype: DTypeLike) -> jnp.dtype:
  """float32 for the states and decays of any input but float64, which tests alone use."""
  return jnp.promote_types(dtype, jnp.float32)


def valid_tokens(lengths: Int[Array, "B"], length: int) -> Bool[Array, "B T"]:
  """Which tokens are no padding."""
  return jnp.arange(length) < lengths[:, None]


def document_starts(
  segment_ids: Int[Array, "B T"], valid: Bool[Array, "B T"] | None
) -> Bool[Array, "B T"]:
  """Where the id changes. An id that returns later is a new document; padding starts none."""
  starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  return starts if valid is None else starts & valid


def _fixed_decay(
  log_decay: Float[Array, "K G"], ends: Int[Array, "#B"] | np.ndarray, num_chunks: int, chunk: int
) -> tuple[Float[Array, "M #B K G C C"], Float[Array, "M #B K G C"]]:
  """`inner` and `enter` of chunks whose local positions stop at the last valid token."""
  counts = (ends - chunk * np.arange(num_chunks)[:, None]).clip(0, chunk)  # M B
  token = np.minimum if isinstance(counts, np.ndarray) else jnp.minimum
  token = token(np.arange(chunk), counts[..., None] - 1)[:, :, None, None]  # M B 1 1 C

  def power(log_decay, gap):
    # No `-inf * 0` at gap 0: a NaN that a mask hides still poisons the gradient.
    return jnp.where(gap <= 0, 1, jnp.exp(log_decay * jnp.maximum(gap, 1)))

  inner = power(log_decay[..., None, None], token[..., :, None] - token[..., None, :])
  return inner, power(log_decay[..., None], token + 1)


def _token_decay(
  log_decay: Float[Array, "M B K G C"],
) -> tuple[Float[Array, "M B K G C C"], Float[Array, "M B K G C"]]:
  """`inner` and `enter` from sums over `(j, i]`: a difference of totals loses them to `-inf`."""
  chunk = log_decay.shape[-1]
  later = np.tri(chunk, k=-1, dtype=bool)
  sums = jnp.cumsum(jnp.where(later, log_decay[..., :, None], 0), axis=-2)
  return jnp.exp(sums), jnp.exp(jnp.cumsum(log_decay, axis=-1))
