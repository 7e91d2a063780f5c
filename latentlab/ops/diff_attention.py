"""Differential attention under a mesh (https://arxiv.org/abs/2410.05258).

Batch and heads are sharded as they are; along a sharded sequence queries stay where they are, and
`latentlab.ops.sequence` has their keys.
"""

import functools
from collections.abc import Sequence

from jax.sharding import PartitionSpec

from latentlab.ops.mesh import axes_to_map, check_sizes, map_parts, repeat_key_heads
from latentlab.ops.sequence import Gathered, map_attention
from latentlab.typing import Array, Float, Int
from pallas_kernels.diff_attention import Implementation
from pallas_kernels.diff_attention import diff_attention as kernel
from pallas_kernels.diff_attention import diff_attention_decode as decode_kernel

__all__ = ["diff_attention", "diff_attention_decode"]


def diff_attention(
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"] | Gathered,
  v: Float[Array, "B S K V"] | Gathered,
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B T N"],
  *,
  scale: float = 1.0,
  causal: bool = True,
  window: int | None = None,
  q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | Gathered | None = None,
  lengths: Int[Array, "B"] | None = None,
  gain: Float[Array, "V"] | None = None,
  eps: float | None = None,
  post_scale: float = 1.0,
  return_lse: bool = False,
  implementation: Implementation | Sequence[Implementation] | None = None,
  spec: PartitionSpec | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N 2"]]:
  """`pallas_kernels.diff_attention.diff_attention`, which see, run on each device's part.

  Args:
    q: See `pallas_kernels.diff_attention.diff_attention`.
    k: See there; or as `gather_sequence` made them.
    v: See there; or with `k`.
    lam: See there.
    scale: See there.
    causal: See there.
    window: See there.
    q_offset: See there.
    segment_ids: See there.
    kv_segment_ids: See there; or with `k`.
    lengths: See there.
    gain: See there.
    eps: See there.
    post_scale: See there.
    return_lse: See there.
    implementation: See there.
    spec: Layout of a `B T N V` array over the ambient mesh. Axes that are manual already (inside
      `pmap` or `shard_map`) are left out; with one device left, or no mesh, the call is the plain
      one. Key heads that its devices do not divide are repeated.

  Returns:
    The outputs, and the log-sum-exps if asked for.

  Raises:
    ValueError: The spec shards `V`, or names axes that the mesh lacks, that do not divide, or that
      shard the sequence in another order than the mesh's; or keys were gathered by another layout.
  """
  options = dict(
    scale=scale,
    causal=causal,
    window=window,
    eps=eps,
    post_scale=post_scale,
    return_lse=return_lse,
    implementation=implementation,
  )
  arrays = dict(
    q=q,
    k=k,
    v=v,
    lam=lam,
    segment_ids=segment_ids,
    kv_segment_ids=kv_segment_ids,
    lengths=lengths,
    gain=gain,
  )
  args = {name: x for name, x in arrays.items() if x is not None}
  axes = axes_to_map(spec)
  b, t, n = (names or None for names in axes or ((),) * 3)
  tokens = PartitionSpec(b, t, n)
  return map_attention(
    functools.partial(kernel, **options),
    args,
    dict(
      lam=(PartitionSpec(), PartitionSpec(n), None, tokens)[lam.ndim],
      gain=PartitionSpec(),
    ),
    (tokens, tokens) if return_lse else tokens,
    q_offset=q_offset,
    window=window,
    axes=axes,
  )


def diff_attention_decode(
  q: Float[Array, "B N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, ""] | Float[Array, "N"] | Float[Array, "B N"],
  *,
  lengths: Int[Array, "B"] | None = None,
  scale: float = 1.0,
  window: int | None = None,
  gain: Float[Array, "V"] | None = None,
  eps: float | None = None,
  post_scale: float = 1.0,
  num_splits: int | None = None,
  implementation: Implementation | Sequence[Implementation] | None = None,
  spec: PartitionSpec | None = None,
) -> Float[Array, "B N V"]:
  """`pallas_kernels.diff_attention.diff_attention_decode`, which see, run on each device's part.

  Args:
    q: See `pallas_kernels.diff_attention.diff_attention_decode`.
    k: See there.
    v: See there.
    lam: See there.
    lengths: See there.
    scale: See there.
    window: See there.
    gain: See there.
    eps: See there.
    post_scale: See there.
    num_splits: See there.
    implementation: See there.
    spec: Layout of a `B T N V` array over the ambient mesh, as in `diff_attention`; the one token,
      and the cache's, are on every device of the sequence's axes.

  Raises:
    ValueError: See `diff_attention`.
  """
  options = dict(
    scale=scale,
    window=window,
    eps=eps,
    post_scale=post_scale,
    num_splits=num_splits,
    implementation=implementation,
  )
  arrays = dict(q=q, k=k, v=v, lam=lam, lengths=lengths, gain=gain)
  args = {name: x for name, x in arrays.items() if x is not None}
  axes = axes_to_map(spec)
  if axes is None:
    return decode_kernel(**args, **options)
  check_sizes(dict(B=q.shape[0], N=q.shape[1]), axes)
  args["k"], args["v"] = repeat_key_heads(axes, k, v)
  b, _, n = (names or None for names in axes)
  heads, cache = PartitionSpec(b, n), PartitionSpec(b, None, n)
  specs = dict(
    q=heads,
    k=cache,
    v=cache,
    lam=(PartitionSpec(), PartitionSpec(n), heads)[lam.ndim],
    lengths=PartitionSpec(b),
    gain=PartitionSpec(),
  )
  return map_parts(lambda args: decode_kernel(**args, **options), args, specs, heads)
