"""The three forms of retention in jax.numpy (RetNet, https://arxiv.org/abs/2307.08621, section 2).

`chunkwise` (eq. 7) is the product path of every platform that has no kernel; `parallel` (eq. 5) is
its single-chunk case; `recurrent` (eq. 6) is on its own, and what the two are held to. All take
the arguments of `api.retention`, which checks them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from pallas_kernels.common import target_platform, vary_alike

DEFAULT_CHUNK_SIZE = 64  # The fastest on CPUs, forward and backward.
_UNROLL = 4  # Chunks between which a CPU's threads find something to do side by side.


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
  """Eq. 7: quadratic within chunks, and a scan that carries the state across them.

  With `S` the state that enters a chunk, `O = (Q K^T * inner) V + enter * (Q S)`, and the state
  that enters the next is `carry * S + (leave * K)^T V`. The last row of `inner` is `leave`, the
  last entry of `enter` is `carry`; all are zero across the start of a document.

  A CPU takes one chunk after another, whose arrays stay in its cache; an accelerator takes all at
  once. A shorter chunk at the end is by itself: nothing is padded.
  """
  (batch, length, heads, head_dim), value_dim = q.shape, v.shape[-1]
  chunk = max(1, min(chunk_size or DEFAULT_CHUNK_SIZE, length))
  dtype = state_dtype(v.dtype)

  valid = None if lengths is None else valid_tokens(lengths, length)
  if valid is not None:  # What a padded token holds is not ours to trust, and may be a NaN.
    k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
  tokens, marks, decay = _Tokens(q, k, v), _Marks(), _Decay()
  log_decay = log_decay.astype(dtype)
  if log_decay.ndim == 3:
    log_decay = log_decay if valid is None else jnp.where(valid[..., None], log_decay, 0)
    tokens = tokens._replace(log_decay=log_decay)
  elif lengths is None:
    decay = _Decay(None, *_fixed_decay(log_decay, np.arange(1, chunk + 1)))
  else:
    decay = _Decay(log_decay)
    marks = marks._replace(places=jnp.minimum(np.arange(-1, length), lengths[:, None] - 1))
  if segment_ids is not None:
    runs = jnp.cumsum(document_starts(segment_ids, valid), axis=1)
    marks = marks._replace(runs=jnp.pad(runs, ((0, 0), (1, 0))))  # The first is the state's.

  if initial_state is None:
    initial_state = jnp.zeros((batch, heads, head_dim, value_dim))
  state = initial_state.astype(dtype)
  leaves, tree = jax.tree.flatten((decay, state, tokens, marks))
  decay, state, tokens, marks = jax.tree.unflatten(tree, vary_alike(*leaves))

  outs, whole = [], length - length % chunk
  if whole > chunk:
    several = _in_turn if target_platform() == "cpu" else _at_once
    state, out = several(chunk, decay, state, *_cut(tokens, marks, 0, whole))
    outs.append(out)
  for start, size in ((0, chunk * (whole == chunk)), (whole, length - whole)):
    if size:
      state, out = _step(decay, state, *_cut(tokens, marks, start, size))
      outs.append(out)
  if len(outs) != 1:
    outs = [jnp.concatenate([jnp.zeros((batch, 0, heads, value_dim), v.dtype), *outs], axis=1)]
  return outs[0], state


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


class _Tokens(NamedTuple):
  """What there is of each token; several chunks' or one's."""

  q: Float[Array, "B C N H"]
  k: Float[Array, "B C K H"]
  v: Float[Array, "B C K V"]
  log_decay: Float[Array, "B C N"] | None = None


class _Marks(NamedTuple):
  """What counts tokens, with that of the token before the first in front.

  Attributes:
    places: Valid tokens before this one, all of a row's before one that is padding.
    runs: The number of the document.
  """

  places: Int[Array, "B C+1"] | None = None
  runs: Int[Array, "B C+1"] | None = None


class _Decay(NamedTuple):
  """A decay that tokens share: by itself, or as what a chunk without padding makes of it."""

  log_decay: Float[Array, "N"] | None = None
  inner: Float[Array, "1 N C C"] | None = None
  enter: Float[Array, "1 N C"] | None = None


class _Local(NamedTuple):
  """What a chunk computes without the state that enters it."""

  out: Float[Array, "B N C V"]
  queries: Float[Array, "B N C H"]
  enter: Float[Array, "#B N C 1"]
  carry: Float[Array, "#B N 1 1"]
  update: Float[Array, "B N H V"]


def _cut(tokens, marks, start, size):
  """The tokens from `start` on, and their marks."""
  cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, axis=1)
  tokens = jax.tree.map(lambda x: cut(x, slice_size=size), tokens)
  return tokens, jax.tree.map(lambda x: cut(x, slice_size=size + 1), marks)


def _local(decay: _Decay, tokens: _Tokens, marks: _Marks) -> _Local:
  # Heads before length, and a copy of its key for each query head: plain batched products.
  q, k, v = (x.swapaxes(1, 2) for x in tokens[:3])
  k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
  if tokens.log_decay is not None:
    inner, enter = _token_decay(tokens.log_decay.swapaxes(1, 2))
  elif marks.places is not None:
    inner, enter = _fixed_decay(decay.log_decay, marks.places[:, 1:] - marks.places[:, :1])
  else:
    chunk = q.shape[2]
    inner, enter = decay.inner[..., :chunk, :chunk], decay.enter[..., :chunk]
  if marks.runs is not None:
    runs = marks.runs[:, 1:]
    inner = jnp.where((runs[:, :, None] == runs[:, None, :])[:, None], inner, 0)
    enter = jnp.where((runs == marks.runs[:, :1])[:, None], enter, 0)
  leave, carry = inner[..., -1, :, None], enter[..., -1, None, None]

  scores = product("BNCH,BNDH->BNCD", q, k) * inner
  return _Local(
    out=product("BNCD,BNDV->BNCV", scores.astype(v.dtype), v),
    queries=q,
    enter=enter[..., None],
    carry=carry,
    update=product("BNCH,BNCV->BNHV", (k * leave).astype(k.dtype), v),
  )


def _join(state: Float[Array, "B N H V"], local: _Local, *, scale_queries: bool = False):
  """The state that leaves a chunk, and its output, `B C N V`."""
  # To scale what is read from the state fuses with the sum. The gradient wants it on the queries,
  # which are narrower: forward and backward then take a CPU 0.8 of the time.
  queries = local.queries * local.enter if scale_queries else local.queries
  read = product("BNCH,BNHV->BNCV", queries, state)
  out = local.out + (read if scale_queries else local.enter * read)
  return local.carry * state + local.update, out.swapaxes(1, 2)


def product(equation: str, x: Array, y: Array) -> Array:
  """An einsum that accumulates, and is returned, in the states' dtype."""
  return jnp.einsum(equation, x, y, preferred_element_type=state_dtype(x.dtype))


