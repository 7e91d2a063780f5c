r"""Solver steps x guidance of trained models over latents: what is drawn at each, and how it errs.

  python -m experiments.solver_grid --workdir=runs/digits/seed0,runs/digits/seed1 \
      --num_steps=1,2,3,5,10,20 --guidance=1,1.5,2,3,4 --solvers=dpm_2m

Each folder is a run of `experiments.train`, of one config at several seeds; figures are means over
them, with 95 % t-intervals. In every cell of the grid the same noise becomes samples. The
evaluation `generation` tells their Fréchet distance to real media in a classifier's features, how
often that classifier sees the class that was asked for, and the deviation of their latents;
`std_ratio` is that over the real ones'. A solver of few steps disperses too little, and cells are
comparable where the ratio is the same.

Beside them stand distances of each position's latents from the real ones: of latents that are drawn
one behind another, and, of a LatentLM, of latents each of which is drawn behind real ones. What the
former are farther, the `excess`, is what errors add up to.

Writes `<output>.json` and heat maps, `<output>.png`. Each cell is kept as soon as it is there, and
the same command goes on where a killed one stopped.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from absl import flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from experiments import cells as cells_lib
from latentlab import app
from latentlab.data import files
from latentlab.eval import generation, tables
from latentlab.layers.diffusion_head import Diffusion, check_solver
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latentlm import LatentLM
from latentlab.train import loop
from latentlab.typing import Params

METRICS = ("fd", "agreement", "std_ratio")
"""Those that are drawn and printed."""

# What may differ between runs that are seeds of one another.
_OF_A_RUN = ("seed", "cache_dir", "tokenizer_run")


@dataclasses.dataclass(frozen=True)
class Options:
  """Fields of the evaluation `generation` that are one for the whole grid.

  Attributes:
    num_samples: Of each cell.
    features: What media are compared by.
    split: Real media.
    seed: Of the samples.
  """

  num_samples: int = 500
  features: str = "classifier"
  split: str = "train"
  seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """A trained run.

  Attributes:
    config: As it was asked for.
    trained: What is drawn from.
    evaluator: Measures it.
    about: Its `step`, and the digest of its parameters.
  """

  config: ml_collections.ConfigDict
  trained: loop.Trained
  evaluator: generation.Evaluator
  about: dict[str, Any]


def make_grid(
  num_steps: Sequence[int],
  guidance: Sequence[float],
  solvers: Sequence[str],
  lambda_min: float | None = None,
) -> dict[str, SolverSettings]:
  """The cells by name.

  Raises:
    ValueError: a solver is unknown, a number of steps not positive, or an axis empty.
  """
  for name, values in (("num_steps", num_steps), ("guidance", guidance), ("solvers", solvers)):
    if not values or len(set(values)) < len(values):
      raise ValueError(f"--{name}={_listed(values)} must be different values, at least one.")
  grid = {}
  for solver, steps, scale in itertools.product(solvers, num_steps, guidance):
    try:
      settings = SolverSettings(scale, solver=solver, num_steps=steps, lambda_min=lambda_min)
    except ValueError as e:
      raise ValueError(f"--solvers, --num_steps or --guidance: {e}") from e
    grid[f"{solver}_s{steps}_g{scale:g}"] = settings
  return grid


def check_cells(diffusion: Diffusion | None, grid: Mapping[str, SolverSettings]) -> None:
  """Raises a `ValueError` where a cell's steps do not fit a run's model."""
  for name, settings in grid.items():
    try:
      check_solver(diffusion, settings)
    except ValueError as e:
      raise ValueError(f"--solvers, --num_steps or --lambda_min, cell {name}: {e}") from e


def load_runs(workdirs: Sequence[str], options: Options) -> dict[str, Run]:
  """Runs by their seeds.

  Raises:
    ValueError: a folder holds no run over latents, or runs are no seeds of one config.
  """
  configs = {}
  for workdir in workdirs:
    config = loop.read_config(workdir)
    name = f"seed{config.seed}"
    if name in configs:
      raise ValueError(
        f"--workdir has two runs of seed {config.seed}, {workdir!r} and {configs[name][0]!r}; an "
        "interval is over runs of different seeds."
      )
    configs[name] = workdir, config
  first, *others = (_decisive(config) for _, config in configs.values())
  for (workdir, _), other in zip(list(configs.values())[1:], others, strict=True):
    if changed := sorted(k for k in first | other if first.get(k) != other.get(k)):
      raise ValueError(
        f"--workdir={workdirs[0]},{workdir} are no seeds of one config: they differ in {changed}."
      )
  return {name: _load(*found, options) for name, found in configs.items()}


def _decisive(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What is the same at all seeds."""
  flat = cells_lib.settings(config.to_dict())
  return {name: x for name, x in flat.items() if name.split(".")[-1] not in _OF_A_RUN}


