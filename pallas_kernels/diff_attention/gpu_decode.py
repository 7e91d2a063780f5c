"""Decoding with differential attention on Hopper: the forward kernel over parts of the cache.

Query heads that share a key head are the rows of one tile, so that a cache is read once. Its parts
are rows of the batch; their outputs are merged map by map, and subtracted last.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels import mosaic_gpu
from pallas_kernels.diff_attention import gpu, reference, xla
from pallas_kernels.diff_attention.blocks import GpuBlocks
from pallas_kernels.diff_attention.gpu_forward import forward
from pallas_kernels.diff_attention.reference import Options, Visibility


@xla.with_gradient
def decode(
  options: Options,
  q: Float[Array, "B N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B N"],
  gain: Float[Array, "V"] | None,
  lengths: Int[Array, "B"] | None,
  num_splits: int | None = None,
) -> Float[Array, "B N V"]:
  """The implementation "pallas_gpu" of `api.diff_attention_decode`.

  A cache whose length is no multiple of 8 is copied, since tiles of 8 rows hang over its end.
  """
  mosaic_gpu.refuse_unless_supported()
  gpu.refuse_unless_served(options, q, k, v)
  (batch, heads, _, dim), (kv_length, kv_heads, value_dim) = q.shape, v.shape[1:]
  group = heads // kv_heads
  splits = _splits(num_splits, batch * kv_heads, kv_length)
  part = kv_length // splits
  if lengths is None:
    lengths = jnp.full(batch, kv_length)
  visibility = _visibility(options, lengths.astype(jnp.int32), splits, part, group)

  rows = q.reshape(batch, kv_heads, group, 2, dim).swapaxes(1, 2)  # B G K 2 H
  rows = jnp.repeat(rows, splits, axis=0)
  k, v = (x.reshape(batch * splits, part, *x.shape[2:]) for x in (k, v))
  no_lam = jnp.zeros(rows.shape[:3], jnp.float32)  # What is saved is then both maps' outputs.
  outs = forward(
    Options(scale=options.scale, causal=False),
    GpuBlocks.for_shapes(dim, value_dim),
    rows,
    k,
    v,
    no_lam,
    gain=None,
    visibility=visibility,
    save=True,
    name="diff_attention_decode",
    clean=True,
  )

  def of_parts(x):  # B splits G K V
    return x[:, :group].reshape(batch, splits, group, kv_heads, value_dim)

  maps = jnp.stack([of_parts(outs["difference"]), of_parts(outs["out2"])], axis=-2)
  lse = outs["lse"][..., :group].reshape(batch, splits, kv_heads, 2, group)
  merged = _merge(maps, lse.transpose(0, 1, 4, 2, 3)[..., None])  # B G K 2 V
  merged = merged.swapaxes(1, 2).reshape(batch, heads, 2, value_dim)
  lam = jnp.broadcast_to(lam, (batch, heads)).astype(jnp.float32)
  out = merged[:, :, 0] - lam[..., None] * merged[:, :, 1]
  return reference.headwise_norm(options, out, gain).astype(v.dtype)


def _splits(request, blocks, kv_length):
  """Parts of equal length that are no fewer than fill the card, or as many as asked for."""
  if request is None:
    request = min(-(-mosaic_gpu.num_cores() // blocks), kv_length // 256)
  # Parts begin at whole tiles of rows, or the cache would be copied.
  return next(n for n in range(max(1, request), 0, -1) if n == 1 or kv_length % (8 * n) == 0)


def _visibility(options, lengths, splits, part, group):
  starts = jnp.arange(splits) * part
  limits = jnp.clip(lengths[:, None] - starts, 0, part).reshape(-1)
  if options.window is None:
    return Visibility(lengths=limits)
  position = starts[:, None] + jnp.arange(part)  # All queries are the last token's: a document.
  seen = position >= (lengths - options.window)[:, None, None]
  ids = jnp.ones((limits.size, group), jnp.int32)
  return Visibility(None, ids, seen.astype(jnp.int32).reshape(-1, part), limits)


def _merge(maps, lse):
  """Outputs of parts of the keys, along axis 1, weighed by their sums of exponentials."""
  top = lse.max(axis=1, keepdims=True)
  weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0, top))
  total = weights.sum(axis=1)
  return (weights * maps).sum(axis=1) / jnp.where(total > 0, total, 1)
