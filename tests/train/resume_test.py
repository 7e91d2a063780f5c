"""The real binary, killed and told to stop: it goes on as if nothing had happened, bit for bit."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.configs import common
from latentlab import huge_pages
from latentlab.train import checkpoint, loop, metrics

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS = 200
CONFIG = f"""
from experiments.configs import common

def get_config():
  c = common.smoke(common.language_model())
  c.data.update(source="synthetic")
  c.train_steps, c.log_steps, c.checkpoint_steps = {STEPS}, 1, 5
  c.optimizer.update(peak_lr=3e-3, ema_decay=0.9)
  c.evals.validation.every_steps = 50
  c.checkpoint.keep_best = "validation/loss"
  return c
"""


class _Binary:
  """`experiments.train` on one device, in a process of its own."""

  def __init__(self, folder: pathlib.Path, xla_flags: str):
    self.folder, self.xla_flags = folder, xla_flags
    (folder / "config.py").write_text(CONFIG)

  def start(self, workdir: str, *flags: str) -> subprocess.Popen:
    # Compiled as the tests are, and with the huge pages that it would restart itself for.
    env = {
      **os.environ,
      **huge_pages.environment(),
      "XLA_FLAGS": self.xla_flags,
      "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
      sys.executable,
      "-m",
      "experiments.train",
      f"--config={self.folder}/config.py",
      f"--workdir={self.folder / workdir}",
      *flags,
    ]
    return subprocess.Popen(
      command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

  def finish(self, workdir: str, *flags: str) -> str:
    process = self.start(workdir, *flags)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output

  def wait_for_step(self, process: subprocess.Popen, workdir: str, step: int) -> None:
    """Returns once `workdir` has a checkpoint of `step` or later."""
    directory = self.folder / workdir / "checkpoints"
    while max((int(p.name) for p in directory.glob("*") if p.name.isdigit()), default=0) < step:
      assert process.poll() is None, process.communicate()[0]
      time.sleep(0.01)


@pytest.fixture(scope="module")
def binary(tmp_path_factory, cpu_flags):
  return _Binary(tmp_path_factory.mktemp("resume"), cpu_flags(1))


@pytest.fixture(scope="module")
def straight(binary):
  """A run that nobody disturbs."""
  output = binary.finish("straight")
  assert "Start: from scratch." in output and "Trained 200 steps" in output
  return binary.folder / "straight"


@pytest.fixture(scope="module")
def disturbed(binary, straight):
  """A run that is killed, resumed, told to stop, resumed, and finishes."""
  workdir = binary.folder / "disturbed"
  process = binary.start("disturbed")
  binary.wait_for_step(process, "disturbed", 10)
  time.sleep(random.uniform(0.0, 0.3))  # Any step will do; no seed, so that it differs.
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  killed_at = metrics.read_metrics(workdir / "metrics.jsonl")[-1]["step"]
  assert killed_at < STEPS

  process = binary.start("disturbed")
  binary.wait_for_step(process, "disturbed", killed_at + 20)
  process.terminate()
  output = process.communicate(timeout=300)[0]
  assert process.returncode == loop.PREEMPTED_EXIT_CODE == 75, output
  assert f"Start: resumed {workdir} at step" in output and "Told to stop" in output
  stopped_at = metrics.read_metrics(workdir / "metrics.jsonl")[-1]["step"]
  assert stopped_at < STEPS

  output = binary.finish("disturbed")
  assert f"at step {stopped_at}." in output  # SIGTERM saved the very step it stopped at.
  return workdir


def _arrays(workdir):
  path = workdir / "checkpoints" / str(STEPS)
  target = {
    k: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    for k, x in checkpoint.stored_leaves(path).items()
  }
  return checkpoint._read(path, target)


def test_parameters_optimizer_and_average_are_equal_bit_for_bit(straight, disturbed):
  want, got = _arrays(straight), _arrays(disturbed)
  assert want.keys() == got.keys()
  assert {k.split("/")[0] for k in want} >= {"params", "ema", "opt_states", "key", "step"}
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_every_step_was_logged_once_with_the_same_loss(straight, disturbed):
  want, got = (
    [
      (x["step"], x["train/loss"], x.get("eval/validation/loss"))
      for x in metrics.read_metrics(w / "metrics.jsonl")
    ]
    for w in (straight, disturbed)
  )
  assert [x[0] for x in want] == list(range(1, STEPS + 1))
  assert got == want
  assert want[-1][1] < want[0][1] - 1.0  # And it learnt something.


def test_evaluate_reads_the_best_checkpoint(binary, straight):
  command = [sys.executable, "-m", "experiments.evaluate", f"--workdir={straight}", "--step=best"]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
  result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
  printed = json.loads(result.stdout)
  lines = metrics.read_metrics(straight / "metrics.jsonl")
  best = min(
    (x for x in lines if "eval/validation/loss" in x), key=lambda x: x["eval/validation/loss"]
  )
  assert printed["step"] == best["step"]
  # On 8 devices where training had one.
  assert printed["validation/loss"] == pytest.approx(best["eval/validation/loss"], rel=1e-5)
  assert json.loads((straight / f"evaluation_{best['step']}.json").read_text()) == printed


def test_the_config_is_beside_the_checkpoints(straight):
  assert loop.read_config(straight).model.to_dict() == dict(
    common.smoke(common.language_model()).model
  )
