"""Dot-product attention with structured masks, biases and shared key heads.

The blockwise causal mask is section 3.3 of xPos (https://arxiv.org/abs/2212.10554); the linear bias
is ALiBi's (https://arxiv.org/abs/2108.12409).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from latentlab.ops.mesh import axes_size, axes_to_map, check_sizes, map_parts
from latentlab.typing import Array, Bool, Float, Int
from pallas_kernels.flash_attention import Implementation
from pallas_kernels.flash_attention import flash_attention as kernel

# Finite, since a row of -inf would turn to NaN, and its gradient with it. A hidden key lies so far
# below the lowest score that a bias can make that it gets no weight beside any visible one.
_HIDDEN = float(jnp.finfo(jnp.float32).min)
_LOWEST_BIAS = -1e30


@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query sees, by their positions.

  Attributes:
    kind: "full"; "causal"; "sliding_window", the last `size` keys with the query's own among them;
      "blockwise_causal", causal within the query's block of `size` keys and the one before it.
    size: Of the window or block; `None` for the others.
  """

  kind: Literal["full", "causal", "sliding_window", "blockwise_causal"] = "causal"
  size: int | None = None

  def __post_init__(self):
    sized = self.kind in ("sliding_window", "blockwise_causal")
    if not sized and self.kind not in ("full", "causal"):
      raise ValueError(
        f"kind={self.kind!r} must be 'full', 'causal', 'sliding_window' or 'blockwise_causal'."
      )
    if sized and (self.size is None or self.size < 1):
      raise ValueError(f"size={self.size} of a {self.kind} mask must be at least 1.")
    if not sized and self.size is not None:
      raise ValueError(f"size={self.size} means nothing to a {self.kind} mask; leave it None.")

  def __call__(self, q: Int[Array, "#B T 1"], k: Int[Array, "#B 1 S"]) -> Bool[Array, "#B T S"]:
    """True where the query at position `q` sees the key at position `k`."""
    if self.kind == "full":
      return jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
    causal = k <= q
    if self.kind == "sliding_window":
      return causal & (q - k < self.size)
    if self.kind == "blockwise_causal":
      return causal & (q // self.size - k // self.size <= 1)
    return causal


def attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  *,
  mask: Mask = Mask("causal"),  # noqa: B008 (frozen)
  positions: Int[Array, "#B T"] | None = None,
  kv_positions: Int[Array, "#B S"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  kv_valid: Bool[Array, "B S"] | None = None,
  allowed: Bool[Array, "#B T S"] | None = None,
  key_bias: Float[Array, "#B S"] | None = None,
  slopes: Float[Array, "N"] | None = None,
  return_lse: bool = False,
  spec: PartitionSpec | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
  """Softmax attention, `softmax(q k^T + bias) v`, with float32 scores and statistics.

  A key is seen if every condition given allows it. A query that sees none gets zeros. Where
  positions are places, and documents alone hide what the mask does not, this is `flash_attention`,
  which computes the visible blocks; elsewhere all scores are held at once.

  Args:
    q: Queries. Nothing is scaled in here.
    k: Keys; `N` is a multiple of their `K` heads, which query heads share in consecutive groups.
    v: Values.
    mask: Structured mask over positions.
    positions: Of the queries; their places `0 ... T - 1` if `None`.
    kv_positions: Of the keys, whatever their place in a cache; `0 ... S - 1` if `None`.
    segment_ids: Documents of the queries, which see their own keys alone.
    kv_segment_ids: Documents of the keys; those of the queries if `None`.
    kv_valid: False where a cache slot holds padding or nothing.
    allowed: Arbitrary mask, such as `tree_mask`.
    key_bias: Added to the scores of a key, such as `segment_bias`; `-inf` hides it.
    slopes: ALiBi's, subtracting `slope * (query position - key position)`.
    return_lse: Also return the log-sum-exp of each row, float32 and `-inf` where no key is seen.
    spec: Layout of a `B T N H` array over the ambient mesh, for `flash_attention` to follow.
  """
  (batch, length, heads, head_dim), (kv_length, kv_heads) = q.shape, k.shape[1:3]
  if heads % kv_heads or v.shape[:3] != k.shape[:3]:
    raise ValueError(f"{k.shape=} and {v.shape=} must agree, with heads that divide {q.shape=}'s.")
  if segment_ids is None and kv_segment_ids is not None:
    raise ValueError("kv_segment_ids are given without segment_ids; give both.")
  if segment_ids is not None and kv_segment_ids is None:
    if kv_length != length:
      raise ValueError(f"Give kv_segment_ids where {k.shape=} is not as long as {q.shape=}.")
    kv_segment_ids = segment_ids
  elsewhere = (positions, kv_positions, kv_valid, allowed, key_bias, slopes)
  if mask.kind != "blockwise_causal" and all(x is None for x in elsewhere):
    documents = dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
    return flash_attention(
      q,
      k,
      v,
      causal=mask.kind != "full",
      window=mask.size,
      **documents,
      return_lse=return_lse,
      spec=spec,
    )
  positions = jnp.arange(length)[None] if positions is None else positions
  kv_positions = jnp.arange(kv_length)[None] if kv_positions is None else kv_positions
  distance = positions[:, :, None] - kv_positions[:, None, :]

  visible = mask(positions[:, :, None], kv_positions[:, None, :])  # B T S
  if segment_ids is not None:
    visible &= segment_ids[:, :, None] == kv_segment_ids[:, None, :]
  if kv_valid is not None:
    visible &= kv_valid[:, None, :]
  if allowed is not None:
    visible &= allowed
  if key_bias is not None:
    visible &= key_bias[:, None, :] > -jnp.inf
  visible = visible[:, None, None]

  # Heads before length: plain batched products, and rows of scores that lie together in memory.
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q = q.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)  # B K G T H
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
  scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=dtype)
  if key_bias is not None:
    scores += jnp.maximum(key_bias.astype(dtype), _LOWEST_BIAS)[:, None, None, None, :]
  if slopes is not None:
    slopes = slopes.reshape(1, kv_heads, -1, 1, 1).astype(dtype)
    scores -= slopes * distance[:, None, None].astype(dtype)
  scores = jnp.where(visible, scores, _HIDDEN)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("BKGTS,BKSV->BKGTV", weights, v, preferred_element_type=dtype)
  seen = visible.any(axis=-1, keepdims=True)
  out = jnp.where(seen, out, 0).transpose(0, 3, 1, 2, 4)
  out = out.reshape(batch, length, heads, v.shape[-1]).astype(v.dtype)
  if not return_lse:
    return out
  lse = jnp.where(seen[..., 0], jax.nn.logsumexp(scores, axis=-1), -jnp.inf)
  return out, lse.reshape(batch, heads, length).swapaxes(1, 2)