def _step(decay: _Decay, state: Float[Array, "B N H V"], tokens: _Tokens, marks: _Marks, **options):
  """One chunk."""
  state, out = _join(state, _local(decay, tokens, marks), **options)
  return state, out.astype(tokens.v.dtype)


def _at_once(chunk, decay, state, tokens, marks):
  """Chunks side by side; only the states are made one after another."""
  batch, length, heads = tokens.q.shape[:3]
  split = lambda x: x.reshape(batch, -1, chunk, *x.shape[2:])
  with_the_last = np.arange(0, length, chunk)[:, None] + np.arange(chunk + 1)
  marks = jax.tree.map(lambda x: x[:, with_the_last], marks)
  local = jax.vmap(_local, (None, 1, 1))(decay, jax.tree.map(split, tokens), marks)
  state, entering = states_between(local.carry, local.update, state)
  out = jax.vmap(lambda s, x: _join(s, x)[1].astype(tokens.v.dtype), out_axes=1)(entering, local)
  return state, out.reshape(batch, length, heads, -1)


def states_between(
  carry: Float[Array, "S #B N 1 1"],
  update: Float[Array, "S B N H V"],
  state: Float[Array, "B N H V"],
) -> tuple[Float[Array, "B N H V"], Float[Array, "S B N H V"]]:
  """The last state, and those that enter `S` stretches, which `carry * state + update` leaves."""
  carry, update, state = vary_alike(carry, update, state)
  return jax.lax.scan(lambda s, x: (x[0] * s + x[1], s), state, (carry, update))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_turn(chunk, decay, state, tokens, marks):
  """Chunks one after another. The backward recomputes all of a chunk but the state it began with.

  Left to itself, autodiff would keep each chunk's scores, and move whole arrays to slice them.
  """
  return _in_turn_fwd(chunk, decay, state, tokens, marks)[0]


