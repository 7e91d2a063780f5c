"""Prefill and decode of our models beside their best public peers', on one CPU and in one run.

  python -m experiments.benchmarks.inference --batches=8 --lengths=128,1024

As in `train.py`, whose flags these are but for the sizes' and the output's: equal weights, float32,
a process for each program, which take turns, and results that must agree before anything is timed:
the logits behind a prompt, and then each greedy token, which the peer reads as we drew it. Batches
that are asked for replace their own cases of the file and leave the others. README.md has the rest.
"""

import abc
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.benchmarks import peers, specs
from experiments.benchmarks.train import ATTENTIONS, CHUNK_SIZES, REST_SECONDS, Worker, environment
from latentlab import huge_pages

for _name in ("models", "rounds", "cores"):
  flags.declare_key_flag(_name)
_SIZE = flags.DEFINE_enum("size", "10m", list(specs.SIZES), "Size to time.")
_BATCHES = flags.DEFINE_list("batches", ["8", "1"], "Rows that are decoded together.")
_LENGTHS = flags.DEFINE_list("lengths", ["128", "1024"], "Tokens of the prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Tokens that are drawn per turn.", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
  "inference_output",
  "experiments/results/benchmarks/inference_cpu.json",
  "Where figures go; '' for nowhere.",
)

GATES = {"retnet_10m_b8_t128": 1.5}  # Decoding, ours over the peer's.
TOLERANCE = 1e-3  # Absolute, of logits of order one.
ROOM_TO_CHOOSE = 24  # Tokens that a peer draws with each of its caches.
READ_TOKEN_BY_TOKEN = 128  # Prompts that torchscale reads itself, to check a state of ours.


class Program(abc.ABC):
  """A model that reads prompts and goes on greedily, in the process that it has to itself."""

  def __init__(self, model: str, size: specs.Size, folder: str):
    self.name, self.size, self.folder = model, size, folder

  @property
  def weights_path(self) -> str:
    return os.path.join(self.folder, "weights.npz")

  @abc.abstractmethod
  def num_params(self) -> int:
    """Parameters of the model."""

  @abc.abstractmethod
  def start(self, prompts: np.ndarray, capacity: int) -> dict[str, Any]:
    """Prepares all programs for prompts like these; returns a report."""

  @abc.abstractmethod
  def prefill(self) -> Any:
    """Reads the prompts; returns what holds their last logits."""

  @abc.abstractmethod
  def logits(self) -> np.ndarray:
    """Last logits of the prompts, `[B, vocab]`."""

  @abc.abstractmethod
  def decode(self, num_tokens: int) -> np.ndarray:
    """The next tokens `[B, num_tokens]`, greedily."""

  def time(self, method: str, *args: Any) -> tuple[float, float]:
    """Seconds by the clock and of all cores' time, of a call after another."""
    getattr(self, method)(*args)
    clock, cpu = time.perf_counter(), time.process_time()
    getattr(self, method)(*args)
    return time.perf_counter() - clock, time.process_time() - cpu


class Ours(Program):
  """Our model under the loop that `experiments.generate` runs."""

  def __init__(self, model: str, size: specs.Size, folder: str):
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from latentlab import sample
    from latentlab.models import LanguageModel, build_config

    super().__init__(model, size, folder)
    module = LanguageModel(build_config(size.model(model), size.vocab_size))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    np.savez(self.weights_path, **peers.PEERS[model].weights(params["params"]))
    self._num_params = sum(x.size for x in jax.tree.leaves(params))
    stepper = sample.TokenStepper(module, params["params"], np.zeros(0, np.int32), np.int32(0))
    self._stepper = stepper.unstacked()

  def num_params(self):
    return self._num_params

  def start(self, prompts, capacity):
    import jax
    import jax.numpy as jnp

    from latentlab import sample

    self._prompts = jnp.asarray(prompts)
    self._lengths = jnp.full(len(prompts), prompts.shape[1], jnp.int32)
    self._prefill = jax.jit(lambda *args: self._stepper.prefill(*args, capacity))
    sampler, keys = sample.token_sampler(greedy=True), sample.row_keys(0, np.arange(len(prompts)))
    start = time.perf_counter()
    _, self._carry = sample.begin(
      *(self._stepper, sampler, self._prompts, self._lengths, keys, capacity),
      capacity=capacity,
      num_items=1,
    )
    self._first = True
    self._advance = lambda n: sample.advance(self._stepper, sampler, self._carry, num_items=n)
    features, cache = jax.block_until_ready(self._prefill(self._prompts, self._lengths))
    self._logits = np.asarray(features)
    self._hand_over(cache)
    return dict(
      mode="compiled loop",
      cache_bytes=cache.num_bytes,
      compile_seconds=round(time.perf_counter() - start, 2),
    )

  def _hand_over(self, cache):
    """Saves states for a peer that cannot read a prompt at once."""
    if self.name == "retnet":
      states = {str(i): stage[0].state for i, stage in enumerate(cache.stages)}
      np.savez(os.path.join(self.folder, "states.npz"), **states)

  def prefill(self):
    import jax

    return jax.block_until_ready(self._prefill(self._prompts, self._lengths))

  def logits(self):
    return self._logits

  def decode(self, num_tokens):
    # `begin` has drawn the first token; with it the first call is one token longer.
    head, self._first = self._first, False
    block, self._carry = self._advance(num_tokens)
    tokens = np.asarray(block.tokens)
    if not head:
      return tokens
    return np.concatenate([self._logits.argmax(-1)[:, None], tokens], axis=1)


