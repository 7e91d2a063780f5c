"""Generation of latents: LatentLM beside its DiT twin and beside a plain Python loop, on one CPU.

  python -m experiments.benchmarks.latents --rounds=3

A LatentLM draws latents one behind another, in one compiled program with two streams of guidance;
its twin of equal parameters denoises all of them at once, in as many solver steps, each of them a
full pass. The Python loop has the LatentLM's maths in compiled pieces, one call for each step of
the backbone and of the solver; it must draw the same latents before anything is timed. Programs
take turns, round by round, in one process. Models have the release's proportions, with a third of
its layers in backbone and head.

Beside the times stand the operations that XLA counts in each piece, for these models and, from
shapes alone, for the presets (https://arxiv.org/abs/2412.08635, figure 7). README.md has the rest.
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
from latentlab import huge_pages, ops, sample
from latentlab.layers.diffusion_head import DiffusionHeadConfig
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models import dit, init_cache, latentlm
from latentlab.models.latentlm import LatentLM, LatentLMConfig, ModalityConfig
from latentlab.models.transformer import transformer
from latentlab.sample import latent, loop
from latentlab.typing import Array, Key, Params

flags.declare_key_flag("rounds")
_WIDTHS = flags.DEFINE_list("latent_widths", ["96", "192", "384"], "Widths, multiples of 96.")
_BATCHES = flags.DEFINE_list("latent_batches", ["1", "8", "32"], "Images that are drawn together.")
_OUTPUT = flags.DEFINE_string(
  "latents_output",
  "experiments/results/benchmarks/latents_cpu",
  "Files of figures, without an ending; '' for none.",
)

PAPER = {
  "3.8B, batch 128": 2.47,
  "1.82B, batch 256, grouped-query attention": 2.84,
}
"""LatentLM's throughput over DiT's, one H100 and 20 steps; whether decoders count is not told."""
NUM_LAYERS, HEAD_DEPTH, DIM, GRID, NUM_CLASSES = 8, 1, 16, (4, 4), 1000
NUM_STEPS, GUIDANCE = 20, 1.5
STATISTICS = ("best", "median", "per_cpu_second_best")
FEWER_STEPS = (1, 5)  # Which tell the passes of the head from the rest.
TOLERANCE = 1e-3  # Absolute, of latents of order one.
PRESETS = ("base", "medium", "large", "xl", "3b")


def model_config(width: int) -> LatentLMConfig:
  """A LatentLM of the release's proportions, 16 latents an image."""
  sizes = dict(num_layers=NUM_LAYERS, embed_dim=width, num_heads=_heads(width), mlp_dim=4 * width)
  special = latentlm.SpecialTokens(0, 1, NUM_CLASSES)
  language = transformer(vocab_size=special.vocab_size, **sizes, **latentlm.RELEASE)
  head = DiffusionHeadConfig(depth=HEAD_DEPTH, mlp_dim=4 * width)
  modality = ModalityConfig("image", DIM, head, GRID[0] * GRID[1], "fixed")
  return LatentLMConfig(language, (modality,), 0, NUM_CLASSES)


def twin_config(width: int) -> dit.DiTConfig:
  """The DiT of as many parameters."""
  sizes = dict(num_layers=NUM_LAYERS, embed_dim=width, num_heads=_heads(width))
  return dit.DiTConfig(**sizes, dim=DIM, grid=GRID, num_classes=NUM_CLASSES)


def _heads(width: int) -> int:
  return max(2, width // 64)


def make_params(init: Callable[..., Any], *args: Any) -> Params:
  """Parameters none of which are zero, as some are at first."""
  params = nn.unbox(jax.jit(init)(jax.random.key(0), *args))["params"]
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  # A trained head undoes noise; the size of these keeps latents of order one as it does.
  noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, noisy)


