"""Keys and values for softmax attention along a sequence that devices share.

Queries stay where they are. Their keys come in one of three ways: gathered once for many layers
(chunk parallelism, YOCO, https://arxiv.org/abs/2405.05254, appendix A); of a sliding window, from
as many of the devices before as it reaches; or gathered by the call, where there is no window or it
reaches over all devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from latentlab.ops.mesh import axes_size, axes_to_map, check_sizes, map_parts, repeat_key_heads
from latentlab.typing import Array, Float, Int, Shaped

__all__ = ["Gathered", "gather_sequence", "map_attention"]


class Gathered(NamedTuple):
  """An array over the whole sequence, in one copy per device of the sequence.

  Copies are told apart so that the gradients of a device's queries stay with its own copy: layers
  add to them in place, and what gathered the copies sums over devices, once.

  Attributes:
    copies: The copies, sharded along `P`; with a sequence on one device, one.
  """

  copies: Shaped[Array, "P B S ..."]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of one copy."""
    return self.copies.shape[1:]


def gather_sequence(
  k: Float[Array, "B S K H"] | Float[Array, "B S K 2 H"],
  v: Float[Array, "B S K V"],
  segment_ids: Int[Array, "B S"] | None = None,
  *,
  spec: PartitionSpec | None,
) -> tuple[Gathered, Gathered, Gathered | None]:
  """Gathers keys and values, which any number of attention layers then use as they are.

  One all-gather carries both, and one reduce-scatter their gradients; of different dtypes each has
  its own. Documents take another all-gather. Where no mesh shards the length, there is none.

  Args:
    k: Keys, of one map or of differential attention's two.
    v: Values.
    segment_ids: Packed documents of the keys.
    spec: Layout of a `B T N H` array over the ambient mesh, as `flash_attention` has it; key heads
      that its devices do not divide are repeated.

  Returns:
    What `flash_attention` and `diff_attention` take for `k`, `v` and `kv_segment_ids`, under the
    same mesh and spec.

  Raises:
    ValueError: The spec shards `H`, or names axes that the mesh lacks, that do not divide, or that
      shard the sequence in another order than the mesh's.
  """
  arrays = dict(k=k, v=v, segment_ids=segment_ids)
  arrays = {name: x for name, x in arrays.items() if x is not None}
  axes = axes_to_map(spec)
  if axes is not None:
    check_sizes(dict(B=v.shape[0], T=v.shape[1]), axes)
    arrays["k"], arrays["v"] = repeat_key_heads(axes, k, v)
  if axes is None or not axes[1]:
    copies = {name: x[None] for name, x in arrays.items()}
  else:
    b, t, n = (names or None for names in axes)
    parts = dict(
      k=PartitionSpec(b, t, n), v=PartitionSpec(b, t, n), segment_ids=PartitionSpec(b, t)
    )
    whole = dict(k=PartitionSpec(t, b, None, n), v=PartitionSpec(t, b, None, n))
    whole |= dict(segment_ids=PartitionSpec(t, b))
    gather = lambda x: jax.lax.all_gather(x, axes[1], axis=1, tiled=True)

    def local(args):
      args["k"], args["v"] = _together(gather, args["k"], args["v"])
      if segment_ids is not None:
        args["segment_ids"] = gather(args["segment_ids"])
      return {name: x[None] for name, x in args.items()}

    copies = map_parts(local, arrays, parts, {name: whole[name] for name in arrays})
  copies = {name: Gathered(x) for name, x in copies.items()}
  return copies["k"], copies["v"], copies.get("segment_ids")


