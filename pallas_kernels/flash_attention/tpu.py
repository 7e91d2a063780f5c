"""Splash attention, the TPU kernel that ships with jax."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float

from pallas_kernels.common import target_platform
from pallas_kernels.flash_attention.reference import Options, Result
from pallas_kernels.mosaic_tpu import LANES
from pallas_kernels.visibility import Visibility

_BLOCK = 1024  # Queries and keys of a step where there are as many.


def splash(
  options: Options,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  visibility: Visibility,
) -> Result | tuple[Float[Array, "B T N V"], None]:
  """The implementation "splash"; the log-sum-exps are `None`, since its have no gradient."""
  if q.dtype == jnp.float64:
    raise NotImplementedError("Splash attention accumulates in float32; float64 is not served.")
  if options.return_lse:
    raise NotImplementedError("Splash attention's log-sum-exps have no gradient.")
  if options.q_offset is None:
    raise NotImplementedError("Splash attention's mask is known when it is traced; q_offset isn't.")
  if visibility.lengths is not None:
    raise NotImplementedError("Splash attention gives rows without a key no zeros; no lengths.")
  (_, length, heads, _), kv_length = q.shape, k.shape[1]
  # The first key that a query's window still holds, of the last query.
  first = 0 if options.window is None else options.q_offset + length - options.window
  if options.causal and (options.q_offset < 0 or first >= kv_length):
    raise NotImplementedError(f"Splash attention has no rows without a key: {options=} {k.shape=}.")
  # Its blocks are whole; what is added is of no document. A query sees itself in any document.
  padded, kv_padded = (-(-n // LANES) * LANES for n in (length, kv_length))
  documents = None
  if visibility.segment_ids is not None or (padded, kv_padded) != (length, kv_length):
    if not options.causal or length != kv_length or options.q_offset:
      raise NotImplementedError(
        "Splash attention of padded or packed rows may leave a query without a key, unless they "
        f"are causal from the first key on: {q.shape=} {k.shape=} {options=}."
      )
    ids = visibility.segment_ids
    ids = jnp.zeros(q.shape[:2], jnp.int32) if ids is None else ids
    documents = kernel.SegmentIds(
      *(jnp.pad(ids, [(0, 0), (0, n - length)], constant_values=-1) for n in (padded, kv_padded))
    )
  pad = lambda x, n: jnp.pad(x, [(0, 0), (0, n - x.shape[1]), (0, 0), (0, 0)]).swapaxes(1, 2)
  q = (q * options.scale).astype(q.dtype) if options.scale != 1 else q
  attend = _kernel(options, heads, padded, kv_padded, target_platform() != "tpu")
  axes = (0, 0, 0, None if documents is None else 0)
  out = jax.vmap(attend, axes)(pad(q, padded), pad(k, kv_padded), pad(v, kv_padded), documents)
  return out.swapaxes(1, 2)[:, :length].astype(v.dtype), None


def _kernel(options, heads, length, kv_length, interpret):
  shape = (length, kv_length)
  if options.window is not None:
    mask = masks.LocalMask(shape, (options.window - 1, 0), options.q_offset)
  elif options.causal:
    mask = masks.CausalMask(shape, options.q_offset)
  else:
    mask = masks.FullMask(shape)
  block = functools.partial(_largest_divisor, limit=_BLOCK)
  sizes = dict(block_q=block(length), block_kv=block(kv_length), block_kv_compute=block(kv_length))
  sizes |= {f"{name}_dkv": size for name, size in list(sizes.items()) if name != "block_kv_compute"}
  sizes |= dict(block_kv_dkv_compute=block(kv_length), use_fused_bwd_kernel=True)
  return kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=kernel.BlockSizes(**sizes),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )


def _largest_divisor(length, limit):
  """The largest multiple of the lanes that divides `length`, up to `limit`."""
  return max(n for n in range(LANES, min(length, limit) + 1, LANES) if length % n == 0)
