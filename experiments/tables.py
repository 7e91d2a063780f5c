r"""Runs the rows and seeds of a paper's table, and sets the paper's figures beside ours.

  python -m experiments.tables --config=experiments/configs/retnet/table6_ablations.py \
      --seeds=0,1,2 --num_workers=2

Every cell is a run of `experiments.train` in `<workdir>/<run>/seed<k>`. The same command goes on
where a killed one stopped: finished cells are read, others resume. The table is printed, and saved
as `<output>/<paper>/<stem>.{md,json,png}`. What stands behind `--` goes to every cell's trainer:

  python -m experiments.tables --config=... --workdir=runs/try -- --config.data.path=my_texts/

A table's config file has, beside `get_config(arg)` with the arguments `row`, `scale`, `smoke` and
`seed`:

  TITLE    of the table
  BASE     the row that others are compared with
  METRICS  {column: <evaluation>/<metric>}, a column being one of the paper's or a name of our own
  SCALES   {name: a sentence that says what the scale is}
  ROWS     {name: dict(about=<words>, expected={<column of the paper>: figure or None}, ...)}

A row may also have `run`, the `row` that `get_config` is asked for, where rows differ in what is
evaluated and not in what is trained; `metrics`, which differ from METRICS in some columns (`None`:
not measured); and `base`, which takes the place of BASE (`None`: compared with no row). A file may
have

  AXIS     the fields of `latentlab.eval.tables.Axis`, where columns are numbers: a figure of lines
  RUNS     a name of its runs, <stem> by default; tables of one name share what they train
"""

import dataclasses
import importlib.util
import json
import pathlib
import shlex
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags

from experiments import cells as cells_lib
from experiments import runs as runs_lib
from experiments.cells import Cell
from latentlab.eval import tables

_PROTOCOL = ("TITLE", "BASE", "METRICS", "SCALES", "ROWS", "get_config")


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    about: What it is, in words.
    expected: The paper's figures by column; `None` where one is unknown.
    run: The `row` of the config file that is trained.
    metrics: Ours by column; a column that is not measured is not in here.
    base: The row that it is compared with; itself if none.
  """

  about: str
  expected: Mapping[str, float | None]
  run: str
  metrics: Mapping[str, str]
  base: str


@dataclasses.dataclass(frozen=True)
class Table:
  """What a config file says of its table.

  Attributes:
    path: The file.
    title: Of the table.
    base: The row that others are compared with.
    metrics: Ours by column.
    scales: What each scale is.
    rows: By name.
    axis: Of the figure, if it is one of lines.
    runs: Name of the folder of its runs.
    get_config: The file's.
  """

  path: pathlib.Path
  title: str
  base: str
  metrics: Mapping[str, str]
  scales: Mapping[str, str]
  rows: Mapping[str, Row]
  axis: tables.Axis | None
  runs: str
  get_config: Callable[[str], ml_collections.ConfigDict]

  @property
  def paper(self) -> str:
    return self.path.absolute().parent.name

  def select(self, names: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of these names and the rows that they are compared with; all if there are none.

    Raises:
      ValueError: there is no such row.
    """
    if unknown := [row for row in names if row not in self.rows]:
      raise ValueError(f"unknown --rows={','.join(unknown)}; choose among {list(self.rows)}.")
    wanted, found = {self.base, *(names or self.rows)}, set()
    while wanted != found:
      found, wanted = wanted, wanted | {self.rows[row].base for row in wanted}
    return {name: row for name, row in self.rows.items() if name in wanted}


