r"""Runs the rows and seeds of a paper's table, and sets the paper's figures beside ours.

  python -m experiments.tables --config=experiments/configs/retnet/table6_ablations.py \
      --seeds=0,1,2 --num_workers=2

Every cell is a run of `experiments.train` in `<workdir>/<row>/seed<k>`. The same command goes on
where a killed one stopped: finished cells are read, others resume. The table is printed, and saved
as `<output>/<paper>/<stem>.{md,json,png}`. What stands behind `--` goes to every cell's trainer:

  python -m experiments.tables --config=... --workdir=runs/try -- --config.data.path=my_texts/

A table's config file has, beside `get_config(arg)` with the arguments `row`, `scale`, `smoke` and
`seed`:

  TITLE   of the table
  BASE    the row that others are compared with
  METRIC  dict(paper=<a column of the paper>, ours=<evaluation>/<metric>), which are compared
  ALSO    further metrics of ours
  SCALES  {name: a sentence that says what the scale is}
  ROWS    {name: dict(about=<words>, expected={<column of the paper>: figure or None}, ...)}
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import tqdm
from absl import app, flags
from ml_collections import config_flags

from latentlab.eval import tables
from latentlab.train import metrics

_PROTOCOL = ("TITLE", "BASE", "METRIC", "ALSO", "SCALES", "ROWS", "get_config")
# In a process of its own: one that has asked for its devices may hold them from the cells.
_ENVIRONMENT = """
import json, os, platform, flax, jax
device = jax.devices()[0]
print(json.dumps(dict(
    python=platform.python_version(), jax=jax.__version__, flax=flax.__version__,
    platform=device.platform, device=device.device_kind, num_devices=jax.device_count(),
    num_cpus=os.cpu_count())))
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
  """A row at a seed.

  Attributes:
    row: Name of the row.
    seed: The seed.
    argument: Value of the trainer's `--config`.
    overrides: Further flags of the trainer.
    config: What these give.
    workdir: Folder of the run.
  """

  row: str
  seed: int
  argument: str
  overrides: tuple[str, ...]
  config: ml_collections.ConfigDict
  workdir: pathlib.Path

  @property
  def name(self) -> str:
    return f"{self.row}/seed{self.seed}"

  def lines(self) -> list[dict[str, Any]]:
    return metrics.read_metrics(self.workdir / "metrics.jsonl")

  def step(self) -> int:
    lines = self.lines()
    return lines[-1]["step"] if lines else 0

  def values(self, names: Sequence[str]) -> dict[str, float] | None:
    """The metrics after the last step, once the run is finished and they are finite."""
    # The trainer draws its curves last, when the checkpoint of the last step is safe.
    if not (self.workdir / "plots/loss.png").exists() or self.step() != self.config.train_steps:
      return None
    last = self.lines()[-1]
    found = {name: last.get(f"eval/{name}") for name in names}
    return None if None in found.values() else found

  def seconds(self) -> float:
    """Time in training steps, compilation included, over all processes that ran the cell."""
    tokens = self.config.batch_size * self.config.data.seq_length
    total, previous = 0.0, 0
    for line in self.lines():
      total += line.get("perf/compile_sec", 0.0)
      if speed := line.get("perf/tokens_per_sec"):
        total += (line["step"] - previous) * tokens / speed
      if "train/loss" in line:
        previous = line["step"]
    return total

  def check(self) -> None:
    """Raises `ValueError` where the workdir holds a run of another config."""
    path = self.workdir / "config.json"
    if not path.exists():
      return
    old, new = (_flat(json.loads(x)) for x in (path.read_text(), self.config.to_json()))
    if changed := [
      f"{k}: {old.get(k)!r} there, {new.get(k)!r} asked for"
      for k in sorted(old.keys() | new.keys())
      if old.get(k) != new.get(k)
    ]:
      raise ValueError(
        f"{str(self.workdir)!r} holds a run of another config ({'; '.join(changed)})"
        "; choose another --workdir, or delete it."
      )


