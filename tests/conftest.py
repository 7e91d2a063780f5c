"""Set-up of the whole suite: the platform, the simulated devices, and the run-time shape checks."""

import os
import pathlib

import jaxtyping
import pytest

# jax reads these when a test file first imports it; subprocesses that a test starts inherit them.
PLATFORM = os.environ.get("LATENTLAB_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
if PLATFORM == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
  # Tests compile far longer than they run, so the compiler may leave its code as it is.
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_force_host_platform_device_count=8",
      "--xla_backend_optimization_level=0",
      "--xla_llvm_disable_expensive_passes=true",
    ]
  )
os.environ.setdefault("MPLBACKEND", "agg")

# Every annotation is checked on each call (or trace) while the tests run: tests/shape_checks.py.
jaxtyping.install_import_hook(["latentlab", "pallas_kernels"], "shape_checks.typechecked")

_TESTS = pathlib.Path(__file__).parent
_QUICK = ("layers", "models", "ops", "pallas_kernels", "sample")
_ONLY = {"cpu": "cpu_only", "cuda": "gpu_only", "tpu": "tpu_only"}


def pytest_configure() -> None:
  if PLATFORM not in _ONLY:
    raise pytest.UsageError(f"LATENTLAB_TEST_PLATFORM={PLATFORM!r} is none of {', '.join(_ONLY)}.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  for item in items:
    room = item.path.relative_to(_TESTS).parts[0]
    if room in _QUICK and item.get_closest_marker("slow") is None:
      item.add_marker(pytest.mark.quick)
    for platform, marker in _ONLY.items():
      if item.get_closest_marker(marker) and platform != PLATFORM:
        item.add_marker(pytest.mark.skip(reason=f"{marker}, and this run is on {PLATFORM}"))


@pytest.fixture
def key():
  """A fixed key, so that a failure repeats."""
  import jax  # Not before the platform is set above.

  return jax.random.key(0)
