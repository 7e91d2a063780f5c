"""Cells of tables: runs of the trainer at seeds, each in a process and a folder of its own."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import tqdm
from absl import flags
from flax import traverse_util
from ml_collections import config_flags

from latentlab.train import metrics

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
  """A run at a seed.

  Attributes:
    run: What is trained.
    seed: The seed.
    metrics: Those that a finished run has.
    argument: Value of the trainer's `--config`.
    overrides: Further flags of the trainer.
    config: What these give, but for the place of the run that it goes on from.
    workdir: Folder of the run.
  """

  run: str
  seed: int
  metrics: tuple[str, ...]
  argument: str
  overrides: tuple[str, ...]
  config: ml_collections.ConfigDict
  workdir: pathlib.Path

  @property
  def name(self) -> str:
    return f"{self.run}/seed{self.seed}"

  def lines(self) -> list[dict[str, Any]]:
    return metrics.read_metrics(self.workdir / "metrics.jsonl")

  def step(self) -> int:
    lines = self.lines()
    return lines[-1]["step"] if lines else 0

  def values(self) -> dict[str, float] | None:
    """The metrics after the last step, once the run is finished and they are finite."""
    # The trainer draws its curves last, when the checkpoint of the last step is safe.
    if not (self.workdir / "plots/loss.png").exists() or self.step() != self.config.train_steps:
      return None
    last = self.lines()[-1]
    found = {name: last.get(f"eval/{name}") for name in self.metrics}
    return None if None in found.values() else found

  def seconds(self) -> float:
    """Time in training steps, compilation included, over all processes that ran the cell."""
    total, previous = 0.0, 0
    for line in self.lines():
      total += line.get("perf/compile_sec", 0.0)
      total += (line["step"] - previous) * line.get("perf/step_sec", 0.0)
      if "train/loss" in line:
        previous = line["step"]
    return total

  def check(self) -> None:
    """Raises `ValueError` where a metric has no evaluation, or the workdir is another config's."""
    for name in self.metrics:
      if name.partition("/")[0] not in self.config.evals:
        raise ValueError(
          f"{self.argument} has no evaluation for the metric {name!r}; its config.evals are "
          f"{sorted(self.config.evals)}."
        )
    path = self.workdir / "config.json"
    if not path.exists():
      return
    old, new = (settings(json.loads(x)) for x in (path.read_text(), self.config.to_json()))
    if changed := [
      f"{k}: {old.get(k)!r} there, {new.get(k)!r} asked for"
      for k in sorted(old.keys() | new.keys())
      if old.get(k) != new.get(k)
    ]:
      raise ValueError(
        f"{str(self.workdir)!r} holds a run of another config ({'; '.join(changed)})"
        "; choose another --workdir, or delete it."
      )


def run(cells: Sequence[Cell], num_workers: int = 1) -> list[Cell]:
  """Runs the cells that are not finished, several at a time.

  Args:
    cells: The cells.
    num_workers: Processes at a time.

  Returns:
    Those that failed.

  Raises:
    ValueError: several workers would share an accelerator.
  """
  waiting = [cell for cell in cells if cell.values() is None]
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
        values = cell.values() if process.returncode == 0 else None
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


def parse(argument: str, overrides: Sequence[str]) -> ml_collections.ConfigDict:
  """The config that the trainer makes of a `--config` and further flags."""
  argv = ["tables", f"--config={argument}", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"{shlex.join(argv[1:])}: {e}") from e
  return values["config"].value


def environments(cells: Sequence[Cell]) -> list[dict[str, Any]]:
  """Where cells were run, each place once."""
  places: dict[str, list[str]] = {}
  for cell in cells:
    path = cell.workdir / "environment.json"
    places.setdefault(path.read_text() if path.exists() else "{}", []).append(cell.name)
  return [json.loads(text) | {"cells": names} for text, names in places.items()]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
  """What decides a run, `{"a": {"b": 1}}` as `{"a.b": 1}`.

  What a paper expects of it does not, nor where a run lies that it goes on from: of that, the name
  and the seed do.
  """
  decisive = {name: x for name, x in config.items() if name != "expected"}
  decisive["init_from"] = "/".join(pathlib.Path(config.get("init_from", "")).parts[-2:])
  return traverse_util.flatten_dict(decisive, sep=".")


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
