"""A sequence in segments that run side by side, each from the state that enters it.

One pass over keys and values gives what each segment writes, which needs no queries and no outputs;
a prefix over the segments, of pairs `(decay, state)`, gives what enters them. Where the heads of a
batch are too few for a chip, segments are what it shares out.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.common import vary_alike
from pallas_kernels.retention.reference import product, state_dtype, states_between


def entering_states(
  k: Float[Array, "B S L K H"],
  v: Float[Array, "B S L K V"],
  gates: Float[Array, "B S L N"],
  initial_state: Float[Array, "B N H V"] | None = None,
) -> Float[Array, "B S N H V"]:
  """The state before each of `S` segments of `L` tokens, in float32.

  Eq. 7 of RetNet (https://arxiv.org/abs/2307.08621) across chunks, with segments for them.

  Args:
    k: Keys; zeros where tokens are padding.
    v: Values; likewise.
    gates: Log decays, of which every sum is finite (`gates.finite_gates`).
    initial_state: Before the first segment; zeros if `None`.
  """
  if initial_state is None:
    sizes = k.shape[0], gates.shape[-1], k.shape[-1], v.shape[-1]
    initial_state = jnp.zeros(sizes, state_dtype(k.dtype))
  # What leaves the last segment enters none.
  decay, update = segment_updates(k[:, :-1], v[:, :-1], gates[:, :-1])
  carry = decay.swapaxes(0, 1)[..., None, None]
  last, entering = states_between(carry, update.swapaxes(0, 1), initial_state)
  return jnp.concatenate([entering, last[None]]).swapaxes(0, 1)


def segment_updates(
  k: Float[Array, "B S L K H"], v: Float[Array, "B S L K V"], gates: Float[Array, "B S L N"]
) -> tuple[Float[Array, "B S N"], Float[Array, "B S N H V"]]:
  """What segments do to a state `s`, which becomes `decay * s + update`; both are float32.

  Args:
    k: See `entering_states`.
    v: See there.
    gates: See there.
  """
  k, v, gates = vary_alike(k, v, gates)
  batch, segments, length, kv_heads, _ = k.shape
  # Sums from the end lose nothing to a gate that forgets, and are no differences.
  sums = jax.lax.cumsum(gates, axis=2, reverse=True)
  leave = jnp.exp(jnp.pad(sums[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0))))
  leaving = leave.reshape(batch, segments, length, kv_heads, -1, 1) * k[:, :, :, :, None]
  update = _update(leaving.astype(k.dtype), v)
  return jnp.exp(sums[:, :, 0]), update.reshape(batch, segments, -1, *update.shape[-2:])


@jax.custom_vjp
def _update(
  keys: Float[Array, "B S L K G H"], v: Float[Array, "B S L K V"]
) -> Float[Array, "B S K G H V"]:
  """Sums of `k^T v` in float32, whose gradient meets keys and values in their own dtype."""
  return product("BSLKGH,BSLKV->BSKGHV", keys, v)


def _update_fwd(keys, v):
  return _update(keys, v), (keys, v)


def _update_bwd(residuals, d_state):
  keys, v = residuals
  d_state = d_state.astype(v.dtype)
  d_keys = product("BSKGHV,BSLKV->BSLKGH", d_state, v).astype(keys.dtype)
  return d_keys, product("BSKGHV,BSLKGH->BSLKV", d_state, keys).astype(v.dtype)


_update.defvjp(_update_fwd, _update_bwd)
