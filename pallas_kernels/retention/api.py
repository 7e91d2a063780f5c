"""Retention: argument checks, and dispatch to the implementation that serves a platform."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common import dispatch
from pallas_kernels.retention import gpu, gpu_decode, reference, tpu

Implementation = Literal["xla", "parallel", "recurrent", "pallas_tpu", "pallas_gpu"]
DecodeImplementation = Literal["xla", "pallas_tpu", "pallas_gpu"]

# One that cannot serve its arguments raises NotImplementedError, with the reason.
IMPLEMENTATIONS = {
  "xla": reference.chunkwise,
  "parallel": reference.parallel,
  "recurrent": reference.recurrent,
  "pallas_tpu": tpu.chunkwise,
  "pallas_gpu": gpu.chunkwise,
}

DECODE_IMPLEMENTATIONS = {
  "xla": reference.decode,
  "pallas_tpu": tpu.decode,
  "pallas_gpu": gpu_decode.decode,
}

_DEFAULTS = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("pallas_tpu", "xla")}
_DECODE_DEFAULTS = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("pallas_tpu", "xla")}


def retention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B T N"],
  *,
  initial_state: Float[Array, "B N H V"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  chunk_size: int | None = None,
  implementation: Implementation | Sequence[Implementation] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """Retention over `T` tokens: `S_t = exp(g_t) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`.

  The state is float32 whatever the inputs are.

  Args:
    q: Queries, rotated. Nothing is scaled in here.
    k: Keys, scaled, then rotated; `N` is a multiple of their `K` heads, which query heads share
      in consecutive groups.
    v: Values.
    log_decay: `g`, per head or per token and head; at most 0; `-inf` forgets.
    initial_state: State after the preceding tokens; zeros if `None`.
    lengths: Valid tokens per row (right padding); a padded token neither decays nor writes the
      state. All valid if `None`.
    segment_ids: Packed documents; the state restarts where the id changes. `initial_state` belongs
      to the row's first document.
    chunk_size: A request, which an implementation may round or refuse; any `T` is accepted.
    implementation: A name is a demand and raises if it cannot be met; a sequence is tried in order;
      `None` is the target platform's default.

  Returns:
    The outputs in `v`'s dtype, and the state after the last valid token.

  Raises:
    ValueError: Shapes disagree, or a name is unknown.
    ExceptionGroup: Every implementation asked for refused; holds the reasons.
  """
  _check_arguments(q, k, v, log_decay, initial_state, lengths, segment_ids, chunk_size)
  return dispatch(
    "retention",
    IMPLEMENTATIONS,
    _DEFAULTS,
    implementation,
    *(q, k, v, log_decay, initial_state, lengths, segment_ids, chunk_size),
  )


def retention_decode(
  q: Float[Array, "B N H"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K V"],
  log_decay: Float[Array, "N"] | Float[Array, "B N"],
  state: Float[Array, "B N H V"],
  *,
  gate: Float[Array, "B N V"] | None = None,
  norm_eps: float | None = None,
  implementation: DecodeImplementation | Sequence[DecodeImplementation] | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B N H V"]]:
  """Retention over one token, for decoding: `retention` of `T = 1` without its length axis.

  What a layer puts behind it is done in the same pass: the norm over each head, then the gate.

  Args:
    q: The query, rotated.
    k: The key, scaled, then rotated.
    v: The value.
    log_decay: As in `retention`.
    state: State after the preceding tokens. A kernel updates it in place where the caller gives
      it up, as a donated argument or the carry of a loop.
    gate: If given, the output is multiplied by `silu(gate)`.
    norm_eps: If given, the output is divided by its root mean square over `V`, with this epsilon.
    implementation: As in `retention`.

  Returns:
    The output in `v`'s dtype, and the new float32 state.

  Raises:
    ValueError: Shapes disagree, or a name is unknown.
    ExceptionGroup: Every implementation asked for refused; holds the reasons.
  """
  per_token = log_decay[:, None] if log_decay.ndim == 2 else log_decay
  _check_arguments(q[:, None], k[:, None], v[:, None], per_token, state, None, None, None)
  if gate is not None and gate.shape != (*q.shape[:2], v.shape[-1]):
    raise ValueError(f"{gate.shape=} must be {(*q.shape[:2], v.shape[-1])}, one per output.")
  return dispatch(
    "retention_decode",
    DECODE_IMPLEMENTATIONS,
    _DECODE_DEFAULTS,
    implementation,
    *(q, k, v, log_decay, state, gate, norm_eps),
  )


def _check_arguments(q, k, v, log_decay, initial_state, lengths, segment_ids, chunk_size):
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
    raise ValueError(f"q, k and v are laid out B T N H, not {q.shape=} {k.shape=} {v.shape=}.")
  (batch, length, heads, head_dim), (kv_heads, value_dim) = q.shape, v.shape[2:]
  if heads % kv_heads:
    raise ValueError(
      f"Query heads share key heads evenly; make {q.shape[2]=} a multiple of {v.shape[2]=}."
    )
  expected = {
    "k": (k, [(batch, length, kv_heads, head_dim)]),
    "v": (v, [(batch, length, kv_heads, value_dim)]),
    "log_decay": (log_decay, [(heads,), (batch, length, heads)]),
    "initial_state": (initial_state, [(batch, heads, head_dim, value_dim)]),
    "lengths": (lengths, [(batch,)]),
    "segment_ids": (segment_ids, [(batch, length)]),
  }
  for name, (array, shapes) in expected.items():
    if array is not None and array.shape not in shapes:
      raise ValueError(
        f"{name} has shape {array.shape}; with {q.shape=} and {v.shape=} it must be "
        f"{' or '.join(map(str, shapes))}."
      )
  for name, array in (("lengths", lengths), ("segment_ids", segment_ids)):
    if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"{name} counts or names tokens; {array.dtype=} must be an integer type.")
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"{chunk_size=} must be at least 1, or None for the implementation's own.")
