"""The tables binary: statistics, collecting, and cells that finish, resume and fail."""

import json
import math
import os
import pathlib
import types

import forked_binaries
import ml_collections
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import cells as cells_lib
from experiments import tables as binary
from latentlab.eval import tables

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "experiments/configs/retnet/table6_ablations.py"
NAMES = ["validation/perplexity", "validation_4x/perplexity"]
COLUMNS = ["In-domain", "windows four times as long"]


@pytest.fixture(scope="module")
def table():
  return binary.load(str(CONFIG))


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
  """Flags that train on a small text for two steps."""
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text("The quick brown fox jumps over the lazy dog while nobody sees. " * 200)
  return (
    f"--config.data.path={path}",
    f"--config.data.cache_dir={path.parent}",
    "--config.train_steps=2",
  )


def _finish(cell, *values):
  """Leaves behind what a finished run does."""
  (cell.workdir / "plots").mkdir(parents=True)
  (cell.workdir / "plots/loss.png").touch()
  (cell.workdir / "config.json").write_text(cell.config.to_json())
  steps = cell.config.train_steps
  lines = [
    {"step": 1, "train/loss": 5.0, "perf/compile_sec": 3.0},
    {
      "step": steps,
      "train/loss": 4.0,
      "perf/step_sec": 0.1,
      **{f"eval/{name}": x for name, x in zip(NAMES, values, strict=True)},
    },
  ]
  (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_an_estimate_is_a_t_interval():
  x = [8.1, 8.4, 8.3]
  got = tables.Estimate.of(x)
  assert got.mean == pytest.approx(np.mean(x)) and got.num_seeds == 3
  assert got.half_width == pytest.approx(4.302653 * np.std(x, ddof=1) / math.sqrt(3), rel=1e-6)
  assert got.text("+") == "+8.267 ± 0.379"
  assert tables.Estimate(1e300, 2e5, 3).text() == "1e+300 ± 2e+05"
  assert tables.Estimate.of([2.0]) == tables.Estimate(2.0, None, 1)
  assert tables.Estimate.of([]) is None


def test_differences_are_paired_over_the_seeds_that_both_have():
  base = {0: 10.0, 1: 20.0, 2: 30.0}  # Seeds differ by far more than rows do.
  ours = {
    "base": base,
    "worse": {0: 11.0, 1: 21.1, 2: 30.9},
    "better": {0: 9.0, 2: 29.1},
    "same": {0: 10.1, 1: 19.9, 2: 30.0},
    "once": {1: 25.0},
    "new": {0: 12.0, 1: 22.1},
    "never": {},
  }
  paper = {"base": 5.0, "worse": 6.0, "better": 6.0, "same": 6.0, "once": 6.0, "new": None}
  got = tables.compare(paper, ours, dict.fromkeys(ours, "base"))
  assert [c.verdict for c in got.values()] == [
    "",
    "reproduces",
    "opposite",
    "undecided",
    "undecided",
    "",
    "",
  ]
  assert got["worse"].difference.mean == pytest.approx(1.0)
  assert got["worse"].difference.half_width == pytest.approx(4.302653 * 0.1 / math.sqrt(3))
  assert got["better"].ratio.mean == pytest.approx((0.9 + 0.97) / 2)
  assert got["better"].ratio.num_seeds == 2
  assert got["worse"].paper_ratio == pytest.approx(1.2)
  assert got["base"].paper_ratio is got["base"].ratio is got["never"].ours is None
  text = tables.verdicts(got)
  assert text.startswith("1 of 4 directions reproduce") and "opposite: `better`" in text


def test_a_run_goes_on_from_its_own_workdir(tmp_path):
  """What lies elsewhere is another's; where a workdir lies decides nothing."""
  table = binary.load(str(ROOT / "experiments/configs/yoco/extension.py"))
  make = lambda workdir, *flags: {
    cell.run: cell
    for cell in binary.make_cells(table, workdir, scale="small", seeds=["1"], overrides=flags)
  }
  goes_on = lambda cell: [f for f in cell.overrides if f.startswith("--config.init_from=")]
  before, run = "yoco_swa_160m/seed1", "yoco_swa_longer"
  home = make("runs/yoco_runs_small")
  assert home[run].config.init_from == f"runs/yoco_runs_small/{before}" and not goes_on(home[run])
  moved = make(tmp_path)
  assert goes_on(moved[run]) == [f"--config.init_from={tmp_path / before}"]
  assert not goes_on(moved["yoco_swa_160m"])
  assert moved["yoco_swa_160m"].workdir == tmp_path / before
  elsewhere = make(tmp_path, "--config.init_from=other/run/seed1")
  assert goes_on(elsewhere[run]) == ["--config.init_from=other/run/seed1"]
  moved[run].workdir.mkdir(parents=True)
  trained = cells_lib.parse(moved[run].argument, moved[run].overrides)
  (moved[run].workdir / "config.json").write_text(trained.to_json())
  moved[run].check()
  with pytest.raises(ValueError, match="init_from: 'yoco_swa_160m/seed1' there, 'run/seed1' asked"):
    elsewhere[run].check()


def test_rows_have_base_rows_of_their_own():
  ours = {"a": {0: 1.0, 1: 2.0}, "b": {0: 4.0, 1: 8.0}, "c": {0: 2.0, 1: 4.0}, "d": {0: -1.0}}
  paper = {"a": 1.0, "b": 1.0, "c": 3.0}
  got = tables.compare(paper, ours, {"a": "a", "b": "a", "c": "b", "d": "d"})
  assert got["a"].ratio is got["a"].difference is got["d"].ratio is None
  assert got["b"].ratio.mean == 4.0 and got["c"].ratio.mean == 0.5
  assert got["b"].verdict == "" and got["b"].paper_ratio == 1.0  # The paper has no direction.
  assert got["c"].paper_ratio == 3.0 and got["c"].verdict == "undecided"
  # A ratio to what is not positive says nothing; a difference does.
  assert tables.compare({}, {"x": {0: 1.0}, "d": ours["d"]}, {"x": "d", "d": "d"})[
    "x"
  ] == tables.Comparison(
    None, None, tables.Estimate(1.0, None, 1), None, tables.Estimate(2.0, None, 1), ""
  )


def _module(**changes):
  """A table's config file: two lengths, three rows of two runs."""
  module = types.ModuleType("table")
  fields = dict(
    __file__="configs/paper/table.py",
    TITLE="Lengths",
    BASE="a",
    METRICS={"1024": "x1/perplexity", "2048": "x2/perplexity"},
    SCALES={"small": "A small one."},
    ROWS={
      "a": dict(about="first", expected={"1024": 10.0, "2048": 9.0, "4096": 8.0}),
      "b": dict(about="second", expected={"1024": 11.0, "2048": 100.0}),
      "b_blocks": dict(
        about="second, in blocks",
        expected={"2048": 12.0},
        run="b",
        metrics={"1024": None, "2048": "x2_blocks/perplexity"},
        base="b",
      ),
    },
    AXIS=dict(name="length", values={"2048": 2.0, "1024": 1.0}, log=True),
    get_config=lambda arg: None,
  )
  vars(module).update(fields | changes)
  return module


def _cell(tmp_path, run, seed, values):
  """A cell that is finished, but for its files."""
  workdir = tmp_path / run / f"seed{seed}"
  config = ml_collections.ConfigDict(dict(train_steps=1, evals={}, run=run))
  cell = cells_lib.Cell(run, seed, tuple(values), "", (), config, workdir)
  object.__setattr__(cell, "values", lambda: values)
  object.__setattr__(cell, "seconds", lambda: 1.0)
  return cell


def test_rows_that_share_a_run_differ_in_what_is_measured(tmp_path):
  table = binary.describe(_module())
  assert table.rows["b_blocks"].metrics == {"2048": "x2_blocks/perplexity"}
  cells = []
  for seed, noise in enumerate((0.0, 0.1, 0.05)):
    cells.append(
      _cell(tmp_path, "a", seed, {"x1/perplexity": 5 + noise, "x2/perplexity": 4 + noise})
    )
    b = {"x1/perplexity": 6.0 + noise, "x2/perplexity": 60 + noise, "x2_blocks/perplexity": 5.5}
    cells.append(_cell(tmp_path, "b", seed, b))
  text, data, columns = binary.collect(table, cells, scale="small", command="made so")
  assert list(columns) == ["1024", "2048"]
  assert columns["1024"]["b_blocks"].ours is None
  assert columns["2048"]["b_blocks"].ratio.mean == pytest.approx(5.5 / 60, rel=1e-2)
  assert columns["2048"]["b_blocks"].paper_ratio == 0.12
  assert columns["2048"]["b_blocks"].verdict == columns["2048"]["b"].verdict == "reproduces"
  lines = text.splitlines()
  assert "| row | 1024: paper | ours | 2048: paper | ours |" in lines
  assert "| `b_blocks`: second, in blocks | – | – | 12 | 5.500 ± 0.000 |" in lines
  assert "are to `a`, of `b_blocks` to `b`, seed by seed" in text
  assert "`b_blocks` is not measured in 1024, `x2_blocks/perplexity` in 2048" in text
  assert "| row | 4096 |" in lines and "| `a` | 8 |" in lines  # In the paper only.
  assert data["rows"]["b_blocks"]["seeds"][0] == {"x2_blocks/perplexity": 5.5, "seconds": 1.0}
  assert data["config_changes"] == {"b": {"run": "b"}}
  paths = binary.save(tmp_path / "results", "table", text, data, columns, table.axis)
  assert paths[2].read_bytes().startswith(b"\x89PNG")


def _drawn(monkeypatch, tmp_path, columns, axis):
  """The panels of a picture."""
  figures = []
  save = Figure.savefig
  monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
  tables.plot(tmp_path / "x.png", columns, "title", axis)
  return figures[0].axes


def _comparisons(**rows):
  ours = {row: {0: x, 1: x + 0.1} for row, (_, x) in rows.items()}
  paper = {row: p for row, (p, _) in rows.items()}
  return tables.compare(paper, ours, dict.fromkeys(rows, "a"))


def test_draws_lines_over_an_axis_and_ratios_without(monkeypatch, tmp_path):
  columns = {
    "4": _comparisons(a=(20.0, 3.0), b=(10.0, 4.0)),
    "1": _comparisons(a=(30.0, 5.0), b=(None, 6.0)),
    "mean": _comparisons(a=(None, 1.0), b=(None, 1.0)),
  }
  axis = tables.Axis("length", {"4": 4.0, "1": 1.0}, log=True, log_figures=True)
  paper, ours = _drawn(monkeypatch, tmp_path, columns, axis)
  points = lambda axes: [c.lines[0].get_xydata().tolist() for c in axes.containers]
  assert points(paper) == [[[1, 30], [4, 20]], [[4, 10]]]
  assert np.allclose(points(ours), [[[1, 5.05], [4, 3.05]], [[1, 6.05], [4, 4.05]]])
  assert (ours.get_xscale(), ours.get_yscale(), ours.get_xlabel()) == ("log", "log", "length")
  panels = _drawn(monkeypatch, tmp_path, columns, None)
  assert [axes.get_title() for axes in panels] == ["4", "1", "mean"]
  assert [len(axes.containers) for axes in panels] == [2, 1, 1]
  assert points(panels[0])[0] == [[0.5, -0.12]]  # The paper's b over its a.


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(BASE="c"), r"the base rows \['c'\] are none of ROWS"),
    (dict(METRICS={"1024": "perplexity"}, ROWS={}), r"the base rows \['a'\]"),
    (dict(METRICS={"1024": "x", "2048": "y"}), "metrics .* are not of the form"),
    (dict(METRICS={"1024": "x1/perplexity"}), r"row 'b_blocks' has metrics of \['2048'\]"),
    (dict(ROWS={"a": dict(about="")}), r"row 'a' has no \['expected'\]"),
    (dict(AXIS=dict(values={})), "AXIS does not have the fields of an axis .*'name'"),
    (dict(AXIS=dict(name="", values={"4096": 3.0})), r"columns of AXIS, \['4096'\]"),
  ],
  ids=str,
)
def test_tables_that_contradict_themselves(changes, message):
  with pytest.raises(ValueError, match=message):
    binary.describe(_module(**changes))


