r"""Searches the kernels' block sizes on the chip at hand, and prints a table to commit.

  python -m experiments.benchmarks.tune --platform=gpu --ops=retention --cases=retnet_4k

One field of an op's block sizes after another is tried at each of its values, the others at their
best so far; what counts is the time of forward and backward. The search begins with what the
heuristic of `blocks.py` chooses, whose time stands beside the best. Sizes that do not fit are
listed with their reason, and those whose results are wrong end the run with an error. Flags are
those of `kernels.py` but `--output` and `--programs`; on a CPU the TPU's kernels are interpreted,
for tests.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from experiments.benchmarks import kernels

_OUTPUT = flags.DEFINE_string(
  "tune_output",
  "experiments/results/benchmarks/tune",
  "Path of .json and .md, without suffix; '' for nowhere.",
)


@dataclasses.dataclass(frozen=True)
class Search:
  """What is searched for one op at one shape.

  Attributes:
    start: The heuristic's block sizes, a frozen dataclass.
    choices: Values to try, by field.
    function: Of block sizes, the op as a function of its inputs by name.
  """

  start: Any
  choices: Mapping[str, Sequence[Any]]
  function: Callable[[Any], Callable[..., Any]]


def searches(op: Any, platform: str) -> Search:
  """The search of a `kernel_programs.Op` on a GPU or, as a CPU's interpreter too, a TPU."""
  from experiments.benchmarks import kernel_programs

  make = _retention if isinstance(op, kernel_programs.Retention) else _diff_attention
  return make(op.shape, op.dtype.itemsize, platform)


def _retention(shape, itemsize, platform) -> Search:
  from pallas_kernels.retention import blocks, gpu, tpu

  def function(chunkwise, sizes):
    return lambda **inputs: chunkwise(**inputs, blocks=sizes)[0]

  if platform == "gpu":
    tiles = _grid(blocks.GpuTile, rows=(64, 128, 192, 256), warpgroups=(1, 2), stages=(2, 3, 4))
    start = blocks.GpuBlocks.for_sizes(
      shape.batch * shape.num_heads, shape.length, shape.head_dim, shape.value_head_dim
    )
    choices = _every_field(start, tiles) | dict(segments=(1, 2, 4, 8, 16))
    return Search(start, choices, functools.partial(function, gpu.chunkwise))
  heads = shape.num_heads
  sizes = blocks.Sizes(
    *(shape.batch, shape.length, heads, heads, shape.head_dim, shape.value_head_dim, itemsize)
  )
  tiles = _grid(blocks.TpuTile, chunk=(128, 256, 512), heads=(1, 2, 4, 8))
  start = blocks.TpuBlocks.for_sizes(sizes)
  return Search(start, _every_field(start, tiles), functools.partial(function, tpu.chunkwise))


def _diff_attention(shape, itemsize, platform) -> Search:
  from pallas_kernels.diff_attention import blocks, gpu, tpu
  from pallas_kernels.diff_attention.reference import Options, Visibility

  def function(attend, sizes):
    def op(q, k, v, lam):
      return attend(Options(), q, k, v, lam, None, Visibility(), blocks=sizes)

    return op

  if platform == "gpu":
    start = blocks.GpuBlocks.for_shapes(shape.head_dim, shape.value_head_dim)
    values = lambda name: (1, 2, 3) if name.endswith("stages") else (64, 128)
    choices = {field.name: values(field.name) for field in dataclasses.fields(start)}
    return Search(start, choices, functools.partial(function, gpu.diff_attention))
  tiles = _grid(
    blocks.TpuTile, queries=(256, 512, 1024), keys=(512, 1024, 2048), compute=(256, 512, 1024)
  )
  start = blocks.TpuBlocks.for_sizes(
    *(shape.length, shape.length, shape.head_dim, shape.value_head_dim)
  )
  return Search(start, _every_field(start, tiles), functools.partial(function, tpu.diff_attention))


def _grid(tile: type, **values: Sequence[int]) -> list[Any]:
  """All tiles of these values that are one at all."""
  tiles = []
  for combination in itertools.product(*values.values()):
    try:
      tiles.append(tile(**dict(zip(values, combination, strict=True))))
    except ValueError:
      continue
  return tiles