def flash_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  *,
  scale: float = 1.0,
  causal: bool = True,
  window: int | None = None,
  q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
  segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  lengths: Int[Array, "B"] | None = None,
  return_lse: bool = False,
  implementation: Implementation | Sequence[Implementation] | None = None,
  spec: PartitionSpec | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
  """`pallas_kernels.flash_attention`, which see, run on each device's part of the arrays.

  Where the length is sharded, queries stay where they are and every device gathers the keys.

  Args:
    q: See `pallas_kernels.flash_attention`.
    k: See there.
    v: See there.
    scale: See there.
    causal: See there.
    window: See there.
    q_offset: See there.
    segment_ids: See there.
    kv_segment_ids: See there.
    lengths: See there.
    return_lse: See there.
    implementation: See there.
    spec: Layout of a `B T N H` array over the ambient mesh, as `ops.retention` has it; key heads
      that its devices do not divide are repeated.

  Raises:
    ValueError: The spec shards `H`, or names axes that the mesh lacks or that do not divide.
  """
  options = dict(scale=scale, causal=causal, window=window, return_lse=return_lse)
  options |= dict(implementation=implementation)
  args = dict(q=q, k=k, v=v, lengths=lengths)
  args |= dict(segment_ids=segment_ids, kv_segment_ids=kv_segment_ids)
  args = {name: x for name, x in args.items() if x is not None}
  axes = axes_to_map(spec)
  if axes is None:
    return kernel(**args, **options, q_offset=q_offset)
  if not isinstance(q_offset, int):
    args["q_offset"] = jnp.broadcast_to(q_offset, q.shape[:1])
  if "segment_ids" in args:
    args.setdefault("kv_segment_ids", segment_ids)
  if k.shape[2] % axes_size(axes[2]):
    args |= {name: jnp.repeat(args[name], q.shape[2] // k.shape[2], axis=2) for name in ("k", "v")}
  check_sizes(dict(B=q.shape[0], T=q.shape[1], N=q.shape[2], K=args["k"].shape[2]), axes)

  b, t, n = (names or None for names in axes)
  specs = dict.fromkeys(("k", "v"), PartitionSpec(b, None, n, None))
  specs |= dict(q=PartitionSpec(b, t, n, None), lengths=PartitionSpec(b))
  specs |= dict(q_offset=PartitionSpec(b))
  specs |= dict(segment_ids=PartitionSpec(b, t), kv_segment_ids=PartitionSpec(b, None))

  def local(args):
    offset = args.pop("q_offset", q_offset)
    if axes[1]:
      offset = offset + jax.lax.axis_index(axes[1]) * args["q"].shape[1]
    return kernel(**args, **options, q_offset=offset)

  out = specs["q"]
  return map_parts(local, args, specs, (out, PartitionSpec(b, t, n)) if return_lse else out)


def tree_mask(parents: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Each node of a token tree sees itself and its ancestors.

  Args:
    parents: Index of each node's parent, in any order; a root's is its own, or -1.
  """
  length = parents.shape[1]
  reach = (parents[..., None] == jnp.arange(length)) | jnp.eye(length, dtype=bool)
  for _ in range(math.ceil(math.log2(max(length, 2)))):  # Each squaring doubles the ancestry.
    reach = jnp.einsum("BTU,BUS->BTS", *[reach.astype(jnp.float32)] * 2) > 0
  return reach


def segment_bias(
  values: Float[Array, "#B G"], kv_segment_ids: Int[Array, "B S"]
) -> Float[Array, "B S"]:
  """Spreads one bias per segment over its keys; ids outside `0 ... G - 1` get none."""
  known = (kv_segment_ids >= 0) & (kv_segment_ids < values.shape[1])
  ids = jnp.where(known, kv_segment_ids, 0)
  values = jnp.broadcast_to(values, (ids.shape[0], values.shape[1]))
  return jnp.where(known, jnp.take_along_axis(values, ids, axis=1), 0)