class Peer(Program):
  """The peer's model in PyTorch, run eagerly by a plain greedy loop."""

  def __init__(self, model: str, size: specs.Size, folder: str):
    import torch

    from latentlab.models import build_config

    super().__init__(model, size, folder)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    config = build_config(size.model(model), size.vocab_size)
    self._module = peers.PEERS[model].make(config)
    self._module.eval()
    with np.load(self.weights_path) as weights:
      peers.load(self._module, dict(weights))

  def num_params(self):
    return sum(p.numel() for p in self._module.parameters())

  def start(self, prompts, capacity):
    import torch

    self._prompts, self._capacity = torch.from_numpy(prompts).long(), capacity
    report = self.choose()
    self._next = self.enter()
    self._logits = self._next.numpy()
    return report | dict(cache_bytes=self.cache_bytes())

  @abc.abstractmethod
  def choose(self) -> dict[str, Any]:
    """Picks the fastest modes for these prompts; returns what they are."""

  @abc.abstractmethod
  def enter(self) -> Any:
    """Makes a cache that holds the prompts; returns their last logits."""

  @abc.abstractmethod
  def step(self, tokens: Any) -> Any:
    """Reads one token a row, `[B, 1]`; returns the next logits."""

  @abc.abstractmethod
  def cache_bytes(self) -> int:
    """What is held of the tokens so far."""

  def logits(self):
    return self._logits

  def decode(self, num_tokens):
    import torch

    tokens = []
    for _ in range(num_tokens):
      tokens.append(self._next.argmax(-1, keepdim=True))
      self._next = self.step(tokens[-1])
    return torch.cat(tokens, dim=1).numpy()

  def lag(self, tokens: np.ndarray) -> float:
    """How far the logit of any of these tokens is below its best, when it reads them in turn."""
    import torch

    worst = 0.0
    for column in torch.from_numpy(tokens.astype(np.int64)).T:
      own = self._next.gather(-1, column[:, None])[:, 0]
      worst = max(worst, (self._next.max(-1).values - own).max().item())
      self._next = self.step(column[:, None])
    return worst

  def _fastest(self, seconds: Mapping[str, float]) -> tuple[str, dict[str, float]]:
    return min(seconds, key=seconds.get), {name: round(s, 5) for name, s in seconds.items()}


class Llama(Peer):
  """A model of transformers, with the faster of a static and a dynamic cache."""

  attentions = ATTENTIONS[:1]

  def choose(self):
    seconds = {}
    for attention in self.attentions:
      peers.set_attention(self._module, attention)
      for self._mode in ("static", "dynamic"):
        self._next = self.enter()
        self.decode(4)
        seconds[f"{attention}, {self._mode} cache"] = self.time("decode", 8)[0] / 8
    mode, seconds = self._fastest(seconds)
    attention, self._mode = mode.removesuffix(" cache").split(", ")
    peers.set_attention(self._module, attention)
    return dict(mode=mode, step_seconds=seconds)

  def enter(self):
    from transformers import DynamicCache, StaticCache

    config = self._module.config
    self._cache = (
      StaticCache(config=config, max_cache_len=self._capacity)
      if self._mode == "static"
      else DynamicCache(config=config)
    )
    return self._call(self._prompts, self._cache)

  def step(self, tokens):
    return self._call(tokens, self._cache)

  def prefill(self):
    from transformers import DynamicCache

    return self._call(self._prompts, DynamicCache(config=self._module.config))

  def cache_bytes(self):
    return sum(x.nbytes for layer in self._cache.layers for x in (layer.keys, layer.values))

  def _call(self, tokens, cache):
    return self._module(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
      :, -1
    ]


