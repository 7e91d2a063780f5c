"""Our architectures beside one another at equal size: training, prefill and decoding, on one CPU.

  python -m experiments.benchmarks.architectures --rounds=5

Models have the same width, layers and heads' features; they take turns, round by round, in one
process. Beside each ratio to the Transformer's time stands that of the operations which are counted
(matrix products, `models.flops_per_token`; a causal query sees half of the keys). YOCO's prefill
leaves its cross-decoder out but for one row. README.md has the rest.
"""

import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import linen as nn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.benchmarks.train import REST_SECONDS, environment
from experiments.configs import common
from latentlab import huge_pages, sample
from latentlab.models import LanguageModel, build_config, flops_per_token, num_params, prefill
from latentlab.train import partition, tasks

flags.declare_key_flag("rounds")
_MODELS = flags.DEFINE_list("architectures", [], "Models to time; all of them by default.")
_LENGTHS = flags.DEFINE_list("prompt_lengths", ["1024", "2048", "4096", "8192"], "Of prompts.")
_WIDTH = flags.DEFINE_integer(
  "width", 256, "Width of the models, a multiple of 64.", lower_bound=64
)
_LAYERS = flags.DEFINE_integer("layers", 8, "Layers, an even number.", lower_bound=2)
_TOKENS = flags.DEFINE_integer("decoded", 32, "Tokens that are decoded in a turn.", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
  "architectures_output",
  "experiments/results/benchmarks/architectures_cpu",
  "Files of figures, without an ending; '' for none.",
)

