"""Metrics of a run: `metrics.jsonl`, throughput and its share of the chip's peak."""

import contextlib
import json
import logging
import math
import os
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

logger = logging.getLogger(__name__)

# Dense bf16 matmul peaks in flops per second and jax device, by the start of `device_kind`; makers'
# data sheets. A v2 or v3 device is one of a chip's two cores.
PEAK_FLOPS = {
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "Tesla V100": 125e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """The device's peak, or `None` where the table does not know it."""
  kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
  return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def memory_bytes(device: jax.Device) -> int:
  """The most memory in use so far: the device's, or this process's where the device is the host."""
  if stats := device.memory_stats():
    return stats["peak_bytes_in_use"]
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Throughput:
  """Speed between two log steps, evaluations and checkpoints not counted."""

  def __init__(self, *, tokens_per_step: int, flops_per_token: float, devices: list[jax.Device]):
    """Starts the clock.

    Args:
      tokens_per_step: Of the global batch.
      flops_per_token: Of a training step: three times a forward pass.
      devices: All that compute.
    """
    self._tokens, self._flops, self._devices = tokens_per_step, flops_per_token, devices
    self.restart()

  def restart(self) -> None:
    self._start, self._paused, self._steps = time.perf_counter(), 0.0, 0

  def step(self) -> None:
    self._steps += 1

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self._paused += time.perf_counter() - start

  def read(self) -> dict[str, float]:
    """`perf/*` since the last reading; call it when the last step's result has arrived."""
    steps, seconds = self._steps, time.perf_counter() - self._start - self._paused
    self.restart()
    metrics: dict[str, float] = {}
    if steps:
      metrics["perf/step_sec"] = seconds / steps
      metrics["perf/tokens_per_sec"] = steps * self._tokens / seconds
      metrics["perf/model_flops_per_sec"] = metrics["perf/tokens_per_sec"] * self._flops
      if peak := peak_flops(self._devices[0]):
        metrics["perf/mfu"] = metrics["perf/model_flops_per_sec"] / (peak * len(self._devices))
    metrics["perf/memory"] = memory_bytes(jax.local_devices()[0])
    return metrics


class MetricsWriter:
  """Writes `metrics.jsonl`, one line per step that has something to say, from process 0."""

  def __init__(self, workdir: str | pathlib.Path, *, start_step: int, tensorboard: bool = False):
    """Opens the file; lines after `start_step` are of a run that was cut off, and are dropped.

    Args:
      workdir: Where the file lies.
      start_step: The step that the run starts from.
      tensorboard: Whether to write TensorBoard's events too.

    Raises:
      ValueError: TensorBoard is asked for and not installed.
    """
    self._file = self._board = None
    if jax.process_index() != 0:
      return
    path = pathlib.Path(workdir) / "metrics.jsonl"
    kept = [line for line in read_metrics(path) if line["step"] <= start_step]
    partial = path.with_suffix(".jsonl.tmp")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(partial, path)
    self._file = path.open("a")
    if tensorboard:
      self._board = _tensorboard(pathlib.Path(workdir) / "tensorboard", start_step)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line; what is not finite becomes `null`, for JSON has no NaN."""
    if self._file is None or not metrics:
      return
    line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    self._file.write(json.dumps({"step": step, **line}) + "\n")
    self._file.flush()
    if self._board is not None:
      for name, value in metrics.items():
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    for f in (self._file, self._board):
      if f is not None:
        f.close()


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl`; a last line that was cut off is left out."""
  path = pathlib.Path(path)
  lines = path.read_text().splitlines() if path.exists() else []
  metrics = []
  for i, line in enumerate(lines):
    try:
      metrics.append(json.loads(line))
    except ValueError as e:
      if i < len(lines) - 1:
        raise ValueError(f"Line {i + 1} of {str(path)!r} is not JSON: {line[:80]!r}.") from e
      logger.warning("Left out the last line of %s, which was cut off.", path)
  return metrics


def _tensorboard(directory: pathlib.Path, start_step: int) -> Any:
  try:
    import tensorboardX
  except ModuleNotFoundError as e:
    raise ValueError(
      "config.logging.tensorboard needs tensorboardX: "
      "pip install 'latentlab[logging]', or set it to False."
    ) from e
  return tensorboardX.SummaryWriter(str(directory), purge_step=start_step + 1)
