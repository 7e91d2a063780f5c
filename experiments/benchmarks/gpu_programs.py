"""Programs with our Mosaic GPU kernels in them, which `gpu_static.py` and the tests compile."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.diff_attention import diff_attention, diff_attention_decode
from pallas_kernels.retention import retention, retention_decode

Program = tuple[Callable[..., Any], tuple[Any, ...]]


def _of(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _retention(
  head_dim: int,
  value_dim: int,
  *,
  heads: int = 8,
  batch: int = 4,
  length: int = 4096,
  gated: bool = False,
) -> Program:
  """A training step's: outputs, the final state, and the gradients of what is learned."""
  lead = (batch, length, heads)
  queries, values = _of(*lead, head_dim), _of(*lead, value_dim)
  state = _of(batch, heads, head_dim, value_dim, dtype=jnp.float32)
  log_decay = _of(*(lead if gated else lead[2:]), dtype=jnp.float32)

  def step(log_decay, d_out, d_state, *args):
    def op(q, k, v, state, log_decay=log_decay):
      return retention(q, k, v, log_decay, initial_state=state, implementation="pallas_gpu")

    out, pullback = jax.vjp(op, *args, *([log_decay] if gated else []))
    return out, pullback((d_out, d_state))

  return step, (log_decay, values, state, queries, queries, values, state)


def _retention_transformed() -> Program:
  """A gradient under `vmap`, remat and `shard_map`."""
  of = functools.partial(_of, 3, 2, 70, 2)
  rows = jax.sharding.PartitionSpec(None, "data")

  @functools.partial(jax.shard_map, in_specs=rows, out_specs=rows)
  def gradients(*args):
    op = functools.partial(retention, implementation="pallas_gpu")
    out, pullback = jax.vjp(jax.vmap(jax.checkpoint(lambda *args: op(*args)[0])), *args)
    return pullback(out)

  return gradients, (of(64), of(64), of(64), of(dtype=jnp.float32))


def _retention_decode(head_dim: int, value_dim: int) -> Program:
  """A token with norm and gate."""
  lead = (8, 8)
  queries, values = _of(*lead, head_dim), _of(*lead, value_dim)
  state = _of(*lead, head_dim, value_dim, dtype=jnp.float32)

  def step(q, k, v, log_decay, state, gate):
    options = dict(gate=gate, norm_eps=1e-6, implementation="pallas_gpu")
    return retention_decode(q, k, v, log_decay, state, **options)

  return step, (queries, queries, values, _of(8, dtype=jnp.float32), state, values)


def _diff_attention(
  head_dim: int,
  value_dim: int,
  *,
  kv_heads: int = 16,
  shared_keys: bool = False,
  window: int | None = None,
  norm: bool = False,
  documents: bool = False,
  lengths: bool = False,
) -> Program:
  """A training step's: outputs, and the gradients of what is learned."""
  lead = (4, 4096)
  maps = () if shared_keys else (2,)
  operands = dict(
    q=_of(*lead, 16, 2, head_dim),
    k=_of(*lead, kv_heads, *maps, head_dim),
    v=_of(*lead, kv_heads, value_dim),
    lam=_of(16, dtype=jnp.float32),
  )
  options = dict(scale=head_dim**-0.5, window=window, implementation="pallas_gpu")
  if norm:
    operands["gain"] = _of(value_dim, dtype=jnp.float32)
    options |= dict(eps=1e-5, post_scale=0.2)
  bounds = {}
  if documents:
    bounds["segment_ids"] = _of(*lead, dtype=jnp.int32)
  if lengths:
    bounds["lengths"] = _of(lead[0], dtype=jnp.int32)

  def step(operands, bounds, d_out):
    out, pullback = jax.vjp(lambda x: diff_attention(**x, **bounds, **options), operands)
    return out, pullback(d_out)

  return step, (operands, bounds, _of(*lead, 16, value_dim))


def _diff_attention_decode() -> Program:
  """Two rows of a long cache, which is read in parts."""
  operands = dict(
    q=_of(2, 16, 2, 128),
    k=_of(2, 8192, 4, 2, 128),
    v=_of(2, 8192, 4, 256),
    lam=_of(16, dtype=jnp.float32),
    gain=_of(256, dtype=jnp.float32),
    lengths=_of(2, dtype=jnp.int32),
  )
  options = dict(scale=0.1, window=2048, eps=1e-5, implementation="pallas_gpu")
  return lambda operands: diff_attention_decode(**operands, **options), (operands,)


_EVERYTHING = dict(kv_heads=4, window=1024, norm=True, documents=True, lengths=True)

# By op, then by head size, value size and what else there is.
CASES: Mapping[str, Callable[[], Program]] = {
  "retention/64x64": functools.partial(_retention, 64, 64),
  "retention/64x64_row": functools.partial(_retention, 64, 64, batch=1, length=16384, gated=True),
  "retention/64x64_transformed": _retention_transformed,
  "retention/128x128": functools.partial(_retention, 128, 128, heads=96),
  "retention/256x256_gated": functools.partial(_retention, 256, 256, heads=32, gated=True),
  "retention/256x512": functools.partial(_retention, 256, 512),
  "retention_decode/256x512": functools.partial(_retention_decode, 256, 512),
  "diff_attention/64x128": functools.partial(_diff_attention, 64, 128),
  "diff_attention/96x192": functools.partial(_diff_attention, 96, 192),
  "diff_attention/128x256": functools.partial(_diff_attention, 128, 256),
  "diff_attention/128x256_everything": functools.partial(_diff_attention, 128, 256, **_EVERYTHING),
  "diff_attention/128x128_shared": functools.partial(
    _diff_attention, 128, 128, kv_heads=4, shared_keys=True, window=1024
  ),
  "diff_attention_decode/128x256": _diff_attention_decode,
}