class Latents:
  """A LatentLM that draws latents behind classes, with guidance.

  Attributes:
    num_params: Parameters.
  """

  def __init__(self, config: LatentLMConfig, batch_size: int):
    model = LatentLM(config)
    params = make_params(model.init, latentlm.empty_items(config))
    self.num_params = latentlm.num_params(config)["total"]
    self._modality, self._special = config.modalities[0], config.tokens
    self._model, self._params = latent.unstacked(model, params)
    self._stepper = latent.LatentStepper(self._model, self._params, guided=True, tokens=False)
    labels = np.arange(batch_size)[:, None] % config.num_classes
    items = latentlm.empty_items(config, batch_size, 1)
    items = items.replace(tokens=jnp.asarray(self._special.class_token(labels), jnp.int32))
    null = jnp.full_like(items.tokens, self._special.null)
    self._prompts = latent.Prompts(items, null)
    self._lengths = jnp.ones(batch_size, jnp.int32)
    self._keys = sample.row_keys(0, np.arange(batch_size))

  @property
  def num_latents(self) -> int:
    return len(self._lengths) * self._modality.num_latents

  def compiled(self, num_steps: int) -> Array:
    """Latents `[B T Z]`, drawn by one program."""
    settings = SolverSettings(guidance=GUIDANCE, num_steps=num_steps)
    count = self._modality.num_latents
    sampler = latent.LatentSampler(
      *(self._model, self._params, settings, None, np.zeros(0, np.int32)),
      min_latents=np.int32(0),
      max_latents=np.int32(count),
    )
    args = (self._stepper, sampler, self._prompts, self._lengths, self._keys, count)
    drawn, _ = loop.begin(*args, capacity=1 + count, num_items=count)
    return drawn.tokens.latents[self._modality.name]

  def python_loop(self, num_steps: int) -> Array:
    """The same, by a Python loop over positions and solver steps."""
    count, name = self._modality.num_latents, self._modality.name
    levels = self._modality.head.diffusion.levels
    table = SolverSettings(num_steps=num_steps).table(levels)
    prefill, step = _pieces()
    features, cache = prefill(self._stepper, self._prompts, self._lengths, capacity=1 + count)
    rows, latents = len(self._lengths), []
    for i in range(count):
      hidden = jnp.concatenate([features.hidden, features.null_hidden])
      x = _start(self._keys, i, dim=self._modality.dim)
      older = jnp.zeros_like(x)
      for j in range(num_steps):
        row = (table.t[j], table.alpha[j], table.sigma[j], table.on_x[j], table.on_clean[j])
        row = tuple(np.asarray(a, np.float32) for a in row)
        x, older = _solver_step(self._model, self._params, name, x, older, hidden, row)
      latents.append(x)
      token, kind = (np.full(rows, a, np.int32) for a in (self._special.latent(0), 1))
      item = latent.Item(token, kind, {name: x}, np.zeros(rows, bool))
      features, cache = step(self._stepper, item, cache)
    return jnp.stack(latents, axis=1)


class Twin:
  """A DiT that draws the same number of latents, with guidance.

  Attributes:
    num_params: Parameters.
  """

  def __init__(self, config: dit.DiTConfig, batch_size: int):
    self._config = config
    shape = (1, config.num_latents, config.dim)
    zero = jnp.zeros(1, jnp.int32)
    self._params = make_params(dit.DiT(config).init, jnp.zeros(shape), zero, zero)
    self.num_params = config.num_params
    self._labels = jnp.arange(batch_size) % config.num_classes
    self._keys = sample.row_keys(0, np.arange(batch_size))

  def compiled(self, num_steps: int) -> Array:
    """Latents `[B T Z]`, drawn by one program."""
    settings = SolverSettings(guidance=GUIDANCE, num_steps=num_steps)
    return dit.generate(
      self._config, self._params, self._labels, key=self._keys, settings=settings, guided=True
    )


@functools.cache
def _pieces() -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The backbone's two programs; the cache is updated where it lies."""
  prefill = lambda stepper, *args, capacity: stepper.prefill(*args, capacity)
  step = lambda stepper, item, cache: stepper.step(item, cache)
  return jax.jit(prefill, static_argnames="capacity"), jax.jit(step, donate_argnums=2)


@functools.partial(jax.jit, static_argnames="dim")
def _start(keys: Key[Array, " B"], number: Array, *, dim: int) -> Array:
  """The noise that the sampling loop starts a latent from."""

  def draw(key):
    key = jax.random.fold_in(jax.random.fold_in(key, number), 1)
    return jax.random.normal(jax.random.split(key)[0], (dim,))

  return jax.vmap(draw)(keys)


@functools.partial(jax.jit, static_argnames=("model", "name"))
def _solver_step(
  model: LatentLM, params: Params, name: str, x: Array, older: Array, hidden: Array, row: Any
) -> tuple[Array, Array]:
  """The next vector of DPM-Solver++ (2M), and the latent that was predicted."""
  t, alpha, sigma, on_x, on_clean = row
  head = lambda model, *args: model.heads[name](*args)
  args = (jnp.concatenate([x, x]), jnp.broadcast_to(t, 2 * len(x)), hidden)
  output = model.apply({"params": params}, *args, method=head)
  output = ops.guide(*jnp.split(output, 2), jnp.float32(GUIDANCE))
  clean = ops.predicted_clean("v", output, x, alpha, sigma)
  return on_x * x + on_clean[0] * clean + on_clean[1] * older, clean


