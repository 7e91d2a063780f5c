"""Train tokens/s of our models beside their best public peers', on one CPU and in one run.

  python -m experiments.benchmarks.train --sizes=3m,10m --rounds=9

Each case is a model of ours and a peer with the same weights, batches, loss, clipping and AdamW,
all in float32. Before it is timed, its logits and its losses over the first steps must agree, or
the run ends with an error. Each program has a process of its own, which is idle while the other is
timed; the two take turns, round by round. Compile time is reported apart. README.md has the rest.
"""

import abc
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments.benchmarks import peers, specs
from latentlab import huge_pages

_MODELS = flags.DEFINE_list("models", list(specs.MODELS), "Models to time.")
_SIZES = flags.DEFINE_list("sizes", ["3m", "10m"], f"Sizes to time, of {', '.join(specs.SIZES)}.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each program.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 4, "Timed steps per turn, after one untimed.", lower_bound=1)
_CORES = flags.DEFINE_integer(
  "cores", None, "Cores that each program is bound to; all there are by default.", lower_bound=1
)
_PEER_COMPILE = flags.DEFINE_bool(
  "peer_compile", False, "Run the peers through torch.compile, which needs a C++ compiler."
)
_OUTPUT = flags.DEFINE_string(
  "train_output",
  "experiments/results/benchmarks/train_cpu.json",
  "Where figures go; '' for nowhere.",
)

ATTENTIONS = ("sdpa", "eager")  # Of DiffLlama; Llama runs with the first.
CHUNK_SIZES = (32, 64, 128, 256)  # That torchscale is tried with, besides its parallel form.
MATCH_STEPS = 3
LOGITS_TOLERANCE, LOSS_TOLERANCE = 1e-3, 1e-3  # Absolute, with logits of order one; relative.
REST_SECONDS = 0.3  # Lets the thread pool of the program before stop spinning.
OPTIMIZER = dict(
  name="adamw",
  peak_lr=3e-4,
  b1=0.9,
  b2=0.98,
  eps=1e-8,
  weight_decay=0.01,
  clip_norm=1.0,
  schedule="constant",
  warmup_steps=0,
)


class Program(abc.ABC):
  """A model with its trainer, in the process that it has to itself.

  Attributes:
    batches: `(inputs, targets)`, taken in turn.
  """

  def __init__(self, size: specs.Size):
    shape = (4, 2, size.batch_size, size.seq_length)
    self.batches = np.random.default_rng(0).integers(0, size.vocab_size, shape, np.int32)
    self._num_steps = 0

  @abc.abstractmethod
  def reset(self) -> None:
    """Goes back to the weights and the optimiser before the first step."""

  @abc.abstractmethod
  def num_params(self) -> int:
    """Parameters of the model."""

  def prepare(self) -> dict[str, Any]:
    """Compiles, and picks the fastest mode if there is a choice; returns a report."""
    start = time.perf_counter()
    self.train(1)
    seconds = round(time.perf_counter() - start, 2)
    self.reset()
    return dict(num_params=self.num_params(), first_step_seconds=seconds)

  @abc.abstractmethod
  def logits(self) -> np.ndarray:
    """Logits of the first batch."""

  @abc.abstractmethod
  def step(self, inputs: np.ndarray, targets: np.ndarray) -> Any:
    """Takes a step; returns something that `loss` can wait for."""

  @abc.abstractmethod
  def loss(self, result: Any) -> float:
    """Waits for all that was asked for; returns the mean loss of the step with this result."""

  def train(self, num_steps: int) -> list[float]:
    """Losses of the next steps."""
    losses = []
    for _ in range(num_steps):
      losses.append(self.loss(self.step(*self._next_batch())))
    return losses

  def time(self, num_steps: int) -> tuple[float, float]:
    """Seconds by the clock and of all cores' time for a number of steps."""
    self.loss(self.step(*self._next_batch()))
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
      result = self.step(*self._next_batch())
    self.loss(result)
    return time.perf_counter() - clock, time.process_time() - cpu

  def _next_batch(self):
    self._num_steps += 1
    return self.batches[(self._num_steps - 1) % len(self.batches)]


class Ours(Program):
  """Our model under the trainer that `experiments.train` runs."""

  def __init__(self, model: str, size: specs.Size, weights_path: str):
    from experiments.configs import common
    from latentlab.train import partition, tasks

    super().__init__(size)
    config = common.language_model()
    config.model = size.model(model)
    config.optimizer.update(OPTIMIZER)
    self._task = tasks.build_task(config, size.vocab_size)
    self._trainer = partition.make_trainer(self._task, config)
    self.reset()
    np.savez(weights_path, **peers.PEERS[model].weights(self._state.params))

  def reset(self):
    import jax

    self._state, self._num_steps = self._trainer.init(jax.random.key(0)), 0

  def num_params(self):
    import jax

    return sum(x.size for x in jax.tree.leaves(self._state.params))

  def logits(self):
    import jax

    apply = jax.jit(self._task.model.apply)
    return np.asarray(apply({"params": self._state.params}, self.batches[0][0]).logits)

  def step(self, inputs, targets):
    self._state, metrics = self._trainer.step(self._state, self._place(inputs, targets))
    return metrics

  def loss(self, result):
    import jax

    jax.block_until_ready(self._state)
    return float(result["loss"])

  def _place(self, inputs, targets):
    # One document a row, as the peers have it: no segments, and positions that count from zero.
    weights = np.ones(inputs.shape, np.float32)
    return self._trainer.place(
      dict(inputs=inputs, targets=targets, weights=weights, positions=None, segment_ids=None)
    )


class Peer(Program):
  """The peer's model in PyTorch, with its fused AdamW."""

  def __init__(self, model: str, size: specs.Size, weights_path: str, compiled: bool):
    import torch

    from latentlab.models import build_config

    super().__init__(size)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = build_config(size.model(model), size.vocab_size)
    self._module = peers.PEERS[model].make(config)
    self._forward = torch.compile(self._module) if compiled else self._module
    self._modes = {}  # By name, what a mode is set by; one mode needs no choice.
    if model == "retnet":
      chunks = (c for c in CHUNK_SIZES if c <= size.seq_length)
      self._modes = {"parallel": None} | {f"chunkwise_{c}": c for c in chunks}
      self._set_mode = peers.set_chunk_size
    elif model == "diff_transformer":
      self._modes = dict(zip(ATTENTIONS, ATTENTIONS, strict=True))
      self._set_mode = peers.set_attention
    self._weights_path = weights_path
    self.reset()

  def reset(self):
    import torch

    with np.load(self._weights_path) as weights:
      peers.load(self._module, dict(weights))
    self._num_steps, o = 0, OPTIMIZER
    matrices, vectors = [], []
    for parameter in self._module.parameters():
      (matrices if parameter.ndim > 1 else vectors).append(parameter)
    self._optimizer = torch.optim.AdamW(
      [dict(params=matrices, weight_decay=o["weight_decay"]), dict(params=vectors, weight_decay=0)],
      lr=o["peak_lr"],
      betas=(o["b1"], o["b2"]),
      eps=o["eps"],
      fused=True,
    )

  def num_params(self):
    return sum(p.numel() for p in self._module.parameters())

  def prepare(self):
    report = super().prepare()
    if not self._modes:
      return report | dict(mode="sdpa")
    seconds = {name: self._time_mode(value) for name, value in self._modes.items()}
    best = min(seconds, key=seconds.get)
    self._set_mode(self._module, self._modes[best])
    self.reset()
    return report | dict(mode=best, step_seconds={n: round(s, 4) for n, s in seconds.items()})

  def _time_mode(self, mode):
    self._set_mode(self._module, mode)
    return min(self.time(1)[0] for _ in range(3))

  def logits(self):
    import torch

    with torch.no_grad():
      return self._logits(self.batches[0][0]).numpy()

  def step(self, inputs, targets):
    import torch

    targets = torch.from_numpy(targets).long().flatten()
    loss = torch.nn.functional.cross_entropy(self._logits(inputs).flatten(0, 1), targets)
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._module.parameters(), OPTIMIZER["clip_norm"], foreach=True)
    self._optimizer.step()
    return loss

  def loss(self, result):
    return result.item()

  def _logits(self, inputs):
    import torch

    out = self._forward(torch.from_numpy(inputs))
    return out[0] if isinstance(out, tuple) else out.logits