def test_collects_what_is_finished(table, tmp_path):
  cells = binary.make_cells(
    table,
    tmp_path / "runs",
    scale="small",
    seeds=["0", "1"],
    smoke=True,
    rows=["no_gate", "no_decay"],
  )
  assert [c.name for c in cells] == [
    f"{row}/seed{k}" for k in (0, 1) for row in ("retnet", "no_gate", "no_decay")
  ]
  for cell, x in zip(cells[:5], (8.0, 9.0, 10.0, 8.2, 9.3), strict=True):
    _finish(cell, x, x + 1)
  (cells[0].workdir / "environment.json").write_text('{"jax": "0.0"}')
  rows = ["no_gate", "no_decay"]
  text, data, columns = binary.collect(table, cells, scale="small", command="made so", rows=rows)
  assert "Not finished: no_decay/seed1" in text and data["missing"] == ["no_decay/seed1"]
  assert "| `no_gate`: no swish gate" in text and "made so" in text and "| 49.44 |" in text
  gate = data["rows"]["no_gate"]
  assert gate["paper"]["In-domain"] == 27.84
  assert gate["seeds"][1] == {NAMES[0]: 9.3, NAMES[1]: 10.3, "seconds": pytest.approx(3.7)}
  assert gate["ours"][COLUMNS[0]]["ratio"]["mean"] == pytest.approx((9 / 8 + 9.3 / 8.2) / 2)
  assert gate["ours"][COLUMNS[1]]["paper"] is None
  assert data["config"]["model"]["name"] == "retnet"
  assert data["config_changes"]["no_decay"] == {"model.decay": "one"}
  assert [e["cells"] for e in data["environments"]][0] == ["retnet/seed0"]
  paths = binary.save(tmp_path / "results", "table6", text, data, columns)
  assert [p.name for p in paths] == ["table6.md", "table6.json", "table6.png"]
  assert json.loads(paths[1].read_text())["rows"].keys() == {"retnet", "no_gate", "no_decay"}
  assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_does_not_mix_configs(table, tmp_path):
  make = lambda **kw: binary.make_cells(table, tmp_path, scale="small", seeds=["0"], **kw)
  _finish(make(smoke=True)[0], 8.0, 9.0)
  make(smoke=True)
  with pytest.raises(ValueError, match=r"another config \(.*train_steps: 8 there, 1200 asked for"):
    make()