def counted(config: LatentLMConfig, *, compiled: bool = False) -> dict[str, float]:
  """Multiply-adds of one latent in one stream, as XLA counts them: from shapes alone.

  Args:
    config: Of the model.
    compiled: Whether the compiler's result is counted, and not what it is given.

  Returns:
    `backbone`, of one item behind a full cache; `head_pass`, of one evaluation.
  """
  model, m = LatentLM(config), config.modalities[0]
  items = jax.eval_shape(lambda: latentlm.empty_items(config, 1, 1))
  boxed = jax.eval_shape(model.init, jax.random.key(0), latentlm.empty_items(config))
  params = nn.unbox(boxed)["params"]
  cache = jax.eval_shape(lambda: init_cache(config.language, 1, 1 + m.num_latents))
  hidden = jax.ShapeDtypeStruct((1, config.shared.embed_dim), jnp.float32)
  noisy = jax.ShapeDtypeStruct((1, m.dim), jnp.float32)

  def backbone(params, items, cache):
    return model.apply({"params": params}, items, cache=cache, method="hidden")

  def head(params, noisy, condition):
    predict = lambda model, *args: model.heads[m.name].predict(*args)
    return model.apply({"params": params}, noisy, condition, method=predict)

  calls = dict(backbone=(backbone, items, cache), head_pass=(head, noisy, hidden))
  return {
    name: _multiply_adds(call, params, *args, compiled=compiled)
    for name, (call, *args) in calls.items()
  }


def counted_twin(config: dit.DiTConfig, *, compiled: bool = False) -> float:
  """Multiply-adds of one latent in one pass of a DiT, as XLA counts them."""
  model, shape = dit.DiT(config), (1, config.num_latents, config.dim)
  noisy = jax.ShapeDtypeStruct(shape, jnp.float32)
  one = jax.ShapeDtypeStruct((1,), jnp.int32)
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), noisy, one, one))["params"]
  condition = jax.ShapeDtypeStruct((1, config.embed_dim), jnp.float32)
  call = lambda p, x, c: model.apply({"params": p}, x, c, method="predict")
  return _multiply_adds(call, params, noisy, condition, compiled=compiled) / config.num_latents


def _multiply_adds(call: Callable[..., Any], *args: Any, compiled: bool) -> float:
  lowered = jax.jit(call).lower(*args)
  analysis = (lowered.compile() if compiled else lowered).cost_analysis()
  return analysis["flops"] / 2


def formula(num_layers: int, width: int, mlp_dim: int, head_depth: int) -> dict[str, float]:
  """Multiply-adds with weights alone, of one latent in one stream.

  Returns:
    `backbone`: `L (4 h^2 + 3 h f)`; `head_pass`: `l (3 h^2 + 3 h f) + 2 h^2` of `l` layers, the
    latent's channels left out.
  """
  h, f = width, mlp_dim
  backbone = num_layers * (4 * h**2 + 3 * h * f)
  return dict(backbone=backbone, head_pass=head_depth * (3 * h**2 + 3 * h * f) + 2 * h**2)


def costs(one: Mapping[str, float], twin_pass: float, num_steps: int) -> dict[str, float]:
  """What guided generation costs for each latent, in two streams.

  Args:
    one: As of `counted`.
    twin_pass: As of `counted_twin`.
    num_steps: Of both solvers.
  """
  head, backbone = 2 * num_steps * one["head_pass"], 2 * one["backbone"]
  twin = 2 * num_steps * twin_pass
  share = head / (head + backbone)
  return dict(total=head + backbone, head_share=share, twin_over_ours=twin / (head + backbone))


def preset_costs() -> dict[str, Any]:
  """Counted costs of the release's sizes beside the formula, on 256 latents an image."""
  report = {}
  for name in tqdm(PRESETS, unit="presets"):
    sizes = latentlm.PRESETS[name]
    fields = ("num_layers", "embed_dim", "mlp_dim", "head_depth")
    one = counted(latentlm.class_conditional(name))
    twin = counted_twin(dit.preset(name, dim=16, grid=(16, 16), num_classes=1000))
    report[name] = dict(
      counted=one,
      formula=formula(*(sizes[f] for f in fields)),
      twin_pass=twin,
      by_steps={s: costs(one, twin, s) for s in (*FEWER_STEPS, NUM_STEPS)},
    )
  return report


