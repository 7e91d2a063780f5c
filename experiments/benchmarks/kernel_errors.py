r"""How far the kernels' roundings take them from float64, under the interpreters: no chip needed.

  python -m experiments.benchmarks.kernel_errors --programs=pallas_tpu

Interpreted arithmetic is exact but for the roundings that a kernel asks for, which a chip has too.
Each case's output and gradients are held to the op written out in float64, of the same rounded
inputs; the figure is the norm of the difference over that of what is right.
"""

import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from absl import app, flags  # noqa: E402 (after the platform, which jax reads when imported)

_PROGRAMS = flags.DEFINE_list("programs", ["xla", "pallas_tpu", "pallas_gpu"], "Implementations.")
_CASES = flags.DEFINE_list("cases", None, "Cases to run, by prefix; all by default.")
_OUTPUT = flags.DEFINE_string(
  "output", "experiments/results/benchmarks/kernel_errors.json", "Where figures go; '' for nowhere."
)

# Batch, tokens, heads, head size, value size and gates: no more than the form in float64 can hold.
SHAPES = {
  "retention/100_gated": (1, 100, 1, 64, 64, True),
  "retention/500": (1, 500, 2, 64, 128, False),
  "retention/2000_gated": (1, 2000, 1, 64, 64, True),
  "diff_attention/100": (1, 100, 2, 64, 128),
  "diff_attention/500": (1, 500, 1, 64, 128),
}
WRITTEN_OUT = {"retention": "recurrent", "diff_attention": "naive"}


def measure(case: str, implementation: str, dtype: str) -> dict[str, float]:
  """Relative errors of the output and of each gradient, by name."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from experiments.benchmarks import kernel_programs, specs

  op_name = case.split("/")[0]
  op = kernel_programs.OPS[op_name][0](specs.Attention(*SHAPES[case]), dtype)
  inputs = op.inputs(0)

  def results(implementation, inputs):
    program = kernel_programs.jax_program(op.ours(implementation), op.learned)
    return program.passes["forward_backward"](inputs)

  got = results(implementation, inputs)
  with jax.enable_x64(True):
    inputs = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in inputs.items()}
    want = jax.tree.map(np.asarray, results(WRITTEN_OUT[op_name], inputs))
  wide = {name: np.asarray(x, np.float64) for name, x in got.items()}
  error = lambda name: np.linalg.norm(wide[name] - want[name]) / np.linalg.norm(want[name])
  return {name: float(f"{error(name):.2g}") for name in want}


def _versions() -> dict[str, str]:
  here = pathlib.Path(__file__).parent
  commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
  return dict(jax=importlib.metadata.version("jax"), commit=commit.stdout.strip())


def main(argv: list[str]) -> None:
  del argv
  cases = [case for case in SHAPES if not _CASES.value or case.startswith(tuple(_CASES.value))]
  for case, program, dtype in itertools.product(cases, _PROGRAMS.value, ("bfloat16", "float32")):
    row = dict(case=case, program=program, dtype=dtype)
    try:
      row["errors"] = measure(case, program, dtype)
    except ExceptionGroup as e:  # Refused, as float32 is by a Hopper kernel.
      print(row, e.exceptions[0], flush=True)
      continue
    print(row, flush=True)
    if _OUTPUT.value:
      _write(pathlib.Path(_OUTPUT.value), row | _versions())


def _write(path: pathlib.Path, row: dict[str, Any]) -> None:
  """Puts a row into the file; the others stay, with the versions that they were made by."""
  path.parent.mkdir(parents=True, exist_ok=True)
  key = lambda row: (row["case"], row["program"], row["dtype"])
  old = json.loads(path.read_text())["rows"] if path.exists() else []
  rows = sorted([row, *(x for x in old if key(x) != key(row))], key=key)
  path.write_text(json.dumps(dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