def load(path: str) -> types.ModuleType:
  """Imports a table's config file.

  Raises:
    ValueError: there is no such file, or it describes no table.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--config={path!r} is no file; rows and scales have flags of their own.")
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if missing := [name for name in _PROTOCOL if not hasattr(module, name)]:
    raise ValueError(f"--config={path!r} is no table's config file: it has no {missing}.")
  return module


def make_cells(
  table: types.ModuleType,
  workdir: str | pathlib.Path,
  *,
  scale: str,
  seeds: Sequence[str],
  rows: Sequence[str] = (),
  smoke: bool = False,
  overrides: Sequence[str] = (),
) -> list[Cell]:
  """The cells of a table, seed by seed, so that whole comparisons are there early.

  Raises:
    ValueError: a scale, row, seed or override is unknown.
  """
  if scale not in table.SCALES:
    raise ValueError(f"unknown --scale={scale!r}; choose one of {sorted(table.SCALES)}.")
  if unknown := [row for row in rows if row not in table.ROWS]:
    raise ValueError(f"unknown --rows={','.join(unknown)}; choose among {list(table.ROWS)}.")
  if not seeds or len(set(seeds)) < len(seeds) or not all(s.isdecimal() for s in seeds):
    raise ValueError(f"--seeds={','.join(seeds)} must be different numbers, 0,1,2 say.")
  if unknown := [flag for flag in overrides if not flag.startswith("--config.")]:
    raise ValueError(f"unknown arguments {unknown}; behind -- stand --config.<field>=<value>.")
  cells = []
  for seed in map(int, seeds):
    for row in table.ROWS:
      if rows and row not in (*rows, table.BASE):
        continue
      argument = f"{table.__file__}:row={row},scale={scale},seed={seed}{',smoke' * smoke}"
      config = _parse(argument, overrides)
      folder = pathlib.Path(workdir).absolute() / row / f"seed{seed}"
      cells.append(Cell(row, seed, argument, tuple(overrides), config, folder))
      cells[-1].check()
  return cells


def run(cells: Sequence[Cell], names: Sequence[str], num_workers: int = 1) -> list[Cell]:
  """Runs the cells that are not finished, several at a time.

  Args:
    cells: The cells.
    names: Metrics that a finished cell has.
    num_workers: Processes at a time.

  Returns:
    Those that failed.

  Raises:
    ValueError: several workers would share an accelerator.
  """
  waiting = [cell for cell in cells if cell.values(names) is None]
  if not waiting:
    return []
  environment = _environment()
  if num_workers > 1 and environment["platform"] != "cpu":
    raise ValueError(
      f"--num_workers={num_workers} would share {environment['device']!r}; "
      "on an accelerator it is 1."
    )
  num_threads = max((os.cpu_count() or 1) // num_workers, 1) if num_workers > 1 else None
  running: dict[Cell, subprocess.Popen] = {}
  failed = []
  steps = {cell: cell.step() for cell in cells}
  total = sum(cell.config.train_steps for cell in cells)
  with _terminating(running), tqdm.tqdm(total=total, unit="step", disable=None) as bar:
    while waiting or running:
      while waiting and len(running) < num_workers:
        cell = waiting.pop(0)
        running[cell] = _start(cell, environment, num_threads)
      time.sleep(0.5)
      for cell, process in [x for x in running.items() if x[1].poll() is not None]:
        del running[cell]
        values = cell.values(names) if process.returncode == 0 else None
        if values is None:
          failed.append(cell)
          _say(f"{cell.name} FAILED with exit code {process.returncode}: {_tail(cell)}")
        else:
          shown = "  ".join(f"{name} {x:.4g}" for name, x in values.items())
          left = len(waiting) + len(running)
          _say(f"{cell.name}: {shown}  ({cell.seconds():.0f} s; {left} cells left)")
        steps[cell] = cell.step()
      steps |= {cell: cell.step() for cell in running}
      bar.n = sum(steps.values())
      bar.set_postfix_str(" ".join(cell.name for cell in running), refresh=True)
  return failed


def collect(
  table: types.ModuleType, cells: Sequence[Cell], *, scale: str, command: str
) -> tuple[str, dict[str, Any], dict[str, tables.Comparison]]:
  """Makes the table from the cells that are finished.

  Returns:
    Its Markdown, what goes into its JSON, and the comparisons by row.

  Raises:
    ValueError: no cell of the base row is finished.
  """
  names = _names(table)
  found = {cell: values for cell in cells if (values := cell.values(names)) is not None}
  rows = list(dict.fromkeys(cell.row for cell in cells))
  ours = {
    name: {row: {c.seed: v[name] for c, v in found.items() if c.row == row} for row in rows}
    for name in names
  }
  if not ours[names[0]][table.BASE]:
    raise ValueError(
      f"no seed of {table.BASE!r}, the row that others are compared with, is finished; run it."
    )
  expected = {row: table.ROWS[row]["expected"] for row in rows}
  column = table.METRIC["paper"]
  comparisons = {
    name: tables.compare(
      {row: x.get(column) for row, x in expected.items()} if name == names[0] else {},
      ours[name],
      table.BASE,
    )
    for name in names
  }

  about = {row: table.ROWS[row]["about"] for row in rows}
  missing = [cell.name for cell in cells if cell not in found]
  num_seeds = len({cell.seed for cell in cells})
  parts = [
    f"# {table.TITLE}\n\n",
    f"Scale `{scale}`. {table.SCALES[scale]}\n\n",
    f"Ours: mean ± half of the 95 % t-interval over {num_seeds} seeds. Ratios and differences "
    f"are to `{table.BASE}`, seed by seed. Made by\n\n```\n{command}\n```\n\n",
    f"**Not finished: {', '.join(missing)}.**\n\n" if missing else "",
    tables.markdown(comparisons[names[0]], about, column, names[0]),
  ]
  if table.ALSO:
    parts += ["\n## Also measured\n\n", _also(table, {n: comparisons[n] for n in table.ALSO})]
  if others := [c for c in next(iter(expected.values())) if c != column]:
    parts += [
      "\n## In the paper only\n\n",
      tables.markdown_table(
        ("row", *others),
        (
          (f"`{row}`", *("–" if x.get(c) is None else f"{x[c]:g}" for c in others))
          for row, x in expected.items()
        ),
      ),
    ]

  data = dict(
    title=table.TITLE,
    scale=scale,
    about=table.SCALES[scale],
    base=table.BASE,
    command=command,
    metric=dict(table.METRIC),
    missing=missing,
    rows={
      row: dict(
        about=about[row],
        paper=expected[row],
        seeds={
          c.seed: values | {"seconds": c.seconds()} for c, values in found.items() if c.row == row
        },
        ours={name: dataclasses.asdict(comparisons[name][row]) for name in names},
      )
      for row in rows
    },
    **_configs(cells, table.BASE),
    environments=_environments(found),
  )
  return "".join(parts), data, comparisons[names[0]]


def save(
  directory: pathlib.Path,
  stem: str,
  text: str,
  data: Mapping[str, Any],
  comparisons: Mapping[str, tables.Comparison],
) -> list[pathlib.Path]:
  """Writes `<stem>.md`, `.json` and `.png`."""
  directory.mkdir(parents=True, exist_ok=True)
  paths = [directory / f"{stem}{suffix}" for suffix in (".md", ".json", ".png")]
  paths[0].write_text(text, "utf-8")
  paths[1].write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "utf-8")
  names = (f"paper: {data['metric']['paper']}", f"ours: {data['metric']['ours']}")
  tables.plot(paths[2], comparisons, f"{data['title']} ({data['scale']} scale)", names)
  return paths


def main(argv: list[str]) -> None:
  try:
    failed = _main(argv[1:])
  except ValueError as e:
    sys.exit(f"Error: {e}")
  if failed:
    sys.exit(
      f"Failed: {', '.join(cell.name for cell in failed)}; see log.txt of each. The same "
      "command tries them again."
    )


def _main(overrides: list[str]) -> list[Cell]:
  path = pathlib.Path(flags.FLAGS.config)
  table = load(flags.FLAGS.config)
  size = f"{flags.FLAGS.scale}_smoke" if flags.FLAGS.smoke else flags.FLAGS.scale
  paper = path.absolute().parent.name
  workdir = pathlib.Path(flags.FLAGS.workdir or f"runs/{paper}_{path.stem}_{size}")
  cells = make_cells(
    table,
    workdir,
    scale=flags.FLAGS.scale,
    seeds=flags.FLAGS.seeds,
    rows=flags.FLAGS.rows,
    smoke=flags.FLAGS.smoke,
    overrides=overrides,
  )
  failed = [] if flags.FLAGS.collect_only else run(cells, _names(table), flags.FLAGS.num_workers)
  # What a smoke run measures is no result.
  output = flags.FLAGS.output or (workdir if flags.FLAGS.smoke else "experiments/results")
  stem = path.stem if flags.FLAGS.scale == "small" else f"{path.stem}_{flags.FLAGS.scale}"
  command = f"python -m experiments.tables {shlex.join(_shown_flags(overrides))}"
  text, data, comparisons = collect(table, cells, scale=flags.FLAGS.scale, command=command)
  print(text)
  print(*save(pathlib.Path(output) / paper, stem, text, data, comparisons))
  return failed


def _shown_flags(overrides: Sequence[str]) -> list[str]:
  """The flags that decide what the table holds."""
  shown = [
    f"--config={flags.FLAGS.config}",
    f"--scale={flags.FLAGS.scale}",
    f"--seeds={','.join(flags.FLAGS.seeds)}",
  ]
  if flags.FLAGS.rows:
    shown.append(f"--rows={','.join(flags.FLAGS.rows)}")
  return shown + flags.FLAGS.smoke * ["--smoke"] + (["--", *overrides] if overrides else [])


def _names(table: types.ModuleType) -> list[str]:
  return [table.METRIC["ours"], *table.ALSO]


def _also(
  table: types.ModuleType, comparisons: Mapping[str, Mapping[str, tables.Comparison]]
) -> str:
  header = ["row", *(f"{name}{what}" for name in comparisons for what in ("", ", ratio"))]
  text = lambda x: "–" if x is None else x.text()
  rows = next(iter(comparisons.values()))
  return tables.markdown_table(
    header,
    (
      [f"`{row}`", *(text(x) for c in comparisons.values() for x in (c[row].ours, c[row].ratio))]
      for row in rows
    ),
  )


def _configs(cells: Sequence[Cell], base: str) -> dict[str, Any]:
  """The base row's config, and what each other row changes of it, at the first seed."""
  first = {cell.row: cell.config for cell in reversed(cells)}
  whole = json.loads(first.pop(base).to_json())
  changes = {
    row: {
      k: v
      for k, v in _flat(json.loads(config.to_json())).items()
      if _flat(whole).get(k, ...) != v and not k.startswith("expected.")
    }
    for row, config in first.items()
  }
  return {"config": whole, "config_changes": dict(reversed(changes.items()))}


