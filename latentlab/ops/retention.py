"""Retention under a mesh, and its decay rates (RetNet, https://arxiv.org/abs/2307.08621).

Batch and heads are sharded as they are. A sharded sequence is a prefix over devices of the pairs
`(a, S)`, decay and end state of each device's tokens, which combine by
`(a2, S2) o (a1, S1) = (a1 a2, a2 S1 + S2)`: one cheap pass over keys and values makes the pairs,
and the operation then runs with the state that enters each device as its initial one.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from latentlab.ops.mesh import (
  axes_size,
  axes_to_map,
  check_sizes,
  map_parts,
  repeat_key_heads,
)
from latentlab.typing import Array, Float, Int
from pallas_kernels.retention import DecodeImplementation, Implementation
from pallas_kernels.retention import retention as kernel
from pallas_kernels.retention import retention_decode as decode_kernel
from pallas_kernels.retention.gates import finite_gates
from pallas_kernels.retention.reference import document_starts, valid_tokens
from pallas_kernels.retention.segments import segment_updates

__all__ = ["decay_scale", "log_decay_rates", "retention", "retention_decode"]


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
  spec: PartitionSpec | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N H V"]]:
  """`pallas_kernels.retention`, which see, run on each device's part of the arrays.

  Args:
    q: See `pallas_kernels.retention`.
    k: See there.
    v: See there.
    log_decay: See there.
    initial_state: See there.
    lengths: See there.
    segment_ids: See there.
    chunk_size: See there.
    implementation: See there.
    spec: Layout of a `B T N H` array over the ambient mesh. Axes that are manual already (inside
      `pmap` or `shard_map`) are left out; with one device left, or no mesh, the call is the plain
      one. Key heads that its devices do not divide are repeated.

  Returns:
    The outputs, and the state after the last valid token, replicated over the sequence's axes.

  Raises:
    ValueError: The spec shards `H`, or names axes that the mesh lacks, that do not divide, or that
      shard the sequence in another order than the mesh's.
  """
  options = dict(chunk_size=chunk_size, implementation=implementation)
  args = dict(
    q=q,
    k=k,
    v=v,
    log_decay=log_decay,
    initial_state=initial_state,
    lengths=lengths,
    segment_ids=segment_ids,
  )
  args = {name: x for name, x in args.items() if x is not None}
  axes = axes_to_map(spec)
  if axes is None:
    return kernel(**args, **options)
  check_sizes(dict(B=q.shape[0], T=q.shape[1], N=q.shape[2]), axes)
  args["k"], args["v"] = repeat_key_heads(axes, k, v)

  b, t, n = (names or None for names in axes)
  tokens, state = PartitionSpec(b, t, n, None), PartitionSpec(b, n, None, None)
  specs = dict(
    q=tokens,
    k=tokens,
    v=tokens,
    log_decay=PartitionSpec(n) if log_decay.ndim == 1 else PartitionSpec(b, t, n),
    initial_state=state,
    lengths=PartitionSpec(b),
    segment_ids=PartitionSpec(b, t),
  )

  def local(args):
    if axes[1]:
      return _sequence_sharded(args, axes[1], options)
    return kernel(**args, **options)

  return map_parts(local, args, specs, (tokens, state))


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
  spec: PartitionSpec | None = None,
) -> tuple[Float[Array, "B N V"], Float[Array, "B N H V"]]:
  """`pallas_kernels.retention_decode`, which see, run on each device's part.

  Args:
    q: See `pallas_kernels.retention_decode`.
    k: See there.
    v: See there.
    log_decay: See there.
    state: See there.
    gate: See there.
    norm_eps: See there.
    implementation: See there.
    spec: Layout of a `B T N H` array over the ambient mesh, as in `retention`; the one token is
      on every device of the sequence's axes.

  Returns:
    The output, and the new state.

  Raises:
    ValueError: As in `retention`.
  """
  options = dict(norm_eps=norm_eps, implementation=implementation)
  args = dict(q=q, k=k, v=v, log_decay=log_decay, state=state)
  if gate is not None:
    args["gate"] = gate
  axes = axes_to_map(spec)
  if axes is None:
    return decode_kernel(**args, **options)
  check_sizes(dict(B=q.shape[0], N=q.shape[1]), axes)
  args["k"], args["v"] = (x[:, 0] for x in repeat_key_heads(axes, k[:, None], v[:, None]))

  b, _, n = (names or None for names in axes)
  token, whole = PartitionSpec(b, n, None), PartitionSpec(b, n, None, None)
  specs = dict.fromkeys(args, token) | dict(state=whole)
  specs["log_decay"] = PartitionSpec(n) if log_decay.ndim == 1 else PartitionSpec(b, n)
  local = lambda args: decode_kernel(**args, **options)
  return map_parts(local, args, specs, (token, whole))


def _sequence_sharded(args, axes, options):
  """Retention of one device's stretch of tokens, within `shard_map` over `axes`."""
  k, v, log_decay = args["k"], args["v"], args["log_decay"]
  batch, length = k.shape[:2]
  index, count = jax.lax.axis_index(axes), axes_size(axes)
  if "lengths" in args:
    args["lengths"] = jnp.clip(args["lengths"] - index * length, 0, length)
  valid = valid_tokens(args.get("lengths", jnp.full(batch, length)), length)
  starts = None
  if "segment_ids" in args:
    ids = args["segment_ids"]
    left = jax.lax.ppermute(ids[:, -1:], axes, [(i, i + 1) for i in range(count - 1)])
    left = jnp.where(index == 0, ids[:, :1], left)
    starts = document_starts(jnp.concatenate([left, ids], axis=1), None)[:, 1:] & valid
  gates = jnp.broadcast_to(log_decay, (batch, length, log_decay.shape[-1]))
  gates = finite_gates(gates, starts, valid)

  # What a padded token holds may be a NaN.
  k, v = (jnp.where(valid[..., None, None], x, 0) for x in (k, v))
  carry, state = (x[:, 0] for x in segment_updates(k[:, None], v[:, None], gates[:, None]))
  initial = args.get("initial_state", jnp.zeros_like(state))
  carry = carry[..., None, None]
  state += jnp.where(index == 0, carry * initial, 0)

  # An inclusive prefix in log2(devices) exchanges, then a shift by one makes it exclusive.
  shift = 1
  while shift < count:
    before = jax.lax.ppermute((carry, state), axes, [(i, i + shift) for i in range(count - shift)])
    inside = index >= shift
    state += jnp.where(inside, carry * before[1], 0)
    carry *= jnp.where(inside, before[0], 1)
    shift *= 2
  entering = jax.lax.ppermute(state, axes, [(i, i + 1) for i in range(count - 1)])
  entering = jnp.where(index == 0, initial, entering)
  if "segment_ids" in args:
    entering = jnp.where(starts[:, 0, None, None, None], 0, entering)
  out, state = kernel(**args | {"initial_state": entering}, **options)
  return out, jax.lax.psum(jnp.where(index == count - 1, state, 0), axes)


