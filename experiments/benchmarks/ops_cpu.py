"""Our XLA forms of retention and differential attention beside torch's, on one CPU, in one run.

  python -m experiments.benchmarks.ops_cpu --rounds=9

Each case is an op of ours and a peer on the same float32 inputs, forward or with every gradient.
Outputs and gradients must agree before anything is timed; retention's after the head norm, which
cancels the rows' scales that torchscale puts in. Both may choose among chunk sizes. As in
`train.py`, whose flags these are but for the output's: a process for each, which take turns, and
the best round counts.
"""

import abc
import contextlib
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.benchmarks import specs
from experiments.benchmarks.train import CHUNK_SIZES, REST_SECONDS, Worker, environment
from latentlab import huge_pages

_OUTPUT = flags.DEFINE_string(
  "ops_output", "experiments/results/benchmarks/ops_cpu.json", "Where figures go; '' for nowhere."
)
_CASES = flags.DEFINE_list("ops_cases", None, "Cases to time, by prefix; all by default.")
_SHAPES = flags.DEFINE_list(
  "ops_shapes",
  None,
  "Shapes in place of the cases' own, as BATCHxLENGTHxHEADSxHEAD_DIMxVALUE_DIM: 8x2048x4x32x64.",
)

TOLERANCE = 1e-4  # Relative, of the norm.
TURN_SECONDS = 0.3  # At least, and three calls after an untimed one.
NORM_EPS = 0.0  # Under the head norm's root.


class Case(abc.ABC):
  """An op on inputs, in a process that it has to itself.

  Attributes:
    maps: Attention maps, each with queries and keys of its own.
    inputs: By name.
    d_out: The gradient of the output.
  """

  maps = 1
  lam = 0.5  # Weight of a second map.

  def __init__(self, shape: specs.Attention, backward: bool):
    self.shape, self.backward = shape, backward
    rng = np.random.default_rng(0)
    draw = lambda *sizes: rng.normal(size=sizes).astype(np.float32)
    lead = (shape.batch, shape.length, shape.num_heads)
    queries = (*lead, *((self.maps,) if self.maps > 1 else ()), shape.head_dim)
    values = (*lead, shape.value_head_dim)
    self.inputs = dict(q=draw(*queries), k=draw(*queries) * shape.head_dim**-0.5, v=draw(*values))
    self.d_out = draw(*values)

  @abc.abstractmethod
  def compute(self) -> Sequence[Any]:
    """The output, or the gradients, once they are there."""

  def results(self) -> list[np.ndarray]:
    """The same as arrays of numpy."""
    return [np.asarray(x) for x in self.compute()]

  def time(self) -> tuple[float, float]:
    """Seconds by the clock and of all cores' time of a call, on average over a turn."""
    self.compute()
    calls, clock, cpu = 0, time.perf_counter(), time.process_time()
    while calls < 3 or time.perf_counter() - clock < TURN_SECONDS:
      self.compute()
      calls += 1
    return (time.perf_counter() - clock) / calls, (time.process_time() - cpu) / calls


class Ours(Case):
  """By jax."""

  def __init__(self, shape, backward, *options):
    import jax
    import jax.numpy as jnp

    super().__init__(shape, backward)
    self.options = options
    args = [jnp.asarray(x) for x in self.inputs.values()]
    function = lambda *args: (self.op(*args),)
    if backward:
      loss = lambda *args: jnp.sum(self.op(*args) * self.d_out)
      function = jax.grad(loss, argnums=(0, 1, 2))
    compiled = jax.jit(function).lower(*args).compile()
    self._call = lambda: compiled(*args)

  def compute(self):
    import jax

    return jax.block_until_ready(self._call())


class OurRetention(Ours):
  def op(self, q, k, v):
    import jax.numpy as jnp

    from latentlab.ops import log_decay_rates
    from pallas_kernels import retention

    out, _ = retention(
      *(q, k, v, log_decay_rates(self.shape.num_heads)),
      chunk_size=self.options[0],
      implementation="xla",
    )
    return out / jnp.sqrt(jnp.mean(out**2, axis=-1, keepdims=True) + NORM_EPS)


class OurDiffAttention(Ours):
  maps = 2

  def op(self, q, k, v):
    import jax.numpy as jnp

    from pallas_kernels import diff_attention

    return diff_attention(q, k, v, jnp.float32(self.lam), implementation="xla")


