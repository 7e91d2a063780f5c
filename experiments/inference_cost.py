r"""What inference costs: figures 1 and 6 of RetNet, https://arxiv.org/abs/2307.08621.

  python -m experiments.inference_cost --targets=cpu,v5p,v5e_x4

Bytes are exact and of the paper's size: one decoding step is compiled ahead of time for each
target, from shapes alone (no parameter is ever made), and the compiler says what it holds: weights,
what is remembered of the tokens, and temporaries. TPU targets need libtpu and no TPU. Times are
measured, of sizes that fit this CPU: they are those of `experiments.benchmarks.inference`, whose
file is read. Points that the output holds already are kept, unless --overwrite is given.
"""

import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from latentlab import app
from latentlab.layers.cache import KVCache, RetentionState
from latentlab.models import (
  LanguageModel,
  LanguageModelConfig,
  build_config,
  decode_step,
  init_cache,
  unstack,
)
from latentlab.train import partition

_PRESET = flags.DEFINE_string("preset", "6b7", "Size of both models, a preset of theirs.")
_MODELS = flags.DEFINE_list("cost_models", ["retnet", "transformer"], "Models.")
_TARGETS = flags.DEFINE_list(
  "targets", ["cpu", "v5p", "v5e_x4"], "Chips to compile for; _x4 splits heads over four of them."
)
_LENGTHS = flags.DEFINE_list(
  "cost_lengths", ["2048", "4096", "8192"], "Tokens remembered of each row."
)
_BATCHES = flags.DEFINE_list("cost_batches", ["8"], "Rows.")
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", 32768, "Tokens of the vocabulary, which the paper does not tell.", lower_bound=1
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Compiles points anew that are there already.")
_TIMES = flags.DEFINE_string(
  "times", "experiments/results/benchmarks/inference_cpu.json", "Measured times; '' for none."
)
_OUTPUT = flags.DEFINE_string(
  "cost_output",
  "experiments/results/retnet/figure6_inference",
  "Figures' file, without its ending.",
)
_FLAGS = (
  *(_PRESET, _MODELS, _TARGETS, _LENGTHS, _BATCHES, _VOCAB_SIZE, _OVERWRITE, _TIMES, _OUTPUT),
)

# Topology, chips, and the dtype of weights, activations and keys: a state is float32 everywhere.
TARGETS: dict[str, tuple[str | None, int, str]] = {
  "cpu": (None, 1, "float32"),
  "v5p": ("v5p:2x2x1", 1, "bfloat16"),
  "v6e": ("v6e:2x2", 1, "bfloat16"),
  "v5e_x4": ("v5e:2x2", 4, "bfloat16"),
}
# At 7B parameters and 8192 tokens, on one A100-80GB; the batch of the first two is not told.
PAPER = dict(
  memory_ratio=3.4,
  throughput_ratio=8.4,
  latency_ratio=15.6,
  retnet_memory_gb="14 to 15, flat (read off the plot)",
  transformer_memory_gb="20 at 2048 to 43-45 at 8192 tokens (read off the plot)",
)
# What libtpu looks for where there is no TPU.
WITHOUT_TPU = dict(
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)


