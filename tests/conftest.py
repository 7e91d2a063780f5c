"""Set-up of the whole suite: the platform, the simulated devices, and the run-time shape checks."""

import functools
import gc
import importlib.metadata
import importlib.util
import math
import os
import pathlib
from collections.abc import Callable

import jaxtyping
import pytest

# jax reads these when a test file first imports it; subprocesses that a test starts inherit them.
PLATFORM = os.environ.get("LATENTLAB_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
# Tests compile far longer than they run, so the CPU's compiler may leave its code as it is, and in
# one piece; and fusions to its older emitters, half as long a way that later releases have not.
_UNOPTIMISED = (
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
)
_OLDER_EMITTERS = (
  ("--xla_cpu_use_fusion_emitters=false",)
  if importlib.metadata.version("jaxlib").startswith("0.10.")
  else ()
)
if PLATFORM == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
  _flags = ["--xla_force_host_platform_device_count=8", *_UNOPTIMISED]
  os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])
os.environ.setdefault("MPLBACKEND", "agg")
if PLATFORM != "tpu":
  # libtpu compiles for a chip that is not there, if nothing makes it look for one or for a lock.
  for name, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
  ):
    os.environ.setdefault(name, value)

# Tracing makes many objects, and few of them are garbage; to look for it less saves a twentieth.
gc.set_threshold(50_000, 20, 50)

# Every annotation is checked on each call (or trace) while the tests run: tests/shape_checks.py.
jaxtyping.install_import_hook(["latentlab", "pallas_kernels"], "shape_checks.typechecked")

# The suites that implementations of an op inherit are no test files of their own.
pytest.register_assert_rewrite(
  "diff_attention_suite", "flash_attention_suite", "retention_suite", "suite_common"
)

_TESTS = pathlib.Path(__file__).parent
# What changes with jax: ops, kernels of GPUs (which older ones refuse), and the models of language;
# the main job's smoke run beside them is the trainer's and the sampler's.
_QUICK = ("ops/", "models/language_model_test.py")
_ONLY = {"cpu": "cpu_only", "cuda": "gpu_only", "tpu": "tpu_only"}


def pytest_configure() -> None:
  if PLATFORM not in _ONLY:
    raise pytest.UsageError(f"LATENTLAB_TEST_PLATFORM={PLATFORM!r} is none of {', '.join(_ONLY)}.")
  if PLATFORM == "cpu" and _OLDER_EMITTERS:
    _use_older_emitters()


def _use_older_emitters() -> None:
  """Has the CPU's compiler read the flag, which it does once, and takes it back.

  Compilers of TPUs, which subprocesses and tests start, do not know it and would stop the process.
  """
  import jax

  flags = os.environ["XLA_FLAGS"]
  os.environ["XLA_FLAGS"] = " ".join([flags, *_OLDER_EMITTERS])
  jax.devices()
  os.environ["XLA_FLAGS"] = flags


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  for item in items:
    path = item.path.relative_to(_TESTS).as_posix()
    quick = path.startswith(_QUICK) or path.endswith("_gpu_test.py")
    if quick and item.get_closest_marker("slow") is None:
      item.add_marker(pytest.mark.quick)
    for platform, marker in _ONLY.items():
      if item.get_closest_marker(marker) and platform != PLATFORM:
        item.add_marker(pytest.mark.skip(reason=f"{marker}, and this run is on {PLATFORM}"))


@pytest.fixture
def key():
  """A fixed key, so that a failure repeats."""
  import jax  # Not before the platform is set above.

  return jax.random.key(0)


@pytest.fixture(scope="session")
def cpu_flags() -> Callable[[int], str]:
  """`XLA_FLAGS` of a process on the CPU alone, by its devices: it compiles as fast as this one."""
  fast = (*_UNOPTIMISED, *_OLDER_EMITTERS)
  return lambda devices: " ".join([f"--xla_force_host_platform_device_count={devices}", *fast])


@pytest.fixture
def core(worker_id) -> int:
  """A core for what is bound to one, so that workers side by side do not share it."""
  available = sorted(os.sched_getaffinity(0))
  return available[
    int(worker_id.removeprefix("gw") if worker_id != "master" else 0) % len(available)
  ]


@pytest.fixture
def empty_jit_cache() -> None:
  """For tests that count a function's programs by its part of jax's cache.

  That cache is the process's and holds 8192 programs. Once it is full it keeps no new one, and
  each function's part reads 0.
  """
  import jax

  jax.clear_caches()


@pytest.fixture(scope="session")
def tpu_mesh() -> Callable:
  """Meshes of TPU topologies, for real compiles: under `jax.set_mesh` they are the target."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("compiling for a TPU needs libtpu, and no TPU: pip install '.[tpu]'")
  import jax
  from jax.experimental import topologies

  @functools.cache
  def devices(topology: str):
    return topologies.get_topology_desc(topology, platform="tpu").devices

  def make(topology: str, **axes: int) -> jax.sharding.Mesh:
    """A mesh of as many of the topology's devices as `axes` have; of one without axes."""
    axes = axes or {"data": 1}
    count = math.prod(axes.values())
    return jax.make_mesh(
      tuple(axes.values()),
      tuple(axes),
      axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
      devices=devices(topology)[:count],
    )

  return make