def _load(workdir: str, config: ml_collections.ConfigDict, options: Options) -> Run:
  trained = loop.load(workdir)
  if len(names := getattr(trained.data, "modalities", ())) > 1:
    raise ValueError(f"--workdir={workdir} draws {list(names)}; a grid is of runs on one modality.")
  try:
    evaluator = generation.Evaluator(
      trained.task, trained.data, trained.trainer.compile, **dataclasses.asdict(options)
    )
  except ValueError as e:
    raise ValueError(f"--workdir={workdir}: {e}") from e
  about = dict(step=trained.step, params_sha256=_digest(trained.params))
  return Run(config, trained, evaluator, about)


def _digest(params: Params) -> str:
  """Of all parameters, so that a cell belongs to them and to no others."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(params)):
    found.update(jax.tree_util.keystr(path).encode())
    found.update(np.ascontiguousarray(leaf).tobytes())
  return found.hexdigest()[:16]


def measure(run: Run, settings: SolverSettings) -> dict[str, Any]:
  """Figures of a cell; those of `positions` by position."""
  params, evaluator = run.trained.params, run.evaluator
  drawn, labels = evaluator.draw(params, settings)
  found = evaluator.compare(drawn, labels)
  found["std_ratio"] = found["latent_std"] / found["real_latent_std"]
  positions = evaluator.positions(drawn.latents)
  if isinstance(run.trained.task.model, LatentLM):
    behind = evaluator.positions(evaluator.draw_behind_real(params, settings))
    positions |= {f"{name}_behind_real": behind[name] for name in ("distance", "std")}
    excess = np.subtract(positions["distance"], behind["distance"])
    middle = len(excess) // 2
    found["excess_first_half"] = float(excess[:middle].mean())
    found["excess_second_half"] = float(excess[middle:].mean())
  return found | {"positions": positions}


def fill(
  runs: Mapping[str, Run],
  grid: Mapping[str, SolverSettings],
  options: Options,
  path: pathlib.Path,
  command: str = "",
) -> dict[str, Any]:
  """Measures the cells that a file does not hold yet, and writes each into it.

  Args:
    runs: By name.
    grid: Cells by name.
    options: Of the evaluation.
    path: The file.
    command: What is run.

  Returns:
    All that the file holds: `cells`, with figures by run and their `mean`s; `runs`, with the
    `limits` of their tokenizers and the `position_floor` of real latents.

  Raises:
    ValueError: the file is of other options or of other parameters, or a run's model does not fit
      the grid; before anything is drawn.
  """
  asked = dataclasses.asdict(options) | dict(lambda_min=next(iter(grid.values())).lambda_min)
  result = _read(path, runs, asked)
  for run in runs.values():
    check_cells(run.trained.task.diffusion, grid)
  result |= dict(
    command=command,
    versions=dict(jax=jax.__version__, device=jax.devices()[0].device_kind),
    config=json.loads(next(iter(runs.values())).config.to_json()),
  )
  cells = result["cells"]
  todo = [
    (name, cell)
    for name in runs
    for cell in grid
    if name not in cells.get(cell, {}).get("runs", {})
  ]
  with tqdm.tqdm(todo, unit="cell", disable=None) as bar:
    for name, cell in bar:
      bar.set_postfix_str(f"{cell}, {name}")
      run, settings = runs[name], grid[cell]
      if name not in result["runs"]:
        limits = run.evaluator.limits(run.trained.params)
        floor = run.evaluator.position_floor()
        result["runs"][name] = run.about | dict(limits=limits, position_floor=floor)
      axes = {field: getattr(settings, field) for field in ("solver", "num_steps", "guidance")}
      here = cells.setdefault(cell, axes | dict(runs={}))
      here["runs"][name] = measure(run, settings)
      here["mean"] = _means(here["runs"])
      _write(path, result)
  return result


def _read(path: pathlib.Path, runs: Mapping[str, Run], asked: Mapping[str, Any]) -> dict[str, Any]:
  if not path.exists():
    return dict(options=asked, runs={}, cells={})
  result = json.loads(path.read_text("utf-8"))
  for name, here in (("options", asked), *((name, run.about) for name, run in runs.items())):
    there = result["options"] if name == "options" else result["runs"].get(name, here)
    changed = {k: x for k, x in here.items() if there.get(k) != x}
    if changed:
      differ = "; ".join(f"{k}={there.get(k)!r}, not {x!r}" for k, x in changed.items())
      raise ValueError(
        f"--output={path.with_suffix('')} holds cells of {name} with {differ}: choose another "
        "--output, or delete it."
      )
  return result


def _means(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Means of figures over runs; those by position are averaged over positions too."""
  values = {
    name: {k: x for k, x in found.items() if k != "positions"}
    | {f"position_{k}": float(np.mean(x)) for k, x in found["positions"].items()}
    for name, found in runs.items()
  }
  names = next(iter(values.values()))
  return {
    k: dataclasses.asdict(tables.Estimate.of([values[run][k] for run in runs])) for k in names
  }


