"""The one shim for Mosaic TPU: how its kernels are called, and what is known of the chip.

Kernels import `pl` and `pltpu` as usual; names that moved between jax's minor releases are taken
from here. A kernel is interpreted wherever the target is no TPU. By default that is the plain
interpreter, the fastest; `pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(...))` around a
trace chooses the one that models memories, their copies and, on request, their races.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.common import target_platform, vary_alike

LANES, SUBLANES = 128, 8  # Of every generation's vector registers.
PARALLEL, SEQUENTIAL = pltpu.PARALLEL, pltpu.ARBITRARY  # A state is carried along the latter.

# From jax 0.12 on, `pl`'s name is deprecated; before, `pltpu` has none.
reciprocal = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal


def chip() -> pltpu.TpuInfo:
  """The chip compiled for; where the target is no TPU, a v5e stands for it, and is interpreted."""
  if target_platform() == "tpu":
    return pltpu.get_tpu_info()
  return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5E, 1)


def vmem_limit_bytes() -> int:
  """What a kernel may take of the chip's vector memory; the compiler keeps an eighth for itself."""
  return chip().vmem_capacity_bytes // 8 * 7


def flops_per_cycle() -> int:
  """Of one core's matrix units, for bfloat16 operands."""
  return 2 * chip().num_mxus * chip().mxu_column_size ** 2


def rounded(x: Array, dtype: DTypeLike) -> Array:
  """`x` as `dtype` holds it, in `x`'s own dtype: XLA, which interprets, drops a mere round trip."""
  if target_platform() == "tpu":
    return x.astype(dtype).astype(x.dtype)
  info = jax.numpy.finfo(dtype)
  return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def dot(x: Array, y: Array, contract: tuple[int, int] = (1, 0)) -> Array:
  """A product inside a kernel, over one axis of either, in float32.

  That of float32 operands is exact to its rounding; by default the chip would round them first.
  """
  precision = jax.lax.Precision.HIGHEST if x.dtype == jax.numpy.float32 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(
    x, y, dimensions, precision=precision, preferred_element_type=jax.numpy.float32
  )


def padded_bytes(shape: Sequence[int], dtype: Any) -> int:
  """Vector memory that an array takes: its last two axes are laid out in whole tiles."""
  size = jax.numpy.dtype(dtype).itemsize
  *major, rows, lanes = (1, *shape) if len(shape) == 1 else shape
  tile_rows = SUBLANES * max(1, 4 // size)
  return (
    math.prod(major) * pl.cdiv(rows, tile_rows) * tile_rows * pl.cdiv(lanes, LANES) * LANES * size
  )


def cost_estimate(
  args: Sequence[Any], out_shape: Sequence[Any], *, flops: int, transcendentals: int = 0
) -> pl.CostEstimate:
  """A kernel's cost where each operand is read once and each result written once."""
  moved = sum(math.prod(x.shape) * jax.numpy.dtype(x.dtype).itemsize for x in (*args, *out_shape))
  return pl.CostEstimate(
    flops=int(flops), transcendentals=int(transcendentals), bytes_accessed=int(moved)
  )


def call(
  kernel: Callable[..., None],
  *args: Array,
  name: str,
  out_shape: Sequence[jax.ShapeDtypeStruct],
  grid: tuple[int, ...],
  in_specs: Sequence[pl.BlockSpec],
  out_specs: Sequence[pl.BlockSpec],
  semantics: tuple[Any, ...],
  cost: pl.CostEstimate,
  scratch_shapes: Sequence[Any] = (),
  num_scalar_prefetch: int = 0,
  input_output_aliases: Mapping[int, int] | None = None,
  **compiler_params: Any,
) -> tuple[Array, ...]:
  """Runs a Mosaic TPU kernel on `args`: compiled for a TPU, interpreted elsewhere.

  Inside `shard_map` operands and results are marked as varying alike, as it demands.

  Args:
    kernel: Function of references: scalars, inputs, outputs, scratch.
    *args: Operands; the first `num_scalar_prefetch` are put in scalar memory before the grid.
    name: The kernel's, as the compiled program shows it.
    out_shape: Shapes and dtypes of the results.
    grid: Steps per axis, the last axis fastest.
    in_specs: Of the operands that are no prefetched scalars.
    out_specs: Of the results.
    semantics: `PARALLEL` or `SEQUENTIAL` for each axis of the grid.
    cost: For the compiler's scheduler, which can't see inside.
    scratch_shapes: Memories that outlive a step.
    num_scalar_prefetch: How many operands index maps may read.
    input_output_aliases: Operands whose memory a result takes over, by position.
    **compiler_params: Further fields of `pltpu.CompilerParams`.
  """
  args = vary_alike(*args)
  varying = jax.typeof(args[0]).manual_axis_type
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x in out_shape]
  out = pl.pallas_call(
    kernel,
    out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=num_scalar_prefetch,
      grid=grid,
      in_specs=list(in_specs),
      out_specs=list(out_specs),
      scratch_shapes=list(scratch_shapes),
    ),
    input_output_aliases=input_output_aliases or {},
    compiler_params=pltpu.CompilerParams(
      **dict(dimension_semantics=semantics, vmem_limit_bytes=vmem_limit_bytes()) | compiler_params
    ),
    cost_estimate=cost,
    interpret=target_platform() != "tpu",
    name=name,
  )(*args)
  return tuple(out)
