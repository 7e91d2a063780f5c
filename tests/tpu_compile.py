"""Mosaic TPU kernels under test: real compiles with no TPU, and the interpreter that sees races."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Shape = tuple[tuple[int, ...], Any] | tuple[tuple[int, ...], Any, PartitionSpec]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    text: Its HLO.
    vmem_bytes: Vector memory that each kernel uses, by its name.
  """

  text: str
  vmem_bytes: dict[str, int]


def compile_for(mesh: Mesh, fn: Callable[..., Any], *shapes: Shape) -> Program:
  """Compiles for a mesh of the `tpu_mesh` fixture; a shape without a layout is on every device."""
  with jax.set_mesh(mesh):
    args = [
      jax.ShapeDtypeStruct(
        shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, *(spec or [PartitionSpec()]))
      )
      for shape, dtype, *spec in shapes
    ]
    text = jax.jit(fn).lower(*args).compile().as_text()
  vmem = {}
  for line in text.splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
      used = re.search(r'"used_scoped_memory_configs":\[.*?"size":"(\d+)"', line)
      vmem[re.search(r"%(\S+) =", line)[1]] = int(used[1])
  return Program(text, vmem)


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False) -> Iterator[None]:
  """Interprets what is traced within with copies, semaphores and NaN-filled memory as on a TPU.

  Raises:
    AssertionError: Races were asked for, and found.
  """
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # It alone tells of races.

  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=detect_races)):
    try:
      yield
    finally:
      races = interpret_pallas_call.races
      pltpu.reset_tpu_interpret_mode_state()
  assert not detect_races or (races is not None and not races.races_found)