class DiffLlama(Llama):
  """transformers' DiffLlama, with the faster of its attentions too."""

  attentions = ATTENTIONS


class Torchscale(Peer):
  """torchscale's RetNet: prompts in its fastest form, which leaves no state; recurrent decoding.

  It can read a prompt into a state token by token alone. So it starts from our state, in its units,
  and short prompts are read by itself to see that they end at the same logits.
  """

  def choose(self):
    length = self._prompts.shape[1]
    forms = {"parallel": None} if length <= 2048 else {}  # Its mask alone is H T^2.
    forms |= {f"chunkwise_{c}": c for c in CHUNK_SIZES if length % c == 0}
    seconds = {}
    for name, self._form in forms.items():
      self.prefill()
      seconds[name] = self.time("prefill")[0]
    name, seconds = self._fastest(seconds)
    self._form = forms[name]
    return dict(mode="recurrent", prefill_mode=f"{name}, without a state", prefill_seconds=seconds)

  def enter(self):
    import torch

    length = self._prompts.shape[1]
    self._tokens = torch.zeros(len(self._prompts), self._capacity, dtype=torch.long)
    self._tokens[:, :length] = self._prompts
    self._count = length
    log_decay = self._module.retnet_rel_pos.decay.double()
    scale = (torch.expm1(length * log_decay) / torch.expm1(log_decay)).float()
    with np.load(os.path.join(self.folder, "states.npz")) as states:
      self._state = {
        int(i): dict(
          prev_key_value=torch.from_numpy(x).mT.contiguous() / scale.sqrt()[:, None, None],
          scale=scale.clone(),
        )
        for i, x in states.items()
      }
    return self.prefill()

  def read_token_by_token(self) -> np.ndarray:
    """Last logits of the prompts, by its own recurrence."""
    state = {}
    for i in range(1, self._prompts.shape[1] + 1):
      out, _ = self._module(self._prompts[:, :i], incremental_state=state)
    return out[:, -1].numpy()

  def step(self, tokens):
    self._tokens[:, self._count] = tokens[:, 0]
    self._count += 1
    # It takes the last of these tokens, and its position from their number.
    out, _ = self._module(self._tokens[:, : self._count], incremental_state=self._state)
    return out[:, -1]

  def prefill(self):

    peers.set_chunk_size(self._module, self._form)
    features, _ = self._module(self._prompts, features_only=True)
    peers.set_chunk_size(self._module, None)
    return self._module.output_layer(features[:, -1])

  def cache_bytes(self):
    return sum(x.nbytes for layer in self._state.values() for x in layer.values())


def run_cases(
  model: str,
  size: specs.Size,
  batch: int,
  lengths: Sequence[int],
  cores: Sequence[int],
  rounds: int,
  num_tokens: int,
) -> dict[int, dict[str, Any]]:
  """Checks that a model and its peer compute the same, and times both, by length of the prompt.

  Raises:
    RuntimeError: They do not compute the same; nothing was timed.
  """
  types = {"transformer": Llama, "diff_transformer": DiffLlama, "retnet": Torchscale}
  cases = {}
  with (
    tempfile.TemporaryDirectory() as folder,
    Worker(Ours, cores, model, size, folder) as ours,
    Worker(types[model], cores, model, size, folder) as peer,
  ):
    programs = {"ours": ours, "peer": peer}
    counts = {name: program.call("num_params") for name, program in programs.items()}
    if len(set(counts.values())) > 1:
      raise RuntimeError(f"The models differ in size: {counts}.")
    for length in lengths:
      prompts = np.random.default_rng(length).integers(
        0, size.vocab_size, (batch, length), np.int32
      )
      capacity = length + max(num_tokens * (2 * rounds + 2), ROOM_TO_CHOOSE)
      reports = {name: p.call("start", prompts, capacity) for name, p in programs.items()}
      reads = model == "retnet" and length <= READ_TOKEN_BY_TOKEN
      match = _match(ours, peer, num_tokens, reads)
      seconds = {name: dict(prefill=[], decode=[]) for name in programs}
      for i in tqdm(range(rounds), desc=f"{model} b{batch} t{length}", unit="rounds"):
        for name in list(programs)[:: 1 if i % 2 else -1]:  # None is always the first.
          for kind, args in (("prefill", ()), ("decode", (num_tokens,))):
            time.sleep(REST_SECONDS)
            seconds[name][kind].append(programs[name].call("time", kind, *args))
      for name, report in reports.items():
        report["prefill_tokens_per_second"] = _rates(seconds[name]["prefill"], batch * length)
        report["decode_tokens_per_second"] = _rates(seconds[name]["decode"], batch * num_tokens)
        best = min(clock for clock, _ in seconds[name]["decode"])
        report["decode_step_ms"] = round(1e3 * best / num_tokens, 3)
      ratio = {
        kind: round(
          reports["ours"][f"{kind}_tokens_per_second"]["best"]
          / reports["peer"][f"{kind}_tokens_per_second"]["best"],
          3,
        )
        for kind in ("prefill", "decode")
      }
      cases[length] = dict(
        batch_size=batch,
        length=length,
        num_params=counts["ours"],
        peer_name=peers.PEERS[model].name,
        ratio=ratio,
        match=match,
        **reports,
      )
  return cases


