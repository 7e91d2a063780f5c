"""Two processes with two devices each, on loopback, through the real binary: one run, as one."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from latentlab.train import checkpoint, loop, metrics

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS = 60
CONFIG = f"""
from experiments.configs import common

def get_config():
  c = common.smoke(common.language_model())
  c.data.update(source="synthetic")
  c.model.num_layers = 1
  c.mesh.update(data=2, fsdp=2)
  c.train_steps, c.log_steps, c.checkpoint_steps = {STEPS}, 1, 5
  c.optimizer.peak_lr = 3e-3
  c.evals.validation.every_steps = 20
  return c
"""


def _start(folder, workdir, xla_flags, *flags):
  env = {
    **os.environ,
    "XLA_FLAGS": xla_flags,
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
  }
  command = [
    sys.executable,
    "-m",
    "experiments.train",
    f"--config={folder}/config.py",
    f"--workdir={folder / workdir}",
    *flags,
  ]
  return subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def _start_pair(folder, workdir, xla_flags):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  return [
    _start(
      folder,
      workdir,
      xla_flags,
      f"--coordinator_address={address}",
      "--num_processes=2",
      f"--process_id={i}",
    )
    for i in range(2)
  ]


def _finish(processes, returncode=0):
  outputs = [p.communicate(timeout=300)[0] for p in processes]
  assert [p.returncode for p in processes] == [returncode] * len(processes), "\n".join(outputs)
  return outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("multihost")
  (folder / "config.py").write_text(CONFIG)
  return folder


@pytest.fixture(scope="module")
def single(folder, cpu_flags):
  _finish([_start(folder, "single", cpu_flags(4))])
  return folder / "single"


@pytest.fixture(scope="module")
def double(folder, cpu_flags):
  """Stopped in the middle by a SIGTERM to the second process alone, then finished."""
  workdir = folder / "double"
  processes = _start_pair(folder, "double", cpu_flags(2))
  while not (workdir / "checkpoints" / "5").exists():
    assert all(p.poll() is None for p in processes), _finish(processes)
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)
  first, second = _finish(processes, loop.PREEMPTED_EXIT_CODE)
  assert "Process 0 of 2: 4 devices" in first and "Told to stop" in first
  stopped_at = metrics.read_metrics(workdir / "metrics.jsonl")[-1]["step"]
  assert 5 <= stopped_at < STEPS
  first, second = _finish(_start_pair(folder, "double", cpu_flags(2)))
  assert f"resumed {workdir} at step {stopped_at}." in first
  assert "Trained 60 steps" in first and "Trained 60 steps" not in second  # One of them reports.
  return workdir


def test_losses_equal_those_of_one_process(single, double):
  want, got = (metrics.read_metrics(w / "metrics.jsonl") for w in (single, double))
  assert [x["step"] for x in want] == [x["step"] for x in got] == list(range(1, STEPS + 1))
  for name in ("train/loss", "eval/validation/loss", "eval/validation/bits_per_byte"):
    a, b = ([x[name] for x in lines if name in x] for lines in (want, got))
    assert len(a) == len(b) > 2
    np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


def test_parameters_equal_those_of_one_process(single, double):
  def params(workdir):
    path = workdir / "checkpoints" / str(STEPS)
    return checkpoint._read(
      path,
      {
        k: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )
        for k, x in checkpoint.stored_leaves(path).items()
        if k.startswith("params/")
      },
    )

  want, got = params(single), params(double)
  assert want.keys() == got.keys() and len(want) > 5
  for name in want:
    a, b = np.asarray(want[name]), np.asarray(got[name])
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), name
