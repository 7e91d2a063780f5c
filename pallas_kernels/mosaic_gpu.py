"""The one shim for Mosaic GPU: where its kernels can run, and how they are called.

A kernel is interpreted wherever the target is no GPU; `interpret_mode` chooses how. Modules of
kernels import under every supported jax, so what jax 0.10 lacks is looked up inside functions.

Registers: from jax 0.12 on, a kernel passes through nvJitLink where that is installed, which
ignores `set_max_registers`: each thread has 65536 / (128 * warpgroups) registers, 255 at most,
whatever its role. Two warpgroups that both compute have 255; a third, that only copies, leaves 168.
"""

import contextlib
import contextvars
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.common import target_platform, vary_alike

try:
  from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError as e:  # A jaxlib without Mosaic GPU, as on some platforms.
  plgpu, _import_error = None, e

WARPGROUP_ROWS = 64  # Of one warpgroup's matrix instruction, and so the least height of a tile.
MAX_SMEM_BYTES = 232448  # That a block may ask for on Hopper.
LOG2E = math.log2(math.e)  # The chip has a power of two, and no exponential.

_interpret_params = contextvars.ContextVar("interpret_params", default=None)


def refuse_unless_supported() -> None:
  """Raises `NotImplementedError`, with the reason, where Mosaic GPU kernels cannot serve."""
  if plgpu is None:
    raise NotImplementedError(f"This jaxlib has no Mosaic GPU: {_import_error}.")
  if jax.__version_info__ < (0, 11):
    raise NotImplementedError(
      f"Mosaic GPU kernels need jax 0.11, whose lowering and interpreter they are written for; "
      f"this is jax {jax.__version__}."
    )
  platform = target_platform()
  if platform == "cpu":
    return
  if platform != "gpu":
    raise NotImplementedError(f"Mosaic GPU kernels run on GPUs, not on {platform!r}.")
  kind = device_kind()
  if not re.search(r"\bG?H(100|200|800|20)\b", kind):
    raise NotImplementedError(
      f"Kernels use wgmma, which Hopper's tensor cores alone have; the device is {kind!r}."
    )


def device_kind() -> str:
  """The target device's name, from the ambient mesh if it knows one."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def num_cores() -> int:
  """The target's multiprocessors; an H100's where the target is no GPU, or does not tell."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if interpreted():
    return 132
  if device is None:
    return getattr(jax.devices()[0], "core_count", 132)
  return device.num_cores or 132


def interpreted() -> bool:
  """Whether kernels traced here are interpreted: the target is no GPU."""
  return target_platform() != "gpu"


@contextlib.contextmanager
def interpret_mode(**params: Any) -> Iterator[None]:
  """Interprets kernels under these fields of `plgpu.InterpretGPUParams`, `detect_races` say.

  What is jitted before is not retraced.
  """
  token = _interpret_params.set(plgpu.InterpretGPUParams(**params))
  try:
    yield
  finally:
    _interpret_params.reset(token)


def tiled(shape: tuple[int, ...], dtype: Any, *, swizzle: int = 128) -> "plgpu.GPUMemoryRef":
  """Shared memory in the layout that the tensor cores and the copy engine read."""
  columns = swizzle // jnp.dtype(dtype).itemsize
  transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def matmul(a: Any, b: Any) -> Array:
  """`a @ b` of operands in shared memory, in float32 registers."""

  def product(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(product, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def mma(acc: Array, a: Any, b: Any, *, stage: Any = None) -> Array:
  """`acc + a @ b`, complete on return.

  The interpreter has neither accumulators with a value nor register operands: there the product is
  added to `acc`, and an `a` in registers goes by shared memory.

  Args:
    acc: Registers, float32.
    a: In shared memory, or registers. Assemblers before CUDA 13.3 can overwrite the registers
      before the tensor core has read them; prefer shared memory.
    b: In shared memory.
    stage: Shared memory of `a`'s shape and dtype for the interpreter, where `a` is in registers.
  """
  if not interpreted():
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(acc))
  if isinstance(a, jax.Array):
    stage[...] = a
    plgpu.commit_smem()
    a = stage
  return acc + matmul(a, b)


def call(
  kernel: Callable[..., None],
  *args: Array,
  name: str,
  out_shape: Sequence[jax.ShapeDtypeStruct],
  grid: dict[str, int],
  num_warpgroups: int,
  scratch: dict[str, Any],
  flops: int,
  transcendentals: int = 0,
  in_place: Sequence[Array] = (),
  **compiler_params: Any,
) -> tuple[Array, ...]:
  """Runs a Mosaic GPU kernel on `args`: compiled for a GPU, interpreted elsewhere.

  Inside `shard_map` operands and results are marked as varying alike, as it demands.

  Args:
    kernel: Function of references: inputs, outputs and what is changed in place, in the card's
      memory, then the scratch by its names.
    *args: Operands.
    name: The kernel's, as the compiled program shows it.
    out_shape: Shapes and dtypes of the results.
    grid: Blocks by the axis that the kernel asks for with `jax.lax.axis_index`, the first fastest.
    num_warpgroups: Of a block; axis "warpgroup".
    scratch: Shared memory and barriers, which the block's warpgroups share.
    flops: For the compiler's scheduler, which can't see inside.
    transcendentals: Likewise.
    in_place: Arrays that the kernel reads and writes; their last values follow the results.
    **compiler_params: Fields of `plgpu.CompilerParams`. Lanes' semantics by default: layouts are
      the ones that the kernel names, where warpgroups' would have to infer them.
  """
  args = vary_alike(*args, *in_place)
  args, in_place = args[: len(args) - len(in_place)], args[len(args) - len(in_place) :]
  moved = sum(x.size * x.dtype.itemsize for x in (*args, *out_shape, *in_place, *in_place))
  options = {}
  if "cost_estimate" in inspect.signature(plgpu.kernel).parameters:  # From jax 0.12 on.
    options["cost_estimate"] = pl.CostEstimate(
      flops=int(flops), transcendentals=int(transcendentals), bytes_accessed=int(moved)
    )
  interpret = (_interpret_params.get() or plgpu.InterpretGPUParams()) if interpreted() else False
  num_inputs, references = len(args), [jax.new_ref(x) for x in in_place]

  def reordered(*refs, **scratch_refs):
    changed = refs[num_inputs : num_inputs + len(references)]
    kernel(*refs[:num_inputs], *refs[num_inputs + len(references) :], *changed, **scratch_refs)

  out = plgpu.kernel(
    reordered,
    out_type=tuple(out_shape),
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=num_warpgroups,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      **dict(lowering_semantics=plgpu.LoweringSemantics.Lane) | compiler_params
    ),
    interpret=interpret,
    **options,
  )(*args, *references)
  out = (*out, *(jax.freeze(x) for x in references))
  return vary_alike(args[0], *out)[1:]  # Which the kernel has forgotten inside `shard_map`.