def _in_turn_fwd(chunk, decay, state, tokens, marks):
  def step(carry, start):
    state, out = carry
    leaving, part = _step(decay, state, *_cut(tokens, marks, start, chunk))
    return (leaving, _put(out, part, start)), state

  q, v = tokens.q, tokens.v
  out = jnp.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)
  starts = np.arange(0, q.shape[1], chunk)
  carry = (state, vary_alike(out, q)[0])
  carry, entering = jax.lax.scan(step, carry, starts, unroll=_UNROLL)
  return carry, (decay, entering, tokens, marks)


def _in_turn_bwd(chunk, residuals, cotangents):
  decay, entering, tokens, marks = residuals
  d_state, d_out = cotangents

  def step(carry, x):
    (d_decay, d_state, d_tokens), (state, start) = carry, x
    part, marked = _cut(tokens, marks, start, chunk)
    _, pull = jax.vjp(lambda *args: _step(*args, marked, scale_queries=True), decay, state, part)
    d_part = jax.lax.dynamic_slice_in_dim(d_out, start, chunk, 1)
    more, d_state, d_part = pull((d_state, d_part))
    d_tokens = jax.tree.map(lambda whole, part: _put(whole, part, start), d_tokens, d_part)
    return (jax.tree.map(jnp.add, d_decay, more), d_state, d_tokens), None

  zeros = lambda tree: jax.tree.map(lambda x: vary_alike(jnp.zeros_like(x), d_out)[0], tree)
  carry = (zeros(decay), d_state, zeros(tokens))
  xs = (entering, np.arange(0, tokens.q.shape[1], chunk))
  (d_decay, d_state, d_tokens), _ = jax.lax.scan(step, carry, xs, reverse=True, unroll=_UNROLL)
  return d_decay, d_state, d_tokens, None


_in_turn.defvjp(_in_turn_fwd, _in_turn_bwd)


def _put(whole, part, start):
  return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)


def _fixed_decay(
  log_decay: Float[Array, "N"], elapsed: Int[Array, "B C"] | np.ndarray
) -> tuple[Float[Array, "#B N C C"], Float[Array, "#B N C"]]:
  """`inner` and `enter` of a chunk in which each token is the `elapsed`-th that is no padding."""
  elapsed = elapsed.reshape(-1, 1, elapsed.shape[-1])  # B 1 C

  def power(log_decay, gap):
    # No `-inf * 0` at gap 0: a NaN that a mask hides still poisons the gradient.
    return jnp.where(gap <= 0, 1, jnp.exp(log_decay * jnp.maximum(gap, 1)))

  inner = power(log_decay[..., None, None], elapsed[..., :, None] - elapsed[..., None, :])
  return _causal(inner), power(log_decay[..., None], elapsed)


def _token_decay(
  log_decay: Float[Array, "B N C"],
) -> tuple[Float[Array, "B N C C"], Float[Array, "B N C"]]:
  """`inner` and `enter` from sums over `(j, i]`: a difference of totals loses them to `-inf`."""
  chunk = log_decay.shape[-1]
  later = np.tri(chunk, k=-1, dtype=bool)
  sums = jnp.cumsum(jnp.where(later, log_decay[..., :, None], 0), axis=-2)
  return _causal(jnp.exp(sums)), jnp.exp(jnp.cumsum(log_decay, axis=-1))


def _causal(inner: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
  return jnp.where(np.tri(inner.shape[-1], dtype=bool), inner, 0)