def _write(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  text = json.dumps(result, indent=1, allow_nan=False)
  # Numbers by position on one line.
  flat = lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]")
  files.write_text(path, re.sub(r"\[[-+.,\d\se]+\]", flat, text) + "\n")


def best_guidance(
  result: Mapping[str, Any], grid: Mapping[str, SolverSettings]
) -> dict[str, dict[str, float]]:
  """By solver and number of steps, the scale of guidance at which the distance is the smallest."""
  found: dict[str, dict[str, float]] = {}
  cells = {name: result["cells"][name]["mean"]["fd"]["mean"] for name in grid}
  for name in sorted(cells, key=cells.get, reverse=True):  # The best ones last.
    c = grid[name]
    found[f"{c.solver}_s{c.num_steps}"] = dict(guidance=c.guidance, fd=cells[name])
  return dict(sorted(found.items()))


def markdown(result: Mapping[str, Any], grid: Mapping[str, SolverSettings]) -> str:
  """The grid as a table."""
  rows = []
  for name, c in grid.items():
    mean = result["cells"][name]["mean"]
    figures = (tables.Estimate(**mean[k]).text() if k in mean else "–" for k in METRICS)
    rows.append([c.solver, str(c.num_steps), f"{c.guidance:g}", *figures])
  return tables.markdown_table(["solver", "steps", "guidance", *METRICS], rows)


def plot(path: pathlib.Path, result: Mapping[str, Any], grid: Mapping[str, SolverSettings]) -> None:
  """Heat maps, a row of them for each solver; then distances by position at the first guidance."""
  axes_of = lambda field: list(dict.fromkeys(getattr(c, field) for c in grid.values()))
  solvers, steps, scales = (axes_of(f) for f in ("solver", "num_steps", "guidance"))
  by_place = {(c.solver, c.num_steps, c.guidance): result["cells"][n] for n, c in grid.items()}
  size = (3.2 * (len(METRICS) + 1), 0.8 + max(2.6, 0.45 * len(steps)) * len(solvers))
  # The object interface: pyplot would choose a backend and keep every figure alive.
  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(len(solvers), len(METRICS) + 1, squeeze=False)
  for solver, row in zip(solvers, panels, strict=True):
    for metric, axes in zip(METRICS, row, strict=False):
      found = [[by_place[solver, s, g]["mean"].get(metric) for g in scales] for s in steps]
      values = np.array([[np.nan if x is None else x["mean"] for x in line] for line in found])
      _heat_map(axes, values, steps, scales, log=metric == "fd")
      axes.set_title(f"{solver}: {metric}", fontsize="medium")
    for color, s in enumerate(steps):
      runs = by_place[solver, s, scales[0]]["runs"].values()
      for name, style in (("distance", "-"), ("distance_behind_real", ":")):
        lines = [r["positions"][name] for r in runs if name in r["positions"]]
        if lines:
          length = min(map(len, lines))
          mean = np.mean([line[:length] for line in lines], axis=0)
          label = f"{s} steps" if style == "-" else None
          row[-1].plot(mean, style, color=f"C{color}", linewidth=1, label=label)
    row[-1].set_title(f"distance by position, guidance {scales[0]:g}", fontsize="medium")
    row[-1].set_xlabel("position (dotted: behind real ones)")
    row[-1].set_yscale("log")
    row[-1].grid(alpha=0.3)
    row[-1].legend(fontsize="xx-small", ncols=2)
  figure.savefig(path, dpi=120)