def _environments(cells: Sequence[Cell]) -> list[dict[str, Any]]:
  """Where cells were run, each place once."""
  places: dict[str, list[str]] = {}
  for cell in cells:
    path = cell.workdir / "environment.json"
    places.setdefault(path.read_text() if path.exists() else "{}", []).append(cell.name)
  return [json.loads(text) | {"cells": names} for text, names in places.items()]


def _environment() -> dict[str, Any]:
  """Versions, device and commit that the cells will run on."""
  probe = subprocess.run([sys.executable, "-c", _ENVIRONMENT], capture_output=True, text=True)
  if probe.returncode:
    raise ValueError(f"jax does not start here: {probe.stderr.strip().splitlines()[-1]}")
  return json.loads(probe.stdout) | {"commit": _commit()}


def _commit() -> str | None:
  """The checkout's commit, marked where files differ from it; `None` outside of one."""
  git = lambda *args: subprocess.run(
    ["git", *args], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True
  )
  try:
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
  except FileNotFoundError:
    return None
  if commit.returncode:
    return None
  return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _parse(argument: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  """The config that the trainer makes of these flags."""
  argv = ["tables", f"--config={argument}", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"{shlex.join(argv[1:])}: {e}") from e
  return values["config"].value


def _start(cell: Cell, environment: Mapping[str, Any], num_threads: int | None) -> subprocess.Popen:
  cell.workdir.mkdir(parents=True, exist_ok=True)
  (cell.workdir / "environment.json").write_text(json.dumps(environment) + "\n")
  env = dict(os.environ)
  if num_threads:
    # NPROC is the size of XLA's thread pools on a CPU.
    env |= {name: str(num_threads) for name in ("NPROC", "OMP_NUM_THREADS")}
    if num_threads == 1:
      env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
  command = [
    sys.executable,
    "-m",
    "experiments.train",
    f"--config={cell.argument}",
    f"--workdir={cell.workdir}",
    *cell.overrides,
  ]
  with (cell.workdir / "log.txt").open("a") as log:
    # A group of its own: Ctrl-C reaches this process alone, which then lets the cell save.
    return subprocess.Popen(
      command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


@contextlib.contextmanager
def _terminating(running: Mapping[Any, subprocess.Popen]) -> Iterator[None]:
  """Lets running cells save and leave when this process is told to stop, or fails."""
  stop = lambda number, _: sys.exit(128 + number)
  previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
  try:
    yield
  finally:
    for process in running.values():
      process.terminate()
    for process in running.values():
      process.wait()
    for s, handler in previous.items():
      signal.signal(s, handler)


def _tail(cell: Cell) -> str:
  lines = (cell.workdir / "log.txt").read_text(errors="replace").strip().splitlines()
  errors = [line for line in lines if "Error" in line]
  return " ".join((errors or lines)[-1:]) or "it said nothing"


def _say(text: str) -> None:
  tqdm.tqdm.write(text, file=sys.stderr)


def _flat(x: Any, path: str = "") -> dict[str, Any]:
  """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
  if not isinstance(x, dict):
    return {path: x}
  return {
    k: v for name, y in x.items() for k, v in _flat(y, f"{path}.{name}" if path else name).items()
  }


def _define_flags() -> None:
  """Not on import: others import what is in here, and have a `--config` of their own."""
  flags.DEFINE_string("config", None, "Config file of a table.", required=True)
  flags.DEFINE_string("scale", "small", "A name of the config file's SCALES.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each row.")
  flags.DEFINE_list("rows", [], "Rows to run, beside the base row; all of them if empty.")
  flags.DEFINE_bool("smoke", False, "Runs of seconds; results stay in the workdir.")
  flags.DEFINE_string("workdir", None, "Folder of the runs; runs/<paper>_<stem>_<scale>.")
  flags.DEFINE_string("output", None, "Folder of the results; experiments/results.")
  flags.DEFINE_bool("collect_only", False, "Run nothing; use what is finished.")
  flags.DEFINE_integer(
    "num_workers",
    1,
    "Cells that run at a time, each with its share of the CPU's cores.",
    lower_bound=1,
  )


if __name__ == "__main__":
  _define_flags()
  app.run(main)
