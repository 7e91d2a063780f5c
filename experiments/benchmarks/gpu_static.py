r"""What CUDA's assembler says of the Mosaic GPU kernels, compiled for an H100: no GPU needed.

  python -m experiments.benchmarks.gpu_static --cases=retention

Each case is compiled in a process of its own. A kernel that spills registers, whose matrix products
wait for each other, or whose shared memory a block does not have, is an error, once all is
written. README.md says what is needed, and what the fields are.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
from typing import Any

from absl import app, flags

from experiments.benchmarks import gpu_compile, gpu_programs
from pallas_kernels.mosaic_gpu import MAX_SMEM_BYTES

_CASES = flags.DEFINE_list("cases", None, "Cases to compile, by prefix; all by default.")
_OUTPUT = flags.DEFINE_string(
  "output", "experiments/results/benchmarks/gpu_static.json", "Where figures go; '' for nowhere."
)


def _versions() -> dict[str, str]:
  here = pathlib.Path(__file__).parent
  commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
  names = ("jax", "jaxlib", "nvidia-cuda-nvcc", "nvidia-nvjitlink")
  return {n: importlib.metadata.version(n) for n in names} | {"commit": commit.stdout.strip()}


def main(argv: list[str]) -> None:
  del argv
  if reason := gpu_compile.why_not():
    raise app.UsageError(reason)
  chosen = [n for n in gpu_programs.CASES if not _CASES.value or n.startswith(tuple(_CASES.value))]
  versions, wrong = _versions(), []
  for name in chosen:
    rows = []
    for kernel, report in gpu_compile.compile_for_h100(name, timeout=1800).items():
      row = dict(case=name, kernel=kernel) | dataclasses.asdict(report)
      print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
      rows.append(row | versions)
      if report.spilled_bytes or report.serialized or report.smem_bytes > MAX_SMEM_BYTES:
        wrong.append(f"{name} {kernel}")
    if _OUTPUT.value:
      _write(pathlib.Path(_OUTPUT.value), rows)
  if wrong:
    raise SystemExit(f"Spilled, serialized or too large: {', '.join(wrong)}.")


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Adds a case's rows; those of other cases, and of other releases of jax, stay."""
  path.parent.mkdir(parents=True, exist_ok=True)
  old = json.loads(path.read_text())["kernels"] if path.exists() else []
  key = lambda row: (row["case"], row["jax"])
  rows = rows + [row for row in old if key(row) != key(rows[0])]
  rows.sort(key=lambda row: (row["case"], row["kernel"], row["jax"]))
  path.write_text(json.dumps(dict(kernels=rows), indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
