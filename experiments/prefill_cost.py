r"""What YOCO saves: cache by length and size, and prefill by length; figures 7 to 10 of its paper.

  python -m experiments.prefill_cost

https://arxiv.org/abs/2405.05254, section 5.4. Bytes are exact and of the paper's sizes, from shapes
alone (no parameter is ever made); closed forms stand beside what `init_cache` makes. Times are
measured, of two models that fit this CPU: only how they grow with the length can be held against
the figure. Throughput (figure 10) is not measured: it needs batches that fill an accelerator.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from latentlab import app
from latentlab.models import LanguageModel, build_config, init_cache, num_params, prefill

_LENGTHS = flags.DEFINE_list(
  "prefill_lengths", ["1024", "2048", "4096", "8192", "16384"], "Tokens of the prompts."
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Passes, of which the fastest counts.", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
  "prefill_output", "experiments/results/yoco/figure7_cost", "Figures' file, without its ending."
)
_FLAGS = (_LENGTHS, _REPEATS, _OUTPUT)

VOCAB_SIZE = 100_288
K = 1024

# Transformer over YOCO, both of 3B parameters on an H100: figures 7, 9 and 10.
PAPER = dict(
  length=[32 * K, 64 * K, 128 * K, 256 * K, 512 * K, K * K],
  memory_ratio=[1.95, 2.32, 3.01, 4.16, 6.39, 9.38],
  prefill_ratio=[2.87, 5.05, 8.36, 15.55, 30.3, 71.82],
  throughput_ratio=[2.72, 2.57, 2.77, 4.37, 9.56, None],
)

# Layers, width, heads, heads of keys and values; of 65B the width of keys and values is what the
# paper's "1 GB holds 1.6K tokens" says. Beside them, figure 8's ratio of cache a token.
SIZES = {
  "1.2B": ((24, 2048, 16, 16), 24),
  "3B": ((26, 3072, 24, 8), None),
  "6.4B": ((32, 4096, 32, 32), 32),
  "13B": ((40, 5120, 40, 40), 40),
  "65B": ((80, 8192, 64, 16), 80),
}
SMALL = dict(num_layers=4, embed_dim=128, num_heads=4, dtype="float32")
MODELS = ("transformer", "yoco")


def section(model: str, size: str) -> dict[str, Any]:
  """The `model` section of a config, of both models at one of the sizes."""
  (num_layers, embed_dim, num_heads, num_kv_heads), _ = SIZES[size]
  common = dict(name=model, num_layers=num_layers, embed_dim=embed_dim, num_heads=num_heads)
  common |= dict(num_kv_heads=num_kv_heads, dtype="bfloat16", feed_forward="swiglu")
  if size == "3B":
    common["mlp_dim"] = 8192
  if model == "yoco":
    # The heads of states are the 3B model's own, and 256 wide in the others.
    common["num_self_heads"] = num_heads if size == "3B" else embed_dim // 256
  return common


def closed_form(model: str, size: str, length: int) -> int:
  """Bytes of keys, values and states of a row: bfloat16, but for states."""
  (num_layers, embed_dim, num_heads, num_kv_heads), _ = SIZES[size]
  keys_and_values = 2 * num_kv_heads * (embed_dim // num_heads) * length
  if model == "transformer":
    return 2 * num_layers * keys_and_values
  state = embed_dim**2 // section(model, size)["num_self_heads"]
  return 2 * keys_and_values + 4 * (num_layers // 2) * state


def cache_bytes(fields: Mapping[str, Any], length: int) -> int:
  """Bytes of keys, values and states that `init_cache` makes for a row of so many tokens."""
  config = build_config(fields, VOCAB_SIZE)
  cache = jax.eval_shape(lambda: init_cache(config, 1, length))
  floats = [x for x in jax.tree.leaves(cache) if jnp.issubdtype(x.dtype, jnp.floating)]
  return sum(x.size * x.dtype.itemsize for x in floats)


def caches() -> dict[str, dict[str, Any]]:
  """Figure 8, and figure 7's memory: weights and cache, without what a step holds for a moment."""
  found = {}
  for size, (_, paper_ratio) in SIZES.items():
    token, entry = {}, {}
    for model in MODELS:
      fields = section(model, size)
      token[model] = cache_bytes(fields, 2 * K) - cache_bytes(fields, 2 * K - 1)
      entry[model] = dict(
        cache_bytes_per_token=token[model],
        constant_bytes=cache_bytes(fields, K) - K * token[model],
        tokens_per_gib=2**30 // token[model],
      )
    entry["ratio_per_token"] = token["transformer"] / token["yoco"]
    found[size] = entry | dict(paper_ratio_per_token=paper_ratio)
  return found