def _heat_map(
  axes: Axes, values: np.ndarray, steps: Sequence[int], scales: Sequence[float], *, log: bool
) -> None:
  # A distance of zero has no logarithm.
  norm = LogNorm() if log and (values > 0).all() else None
  image = axes.imshow(values, aspect="auto", norm=norm, cmap="viridis")
  for (i, j), x in np.ndenumerate(values):
    dark = image.norm(x) < 0.6
    axes.text(j, i, f"{x:.3g}", ha="center", va="center", color="w" if dark else "k", fontsize=7)
  axes.set_xticks(range(len(scales)), [f"{g:g}" for g in scales])
  axes.set_yticks(range(len(steps)), [str(s) for s in steps])
  axes.set_xlabel("guidance")
  axes.set_ylabel("solver steps")


def _listed(values: Sequence[Any]) -> str:
  return ",".join(str(x) for x in values)


def _numbers(name: str, kind: type) -> list[Any]:
  texts = flags.FLAGS[name].value
  try:
    return [kind(x) for x in texts]
  except ValueError as e:
    raise ValueError(f"--{name}={_listed(texts)} must be numbers, as in 1,2,5.") from e


def draw_grid(
  workdirs: Sequence[str],
  grid: Mapping[str, SolverSettings],
  options: Options,
  output: pathlib.Path,
  command: str = "",
) -> dict[str, Any]:
  """Fills `<output>.json`, draws `<output>.png` and prints the table; returns the former."""
  path = output.with_suffix(".json")
  result = fill(load_runs(workdirs, options), grid, options, path, command)
  result["best_guidance"] = best_guidance(result, grid)
  _write(path, result)
  plot(output.with_suffix(".png"), result, grid)
  print(markdown(result, grid))
  print(path, output.with_suffix(".png"))
  return result


def main() -> None:
  values = flags.FLAGS
  axes = _numbers("num_steps", int), _numbers("guidance", float), values.solvers
  grid = make_grid(*axes, values.lambda_min)
  if not values.workdir:
    raise ValueError("--workdir is missing: give the folder of a run, or of several with commas.")
  options = Options(values.num_samples, values.features, values.split, values.seed)
  command = f"python -m experiments.solver_grid {shlex.join(sys.argv[1:])}"
  draw_grid(values.workdir.split(","), grid, options, pathlib.Path(values.output), command)


_FLAGS = (
  *("num_steps", "guidance", "solvers", "lambda_min"),
  *("num_samples", "features", "split", "seed", "output"),
)


def _define_flags() -> None:
  """Not on import: other binaries have flags of these names."""
  flags.declare_key_flag("workdir")
  flags.DEFINE_list("num_steps", ["1", "2", "3", "5", "10", "20"], "Steps of the solver.")
  flags.DEFINE_list("guidance", ["1", "1.5", "2", "3", "4"], "Scales of guidance; 1 is none.")
  flags.DEFINE_list("solvers", ["dpm_2m"], "Solvers: dpm_2m, ddim, sde_2m, ...")
  flags.DEFINE_float(
    "lambda_min",
    None,
    "Leaves out levels whose ln(alpha / sigma) lies below; -3 for a model that predicts noise.",
  )
  flags.DEFINE_integer("num_samples", 500, "Samples of each cell.", lower_bound=10)
  flags.DEFINE_string("features", "classifier", "What media are compared by, or 'pixels'.")
  flags.DEFINE_string("split", "train", "Split of the real media.")
  flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
  flags.DEFINE_string(
    "output", "experiments/results/latentlm/solver_grid", "Files, without an ending."
  )


if __name__ == "__main__":
  _define_flags()
  app.run_tool(main, flag_names=("workdir", *_FLAGS))