def model_config(section: Mapping[str, Any], vocab_size: int) -> LanguageModelConfig:
  """The model of a config's `model` section as decoding has it, a stage per layer."""
  config = build_config(section, vocab_size)
  unstacked = []

  def record(key):
    params = LanguageModel(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    new, params = unstack(config, params)
    unstacked.append(new)
    return params

  jax.eval_shape(record, jax.random.key(0))
  return unstacked[0]


def decode_bytes(
  config: LanguageModelConfig, batch_size: int, length: int, topology: str | None, num_chips: int
) -> dict[str, Any]:
  """Compiles one decoding step from shapes, and returns the bytes that each chip holds.

  Args:
    config: An unstacked model (`models.unstack`).
    batch_size: Rows.
    length: Tokens that the cache has room for.
    topology: Of TPUs; the CPU if `None`.
    num_chips: Chips that heads are split over.
  """
  devices = jax.devices("cpu")
  if topology is not None:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
  mesh = partition.make_mesh(
    dict(data=1, fsdp=1, tensor=num_chips, seq=1), devices=devices[:num_chips]
  )
  rules = partition.make_rules()
  model, dtype = LanguageModel(config), config.decoder.dtype
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  shapes = nn.unbox(boxed)  # Under rules, unboxing would ask for a layout.
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    layouts = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    # Weights are stored as they are used; in training they are float32.
    place = lambda x, layout: jax.ShapeDtypeStruct(x.shape, dtype, sharding=layout)
    params = jax.tree.map(place, shapes, layouts)

    def cache_layout(cache):
      heads = {KVCache: dict(k=2, v=2), RetentionState: dict(state=1, z=1)}[type(cache)]

      def place(path, x):
        axis = heads.get(path[-1].name)
        parts = [None] * x.ndim
        if axis is not None:
          parts[axis] = "tensor"
        layout = NamedSharding(mesh, PartitionSpec(*parts))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

      return jax.tree_util.tree_map_with_path(place, cache)

    whole = NamedSharding(mesh, PartitionSpec())
    cache = jax.eval_shape(lambda: init_cache(config, batch_size, length))
    cache = cache.replace(
      lengths=jax.ShapeDtypeStruct(cache.lengths.shape, jnp.int32, sharding=whole),
      stages=jax.tree.map(
        cache_layout, cache.stages, is_leaf=lambda x: isinstance(x, KVCache | RetentionState)
      ),
    )
    ids = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=whole)
    step = jax.jit(lambda p, t, c: decode_step(model, p, t, c), donate_argnums=2)
    start = time.perf_counter()
    compiled = step.lower(params, ids, cache).compile()
  held = compiled.memory_analysis()
  nbytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  arguments, outputs = held.argument_size_in_bytes, held.output_size_in_bytes
  aliased, temporaries = held.alias_size_in_bytes, held.temp_size_in_bytes
  return dict(
    weight_bytes=nbytes(params),
    cache_bytes=nbytes(cache),
    chips=num_chips,
    argument_bytes_per_chip=arguments,
    temporary_bytes_per_chip=temporaries,
    updated_in_place_bytes_per_chip=aliased,
    total_bytes_per_chip=arguments + outputs - aliased + temporaries,
    compile_seconds=round(time.perf_counter() - start, 1),
  )


def points() -> Iterator[tuple[str, str, int, int]]:
  """`(model, target, batch, length)` of the flags; RetNet's at one length, since none enters."""
  lengths, batches = sorted(map(int, _LENGTHS.value)), map(int, _BATCHES.value)
  for batch in batches:
    for target in _TARGETS.value:
      for model in _MODELS.value:
        for length in lengths if model == "transformer" else lengths[-1:]:
          yield model, target, batch, length


def summarise(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Ratios of the Transformer's figures to RetNet's, with what they can be compared with."""
  rows, bytes_ = [], result["bytes"]
  for point in bytes_.values():
    if point["model"] != "transformer":
      continue
    ours = [
      p
      for p in bytes_.values()
      if p["model"] == "retnet" and all(p[k] == point[k] for k in ("target", "batch_size"))
    ]
    if ours:
      ratio = point["total_bytes_per_chip"] / ours[0]["total_bytes_per_chip"]
      where = {k: point[k] for k in ("target", "batch_size", "length")}
      rows.append(dict(what="memory", **where, ratio=round(ratio, 2)))
  times = result["times"]
  for name, case in times.items():
    other = times.get(name.replace("transformer", "retnet"))
    if name.startswith("transformer") and other is not None:
      ratio = case["decode_step_ms"] / other["decode_step_ms"]
      where = dict(target="this CPU", batch_size=case["batch_size"], length=case["length"])
      rows.append(dict(what="step time", **where, ratio=round(ratio, 2)))
  return rows


def read_times(path: str) -> dict[str, dict[str, Any]]:
  """Step times from the benchmark's file, of the faster program of a model, ours or its peer."""
  cases = json.loads(pathlib.Path(path).read_text())["cases"]
  return {
    name: dict(
      batch_size=case["batch_size"],
      length=case["length"],
      num_params=case["num_params"],
      program=who,
      decode_step_ms=case[who]["decode_step_ms"],
      decode_tokens_per_second=case[who]["decode_tokens_per_second"]["best"],
      cache_bytes=case["ours"]["cache_bytes"],
    )
    for name, case in cases.items()
    for who in [min(("ours", "peer"), key=lambda who: case[who]["decode_step_ms"])]
  }


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Memory by length, and measured step times and throughput by length."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 3.6), layout="constrained")
  FigureCanvasAgg(figure)
  memory, latency, throughput = figure.subplots(1, 3)
  series: dict[str, list[tuple[int, float]]] = {}
  for point in result["bytes"].values():
    name = f"{point['model']}, {point['target']}, batch {point['batch_size']}"
    total = point["chips"] * point["total_bytes_per_chip"] / 1e9
    series.setdefault(name, []).append((point["length"], total))
  longest = max((x for line in series.values() for x, _ in line), default=1)
  for name, line in series.items():
    line = sorted(line)
    if name.startswith("retnet"):  # Compiled at one length, for it has no other.
      line = [(0, line[0][1]), (longest, line[0][1])]
    memory.plot(*zip(*line, strict=True), marker="o", label=name)
  memory.set(title=f"{result['preset']}: bytes of a decoding step", ylabel="GB, all chips")
  series = {}
  for name, case in result["times"].items():
    label = f"{name.split('_')[0]}, batch {case['batch_size']}"
    series.setdefault(label, []).append(
      (case["length"], case["decode_step_ms"], case["decode_tokens_per_second"])
    )
  for label, line in series.items():
    length, step, rate = zip(*sorted(line), strict=True)
    latency.plot(length, step, marker="o", label=label)
    throughput.plot(length, rate, marker="o", label=label)
  latency.set(title="10M parameters, this CPU: latency", ylabel="ms a step", ylim=(0, None))
  throughput.set(title="throughput", ylabel="tokens/s", ylim=(0, None))
  for axes in (memory, latency, throughput):
    axes.set_xlabel("tokens remembered")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=7)
  figure.savefig(path, dpi=120)