def memory() -> list[dict[str, Any]]:
  """3B parameters by length."""
  rows = []
  for length, paper in zip(PAPER["length"], PAPER["memory_ratio"], strict=True):
    row: dict[str, Any] = dict(length=length, paper_ratio=paper)
    for model in MODELS:
      fields = section(model, "3B")
      weights = 2 * num_params(build_config(fields, VOCAB_SIZE))["total"]
      cache = cache_bytes(fields, length)
      forms = dict(weight_bytes=weights, cache_bytes=cache)
      row[model] = forms | dict(closed_form_cache_bytes=closed_form(model, "3B", length))
    total = {m: row[m]["weight_bytes"] + row[m]["cache_bytes"] for m in MODELS}
    row["ratio"] = round(total["transformer"] / total["yoco"], 2)
    row["cache_ratio"] = round(row["transformer"]["cache_bytes"] / row["yoco"]["cache_bytes"], 2)
    rows.append(row)
  return rows


def prefill_seconds(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
  """The fastest of some passes over a prompt, with and without YOCO's early exit."""
  rows: dict[int, dict[str, Any]] = {n: dict(length=n) for n in lengths}
  for model in MODELS:
    config = build_config(dict(name=model, feed_forward="swiglu", **SMALL), 256)
    module = LanguageModel(config)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    for n in lengths:
      tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, n)), jnp.int32)
      for early_exit in (True, False) if model == "yoco" else (True,):
        run = jax.jit(lambda p, t, e=early_exit, m=module: prefill(m, p, t, early_exit=e))
        jax.block_until_ready(run(params["params"], tokens))
        times = []
        for _ in range(repeats):
          start = time.perf_counter()
          jax.block_until_ready(run(params["params"], tokens))
          times.append(time.perf_counter() - start)
        rows[n][model + ("" if early_exit else "_whole")] = round(min(times), 5)
  for row in rows.values():
    row["ratio"] = round(row["transformer"] / row["yoco"], 2)
  return list(rows.values())


def draw(result: Mapping[str, Any], path: pathlib.Path) -> None:
  """Memory by length, its ratio beside the paper's, and prefill by length."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(12, 3.6), layout="constrained")
  FigureCanvasAgg(figure)
  size, ratio, times = figure.subplots(1, 3)
  rows = result["memory"]
  lengths = [row["length"] for row in rows]
  for model in MODELS:
    total = [(row[model]["weight_bytes"] + row[model]["cache_bytes"]) / 1e9 for row in rows]
    size.plot(lengths, total, marker="o", label=model)
  size.set(title="3B parameters: weights and cache", ylabel="GB", yscale="log")
  ratio.plot(lengths, [row["ratio"] for row in rows], marker="o", label="memory, ours")
  ratio.plot(lengths, PAPER["memory_ratio"], "--", marker="x", label="memory, paper")
  ratio.plot(lengths, PAPER["prefill_ratio"], ":", marker="x", label="prefill time, paper")
  ratio.set(title="Transformer over YOCO", yscale="log")
  rows = result["prefill"]
  lengths = [row["length"] for row in rows]
  for name, label in (
    ("transformer", "Transformer"),
    ("yoco_whole", "YOCO, every layer for every token"),
    ("yoco", "YOCO, early exit"),
  ):
    times.plot(lengths, [row[name] for row in rows], marker="o", label=label)
  times.set(title=f"{result['small']}: prefill", ylabel="s", yscale="log")
  for axes in (size, ratio, times):
    axes.set(xlabel="tokens", xscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
  figure.savefig(path, dpi=120)


def main() -> None:
  if not _LENGTHS.value or not all(x.isdigit() and int(x) > 0 for x in _LENGTHS.value):
    raise ValueError(f"--prefill_lengths={','.join(_LENGTHS.value)}: give positive numbers")
  jax.config.update("jax_platforms", "cpu")
  small = build_config(dict(name="transformer", feed_forward="swiglu", **SMALL), 256)
  result = dict(
    caches=caches(),
    memory=memory(),
    prefill=prefill_seconds(sorted(map(int, _LENGTHS.value)), _REPEATS.value),
    small=f"{num_params(small)['total'] / 1e6:.1f}M parameters, this CPU",
    paper=PAPER,
    versions=dict(jax=jax.__version__),
  )
  path = pathlib.Path(_OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
  draw(result, path.with_suffix(".png"))
  for size, entry in result["caches"].items():
    print(
      f"{size:>5}: {entry['transformer']['cache_bytes_per_token']:>8} bytes a token, YOCO "
      f"{entry['yoco']['cache_bytes_per_token']:>6}; ratio {entry['ratio_per_token']:.0f} "
      f"(paper: {entry['paper_ratio_per_token']})"
    )
  for row in result["memory"]:
    print(f"{row['length']:>8} tokens: memory {row['ratio']} (paper: {row['paper_ratio']})")
  for row in result["prefill"]:
    print(
      f"{row['length']:>8} tokens: prefill {row['transformer']:.3f} s, YOCO {row['yoco']:.3f} s "
      f"({row['yoco_whole']:.3f} s without early exit); ratio {row['ratio']}"
    )


if __name__ == "__main__":
  app.run_tool(main, flag_names=[f.name for f in _FLAGS])