def map_attention(
  kernel: Callable[..., Any],
  args: dict[str, Array | Gathered],
  specs: dict[str, PartitionSpec],
  out_specs: Any,
  *,
  q_offset: int | Int[Array, ""] | Int[Array, "B"],
  window: int | None,
  axes: tuple[tuple[str, ...], ...] | None,
) -> Any:
  """Runs an attention kernel on each device's queries and on all the keys that these may see.

  Args:
    kernel: Takes `args` and `q_offset` by name.
    args: `q`, `k`, `v` and, if there are any, `segment_ids`, `kv_segment_ids`, `lengths`; others by
      `specs`. Keys may be `Gathered`. If not, a window of the keys in place is passed on from
      device to device, no further than it reaches; other keys are gathered.
    specs: Layouts of the others.
    out_specs: Layouts of the results.
    q_offset: Place of the first query among the keys.
    window: Of the kernel.
    axes: Of batch, length and heads, as `axes_to_map` has them.

  Raises:
    ValueError: A size does not divide over its devices, or keys were gathered by another layout.
  """
  k, v = args["k"], args["v"]
  if isinstance(k, Gathered) != isinstance(v, Gathered):
    raise ValueError("Give k and v both as gather_sequence made them, or neither.")
  devices = 1 if axes is None else axes_size(axes[1])
  for name, x in args.items():
    if isinstance(x, Gathered) and len(x.copies) != devices:
      raise ValueError(
        f"{name} has {len(x.copies)} copies, and its sequence {devices} devices; gather under the "
        "mesh and the spec of the call."
      )
  if axes is None:
    args = {name: x.copies[0] if isinstance(x, Gathered) else x for name, x in args.items()}
    return kernel(**args, q_offset=q_offset)

  args, (batch, length, heads), kv_length = dict(args), args["q"].shape[:3], k.shape[1]
  check_sizes(dict(B=batch, T=length, N=heads), axes)
  if isinstance(k, Gathered):
    check_sizes(dict(K=k.shape[2]), axes)
  else:
    args["k"], args["v"] = repeat_key_heads(axes, k, v)
  if "segment_ids" in args:
    args.setdefault("kv_segment_ids", args["segment_ids"])
  keys = {name: args[name] for name in ("k", "v", "kv_segment_ids") if name in args}
  gathered = any(isinstance(x, Gathered) for x in keys.values())
  in_place = isinstance(q_offset, int) and q_offset == 0 and length == kv_length
  reach = None  # Of a window, as far as devices before have it.
  if window is not None and devices > 1 and in_place and not gathered:
    reach = window - 1 if 0 < window <= 1 + length - length // devices else None
  if not isinstance(q_offset, int):
    args["q_offset"] = jnp.broadcast_to(q_offset, batch)

  b, t, n = (names or None for names in axes)
  split = kv_length % devices == 0  # Otherwise `shard_map` is given, and gathers, all of them.
  specs = specs | dict(q=PartitionSpec(b, t, n), q_offset=PartitionSpec(b))
  specs |= dict(segment_ids=PartitionSpec(b, t), lengths=PartitionSpec(b))
  for name, x in keys.items():
    specs[name] = PartitionSpec(b, t if split else None)
    if isinstance(x, Gathered):
      specs[name] = PartitionSpec(t, b, None)
    if name != "kv_segment_ids":
      specs[name] = PartitionSpec(*specs[name], n)

  def local(args):
    if reach is not None:
      return kernel(**_with_neighbours(args, axes[1], reach), q_offset=reach)
    offset = args.pop("q_offset", q_offset)
    for name in keys:
      if isinstance(args[name], Gathered):
        args[name] = args[name].copies[0]
      elif devices > 1 and split:
        args[name] = jax.lax.all_gather(args[name], axes[1], axis=1, tiled=True)
    if devices > 1:
      offset = offset + jax.lax.axis_index(axes[1]) * args["q"].shape[1]
    return kernel(**args, q_offset=offset)

  return map_parts(local, args, specs, out_specs)


def _with_neighbours(args: dict[str, Array], axes: tuple[str, ...], reach: int) -> dict[str, Array]:
  """A device's arguments, with the `reach` keys before its own in front of these.

  What the first devices lack is hidden, as a document of its own.
  """
  batch, length = args["q"].shape[:2]
  index, devices = jax.lax.axis_index(axes), axes_size(axes)

  def before(x):
    parts = []
    for hop in range(-(-reach // length), 0, -1):
      last = x[:, max(hop * length - reach, 0) :]
      parts.append(jax.lax.ppermute(last, axes, [(i, i + hop) for i in range(devices - hop)]))
    return jnp.concatenate(parts, axis=1) if parts else x[:, :0]

  args = dict(args)
  fronts = _together(before, args["k"], args["v"])
  args["k"], args["v"] = (
    jnp.concatenate([front, args[name]], axis=1)
    for name, front in zip(("k", "v"), fronts, strict=True)
  )
  start = index * length - reach  # Of these keys.
  if "lengths" in args:
    args["lengths"] = jnp.clip(args["lengths"] - start, 0, reach + length)
  if "segment_ids" in args:
    kv_ids = jnp.concatenate([before(args["kv_segment_ids"]), args["kv_segment_ids"]], axis=1)
  else:
    args["segment_ids"] = jnp.zeros((batch, length), jnp.int32)
    kv_ids = jnp.zeros((batch, reach + length), jnp.int32)
  nobody = jnp.max(args["segment_ids"], axis=1, keepdims=True) + 1
  missing = start + jnp.arange(reach + length) < 0
  return args | dict(kv_segment_ids=jnp.where(missing, nobody, kv_ids))


def _together(
  collective: Callable[[Array], Array],
  k: Shaped[Array, "B S K ..."],
  v: Shaped[Array, "B S K V"],
) -> tuple[Array, Array]:
  """One collective along the length for keys and values: features of both, side by side."""
  if k.dtype != v.dtype:
    return collective(k), collective(v)
  features = k.reshape(*k.shape[:3], -1)
  both = collective(jnp.concatenate([features, v], axis=-1))
  features, v = jnp.split(both, [features.shape[-1]], axis=-1)
  return features.reshape(*features.shape[:3], *k.shape[3:]), v
