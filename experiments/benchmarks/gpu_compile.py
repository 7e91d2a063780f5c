"""Compiles GPU programs for an H100 with no GPU, and reads what the assembler says of kernels.

`compile_for_h100` runs this module in a process of its own, where the dumps and environment
variables that it needs are nobody else's.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

_TOOLCHAIN = (
  "jax-cuda13-plugin",
  "jax-cuda13-pjrt",
  "nvidia-cuda-nvcc",
  "nvidia-nvvm",
  "nvidia-cuda-nvdisasm",
)
# XLA's description of the target, whose facts are in the data sheet of the card.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3350000000000
  device_memory_size: 85000000000
}
runtime_version { major: 13 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Report:
  """What the assembler and the disassembler said of one kernel.

  Attributes:
    registers: Of each thread.
    spilled_bytes: Stored and loaded for lack of registers.
    serialized: Whether matrix instructions wait for each other for lack of registers (C7512).
    smem_bytes: Shared memory of a block, barriers included.
    num_hgmma: Tensor core instructions (warpgroup matrix multiplies) in the machine code.
  """

  registers: int
  spilled_bytes: int
  serialized: bool
  smem_bytes: int
  num_hgmma: int


@functools.cache
def why_not() -> str | None:
  """Why nothing can be compiled for a GPU here, if so."""
  if importlib.metadata.version("jax") < "0.11":
    return f"Mosaic GPU kernels need jax 0.11, not {importlib.metadata.version('jax')}"
  for package in _TOOLCHAIN:
    try:
      importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      return f"compiling for a GPU without one needs {package}: pip install --no-deps {package}"
  return None


def compile_for_h100(case: str, *, timeout: float = 300) -> dict[str, Report]:
  """Compiles a program for an H100 and reports on its Mosaic GPU kernels.

  Args:
    case: Its name among `gpu_programs.CASES`.
    timeout: Seconds.

  Returns:
    Reports by the kernels' names.

  Raises:
    RuntimeError: The program does not compile; holds the end of the output.
  """
  with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | dict(
      JAX_PLATFORMS="cpu",  # With a GPU's it would ask for cuDNN.
      MOSAIC_GPU_DUMP_TO=folder,
      PYTHONPATH=str(pathlib.Path(__file__).parent.parent.parent),
    )
    command = [sys.executable, "-m", "experiments.benchmarks.gpu_compile", case]
    done = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
      raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}")
    return dict(read_reports(pathlib.Path(folder)))


def read_reports(folder: pathlib.Path) -> Iterator[tuple[str, Report]]:
  """Reads what Mosaic dumps of each kernel: notes of the assembler, its code, resources."""
  for log in sorted(folder.glob("*.ptxas")):
    notes = log.read_text(errors="replace")
    name = re.search(r"entry function '(\w+)_mosaic_gpu_kernel'", notes)[1]
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill load", notes)
    # Lowering and compiling number the files of a name each in its own order.
    resources = [x.read_text() for x in folder.glob(f"{name}_*.resources.txt")]
    yield (
      name,
      Report(
        registers=int(re.search(r"Used (\d+) registers", notes)[1]),
        spilled_bytes=sum(map(int, spilled.groups())),
        serialized="C7512" in notes,
        smem_bytes=max(map(_smem_bytes, resources)),
        num_hgmma=log.with_suffix(".sass_ctrl").read_text(errors="replace").count("HGMMA"),
      ),
    )


def _smem_bytes(resources: str) -> int:
  barriers = re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
  scratch = int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1])
  return scratch + 8 * sum(int(count) * int(times) for count, times in barriers)


def _main(case: str) -> None:
  import jax
  from jax.experimental import topologies

  from experiments.benchmarks import gpu_programs

  topology = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1")
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=topology.devices
  )
  with jax.set_mesh(mesh):
    function, args = gpu_programs.CASES[case]()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    jax.jit(function).lower(*args).compile()


if __name__ == "__main__":
  _main(*sys.argv[1:])