VOCAB_SIZE = 1024
TRAIN_SHAPE = (4, 512)
BASE = "transformer"
# Heads are 64 wide, those of gated retention 128; feed-forwards make parameters equal.
MODELS: dict[str, Callable[[int], dict[str, Any]]] = {
  "transformer": lambda d: dict(name="transformer", num_heads=d // 64, feed_forward="swiglu"),
  "diff_transformer": lambda d: dict(name="diff_transformer", num_heads=d // 128),
  "diff_transformer_v2": lambda d: dict(
    name="diff_transformer_v2", num_heads=d // 64, mlp_dim=d * 7 // 3
  ),
  "retnet": lambda d: dict(name="retnet", num_heads=d // 64, head_norm="rms", norm="rms"),
  "yoco": lambda d: dict(name="yoco", num_heads=d // 64, num_self_heads=d // 128),
  "yoco_window": lambda d: dict(
    name="yoco", num_heads=d // 64, self_attention="sliding_window", window=256
  ),
  "yoco_diff": lambda d: dict(
    name="yoco", num_heads=d // 128, num_self_heads=d // 128, cross_attention="diff_attention"
  ),
}


class Program:
  """A model with everything that is timed of it."""

  def __init__(self, name: str, width: int, num_layers: int):
    config = common.language_model()
    config.model = dict(num_layers=num_layers, embed_dim=width) | MODELS[name](width)
    config.optimizer.schedule = "constant"
    self.config = build_config(config.model, VOCAB_SIZE)
    self._model = LanguageModel(self.config)
    self._trainer = partition.make_trainer(tasks.build_task(config, VOCAB_SIZE), config)
    self._state = self._trainer.init(jax.random.key(0))
    self._params = nn.unbox(
      jax.jit(self._model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    )["params"]
    stepper = sample.TokenStepper(
      self._model, self._params, np.zeros(0, np.int32), np.int32(0)
    ).unstacked()
    self._stepper = stepper
    self._prefill = jax.jit(functools.partial(prefill, stepper.model))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB_SIZE, (2, *TRAIN_SHAPE), np.int32)
    weights = np.ones(TRAIN_SHAPE, np.float32)
    self._batch = self._trainer.place(
      dict(inputs=tokens[0], targets=tokens[1], weights=weights, positions=None, segment_ids=None)
    )

  def train(self) -> None:
    self._state, metrics = self._trainer.step(self._state, self._batch)
    jax.block_until_ready((self._state, metrics))

  def read(self, length: int) -> None:
    jax.block_until_ready(self._prefill(self._stepper.params, _prompt(length)))

  def enter(self, length: int, capacity: int) -> int:
    """Reads a prompt that `decode` goes on from; returns the bytes of the cache."""
    keys, lengths = sample.row_keys(0, np.arange(1)), jnp.array([length])
    _, self._carry = sample.begin(
      *(self._stepper, sample.token_sampler(greedy=True), _prompt(length), lengths, keys, capacity),
      capacity=length + capacity,
      num_items=1,
    )
    return self._carry.cache.num_bytes

  def decode(self, num_tokens: int) -> None:
    block, self._carry = sample.advance(
      self._stepper, sample.token_sampler(greedy=True), self._carry, num_items=num_tokens
    )
    jax.block_until_ready(block)


def _prompt(length: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(length).integers(0, VOCAB_SIZE, (1, length), np.int32))


def measure(
  programs: Mapping[str, Program], lengths: Sequence[int], rounds: int, num_tokens: int
) -> dict[str, dict[str, Any]]:
  """Seconds of each program by what it did: the best and the median of its turns."""
  room = num_tokens * (rounds + 1)
  calls = {"train": lambda p: p.train()}
  calls |= {f"prefill_{n}": functools.partial(lambda p, n: p.read(n), n=n) for n in lengths}
  report = {name: dict(cache_bytes={}, flops={}) for name in programs}
  for name, program in programs.items():
    report[name]["num_params"] = num_params(program.config)
    report[name]["flops"]["train"] = 3 * flops_per_token(program.config, TRAIN_SHAPE[1])
    for n in lengths:
      report[name]["flops"][f"prefill_{n}"] = program.config.decoder.prefill_flops(n)
  seconds = {name: {} for name in programs}

  def turns(kind: str, call: Callable[[Program], None]):
    for program in programs.values():
      call(program)  # Compiles.
    for i in range(rounds):
      for name in list(programs)[:: 1 if i % 2 else -1]:
        time.sleep(REST_SECONDS)
        start = time.perf_counter()
        call(programs[name])
        seconds[name].setdefault(kind, []).append(time.perf_counter() - start)

  kinds = [*calls, *(f"decode_{n}" for n in (lengths[0], lengths[-1]))]
  for kind in tqdm(kinds, unit="kinds"):
    if kind in calls:
      turns(kind, calls[kind])
      continue
    length = int(kind.removeprefix("decode_"))
    for name, program in programs.items():
      report[name]["cache_bytes"][length] = program.enter(length, room)
    turns(kind, lambda p: p.decode(num_tokens))
  for name, kinds_of in seconds.items():
    report[name]["seconds"] = {
      kind: dict(best=min(s), median=statistics.median(s)) for kind, s in kinds_of.items()
    }
  return report


def ratios(report: Mapping[str, Any]) -> dict[str, Any]:
  """Times and counted operations over the Transformer's."""
  base, result = report[BASE], {}
  for name, own in report.items():
    result[name] = {
      kind: dict(
        time=round(s["best"] / base["seconds"][kind]["best"], 3),
        flops=round(own["flops"][kind] / base["flops"][kind], 3) if kind in own["flops"] else None,
      )
      for kind, s in own["seconds"].items()
    }
  return result


def plot(report: Mapping[str, Any], lengths: Sequence[int], path: pathlib.Path) -> None:
  """Time of prefill against the length of the prompt."""
  # The object interface: pyplot would choose a backend and keep every figure alive.
  figure = Figure(figsize=(6.4, 4.4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for name, own in report.items():
    axes.plot(lengths, [own["seconds"][f"prefill_{n}"]["best"] for n in lengths], "o-", label=name)
  axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="seconds")
  axes.set_xticks(lengths, [str(n) for n in lengths], minor=False)
  axes.xaxis.minorticks_off()
  axes.set_title("Prefill on a CPU, one row")
  axes.legend()
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  names = _MODELS.value or list(MODELS)
  if unknown := sorted(set(names) - set(MODELS)):
    raise app.UsageError(f"--architectures: unknown {unknown}; choose among {list(MODELS)}")
  names = [BASE, *(n for n in names if n != BASE)]
  try:
    lengths = sorted({int(n) for n in _LENGTHS.value})
  except ValueError:
    lengths = []
  if not lengths or lengths[0] < 1:
    raise app.UsageError(f"--prompt_lengths={_LENGTHS.value}: give positive numbers")
  if _WIDTH.value % 128:
    raise app.UsageError(f"--width={_WIDTH.value} must be a multiple of 128")
  if _LAYERS.value % 2:
    raise app.UsageError(f"--layers={_LAYERS.value} must be even")
  programs = {name: Program(name, _WIDTH.value, _LAYERS.value) for name in names}
  report = measure(programs, lengths, flags.FLAGS.rounds, _TOKENS.value)
  result = dict(
    environment=environment(sorted(os.sched_getaffinity(0))),
    width=_WIDTH.value,
    num_layers=_LAYERS.value,
    train_shape=TRAIN_SHAPE,
    decoded_tokens=_TOKENS.value,
    models=report,
    ratios_to_transformer=ratios(report),
  )
  for name, kinds in result["ratios_to_transformer"].items():
    words = (
      f"{kind} {r['time']:.2f}"
      + ("" if r["flops"] is None else f" ({r['flops']:.2f} of the flops)")
      for kind, r in kinds.items()
    )
    print(f"{name}: {', '.join(words)}")
  if _OUTPUT.value:
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(report, lengths, output.with_suffix(".png"))


if __name__ == "__main__":
  # As `experiments.train` does on a CPU: glibc reads the wish for huge pages when a process starts.
  os.environ["JAX_PLATFORMS"] = "cpu"
  huge_pages.restart()
  jax.config.update("jax_platforms", "cpu")
  app.run(main)
