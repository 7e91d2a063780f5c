"""Mosaic GPU kernels under test: real compiles with no GPU, and the interpreter that sees races."""

import contextlib
import importlib.metadata
from collections.abc import Iterator

import pytest

from experiments.benchmarks import gpu_compile
from experiments.benchmarks.gpu_compile import Report


def require_interpreter() -> None:
  """Skips the test where jax cannot interpret Mosaic GPU kernels."""
  if importlib.metadata.version("jax") < "0.11":
    pytest.skip("jax's interpreter of Mosaic GPU kernels serves from jax 0.11 on")


def compile_for_h100(case: str) -> dict[str, Report]:
  """`experiments.benchmarks.gpu_compile.compile_for_h100`; skips where nothing can be compiled."""
  if reason := gpu_compile.why_not():
    pytest.skip(reason)
  return gpu_compile.compile_for_h100(case)


@contextlib.contextmanager
def race_detection() -> Iterator[None]:
  """Interprets the kernels traced inside with a race detector; a race found is an error."""
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

  from pallas_kernels import mosaic_gpu

  interpreter.reset_gpu_interpret_mode_state()
  with mosaic_gpu.interpret_mode(detect_races=True):
    yield
  assert not interpreter.get_races().races_found
