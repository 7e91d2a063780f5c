"""Diagonal linear recurrences, and RWKV's weighted average of values that is made of two.

The average (RWKV, https://arxiv.org/abs/2305.13048, section 3.1, equation 16; appendix D has the
stable form) is, for each channel with decay `w` and bonus `u`,

  wkv_t = (sum_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u + k_t} v_t) / (the same of ones).

Its two sums grow as `e^k` does, so they are held times `e^-max`, the maximum being that of the
exponents so far. It cancels from the average, and so from every gradient.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from latentlab.typing import Array, Bool, Float, Int
from pallas_kernels.common import target_platform, vary_alike
from pallas_kernels.retention.reference import document_starts, state_dtype, valid_tokens

Scan = Literal["sequential", "associative"]

_NOTHING = -1e30
"""An exponent below all others, and finite: a difference of two is a number."""


def linear_recurrence(
  decay: Float[Array, "B T *C"],
  x: Float[Array, "B T *C"],
  initial_state: Float[Array, "B *C"],
  *,
  scan: Scan | None = None,
) -> Float[Array, "B T *C"]:
  """The states `h_t = decay_t h_{t-1} + x_t`, from `initial_state` on.

  Args:
    decay: Factors of the state; 0 forgets it.
    x: What is added.
    initial_state: The state before the first token.
    scan: `sequential`, one token after another, or `associative`, in `log2(T)` sweeps; by default
      the first on a CPU and the second elsewhere.
  """
  scan = scan or ("sequential" if target_platform() == "cpu" else "associative")
  decay, x, initial_state = vary_alike(decay, x, initial_state)
  first = decay[:, :1] * initial_state[:, None] + x[:, :1]
  return _states(scan, decay, jnp.concatenate([first, x[:, 1:]], axis=1))


# Autodiff through either scan would keep its every sweep; the gradient is a scan backwards.
_states = jax.custom_vjp(
  lambda scan, decay, x: _run(scan, decay, x, reverse=False), nondiff_argnums=(0,)
)


def _states_fwd(scan, decay, x):
  states = _run(scan, decay, x, reverse=False)
  return states, (decay, states)


def _states_bwd(scan, residuals, cotangents):
  decay, states = residuals
  later = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
  d_x = _run(scan, later, cotangents, reverse=True)
  before = jnp.concatenate([jnp.zeros_like(states[:, :1]), states[:, :-1]], axis=1)
  return d_x * before, d_x


_states.defvjp(_states_fwd, _states_bwd)


def _run(scan: Scan, decay, x, *, reverse: bool):
  def combine(earlier, later):
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]

  if scan == "associative":
    return jax.lax.associative_scan(combine, (decay, x), axis=1, reverse=reverse)[1]

  def step(state, token):
    state = token[0] * state + token[1]
    return state, state

  tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (decay, x))
  first, *tokens = vary_alike(jnp.zeros_like(x[:, 0]), *tokens)
  _, states = jax.lax.scan(step, first, tuple(tokens), reverse=reverse)
  return jnp.moveaxis(states, 0, 1)


@struct.dataclass
class WkvState:
  """What `wkv` carries from token to token, per channel.

  Attributes:
    numerator: The weighted sum of values, times `exp(-exponent)`.
    denominator: The sum of the weights, times the same.
    exponent: The running maximum of the weights' exponents.
  """

  numerator: Float[Array, "*layers B C"]
  denominator: Float[Array, "*layers B C"]
  exponent: Float[Array, "*layers B C"]

  @classmethod
  def empty(cls, batch_size: int, channels: int) -> "WkvState":
    """The state before the first token."""
    zeros = jnp.zeros((batch_size, channels), jnp.float32)
    return cls(zeros, zeros, jnp.full_like(zeros, _NOTHING))


def wkv(
  decay: Float[Array, " C"],
  bonus: Float[Array, " C"],
  k: Float[Array, "B T C"],
  v: Float[Array, "B T C"],
  *,
  initial_state: WkvState | None = None,
  lengths: Int[Array, " B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  scan: Scan | None = None,
) -> tuple[Float[Array, "B T C"], WkvState]:
  """RWKV's average of the values so far, in float32 inside.

  Args:
    decay: `w > 0`, what exponents lose from token to token.
    bonus: `u`, what the exponent of the current token gains.
    k: Exponents.
    v: Values.
    initial_state: State after the preceding tokens.
    lengths: Valid tokens per row (right padding); a padded token neither decays nor writes the
      state.
    segment_ids: Packed documents; the state restarts where the id changes.
    scan: See `linear_recurrence`.

  Returns:
    The averages in `v`'s dtype, and the state after the last valid token.
  """
  batch_size, length, channels = v.shape
  dtype, out_dtype = state_dtype(v.dtype), v.dtype
  decay, bonus, k, v = (x.astype(dtype) for x in (decay, bonus, k, v))
  valid = None if lengths is None else valid_tokens(lengths, length)
  starts = None if segment_ids is None else document_starts(segment_ids, valid)
  state = WkvState.empty(batch_size, channels) if initial_state is None else initial_state
  state = jax.tree.map(lambda x: x.astype(dtype), state)

  step = jnp.broadcast_to(-decay, k.shape)
  if valid is not None:
    step = jnp.where(valid[..., None], step, 0)
    k = jnp.where(valid[..., None], k, _NOTHING)
    v = jnp.where(valid[..., None], v, 0)
  exponent = jax.lax.stop_gradient(_running_maximum(step, k, state.exponent, starts))
  before = jnp.concatenate([state.exponent[:, None], exponent[:, :-1]], axis=1)
  if starts is not None:
    before = jnp.where(starts[..., None], _NOTHING, before)  # Which forgets the state.
  forget = jnp.exp(before + step - exponent)
  weight = jnp.exp(k - exponent)
  if valid is not None:
    weight = jnp.where(valid[..., None], weight, 0)  # A row of padding alone has no maximum.

  pair = jnp.stack([weight * v, weight], axis=-1)
  first = jnp.stack([state.numerator, state.denominator], axis=-1)
  forget = jnp.broadcast_to(forget[..., None], pair.shape)
  pairs = linear_recurrence(forget, pair, first, scan=scan)

  # The output takes the state before its token.
  past = jnp.concatenate([first[:, None], pairs[:, :-1]], axis=1)
  top = jax.lax.stop_gradient(jnp.maximum(before, k + bonus))
  old, new = jnp.exp(before - top), jnp.exp(k + bonus - top)
  out = (old * past[..., 0] + new * v) / (old * past[..., 1] + new)
  state = WkvState(pairs[:, -1, :, 0], pairs[:, -1, :, 1], exponent[:, -1])
  return out.astype(out_dtype), state


def _running_maximum(
  step: Float[Array, "B T C"],
  k: Float[Array, "B T C"],
  initial: Float[Array, "B C"],
  starts: Bool[Array, "B T"] | None,
) -> Float[Array, "B T C"]:
  """`m_t = max(m_{t-1} + step_t, k_t)`, without what is before a document's start."""
  if starts is not None:
    step = jnp.where(starts[..., None], _NOTHING, step)
  first = jnp.maximum(initial[:, None] + step[:, :1], k[:, :1])
  k = jnp.concatenate([first, k[:, 1:]], axis=1)

  def combine(earlier, later):
    # Sums of `_NOTHING` are cut off, lest a thousand documents reach minus infinity.
    return (
      jnp.maximum(earlier[0] + later[0], _NOTHING),
      jnp.maximum(earlier[1] + later[0], later[1]),
    )

  return jax.lax.associative_scan(combine, (step, k), axis=1)[1]