def test_a_metric_needs_an_evaluation(tmp_path):
  path = tmp_path / "table.py"
  path.write_text(
    "from experiments.configs.retnet.table6_ablations import *\n"
    "METRICS = {'In-domain': 'validation_8x/perplexity'}\n"
  )
  with pytest.raises(ValueError, match="no evaluation for the metric 'validation_8x/perplexity'"):
    binary.make_cells(binary.load(str(path)), tmp_path, scale="small", seeds=["0"])


def test_what_a_paper_expects_decides_no_run(table, tmp_path):
  make = lambda: binary.make_cells(table, tmp_path, scale="small", seeds=["0"], smoke=True)
  cell = make()[0]
  _finish(cell, 8.0, 9.0)
  path = cell.workdir / "config.json"
  written = json.loads(path.read_text())
  path.write_text(json.dumps(written | {"expected": {"validation/perplexity": 3.0}}))
  make()
  path.write_text(json.dumps(written | {"seed": 1}))
  with pytest.raises(ValueError, match=r"another config \(seed: 1 there, 0 asked for\)"):
    make()


def test_tables_of_one_name_share_their_runs():
  assert binary.describe(_module()).runs == "table"
  assert binary.describe(_module(RUNS="lengths")).runs == "lengths"


def test_rows_come_with_those_that_they_are_compared_with():
  rows = _module().ROWS
  rows["c"] = dict(about="", expected={}, base="b_blocks")
  table = binary.describe(_module(ROWS=rows))
  assert list(table.select(["c"])) == list(table.select()) == ["a", "b", "b_blocks", "c"]
  assert list(table.select(["b"])) == ["a", "b"]