def load(path: str) -> Table:
  """Reads a table's config file.

  Raises:
    ValueError: there is no such file, or it describes no table.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--config={path!r} is no file; rows and scales have flags of their own.")
  spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return describe(module)


def describe(module: types.ModuleType) -> Table:
  """What a table's config file, imported, says of it.

  Raises:
    ValueError: it describes no table, or one that contradicts itself.
  """
  path = pathlib.Path(module.__file__)
  where = f"--config={str(path)!r}"
  if missing := [name for name in _PROTOCOL if not hasattr(module, name)]:
    raise ValueError(f"{where} is no table's config file: it has no {missing}.")
  rows = {name: _row(module, name, where) for name in module.ROWS}
  if unknown := sorted({module.BASE, *(row.base for row in rows.values())} - rows.keys()):
    raise ValueError(f"{where}: the base rows {unknown} are none of ROWS, {list(rows)}.")
  axis = getattr(module, "AXIS", None)
  if axis is not None:
    try:
      axis = tables.Axis(**axis)
    except TypeError as e:
      raise ValueError(f"{where}: AXIS does not have the fields of an axis ({e}).") from e
    if not axis.values or not set(axis.values) <= set(module.METRICS):
      raise ValueError(
        f"{where}: the columns of AXIS, {list(axis.values)}, must be some of METRICS', "
        f"{list(module.METRICS)}."
      )
  return Table(
    path=path,
    title=module.TITLE,
    base=module.BASE,
    metrics=dict(module.METRICS),
    scales=module.SCALES,
    rows=rows,
    axis=axis,
    runs=getattr(module, "RUNS", path.stem),
    get_config=module.get_config,
  )


def _row(module: types.ModuleType, name: str, where: str) -> Row:
  row = module.ROWS[name]
  if lacking := [field for field in ("about", "expected") if field not in row]:
    raise ValueError(f"{where}: row {name!r} has no {lacking}.")
  changed = row.get("metrics", {})
  if unknown := sorted(set(changed) - set(module.METRICS)):
    raise ValueError(f"{where}: row {name!r} has metrics of {unknown}, which are none of METRICS.")
  found = {c: m for c, m in {**module.METRICS, **changed}.items() if m is not None}
  if bad := [m for m in found.values() if "/" not in m]:
    raise ValueError(f"{where}: the metrics {bad} are not of the form <evaluation>/<metric>.")
  base = row.get("base", module.BASE)
  return Row(
    about=row["about"],
    expected=row["expected"],
    run=row.get("run", name),
    metrics=found,
    base=name if base is None else base,
  )


def make_cells(
  table: Table,
  workdir: str | pathlib.Path,
  *,
  scale: str,
  seeds: Sequence[str],
  rows: Sequence[str] = (),
  smoke: bool = False,
  overrides: Sequence[str] = (),
) -> list[Cell]:
  """The cells of a table, seed by seed, so that whole comparisons are there early.

  A run that goes on from another of its table's folder goes on from that of `workdir`.

  Raises:
    ValueError: a scale, row, seed or override is unknown.
  """
  if scale not in table.scales:
    raise ValueError(f"unknown --scale={scale!r}; choose one of {sorted(table.scales)}.")
  selected = table.select(rows)
  numbers = {int(s) for s in seeds if s.isdecimal()}
  if not seeds or len(numbers) < len(seeds):
    raise ValueError(f"--seeds={','.join(seeds)} must be different numbers, 0,1,2 say.")
  if unknown := [flag for flag in overrides if not flag.startswith("--config.")]:
    raise ValueError(f"unknown arguments {unknown}; behind -- stand --config.<field>=<value>.")
  runs: dict[str, set[str]] = {}
  for row in selected.values():
    runs.setdefault(row.run, set()).update(row.metrics.values())
  home, workdir = runs_lib.folder(table.paper, table.runs, scale), pathlib.Path(workdir)
  cells = []
  for seed in sorted(numbers):
    for run, metrics in runs.items():
      argument = f"{table.path}:row={run},scale={scale},seed={seed}{',smoke' * smoke}"
      config = cells_lib.parse(argument, overrides)
      source = pathlib.Path(config.init_from)
      moved = workdir != home and source.is_relative_to(home)
      there = (f"--config.init_from={workdir / source.relative_to(home)}",) if moved else ()
      cell = Cell(
        run=run,
        seed=seed,
        metrics=tuple(sorted(metrics)),
        argument=argument,
        overrides=(*overrides, *there),
        config=config,
        workdir=workdir.absolute() / run / f"seed{seed}",
      )
      cell.check()
      cells.append(cell)
  return cells


def collect(
  table: Table,
  cells: Sequence[Cell],
  *,
  scale: str,
  command: str,
  rows: Sequence[str] = (),
) -> tuple[str, dict[str, Any], tables.Columns]:
  """Makes the table from the cells that are finished.

  Returns:
    Its Markdown, what goes into its JSON, and the comparisons.

  Raises:
    ValueError: no cell of the base row is finished.
  """
  found = {cell: values for cell in cells if (values := cell.values()) is not None}
  selected = table.select(rows)
  seeds = {
    name: {cell.seed: cell for cell in found if cell.run == row.run}
    for name, row in selected.items()
  }
  if not seeds[table.base]:
    raise ValueError(
      f"no seed of {table.base!r}, the row that others are compared with, is finished; run it."
    )
  columns = {
    column: tables.compare(
      {name: row.expected.get(column) for name, row in selected.items()},
      {
        name: {seed: found[cell][row.metrics[column]] for seed, cell in seeds[name].items()}
        if column in row.metrics
        else {}
        for name, row in selected.items()
      },
      {name: row.base for name, row in selected.items()},
    )
    for column in table.metrics
  }
  missing = [cell.name for cell in cells if cell not in found]
  text = _text(table, selected, columns, scale, command, missing, len({c.seed for c in found}))
  base_run = selected[table.base].run
  data = dict(
    title=table.title,
    scale=scale,
    about=table.scales[scale],
    base=table.base,
    command=command,
    metrics=dict(table.metrics),
    missing=missing,
    rows={
      name: dict(
        about=row.about,
        run=row.run,
        base=row.base,
        metrics=dict(row.metrics),
        paper=dict(row.expected),
        seeds={
          seed: {m: found[cell][m] for m in dict.fromkeys(row.metrics.values())}
          | {"seconds": cell.seconds()}
          for seed, cell in seeds[name].items()
        },
        ours={column: dataclasses.asdict(c[name]) for column, c in columns.items()},
      )
      for name, row in selected.items()
    },
    **_configs(cells, base_run),
    environments=cells_lib.environments(list(found)),
  )
  return text, data, columns


def _text(
  table: Table,
  rows: Mapping[str, Row],
  columns: tables.Columns,
  scale: str,
  command: str,
  missing: Sequence[str],
  num_seeds: int,
) -> str:
  """The table as Markdown."""
  about = {name: row.about for name, row in rows.items()}
  bases = {name: row.base for name, row in rows.items() if row.base not in (name, table.base)}
  elsewhere = "".join(f", of `{name}` to `{base}`" for name, base in bases.items())
  changed = [
    f"`{name}` is {', '.join(f'`{row.metrics.get(c)}` in {c}' for c in differing)}"
    for name, row in rows.items()
    if (differing := [c for c in table.metrics if row.metrics.get(c) != table.metrics[c]])
  ]
  parts = [
    f"# {table.title}\n\n",
    f"Scale `{scale}`. {table.scales[scale]}\n\n",
    f"Ours: mean ± half of the 95 % t-interval over {num_seeds} seeds. Ratios and differences "
    f"are to `{table.base}`{elsewhere}, seed by seed. Made by\n\n```\n{command}\n```\n\n",
    f"**Not finished: {', '.join(missing)}.**\n\n" if missing else "",
    tables.markdown(columns, about, table.metrics),
    f"\nOf ours, {'; '.join(changed)}.\n".replace("`None`", "not measured") if changed else "",
  ]
  known = dict.fromkeys(c for row in rows.values() for c in row.expected)
  if others := [c for c in known if c not in table.metrics]:
    parts += [
      "\n## In the paper only\n\n",
      tables.markdown_table(
        ("row", *others),
        (
          (f"`{name}`", *(tables.paper_figure(row.expected.get(c)) for c in others))
          for name, row in rows.items()
        ),
      ),
    ]
  return "".join(parts)


def save(
  directory: pathlib.Path,
  stem: str,
  text: str,
  data: Mapping[str, Any],
  columns: tables.Columns,
  axis: tables.Axis | None = None,
) -> list[pathlib.Path]:
  """Writes `<stem>.md`, `.json` and `.png`."""
  directory.mkdir(parents=True, exist_ok=True)
  paths = [directory / f"{stem}{suffix}" for suffix in (".md", ".json", ".png")]
  paths[0].write_text(text, "utf-8")
  paths[1].write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "utf-8")
  tables.plot(paths[2], columns, f"{data['title']} ({data['scale']} scale)", axis)
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
  table = load(flags.FLAGS.config)
  scale, rows = flags.FLAGS.scale, flags.FLAGS.rows
  size = f"{scale}_smoke" if flags.FLAGS.smoke else scale
  workdir = pathlib.Path(flags.FLAGS.workdir or runs_lib.folder(table.paper, table.runs, size))
  cells = make_cells(
    table,
    workdir,
    scale=scale,
    seeds=flags.FLAGS.seeds,
    rows=rows,
    smoke=flags.FLAGS.smoke,
    overrides=overrides,
  )
  failed = [] if flags.FLAGS.collect_only else cells_lib.run(cells, flags.FLAGS.num_workers)
  # What a smoke run measures is no result.
  output = flags.FLAGS.output or (workdir if flags.FLAGS.smoke else "experiments/results")
  stem = table.path.stem if scale == "small" else f"{table.path.stem}_{scale}"
  command = f"python -m experiments.tables {shlex.join(_shown_flags(overrides))}"
  text, data, columns = collect(table, cells, scale=scale, command=command, rows=rows)
  print(text)
  print(*save(pathlib.Path(output) / table.paper, stem, text, data, columns, table.axis))
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


def _configs(cells: Sequence[Cell], base: str) -> dict[str, Any]:
  """The base row's config, and what each other run changes of it, at the first seed."""
  first = {cell.run: cell.config for cell in reversed(cells)}
  whole = json.loads(first.pop(base).to_json())
  there = cells_lib.settings(whole)
  changes = {
    run: {
      k: v
      for k, v in cells_lib.settings(json.loads(config.to_json())).items()
      if there.get(k, ...) != v
    }
    for run, config in first.items()
  }
  return {"config": whole, "config_changes": dict(reversed(changes.items()))}


def _define_flags() -> None:
  """Not on import: others import what is in here, and have a `--config` of their own."""
  flags.DEFINE_string("config", None, "Config file of a table.", required=True)
  flags.DEFINE_string("scale", "small", "A name of the config file's SCALES.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each row.")
  flags.DEFINE_list("rows", [], "Rows to run, beside the base row; all of them if empty.")
  flags.DEFINE_bool("smoke", False, "Runs of seconds; results stay in the workdir.")
  flags.DEFINE_string("workdir", None, "Folder of the runs; runs/<paper>_<RUNS>_<scale>.")
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