def main() -> None:
  os.environ.update({k: v for k, v in WITHOUT_TPU.items() if k not in os.environ})
  for flag, known in ((_TARGETS, TARGETS), (_MODELS, ("retnet", "transformer"))):
    if unknown := set(flag.value) - set(known):
      raise ValueError(f"--{flag.name}: unknown {sorted(unknown)}; choose among {list(known)}")
  for flag in (_LENGTHS, _BATCHES):
    if not all(x.isdigit() and int(x) > 0 for x in flag.value) or not flag.value:
      raise ValueError(f"--{flag.name}={','.join(flag.value)}: give positive numbers")
  jax.config.update("jax_platforms", "cpu")
  output = pathlib.Path(_OUTPUT.value)
  path = output.with_suffix(".json")
  result = json.loads(path.read_text()) if path.exists() else {}
  same = result.get("preset") == _PRESET.value and result.get("vocab_size") == _VOCAB_SIZE.value
  found = result["bytes"] if same and not _OVERWRITE.value else {}
  result = dict(preset=_PRESET.value, vocab_size=_VOCAB_SIZE.value, bytes=found, paper=PAPER)
  result["times"] = read_times(_TIMES.value) if _TIMES.value else {}
  output.parent.mkdir(parents=True, exist_ok=True)
  for model, target, batch, length in points():
    name = f"{model}_{target}_b{batch}_t{length}"
    if name not in found:
      topology, chips, dtype = TARGETS[target]
      section = dict(name=model, preset=_PRESET.value, dtype=dtype)
      config = model_config(section, _VOCAB_SIZE.value)
      where = dict(model=model, target=target, batch_size=batch, length=length, dtype=dtype)
      found[name] = where | decode_bytes(config, batch, length, topology, chips)
      found[name]["versions"] = dict(jax=jax.__version__)
    print(_line(found[name]), flush=True)
    result["ratios"] = summarise(result)  # After each point: an interrupted run has left something.
    path.write_text(json.dumps(result, indent=1) + "\n")
  draw(result, output.with_suffix(".png"))
  _print_ratios(result["ratios"])


def _line(point: Mapping[str, Any]) -> str:
  gb = lambda key: point[key] / 1e9
  return (
    f"{point['model']:<12} {point['target']:<7} batch {point['batch_size']:<3} "
    f"{point['length']:>5} tokens: {gb('total_bytes_per_chip'):6.2f} GB on each of "
    f"{point['chips']} (weights {gb('weight_bytes'):.2f} GB, cache {gb('cache_bytes'):.3f} GB in "
    f"all; temporaries {gb('temporary_bytes_per_chip'):.3f} GB)"
  )


def _print_ratios(ratios: Sequence[Mapping[str, Any]]) -> None:
  print("\nTransformer over RetNet:")
  for row in ratios:
    print(f"  {row['what']:<9} {row['target']:<8} b{row['batch_size']} t{row['length']}", end="")
    print(f"  {row['ratio']:.2f}")
  print(
    f"\nThe paper, 7B on one A100 at 8192 tokens: memory {PAPER['memory_ratio']}, throughput "
    f"{PAPER['throughput_ratio']}, latency {PAPER['latency_ratio']}.\n"
    "Memory is comparable where dtype and batch are, and the paper does not tell its batch; its\n"
    "times are not: they are of 7B parameters on a GPU, ours of 10M on a CPU, where only their\n"
    "dependence on the length can be held against the figure."
  )


if __name__ == "__main__":
  app.run_tool(main, flag_names=[f.name for f in _FLAGS])
