r"""Device times of the fused ops on one GPU, beside their floors and the best public peers.

  python -m experiments.benchmarks.kernels

Each program of a case sees the same random inputs. Its output and gradients must match our XLA
implementation in float32 before it is timed. A time is the sum of what the card's kernels took in
one call, the median of many; inputs change from call to call, and all together exceed the cache.
A peer that is not installed, or refuses a case, is listed with its reason. README.md has the rest.
"""

import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

_PLATFORM = flags.DEFINE_enum("platform", "gpu", ["gpu", "tpu", "cpu"], "Where programs run.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Only the shapes of tests, whose times tell nothing.")
_OPS = flags.DEFINE_list("ops", None, "Ops to time; all by default.")
_CASES = flags.DEFINE_list("cases", None, "Cases to time, by prefix; all by default.")
_PROGRAMS = flags.DEFINE_list("programs", None, "Programs to time, by prefix; all by default.")
_CALLS = flags.DEFINE_integer("calls", 30, "Timed calls of each program.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of inputs.")
_TIMER = flags.DEFINE_enum(
  "timer", None, ["device", "clock"], "'device' on a GPU by default, the clock elsewhere."
)
_OUTPUT = flags.DEFINE_string(
  "output", "experiments/results/benchmarks/kernels_gpu", "Path without suffix; '' for nowhere."
)

# Of matrix products in bfloat16, operations a second, and of copies, bytes a second: measured.
PEAKS = {"H100": (798e12, 3.0e12), "H200": (788e12, 4.3e12)}
CACHE_BYTES = 60 << 20  # The largest second-level cache of these cards.
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-3}  # Relative, of the norm.
DECAY_TOLERANCE = 10  # Times that: the gradient of a gate is a small difference of sums.
# What a program raises that can't serve a case: a lack, a dispatch, a backend, or memory.
REFUSALS = (NotImplementedError, ExceptionGroup, RuntimeError)


def run_case(
  op: Any, names: Sequence[str] | None, calls: int, timer: str, peaks: tuple[float, float] | None
) -> dict[str, Any]:
  """Checks and times the programs of an op.

  Args:
    op: A `kernel_programs.Op`.
    names: Prefixes of programs' names; all of them if `None`.
    calls: Timed calls of each.
    timer: "device" or "clock".
    peaks: The card's, or `None` where they are not known.

  Returns:
    Floors, and reports by program: its errors and its passes' times, or why it was not timed.
  """

  sets = [op.inputs(0)]
  size = sum(x.nbytes for x in sets[0].values())
  sets += [op.inputs(seed) for seed in range(1, min(calls, math.ceil(CACHE_BYTES / size)))]
  want = op.reference(sets[0])
  floors = {}
  if peaks is not None:
    for name, (flops, moved) in op.work().items():
      floors[name] = max(flops / peaks[0], moved / peaks[1]) * 1e3
  report = dict(floor_ms={k: round(x, 4) for k, x in floors.items()}, programs={})
  for name, make in op.programs().items():
    if names is not None and not name.startswith(tuple(names)):
      continue
    try:
      program = make()
      inputs = [program.prepare(x) for x in sets]
      results = program.passes["forward_backward"](inputs[0])
      results = {k: program.fetch(x) for k, x in results.items()}
    except REFUSALS as e:
      report["programs"][name] = dict(refused=reason(e))
      continue
    found = errors(results, want)
    if wrong := too_large(found, str(op.dtype)):
      report["programs"][name] = dict(errors=found, mismatch=wrong)
      continue
    try:
      passes = {
        which: timed(TIMERS[timer], function, inputs, program.wait, calls, floors.get(which))
        for which, function in program.passes.items()
      }
    except REFUSALS as e:  # Memory for several results, say.
      report["programs"][name] = dict(errors=found, refused=reason(e))
      continue
    report["programs"][name] = dict(errors=found, **passes)
  return report


def timed(
  timer: Callable[..., list[float]],
  function: Callable[[Any], Any],
  inputs: Sequence[Any],
  wait: Callable[[Any], Any],
  calls: int,
  floor: float | None,
) -> dict[str, float]:
  """Milliseconds of a call, in the middle and at both ends, and over the floor if it is known."""
  times = timer([functools.partial(function, x) for x in inputs], wait, calls)
  median = statistics.median(times)
  report = dict(ms=round(median, 4), ms_best=round(min(times), 4), ms_worst=round(max(times), 4))
  return report if floor is None else report | dict(over_floor=round(median / floor, 3))


def reason(e: BaseException) -> str:
  """An error on one line."""
  causes = e.exceptions if isinstance(e, BaseExceptionGroup) else (e,)
  return " ".join(str(x).strip().splitlines()[0] for x in causes if str(x).strip())[:300]