class Peer(Case):
  """By torch."""

  def __init__(self, shape, backward, *options):
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    super().__init__(shape, backward)
    self.options = options
    self._args = [torch.from_numpy(x).requires_grad_(backward) for x in self.inputs.values()]
    self._d_out = torch.from_numpy(self.d_out)
    self.make()

  def make(self) -> None:
    """Prepares what does not depend on the inputs."""

  def compute(self):
    import torch

    if not self.backward:
      with torch.no_grad():
        return [self.op(*self._args)]
    return torch.autograd.grad(self.op(*self._args), self._args, self._d_out)


class TorchscaleRetention(Peer):
  """Its module's form between rotation and gate: in chunks of the option, or parallel."""

  def make(self):
    import torch

    from experiments.benchmarks import peers

    peers.stand_in_for_unused_imports()
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetRelPos
    from torchscale.component.multiscale_retention import MultiScaleRetention

    s, (chunk,) = self.shape, self.options
    widths = dict(decoder_embed_dim=s.num_heads * s.head_dim, decoder_retention_heads=s.num_heads)
    args = RetNetConfig(**widths, decoder_value_embed_dim=s.num_heads * s.value_head_dim)
    args.recurrent_chunk_size = chunk or s.length
    self._module = MultiScaleRetention(
      args, args.decoder_embed_dim, args.decoder_value_embed_dim, s.num_heads
    )
    positions = RetNetRelPos(args)
    with torch.no_grad():
      _, self._mask = positions(s.length, chunkwise_recurrent=chunk is not None)

  def op(self, q, k, v):
    import torch

    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    chunked = self.options[0] is not None
    form = self._module.chunk_recurrent_forward if chunked else self._module.parallel_forward
    out = form(q, k, v.flatten(2), self._mask).reshape(v.shape)
    return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + NORM_EPS)


class TorchDiffAttention(Peer):
  """Two attentions of torch, by its fused kernel or written out."""

  maps = 2

  def op(self, q, k, v):
    import torch

    (fused,) = self.options
    v = v.transpose(1, 2)
    maps = []
    for m in range(2):
      q_map, k_map = q[:, :, :, m].transpose(1, 2), k[:, :, :, m].transpose(1, 2)
      if fused:
        out = torch.nn.functional.scaled_dot_product_attention(
          q_map, k_map, v, is_causal=True, scale=1.0
        )
      else:
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        scores = (q_map @ k_map.mT).masked_fill(hidden, -torch.inf)
        out = scores.softmax(-1) @ v
      maps.append(out)
    return (maps[0] - self.lam * maps[1]).transpose(1, 2)


_RETENTION = specs.Attention(4, 2048, 4, 64, 128)
_DIFF_ATTENTION = specs.Attention(4, 512, 3, 64, 128)
# By case: shape, ours and the options that it may choose among, the peer and its own, and the gate.
CASES: dict[
  str,
  tuple[specs.Attention, type[Case], Sequence[Any], type[Case], Sequence[Any], float | None],
] = {
  "retention/chunkwise": (
    *(_RETENTION, OurRetention, CHUNK_SIZES, TorchscaleRetention, CHUNK_SIZES, 1.8),
  ),
  "retention/chunkwise_backward": (
    *(_RETENTION, OurRetention, CHUNK_SIZES, TorchscaleRetention, CHUNK_SIZES, 1.3),
  ),
  "retention/parallel_backward": (
    *(_RETENTION, OurRetention, CHUNK_SIZES, TorchscaleRetention, (None,), 10),
  ),
  "diff_attention/sdpa": (
    *(_DIFF_ATTENTION, OurDiffAttention, (None,), TorchDiffAttention, (True,), None),
  ),
  "diff_attention/sdpa_backward": (
    *(_DIFF_ATTENTION, OurDiffAttention, (None,), TorchDiffAttention, (True,), None),
  ),
  "diff_attention/written_out_backward": (
    *(_DIFF_ATTENTION, OurDiffAttention, (None,), TorchDiffAttention, (False,), None),
  ),
}


