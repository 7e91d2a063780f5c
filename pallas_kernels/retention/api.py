"""Retention: argument checks, and dispatch to the implementation that serves a platform."""

from collections.abc import Sequence
from typing import Literal

from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.checks import check_at_least_one, check_integers, check_shapes
from pallas_kernels.common import dispatch
from pallas_kernels.retention import gpu, gpu_decode, reference, tpu, tpu_decode

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
  "pallas_tpu": tpu_decode.decode,
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
  _check_heads(q, k, v, log_decay, "B T N H")
  batch, length, *state = *q.shape, v.shape[-1]
  check_shapes(
    f"{q.shape=} and {v.shape=}",
    initial_state=(initial_state, [(batch, *state)]),
    lengths=(lengths, [(batch,)]),
    segment_ids=(segment_ids, [(batch, length)]),
  )
  check_integers(lengths=lengths, segment_ids=segment_ids)
  check_at_least_one(chunk_size=chunk_size)
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
  _check_heads(q, k, v, log_decay, "B N H")
  check_shapes(
    f"{q.shape=} and {v.shape=}",
    state=(state, [(*q.shape, v.shape[-1])]),
    gate=(gate, [(*q.shape[:2], v.shape[-1])]),
  )
  return dispatch(
    "retention_decode",
    DECODE_IMPLEMENTATIONS,
    _DECODE_DEFAULTS,
    implementation,
    *(q, k, v, log_decay, state, gate, norm_eps),
  )


def _check_heads(q, k, v, log_decay, axes):
  if any(x.ndim != len(axes.split()) for x in (q, k, v)):
    raise ValueError(f"q, k and v are laid out {axes}, not {q.shape=} {k.shape=} {v.shape=}.")
  (*lead, heads, head_dim), (kv_heads, value_dim) = q.shape, v.shape[-2:]
  if not kv_heads or heads % kv_heads:
    raise ValueError(
      f"Query heads share key heads evenly; make {q.shape[-2]=} a multiple of {v.shape[-2]=}."
    )
  check_shapes(
    f"{q.shape=} and {v.shape=}",
    k=(k, [(*lead, kv_heads, head_dim)]),
    v=(v, [(*lead, kv_heads, value_dim)]),
    log_decay=(log_decay, [(heads,), (*lead, heads)]),
  )
