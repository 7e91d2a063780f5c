"""The metrics file over interruptions, throughput and the pictures."""

import json
import types
from unittest import mock

import jax
import pytest

from latentlab.train import metrics, plots


def _device(kind="cpu", **stats):
  device = mock.NonCallableMock(spec=jax.Device, device_kind=kind)
  device.memory_stats = lambda: stats or None
  return device


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, start_step=0)
  for step in (1, 2, 3, 4):
    writer.write(step, {"train/loss": 1.0 / step})
  writer.close()
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + '{"step": 5, "train/lo')  # Killed while it wrote.
  writer = metrics.MetricsWriter(tmp_path, start_step=2)
  writer.write(3, {"train/loss": 9.0})
  writer.write(4, {})  # Nothing to say.
  writer.close()
  assert [(x["step"], x["train/loss"]) for x in _lines(path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
  metrics.MetricsWriter(tmp_path, start_step=0).close()
  assert not path.read_text()


def test_not_finite_is_null(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, start_step=0)
  writer.write(1, {"a": float("nan"), "b": float("inf"), "c": 0.5})
  writer.close()
  assert _lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": 0.5}]


def test_damage_within_the_file_is_an_error(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(ValueError, match="Line 2 "):
    metrics.MetricsWriter(tmp_path, start_step=3)


def test_tensorboard_is_optional(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
  with pytest.raises(ValueError, match=r"latentlab\[logging\]"):
    metrics.MetricsWriter(tmp_path, start_step=0, tensorboard=True)
  written = []
  fake = types.SimpleNamespace(
    SummaryWriter=lambda *args, **kwargs: types.SimpleNamespace(
      add_scalar=lambda *x: written.append(x), close=lambda: written.append("closed")
    )
  )
  monkeypatch.setitem(__import__("sys").modules, "tensorboardX", fake)
  writer = metrics.MetricsWriter(tmp_path, start_step=0, tensorboard=True)
  writer.write(3, {"train/loss": 2.0})
  writer.close()
  assert written == [("train/loss", 2.0, 3), "closed"]


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("cpu", None),
  ],
)
def test_peak_of_the_closest_kind(kind, peak):
  assert metrics.peak_flops(_device(kind)) == peak


def test_throughput_leaves_pauses_out(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  throughput = metrics.Throughput(
    tokens_per_step=100, flops_per_token=275e10, devices=[_device("TPU v4")] * 2
  )
  for _ in range(4):
    throughput.step()
    now[0] += 0.5
  with throughput.paused():
    now[0] += 100.0
  read = throughput.read()
  assert read["perf/step_sec"] == pytest.approx(0.5)
  assert read["perf/tokens_per_sec"] == pytest.approx(200)
  assert read["perf/model_flops_per_sec"] == pytest.approx(550e12)
  assert read["perf/mfu"] == pytest.approx(1.0)
  assert read["perf/memory"] > 1e6  # Of this process: a CPU has no memory of its own.
  assert "perf/tokens_per_sec" not in throughput.read()


def test_memory_of_a_device_with_counters():
  assert metrics.memory_bytes(_device(peak_bytes_in_use=5)) == 5
  assert metrics.memory_bytes(jax.local_devices()[0]) > 0


def test_plots(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, start_step=0)
  for step in range(1, 4):
    writer.write(
      step,
      {
        "train/loss": 1.0 / step,
        "train/lr": 0.1,
        "eval/validation/loss": 2.0,
        "eval/validation/position_0_7": 2.0,
        "eval/validation/position_8_15": 1.0,
        "eval/recall/accuracy_depth_0": 0.2,
        "eval/recall/accuracy_depth_50": 0.7,
      },
    )
  writer.close()
  names = {p.name for p in plots.write_plots(tmp_path)}
  evaluations = {"validation_loss.png", "validation_positions.png", "recall_accuracy_depths.png"}
  assert names == {"loss.png", "lr.png"} | evaluations
  assert all((tmp_path / "plots" / n).read_bytes().startswith(b"\x89PNG") for n in names)