def check(ours: Latents, num_steps: int = NUM_STEPS) -> float:
  """How far the latents of the program and of the Python loop are apart, at most.

  Raises:
    RuntimeError: farther than they may; nothing is timed.
  """
  one, other = (np.asarray(f(num_steps)) for f in (ours.compiled, ours.python_loop))
  error = float(np.abs(one - other).max())
  if not error <= TOLERANCE or not one.std() > 0.1:  # A NaN is a mismatch too.
    raise RuntimeError(
      f"The program and the Python loop differ by {error} in latents of deviation {one.std()}; "
      "nothing is timed."
    )
  return error


def run_case(width: int, batch_size: int, rounds: int) -> dict[str, Any]:
  """Times one width and batch.

  Raises:
    RuntimeError: programs that should agree do not.
  """
  config, twin_of = model_config(width), twin_config(width)
  ours, twin = Latents(config, batch_size), Twin(twin_of, batch_size)
  error = check(ours)
  calls = dict(
    latentlm=functools.partial(ours.compiled, NUM_STEPS),
    dit=functools.partial(twin.compiled, NUM_STEPS),
    python_loop=functools.partial(ours.python_loop, NUM_STEPS),
  )
  calls |= {f"latentlm_{s}_steps": functools.partial(ours.compiled, s) for s in FEWER_STEPS}
  seconds = _turns(calls, rounds, f"width {width}, batch {batch_size}")
  reports = {name: _report(s, ours.num_latents) for name, s in seconds.items()}
  one, twin_pass = counted(config), counted_twin(twin_of)
  return dict(
    width=width,
    batch_size=batch_size,
    num_params=dict(latentlm=ours.num_params, dit=twin.num_params),
    max_difference_of_python_loop=error,
    programs=reports,
    ratio={
      name: {
        statistic: round(
          reports["latentlm"]["latents_per_second"][statistic]
          / reports[name]["latents_per_second"][statistic],
          3,
        )
        for statistic in STATISTICS
      }
      for name in ("dit", "python_loop")
    },
    counted=one | dict(twin_pass=twin_pass) | costs(one, twin_pass, NUM_STEPS),
    time_of_parts=parts(reports),
  )


def _turns(
  calls: Mapping[str, Callable[[], Array]], rounds: int, about: str
) -> dict[str, list[tuple[float, float]]]:
  """Seconds by the clock and of all cores, by program and round."""
  seconds = {name: [] for name in calls}
  for call in calls.values():
    jax.block_until_ready(call())  # Compiles.
  for i in tqdm(range(rounds), desc=about, unit="rounds"):
    for name in list(calls)[:: 1 if i % 2 else -1]:  # None is always the first.
      time.sleep(REST_SECONDS)
      clock, cpu = time.perf_counter(), time.process_time()
      jax.block_until_ready(calls[name]())
      seconds[name].append((time.perf_counter() - clock, time.process_time() - cpu))
  return seconds


def _report(seconds: Sequence[tuple[float, float]], num_latents: int) -> dict[str, Any]:
  rates = [num_latents / clock for clock, _ in seconds]
  best, cpu = (min(each) for each in zip(*seconds, strict=True))
  return dict(
    latents_per_second=dict(
      best=round(max(rates), 2),
      median=round(statistics.median(rates), 2),
      rounds=[round(x, 2) for x in rates],
      per_cpu_second_best=round(num_latents / cpu, 2),
    ),
    ms_per_latent=round(1e3 * best / num_latents, 4),
    cpu_ms_per_latent=round(1e3 * cpu / num_latents, 4),
  )


def parts(reports: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """Milliseconds of a latent as a line over solver steps: the head's passes, and the rest.

  By the `clock`, and of all cores' time (`cpu`), the steadier one on a busy machine.
  """
  steps = [*FEWER_STEPS, NUM_STEPS]
  names = [*(f"latentlm_{s}_steps" for s in FEWER_STEPS), "latentlm"]
  found = {}
  for kind, field in (("clock", "ms_per_latent"), ("cpu", "cpu_ms_per_latent")):
    times = [reports[name][field] for name in names]
    slope, rest = np.polyfit(steps, times, 1)
    found[kind] = dict(
      head_pass_ms=round(float(slope), 4),
      backbone_and_loop_ms=round(float(rest), 4),
      head_share=round(float(NUM_STEPS * slope / times[-1]), 3),
    )
  return found


def plot(cases: Mapping[str, Any], path: pathlib.Path) -> None:
  """Ratios of speed against the batch, and milliseconds of the parts."""
  # The object interface: pyplot would choose a backend and keep every figure alive.
  figure = Figure(figsize=(12, 3.9), layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, 3)
  for color, width in enumerate(dict.fromkeys(c["width"] for c in cases.values())):
    here = [c for c in cases.values() if c["width"] == width]
    batches, style = [c["batch_size"] for c in here], dict(color=f"C{color}")
    for axes, other in zip(panels, ("dit", "python_loop"), strict=False):
      axes.plot(
        batches,
        [c["ratio"][other]["per_cpu_second_best"] for c in here],
        "o-",
        label=width,
        **style,
      )
    panels[0].axhline(here[0]["counted"]["twin_over_ours"], linestyle=":", **style)
    shares = [c["time_of_parts"]["cpu"]["head_share"] for c in here]
    panels[2].plot(batches, shares, "o-", label=width, **style)
    panels[2].axhline(here[0]["counted"]["head_share"], linestyle=":", **style)
  titles = ("over DiT's", "over a Python loop's", "the head's share of the time")
  for axes, title in zip(panels, titles, strict=True):
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="images drawn together", xscale="log")
    axes.set_xticks(batches, [str(b) for b in batches], minor=False)
    axes.xaxis.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="width", fontsize="small")
  figure.suptitle(
    f"Latents per second of CPU time, {NUM_STEPS} solver steps, guided; dotted: operations"
  )
  figure.savefig(path, dpi=120)