def test_needs_the_base_row(table, tmp_path):
  cells = binary.make_cells(table, tmp_path, scale="small", seeds=["0"], smoke=True)
  _finish(cells[1], 8.0, 9.0)
  with pytest.raises(ValueError, match="no seed of 'retnet'"):
    binary.collect(table, cells, scale="small", command="")


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(scale="big"), r"--scale='big'; choose one of \['paper', 'small'\]"),
    (dict(rows=["gate"]), r"--rows=gate; choose among \['retnet', 'no_gate'"),
    (dict(seeds=["a"]), "--seeds=a must be different numbers"),
    (dict(seeds=["1", "01"]), "--seeds=1,01 must be different"),
    (dict(overrides=["--seed=1"]), r"behind -- stand --config"),
    (dict(overrides=["--config.train_stepz=1"]), "train_stepz"),
    (dict(overrides=["--config.train_steps=x"]), "train_steps=x"),
  ],
  ids=str,
)
def test_unknown_choices(table, tmp_path, fields, message):
  with pytest.raises(ValueError, match=message):
    binary.make_cells(table, tmp_path, **(dict(scale="small", seeds=["0"]) | fields))


def test_no_table():
  with pytest.raises(ValueError, match=r"no table's config file: it has no \['TITLE'"):
    binary.load(str(ROOT / "experiments/configs/quickstart.py"))
  with pytest.raises(ValueError, match="is no file"):
    binary.load(f"{CONFIG}:row=retnet")