def run_case(
  name: str, cores: Sequence[int], rounds: int, shape: specs.Attention | None = None
) -> dict[str, Any]:
  """Checks that both compute the same, and times them.

  Args:
    name: A key of `CASES`.
    cores: Cores that both are bound to.
    rounds: Turns of each.
    shape: In place of the case's own.

  Raises:
    RuntimeError: They do not compute the same; nothing was timed.
    ValueError: No chunk fits the shape.
  """
  case_shape, ours, our_options, peer, options, gate = CASES[name]
  shape, backward = shape or case_shape, name.endswith("backward")
  seconds: dict[str, dict[Any, list[tuple[float, float]]]] = {}
  fits = lambda option: not option or shape.length % option == 0  # As a chunk.
  for choices in (our_options, options):
    if not any(map(fits, choices)):
      raise ValueError(f"{name}: no chunk of {choices} divides a length of {shape.length}.")
  with contextlib.ExitStack() as stack:
    workers, want = {}, None
    for who, program, choices in (("ours", ours, our_options), ("peer", peer, options)):
      for option in filter(fits, choices):
        worker = stack.enter_context(Worker(program, cores, shape, backward, option))
        got = worker.call("results")
        want = got if want is None else want
        _match(name, who, option, want, got)
        workers[who, option] = worker
        seconds.setdefault(who, {})[option] = []
    for i in tqdm(range(rounds), desc=name, unit="rounds"):
      for who, option in list(workers)[:: 1 if i % 2 else -1]:
        time.sleep(REST_SECONDS)
        seconds[who][option].append(workers[who, option].call("time"))
  best = {
    who: {option: tuple(min(x) for x in zip(*turns, strict=True)) for option, turns in x.items()}
    for who, x in seconds.items()
  }
  modes = {who: min(x, key=lambda option, x=x: x[option][0]) for who, x in best.items()}
  fastest = {who: best[who][mode] for who, mode in modes.items()}
  return dict(
    shape=vars(shape),
    gate=gate,
    modes={who: str(mode) for who, mode in modes.items()},
    ratio=round(fastest["peer"][0] / fastest["ours"][0], 3),
    ratio_of_cpu_seconds=round(fastest["peer"][1] / fastest["ours"][1], 3),
    best_ms={
      who: {str(option): round(1e3 * clock, 3) for option, (clock, _) in x.items()}
      for who, x in best.items()
    },
    rounds_ms={
      who: {
        str(option): [round(1e3 * clock, 3) for clock, _ in turns] for option, turns in x.items()
      }
      for who, x in seconds.items()
    },
  )


def _match(name, who, option, want, got) -> None:
  for i, (a, b) in enumerate(zip(got, want, strict=True)):
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not error <= TOLERANCE:  # A NaN is a mismatch too.
      raise RuntimeError(
        f"{name}, {who} as {option}: array {i} differs by {error}; nothing is timed."
      )


def parse_shape(text: str) -> specs.Attention:
  """A shape of `--ops_shapes`."""
  try:
    sizes = [int(x) for x in text.split("x")]
  except ValueError:
    sizes = []
  if len(sizes) != 5 or min(sizes) < 1:
    raise app.UsageError(
      f"--ops_shapes={text}: five positive numbers with an x between them are a shape, as in "
      f"8x2048x4x32x64 (batch, length, heads, head_dim, value_dim)."
    )
  return specs.Attention(*sizes)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  os.environ.update({"JAX_PLATFORMS": "cpu"} | huge_pages.environment())
  available = sorted(os.sched_getaffinity(0))
  cores, rounds = available[: flags.FLAGS.cores], flags.FLAGS.rounds
  shapes = [parse_shape(x) for x in _SHAPES.value or ()]
  result = environment(cores) | dict(dtype="float32", rounds=rounds, cases={})
  for name in CASES:
    if _CASES.value and not name.startswith(tuple(_CASES.value)):
      continue
    for shape, label in zip(shapes or [None], _SHAPES.value or [""], strict=True):
      case = f"{name}@{label}" if label else name
      report = result["cases"][case] = run_case(name, cores, rounds, shape)
      gate = "" if report["gate"] is None else f", where the gate is {report['gate']}"
      modes = "{ours} against {peer}".format(**report["modes"])
      print(f"{case}: {report['ratio']:.2f} times the peer's speed ({modes}){gate}")
      if _OUTPUT.value:
        output = pathlib.Path(_OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
