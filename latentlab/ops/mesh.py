"""How an op with a kernel runs on the parts of a mesh: its device's rows, tokens and heads."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from latentlab.typing import Array, Shaped


def axes_to_map(spec: PartitionSpec | None) -> tuple[tuple[str, ...], ...] | None:
  """The mesh axes that batch, length and heads are split over; `None` for a plain call.

  Args:
    spec: Layout of a `B T N H` array. Axes that are manual already (inside `pmap` or `shard_map`)
      are left out; with one device left, or no mesh, the call is the plain one.

  Raises:
    ValueError: The spec shards `H`, names axes that the mesh lacks, or shards the sequence in
      another order than the mesh's.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if spec is None or set(mesh.axis_names) == set(mesh.manual_axes):  # No mesh, or all within.
    return None
  entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
  entries += [()] * (4 - len(entries))
  if len(entries) > 4 or entries[3]:
    raise ValueError(f"{spec=} lays out B T N H, of which H stays whole.")
  if unknown := {name for names in entries for name in names} - set(mesh.axis_names):
    raise ValueError(f"{spec=} names {sorted(unknown)}; the mesh has {mesh.axis_names}.")
  if list(entries[1]) != sorted(entries[1], key=mesh.axis_names.index):  # As ppermute demands.
    raise ValueError(
      f"{spec=} must name the sequence's axes in the mesh's order, {mesh.axis_names}."
    )
  if axes_size(free_axes()) == 1:
    return None
  split = [a for a in free_axes() if mesh.shape[a] > 1]
  return tuple(tuple(a for a in names if a in split) for names in entries[:3])


def free_axes() -> tuple[str, ...]:
  """The mesh axes that are not manual yet."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)


def check_sizes(sizes: dict[str, int], axes: tuple[tuple[str, ...], ...]) -> None:
  """Raises `ValueError` where a size of `B`, `T`, `N` or `K` does not divide over its devices."""
  batch, length, heads = axes
  for letter, names in (("B", batch), ("T", length), ("N", heads), ("K", heads)):
    size, devices = sizes.get(letter, 0), axes_size(names)
    if size % devices:
      raise ValueError(
        f"{letter}={size} does not divide over the {devices} devices of mesh axes "
        f"{names}; change the size, the mesh, or the spec."
      )


def repeat_key_heads(
  axes: tuple[tuple[str, ...], ...], *arrays: Shaped[Array, "B S K ..."]
) -> tuple[Shaped[Array, "B S heads ..."], ...]:
  """Key heads that the devices of the heads' axes do not divide, repeated as often as they do.

  A device then has the key heads of its query heads, whose number is a multiple of both.
  """
  devices, heads = axes_size(axes[2]), arrays[0].shape[2]
  times = devices // math.gcd(devices, heads)
  return tuple(x if times == 1 else jnp.repeat(x, times, axis=2) for x in arrays)


def map_parts(
  fn: Callable[[dict[str, Array]], Any],
  args: dict[str, Array],
  specs: dict[str, PartitionSpec],
  out_specs: Any,
) -> Any:
  """`shard_map` over every axis that is not manual yet: a kernel is partitioned by nobody else.

  Args:
    fn: Takes each device's part of `args`.
    args: Arrays by name.
    specs: Their layouts, among others.
    out_specs: Layouts of the results.
  """
  in_specs = ({name: specs[name] for name in args},)
  return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=set(free_axes()))(
    args
  )


def axes_size(names: tuple[str, ...]) -> int:
  """Devices along mesh axes."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[name] for name in names)