@pytest.mark.slow
def test_runs_what_is_missing_and_goes_on_after_a_failure(
  table, tmp_path, overrides, monkeypatch, cpu_flags
):
  """Four cells, two at a time: two are finished, one trains, one fails."""
  make = lambda: binary.make_cells(
    table,
    tmp_path / "runs",
    scale="small",
    seeds=["0", "1"],
    rows=["no_gate"],
    smoke=True,
    overrides=overrides,
  )
  cells = make()
  _finish(cells[0], 8.0, 9.0)
  _finish(cells[2], 8.2, 9.3)
  cells[1].workdir.mkdir(parents=True)
  (cells[1].workdir / "checkpoints").write_text("in the way")
  arguments = [
    f"--config={CONFIG}",
    "--seeds=0,1",
    "--rows=no_gate",
    "--smoke",
    f"--workdir={tmp_path / 'runs'}",
    f"--output={tmp_path / 'results'}",
    "--num_workers=2",
  ]
  monkeypatch.setenv("XLA_FLAGS", cpu_flags(1))
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
  call = lambda *flags: forked_binaries.run("tables", *arguments, *flags, "--", *overrides)

  code, printed, errors = call()
  assert code == 1 and "Failed: no_gate/seed0" in errors, errors
  assert "no_gate/seed0 FAILED with exit code 1" in errors
  assert "no_gate/seed1: validation/perplexity" in errors
  assert "Not finished: no_gate/seed0" in printed and "`no_gate`: no swish gate" in printed
  folder = tmp_path / "results/retnet"
  assert sorted(p.suffix for p in folder.glob("table6_ablations.*")) == [".json", ".md", ".png"]
  data = json.loads((folder / "table6_ablations.json").read_text())
  assert data["rows"]["no_gate"]["seeds"].keys() == {"1"}
  environments = {e["cells"][0]: e for e in data["environments"]}
  assert environments["no_gate/seed1"]["device"] and environments["no_gate/seed1"]["jax"]

  trained = (make()[3].workdir / "metrics.jsonl").read_text()
  code, again, errors = call("--collect_only")
  assert code == 0 and again == printed, errors
  assert (make()[3].workdir / "metrics.jsonl").read_text() == trained