def _match(ours, peer, num_tokens: int, reads: bool) -> dict[str, Any]:
  want = ours.call("logits")
  errors = dict(logits=peer.call("logits"))
  if reads:
    errors["logits_token_by_token"] = peer.call("read_token_by_token")
  errors = {name: float(np.abs(want - got).max()) for name, got in errors.items()}
  tokens = ours.call("decode", num_tokens)
  errors["greedy_tokens"] = peer.call("lag", tokens)
  for name, error in errors.items():
    if not error <= TOLERANCE:  # A NaN is a mismatch too.
      raise RuntimeError(f"{name} differ by {error}; nothing is timed.")
  return {f"{name}_max_difference": error for name, error in errors.items()}


def _rates(times: Sequence[tuple[float, float]], tokens: int) -> dict[str, Any]:
  rates = [tokens / clock for clock, _ in times]
  return dict(
    best=round(max(rates), 1),
    median=round(statistics.median(rates), 1),
    rounds=[round(x, 1) for x in rates],
    per_cpu_second_best=round(max(tokens / cpu for _, cpu in times), 1),
  )


def _numbers(flag: flags.FlagHolder) -> list[int]:
  try:
    values = [int(x) for x in flag.value]
  except ValueError:
    values = []
  if not values or min(values) < 1:
    raise app.UsageError(f"--{flag.name}={','.join(flag.value)}: give positive numbers")
  return values


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  batches, lengths, models = _numbers(_BATCHES), _numbers(_LENGTHS), flags.FLAGS.models
  if unknown := set(models) - set(specs.MODELS):
    raise app.UsageError(f"--models: unknown {sorted(unknown)}; choose among {list(specs.MODELS)}")
  os.environ.update({"JAX_PLATFORMS": "cpu"} | huge_pages.environment())
  cores = sorted(os.sched_getaffinity(0))[: flags.FLAGS.cores]
  size, output = specs.SIZES[_SIZE.value], _OUTPUT.value and pathlib.Path(_OUTPUT.value)
  about = environment(cores) | dict(dtype="float32", rounds=flags.FLAGS.rounds)
  result = json.loads(output.read_text()) if output and output.exists() else dict(cases={})
  for model in models:
    for batch in batches:
      cases = run_cases(model, size, batch, lengths, cores, flags.FLAGS.rounds, _TOKENS.value)
      for length, case in cases.items():
        name = f"{model}_{_SIZE.value}_b{batch}_t{length}"
        result["cases"][name] = dict(gate=GATES.get(name), **case, environment=about)
        print(_summary(name, result["cases"][name]), flush=True)
      if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        result["cases"] = dict(sorted(result["cases"].items()))
        output.write_text(json.dumps(result, indent=1) + "\n")


def _summary(name: str, case: Mapping[str, Any]) -> str:
  ours, peer = case["ours"], case["peer"]
  gate = "" if case["gate"] is None else f" (gate {case['gate']})"
  return (
    f"{name}: decode {ours['decode_step_ms']} ms a step, {case['peer_name']} ({peer['mode']}) "
    f"{peer['decode_step_ms']}: {case['ratio']['decode']:.2f} times its speed{gate}; prefill "
    f"{case['ratio']['prefill']:.2f}; cache {ours['cache_bytes']:,} bytes"
  )


if __name__ == "__main__":
  app.run(main)
