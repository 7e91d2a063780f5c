"""The tables binary: statistics, collecting, and cells that finish, resume and fail."""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import tables as binary
from latentlab.eval import tables

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "experiments/configs/retnet/table6_ablations.py"
NAMES = ["validation/perplexity", "validation_4x/perplexity"]


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
  speed = cell.config.batch_size * cell.config.data.seq_length * 10.0  # Ten steps a second.
  lines = [
    {"step": 1, "train/loss": 5.0, "perf/compile_sec": 3.0},
    {
      "step": steps,
      "train/loss": 4.0,
      "perf/tokens_per_sec": speed,
      **{f"eval/{name}": x for name, x in zip(NAMES, values, strict=True)},
    },
  ]
  (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_an_estimate_is_a_t_interval():
  x = [8.1, 8.4, 8.3]
  got = tables.Estimate.of(x)
  assert got.mean == pytest.approx(np.mean(x)) and got.num_seeds == 3
  assert got.half_width == pytest.approx(4.302653 * np.std(x, ddof=1) / math.sqrt(3), rel=1e-6)
  assert got.text("+.2f") == "+8.27 ± 0.38"
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
  got = tables.compare(paper, ours, "base")
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
  text, data, comparisons = binary.collect(table, cells, scale="small", command="made so")
  assert "Not finished: no_decay/seed1" in text and data["missing"] == ["no_decay/seed1"]
  assert "| `no_gate`: no swish gate" in text and "made so" in text and "| 49.44 |" in text
  gate = data["rows"]["no_gate"]
  assert gate["paper"]["In-domain"] == 27.84
  assert gate["seeds"][1] == {NAMES[0]: 9.3, NAMES[1]: 10.3, "seconds": pytest.approx(3.7)}
  assert gate["ours"][NAMES[0]]["ratio"]["mean"] == pytest.approx((9 / 8 + 9.3 / 8.2) / 2)
  assert gate["ours"][NAMES[1]]["paper"] is None
  assert data["config"]["model"]["name"] == "retnet"
  assert data["config_changes"]["no_decay"] == {"model.decay": "one"}
  assert [e["cells"] for e in data["environments"]][0] == ["retnet/seed0"]
  paths = binary.save(tmp_path / "results", "table6", text, data, comparisons)
  assert [p.name for p in paths] == ["table6.md", "table6.json", "table6.png"]
  assert json.loads(paths[1].read_text())["rows"].keys() == {"retnet", "no_gate", "no_decay"}
  assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_does_not_mix_configs(table, tmp_path):
  make = lambda **kw: binary.make_cells(table, tmp_path, scale="small", seeds=["0"], **kw)
  _finish(make(smoke=True)[0], 8.0, 9.0)
  make(smoke=True)
  with pytest.raises(ValueError, match=r"another config \(.*train_steps: 8 there, 1200 asked for"):
    make()


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
    (dict(seeds=["1", "1"]), "--seeds=1,1 must be different"),
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
def test_runs_what_is_missing_and_goes_on_after_a_failure(table, tmp_path, overrides):
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
  command = [
    sys.executable,
    "-m",
    "experiments.tables",
    f"--config={CONFIG}",
    "--seeds=0,1",
    "--rows=no_gate",
    "--smoke",
    f"--workdir={tmp_path / 'runs'}",
    f"--output={tmp_path / 'results'}",
    "--num_workers=2",
  ]
  env = {
    **os.environ,
    "XLA_FLAGS": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
  }
  call = lambda *flags: subprocess.run(
    [*command, *flags, "--", *overrides], env=env, capture_output=True, text=True
  )

  ran = call()
  assert ran.returncode == 1 and "Failed: no_gate/seed0" in ran.stderr, ran.stderr
  assert "no_gate/seed0 FAILED with exit code 1" in ran.stderr
  assert "no_gate/seed1: validation/perplexity" in ran.stderr
  assert "Not finished: no_gate/seed0" in ran.stdout and "`no_gate`: no swish gate" in ran.stdout
  folder = tmp_path / "results/retnet"
  assert sorted(p.suffix for p in folder.glob("table6_ablations.*")) == [".json", ".md", ".png"]
  data = json.loads((folder / "table6_ablations.json").read_text())
  assert data["rows"]["no_gate"]["seeds"].keys() == {"1"}
  environments = {e["cells"][0]: e for e in data["environments"]}
  assert environments["no_gate/seed1"]["device"] and environments["no_gate/seed1"]["jax"]

  trained = (make()[3].workdir / "metrics.jsonl").read_text()
  collected = call("--collect_only")
  assert collected.returncode == 0 and collected.stdout == ran.stdout, collected.stderr
  assert (make()[3].workdir / "metrics.jsonl").read_text() == trained