def _numbers(flag: flags.FlagHolder, factor: int) -> list[int]:
  try:
    values = sorted({int(x) for x in flag.value})
  except ValueError:
    values = []
  if not values or values[0] < 1 or any(x % factor for x in values):
    kind = f"multiples of {factor}" if factor > 1 else "positive numbers"
    raise app.UsageError(f"--{flag.name}={','.join(flag.value)}: give {kind}")
  return values


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  # Widths at which the feed-forwards of both models have no rounding, so that they are twins.
  widths, batches = _numbers(_WIDTHS, 96), _numbers(_BATCHES, 1)
  result = dict(
    environment=environment(sorted(os.sched_getaffinity(0))),
    settings=dict(
      num_layers=NUM_LAYERS,
      head_depth=HEAD_DEPTH,
      latents_per_image=GRID[0] * GRID[1],
      num_steps=NUM_STEPS,
      guidance=GUIDANCE,
      dtype="float32",
      rounds=flags.FLAGS.rounds,
    ),
    paper=dict(throughput_over_dit=PAPER, device="one H100", num_steps=20),
    presets=preset_costs(),
    cases={},
  )
  for name, preset in result["presets"].items():
    print(_preset_summary(name, preset), flush=True)
  for width in widths:
    for batch_size in batches:
      case = run_case(width, batch_size, flags.FLAGS.rounds)
      result["cases"][f"w{width}_b{batch_size}"] = case
      print(_summary(case), flush=True)
      if _OUTPUT.value:  # After each case, so that an interrupted run has left something.
        output = pathlib.Path(_OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
  if _OUTPUT.value:
    plot(result["cases"], output.with_suffix(".png"))


def _preset_summary(name: str, preset: Mapping[str, Any]) -> str:
  one, steps = preset["counted"], preset["by_steps"]
  shares = ", ".join(f"{100 * c['head_share']:.0f} % at {s}" for s, c in steps.items())
  return (
    f"{name}: backbone {one['backbone'] / 1e6:.1f}M, head {one['head_pass'] / 1e6:.1f}M a step, "
    f"multiply-adds of a latent and stream; the head's share {shares} steps; DiT's operations over "
    f"ours {steps[NUM_STEPS]['twin_over_ours']:.2f}"
  )


def _summary(case: Mapping[str, Any]) -> str:
  ratio, share = case["ratio"], case["time_of_parts"]["cpu"]["head_share"]
  return (
    f"width {case['width']}, batch {case['batch_size']}: "
    f"{case['programs']['latentlm']['latents_per_second']['best']:.0f} latents/s, over DiT's "
    f"{ratio['dit']['best']:.2f} (median {ratio['dit']['median']:.2f}, of CPU time "
    f"{ratio['dit']['per_cpu_second_best']:.2f}; operations "
    f"{case['counted']['twin_over_ours']:.2f}), over the Python loop's "
    f"{ratio['python_loop']['best']:.2f} ({ratio['python_loop']['median']:.2f}, "
    f"{ratio['python_loop']['per_cpu_second_best']:.2f}); the head is "
    f"{100 * share:.0f} % of the time ({100 * case['counted']['head_share']:.0f} % of operations)"
  )


if __name__ == "__main__":
  # As `experiments.train` does on a CPU: glibc reads the wish for huge pages when a process starts.
  os.environ["JAX_PLATFORMS"] = "cpu"
  huge_pages.restart()
  jax.config.update("jax_platforms", "cpu")
  app.run(main)