def errors(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Relative errors, of the norm, by name; infinite where a result is missing, or of another shape.

  What has one axis is a sum over all rows, of which `want` has the first.
  """
  found = {}
  for name, expected in want.items():
    if expected.ndim > 1:
      error = np.inf
      if name in got and got[name].shape == expected.shape:
        error = np.linalg.norm(got[name] - expected) / max(np.linalg.norm(expected), 1e-30)
      found[name] = float(f"{error:.3g}")
  return found


def too_large(errors: Mapping[str, float], dtype: str) -> list[str]:
  """Names of the errors beyond what inputs of the dtype explain."""
  bound = lambda name: TOLERANCE[dtype] * (DECAY_TOLERANCE if name == "log_decay" else 1)
  return [name for name, error in errors.items() if not error <= bound(name)]  # Or a NaN.


def time_on_device(
  thunks: Sequence[Callable[[], Any]], wait: Callable[[Any], Any], calls: int
) -> list[float]:
  """Milliseconds that the card's kernels took in each call; the gaps between them do not count."""
  from jax.experimental.mosaic.gpu import profiler

  for thunk in thunks:
    wait(thunk())
  recorder = profiler.mosaic_gpu_lib._mosaic_gpu_ext  # Of kernels, whoever launches them.
  recorder._cupti_init()
  try:
    for thunk in itertools.islice(itertools.cycle(thunks), calls):
      result = thunk()
    wait(result)
  finally:
    records = recorder._cupti_get_timings(True)
  if not records or len(records) % calls:
    raise RuntimeError(f"{len(records)} kernels were recorded in {calls} calls; use --timer=clock.")
  each = len(records) // calls
  return [sum(ms for _, ms in records[i : i + each]) for i in range(0, len(records), each)]


def time_by_clock(
  thunks: Sequence[Callable[[], Any]], wait: Callable[[Any], Any], calls: int
) -> list[float]:
  """Milliseconds of each call by the clock, with what it takes to start and to wait."""
  for thunk in thunks:
    wait(thunk())
  times = []
  for thunk in itertools.islice(itertools.cycle(thunks), calls):
    start = time.perf_counter()
    wait(thunk())
    times.append(1e3 * (time.perf_counter() - start))
  return times


TIMERS = {"device": time_on_device, "clock": time_by_clock}


def environment() -> dict[str, Any]:
  """What the figures hold for."""
  import jax

  versions = {}
  for package in ("jax", "jaxlib", "jax-cuda13-plugin", "torch", "triton", "fla-core", "tokamax"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  driver = None
  if shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
  here = pathlib.Path(__file__).parent
  git = lambda *args: subprocess.run(
    ["git", *args], capture_output=True, text=True, cwd=here, check=False
  ).stdout.strip()
  return dict(
    device=jax.devices()[0].device_kind,
    driver=driver,
    versions=versions,
    commit=git("rev-parse", "HEAD"),
    uncommitted_changes=bool(git("status", "--porcelain")),
  )


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
  """Bars of the programs' times over the floor, or of their times where it is not known."""
  import matplotlib.pyplot as plt

  cases = {
    k: c for k, c in result["cases"].items() if any("forward" in p for p in c["programs"].values())
  }
  if not cases:
    return
  figure, axes = plt.subplots(
    len(cases), 2, figsize=(9, 0.6 + 1.5 * len(cases)), squeeze=False, layout="constrained"
  )
  for row, (case, report) in zip(axes, cases.items(), strict=True):
    for axis, which in zip(row, ("forward", "forward_backward"), strict=True):
      over = which in report["floor_ms"]
      key = "over_floor" if over else "ms"
      timed = {n: p[which][key] for n, p in report["programs"].items() if which in p}
      bars = axis.barh(list(timed), list(timed.values()))
      axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
      axis.invert_yaxis()
      axis.margins(x=0.15)
      axis.tick_params(labelsize=7)
      axis.set_title(f"{case}: {which}, {'times the floor' if over else 'ms'}", fontsize=8)
  figure.suptitle(f"{result['device']}, {result['dtype']}", fontsize=9)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def selected_cases() -> Iterator[tuple[str, Any]]:
  """The ops that flags select, at their shapes, by name."""
  from experiments.benchmarks import kernel_programs

  if unknown := set(_OPS.value or ()) - set(kernel_programs.OPS):
    raise app.UsageError(f"--ops: unknown {sorted(unknown)}; among {list(kernel_programs.OPS)}")
  prefixes = tuple(_CASES.value or ("",))
  for name in _OPS.value or kernel_programs.OPS:
    op, shapes = kernel_programs.OPS[name]
    for case, shape in shapes.items():
      if case.startswith("tiny") == _SMOKE.value and case.startswith(prefixes):
        yield f"{name}/{case}", op(shape, _DTYPE.value)


def set_platform() -> str:
  """Tells jax, before it is imported, where programs run; returns the timer for it."""
  os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(_PLATFORM.value, _PLATFORM.value)
  # It may share the card with torch, and must not take it all.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  return _TIMER.value or ("device" if _PLATFORM.value == "gpu" else "clock")


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  timer = set_platform()
  result = environment() | dict(dtype=_DTYPE.value, timer=timer, calls=_CALLS.value, cases={})
  peaks = next((x for name, x in PEAKS.items() if name in result["device"]), None)
  for name, op in selected_cases():
    report = run_case(op, _PROGRAMS.value, _CALLS.value, timer, peaks)
    result["cases"][name] = dict(shape=vars(op.shape)) | report
    for program, p in report["programs"].items():
      logging.info("%s %s: %s", name, program, json.dumps(p))
    if _OUTPUT.value:  # After each case, so that an interrupted run has left something.
      output = pathlib.Path(_OUTPUT.value)
      output.parent.mkdir(parents=True, exist_ok=True)
      output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
      plot(result, output.with_suffix(".png"))
  wrong = [
    f"{case} {program}: {p['mismatch']}"
    for case, report in result["cases"].items()
    for program, p in report["programs"].items()
    if "mismatch" in p
  ]
  if wrong:
    sys.exit(f"These do not compute the op, and were not timed: {'; '.join(wrong)}")


if __name__ == "__main__":
  app.run(main)