class Worker:
  """A `Program` in a process of its own, which waits for calls."""

  def __init__(self, program: type[Program], cores: Sequence[int], *args: Any):
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_serve, args=(theirs, cores, program, args), daemon=True)
    self._process.start()
    theirs.close()
    self._connection.recv()

  def __enter__(self) -> "Worker":
    return self

  def __exit__(self, *exception) -> None:
    self._connection.close()
    self._process.join()

  def call(self, method: str, *args: Any) -> Any:
    """Calls a method of the program and waits; `EOFError` if it raised, and said why."""
    self._connection.send((method, args))
    return self._connection.recv()


def _serve(connection, cores, program, args) -> None:
  os.sched_setaffinity(0, cores)  # Before the thread pools are made, which count them.
  served = program(*args)
  connection.send(None)
  while True:
    try:
      method, args = connection.recv()
    except EOFError:  # The parent is done.
      return
    connection.send(getattr(served, method)(*args))


def run_case(
  model: str,
  size: specs.Size,
  cores: Sequence[int],
  rounds: int,
  steps: int,
  peer_compile: bool = False,
) -> dict[str, Any]:
  """Checks that a model and its peer compute the same, and times their training.

  Args:
    model: A key of `specs.MODELS`.
    size: Sizes of model and batch.
    cores: Cores that both are bound to.
    rounds: Turns of each.
    steps: Timed steps of a turn.
    peer_compile: Whether the peer goes through `torch.compile`.

  Returns:
    Reports of both, and the ratios of our tokens/s to the peer's.

  Raises:
    RuntimeError: they do not compute the same; nothing was timed.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "weights.npz")
    with (
      Worker(Ours, cores, model, size, path) as ours,
      Worker(Peer, cores, model, size, path, peer_compile) as peer,
    ):
      programs = {"ours": ours, "peer": peer}
      reports = {name: program.call("prepare") for name, program in programs.items()}
      match = _match(*programs.values(), *reports.values())
      seconds = {name: [] for name in programs}
      for i in range(rounds):
        for name in list(programs)[:: 1 if i % 2 else -1]:  # None is always the first.
          time.sleep(REST_SECONDS)
          seconds[name].append(programs[name].call("time", steps))
  tokens = steps * size.batch_size * size.seq_length
  for name, report in reports.items():
    rates = [tokens / clock for clock, _ in seconds[name]]
    cpu = [tokens / cpu for _, cpu in seconds[name]]
    report |= dict(
      tokens_per_second=dict(
        best=round(max(rates)), median=round(statistics.median(rates)), rounds=_rounded(rates)
      ),
      tokens_per_cpu_second=dict(
        best=round(max(cpu)), median=round(statistics.median(cpu)), rounds=_rounded(cpu)
      ),
    )
  ratios = {
    f"{unit}_{statistic}": round(
      reports["ours"][unit][statistic] / reports["peer"][unit][statistic], 3
    )
    for unit in ("tokens_per_second", "tokens_per_cpu_second")
    for statistic in ("best", "median")
  }
  # The peer's other modes were timed before the turns, a step at a time.
  modes = reports["peer"].get("step_seconds", {})
  ours = reports["ours"]["tokens_per_second"]["best"]
  ratios["of_modes"] = {
    name: round(ours * s / (size.batch_size * size.seq_length), 3) for name, s in modes.items()
  }
  return dict(peer_name=peers.PEERS[model].name, ratio=ratios, match=match, **reports)


def _match(ours, peer, our_report, peer_report) -> dict[str, Any]:
  if our_report["num_params"] != peer_report["num_params"]:
    raise RuntimeError(f"The models differ in size: {our_report}, {peer_report}.")
  error = float(np.abs(ours.call("logits") - peer.call("logits")).max())
  losses = [program.call("train", MATCH_STEPS) for program in (ours, peer)]
  # With `not`, a NaN is a mismatch too.
  if not error <= LOGITS_TOLERANCE:
    raise RuntimeError(f"Logits differ by {error}; nothing is timed.")
  if not np.allclose(*losses, rtol=LOSS_TOLERANCE, atol=0):
    raise RuntimeError(f"Losses of the first steps differ: {losses}; nothing is timed.")
  return dict(logits_max_difference=error, losses_ours=losses[0], losses_peer=losses[1])


def environment(cores: Sequence[int]) -> dict[str, Any]:
  """What the figures hold for."""
  packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "torchscale")
  return dict(
    device=_cpu_name(),
    cores=len(cores),
    machine=platform.machine(),
    load_average_before=round(os.getloadavg()[0], 2),
    versions=dict(
      python=platform.python_version(),
      **{name: importlib.metadata.version(name) for name in packages},
    ),
    commit=_git("rev-parse", "HEAD"),
    uncommitted_changes=bool(_git("status", "--porcelain")),
  )


def _summary(name: str, case: dict[str, Any]) -> str:
  ours, peer = (case[who]["tokens_per_second"]["best"] for who in ("ours", "peer"))
  ratio = case["ratio"]
  return (
    f"{name} ({case['ours']['num_params']:,} parameters): {ours:,} tokens/s; "
    f"{case['peer_name']}, {case['peer']['mode']}: {peer:,}; ratio of the best "
    f"{ratio['tokens_per_second_best']:.2f}, of the medians "
    f"{ratio['tokens_per_second_median']:.2f}"
  )


def _cpu_name() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor()


def _git(*args: str) -> str | None:
  folder = pathlib.Path(__file__).parent
  done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=folder, check=False)
  return done.stdout.strip() if done.returncode == 0 else None


def _rounded(values):
  return [round(x) for x in values]


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  for flag, known in ((_MODELS, specs.MODELS), (_SIZES, specs.SIZES)):
    if unknown := set(flag.value) - set(known):
      raise app.UsageError(f"--{flag.name}: unknown {sorted(unknown)}; choose among {list(known)}")
  # Which the workers inherit: what `experiments.train` runs with, for the peers too.
  os.environ.update({"JAX_PLATFORMS": "cpu"} | huge_pages.environment())
  available = sorted(os.sched_getaffinity(0))
  cores = available[: _CORES.value]
  if _CORES.value and _CORES.value > len(available):
    raise app.UsageError(f"--cores={_CORES.value}: this process has {len(available)}")

  about = environment(cores) | dict(
    dtype="float32",
    rounds=_ROUNDS.value,
    steps_per_round=_STEPS.value,
    peer_compile=_PEER_COMPILE.value,
    optimizer=OPTIMIZER,
  )
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value)
  result = json.loads(output.read_text()) if output and output.exists() else dict(cases={})
  for name in _SIZES.value:
    size = specs.SIZES[name]
    for model in _MODELS.value:
      case = run_case(model, size, cores, _ROUNDS.value, _STEPS.value, _PEER_COMPILE.value)
      result["cases"][f"{model}_{name}"] = (
        dict(
          batch_size=size.batch_size,
          seq_length=size.seq_length,
          model=size.model(model),
          vocab_size=size.vocab_size,
        )
        | case
        | dict(environment=about)
      )
      print(_summary(f"{model} {name}", case), flush=True)
      if output:  # After each case, so that an interrupted run has left something.
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