def log_decay_rates(
  num_heads: int,
  kind: Literal["pow2", "linspace", "one", "const", "custom"] = "pow2",
  value: float | Sequence[float] | None = None,
) -> Float[Array, "N"]:
  """Fixed `log gamma` per head, rounded once: float32's `1 - 2^-25` is 1.

  Args:
    num_heads: How many.
    kind: "pow2", `gamma = 1 - 2^(-5 - h)` (eq. 8); "linspace", `1 - gamma` log-spaced from 1/32 to
      1/512 (section 3.1's experiments); "one", no decay; "const", `value` for all; "custom",
      `value` head by head.
    value: The `gamma` of "const", or those of "custom".

  Raises:
    ValueError: the kind is unknown, or `value` is none of its gammas.
  """
  if (value is not None) != (kind in ("const", "custom")):
    raise ValueError(f"{value=} is the gamma of 'const' or 'custom', and of no other {kind=}.")
  if kind == "pow2":
    forgotten = 2.0 ** -(5.0 + np.arange(num_heads))
  elif kind == "linspace":
    forgotten = np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), num_heads))
  elif kind == "one":
    forgotten = np.zeros(num_heads)
  elif kind == "const":
    if not 0 < value <= 1:
      raise ValueError(f"{value=} must be a decay in (0, 1].")
    forgotten = np.full(num_heads, 1 - value)
  elif kind == "custom":
    forgotten = 1 - np.array(value, np.float64)
    if forgotten.shape != (num_heads,) or not ((forgotten >= 0) & (forgotten <= 1)).all():
      raise ValueError(f"{value=} must be a decay in [0, 1] for each of {num_heads=}.")
  else:
    raise ValueError(f"{kind=} must be 'pow2', 'linspace', 'one', 'const' or 'custom'.")
  with np.errstate(divide="ignore"):  # A decay of 0 is -inf, which forgets.
    return jnp.asarray(np.log1p(-forgotten), jnp.float32)


def decay_scale(
  positions: Int[Array, "#B T"], log_decay: Float[Array, "N"]
) -> Float[Array, "#B T N"]:
  """`s_n = sqrt(sum_{m <= n} gamma^(n - m))`, the norm of a row of decays (section 2.2)."""
  count = (positions + 1)[..., None].astype(jnp.float32)
  decays = log_decay < 0
  log_decay = jnp.where(decays, log_decay, -1).astype(jnp.float32)
  total = jnp.expm1(count * log_decay) / jnp.expm1(log_decay)
  return jnp.sqrt(jnp.where(decays, total, count))