def _every_field(start, tiles):
  return {field.name: tiles for field in dataclasses.fields(start)}


def tune(op: Any, search: Search, calls: int, timer: str) -> list[dict[str, Any]]:
  """Times block sizes, field by field.

  Args:
    op: A `kernel_programs.Op`.
    search: What to try.
    calls: Timed calls of each.
    timer: A key of `kernels.TIMERS`.

  Returns:
    A report for each of the block sizes tried, the heuristic's first.

  Raises:
    MismatchError: Block sizes change the results.
    NotImplementedError: The heuristic's do not run.
  """
  inputs = [op.inputs(0)]
  want = op.reference(inputs[0])
  reports = [_timed(op, search, search.start, inputs, want, calls, timer)]
  if "ms" not in reports[0]:
    raise NotImplementedError(f"The heuristic's {search.start} do not run: {reports[0]['refused']}")
  best = reports[0]
  candidates = list(_candidates(search))
  for field, value in tqdm(candidates, desc=type(op).__name__, unit="sizes"):
    sizes = dataclasses.replace(best["blocks"], **{field: value})
    if any(report["blocks"] == sizes for report in reports):
      continue
    reports.append(_timed(op, search, sizes, inputs, want, calls, timer))
    if reports[-1].get("ms", float("inf")) < best["ms"]:
      best = reports[-1]
  return reports


def _candidates(search: Search) -> Iterator[tuple[str, Any]]:
  for field, values in search.choices.items():
    for value in values:
      yield field, value


def _timed(op, search, sizes, inputs, want, calls, timer) -> dict[str, Any]:
  from experiments.benchmarks import kernel_programs

  program = kernel_programs.jax_program(search.function(sizes), op.learned)
  try:
    results = program.passes["forward_backward"](inputs[0])
    errors = kernels.errors({name: program.fetch(x) for name, x in results.items()}, want)
    if wrong := kernels.too_large(errors, str(op.dtype)):
      raise MismatchError(f"{sizes} change {wrong}: {errors}")
    times = {
      name: kernels.timed(kernels.TIMERS[timer], run, inputs, program.wait, calls, None)["ms"]
      for name, run in program.passes.items()
    }
  except MismatchError:
    raise
  except (ValueError, *kernels.REFUSALS) as e:  # They do not fit the op, the chip, or memory.
    return dict(blocks=sizes, refused=kernels.reason(e))
  return dict(blocks=sizes, ms=times["forward_backward"], forward_ms=times["forward"])


class MismatchError(Exception):
  """Results depend on the block sizes."""


def table(reports: Sequence[dict[str, Any]]) -> str:
  """Markdown, the fastest first, with the heuristic's choice marked."""
  timed = sorted((r for r in reports if "ms" in r), key=lambda r: r["ms"])
  lines = ["| block sizes | forward, ms | with backward, ms | |", "| --- | --- | --- | --- |"]
  for report in timed:
    note = "heuristic" if report is reports[0] else ""
    sizes = str(report["blocks"]).replace("|", "")
    lines.append(f"| `{sizes}` | {report['forward_ms']:.4f} | {report['ms']:.4f} | {note} |")
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  timer = kernels.set_platform()
  platform = flags.FLAGS.platform
  result = kernels.environment() | dict(timer=timer, cases={})
  text = []
  for name, op in kernels.selected_cases():
    reports = tune(op, searches(op, platform), flags.FLAGS.calls, timer)
    text.append(f"## {name}, {result['device']}\n\n{table(reports)}\n")
    print(text[-1], flush=True)
    result["cases"][name] = [r | dict(blocks=dataclasses.asdict(r["blocks"])) for r in reports]
    if _OUTPUT.value:
      output = pathlib.Path(_OUTPUT.value)
      output.parent.mkdir(parents=True, exist_ok=True)
      output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
      output.with_suffix(".md").write_text("\n".join(text))


if __name__ == "__main__":
  app.run(main)
