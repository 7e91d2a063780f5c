r"""Static speed of the TPU kernels, from the schedules that libtpu compiles them to: no TPU needed.

  python -m experiments.benchmarks.tpu_static --chips=v5e,v6e

Each case is compiled in a process of its own, since the compiler's dump is asked for before jax is
imported. Of every kernel in its program the dump has the final bundles, one a cycle where nothing
stalls, and what each of them uses. README.md says how the figures are to be read.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags

from experiments.benchmarks.tpu_schedule import read_schedule

_CHIPS = flags.DEFINE_list("chips", ["v5e", "v5p", "v6e"], "Chips to compile for.")
_CASES = flags.DEFINE_list("cases", None, "Cases to compile, by prefix; all by default.")
_OUTPUT = flags.DEFINE_string(
  "output", "experiments/results/benchmarks/tpu_static.json", "Where figures go; '' for nowhere."
)
_WORKER = flags.DEFINE_string(
  "worker", None, "Compile this case on the one chip, and nothing else."
)

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class Case:
  """A program with kernels in it.

  Attributes:
    build: Makes the function, and the shapes and dtypes of its arguments.
    token_heads: Tokens times query heads of the whole call; of decoding, states.
  """

  build: Callable[[], tuple[Callable[..., Any], list[tuple[tuple[int, ...], str]]]]
  token_heads: int


def _retention(
  batch: int,
  length: int,
  heads: int,
  head_dim: int,
  value_dim: int,
  *,
  gated: bool = False,
  backward: bool = False,
) -> Case:
  def build():
    import jax

    from pallas_kernels.retention import retention

    lead = (batch, length, heads)
    shapes = [((*lead, dim), "bfloat16") for dim in (head_dim, head_dim, value_dim)]
    shapes.append((lead if gated else (heads,), "float32"))
    forward = lambda *args: retention(*args, implementation="pallas_tpu")
    if not backward:
      return forward, shapes
    shapes.append(((*lead, value_dim), "bfloat16"))

    def gradients(q, k, v, log_decay, dout):
      # A fixed decay is not learned.
      fixed = () if gated else (log_decay,)
      args = (q, k, v, log_decay) if gated else (q, k, v)
      return jax.vjp(lambda *args: forward(*args, *fixed)[0], *args)[1](dout)

    return gradients, shapes

  return Case(build, batch * length * heads)


def _retention_decode(batch: int, heads: int, head_dim: int, value_dim: int) -> Case:
  def build():
    from pallas_kernels.retention import retention_decode

    lead = (batch, heads)
    shapes = [((*lead, dim), "bfloat16") for dim in (head_dim, head_dim, value_dim)]
    shapes += [((heads,), "float32"), ((*lead, head_dim, value_dim), "float32")]
    shapes.append(((*lead, value_dim), "bfloat16"))

    def decode(*args):
      *args, gate = args
      return retention_decode(*args, gate=gate, norm_eps=1e-6, implementation="pallas_tpu")

    return decode, shapes

  return Case(build, batch * heads)


def _diff_attention(
  length: int, head_dim: int, *, heads: int = 2, causal: bool = True, backward: bool = False
) -> Case:
  def build():
    import jax

    from pallas_kernels.diff_attention import diff_attention

    keys = (1, length, heads, 2, head_dim)
    values = (1, length, heads, 2 * head_dim)
    shapes = [(keys, "bfloat16"), (keys, "bfloat16"), (values, "bfloat16"), ((heads,), "float32")]

    def forward(*args):
      return diff_attention(*args, scale=0.1, causal=causal, implementation="pallas_tpu")

    if not backward:
      return forward, shapes
    shapes.append((values, "bfloat16"))
    return lambda *args: jax.vjp(forward, *args[:4])[1](args[4]), shapes

  return Case(build, length * heads)


_RETNET = dict(batch=8, length=4096, heads=8, head_dim=256, value_dim=512)
_YOCO = dict(batch=8, length=4096, heads=8, head_dim=256, value_dim=256, gated=True)

CASES: Mapping[str, Case] = {
  "retention/retnet/fwd": _retention(**_RETNET),
  "retention/retnet/bwd": _retention(**_RETNET, backward=True),
  "retention/yoco/fwd": _retention(**_YOCO),
  "retention/yoco/bwd": _retention(**_YOCO, backward=True),
  "retention/retnet/decode": _retention_decode(8, 8, 256, 512),
  # Without a mask every step is the same; under one, the two kinds of step are branches.
  "diff_attention/full/fwd": _diff_attention(4096, 128, causal=False),
  "diff_attention/full/bwd": _diff_attention(4096, 128, causal=False, backward=True),
  "diff_attention/full64/fwd": _diff_attention(4096, 64, causal=False),
  "diff_attention/full64/bwd": _diff_attention(4096, 64, causal=False, backward=True),
  "diff_attention/causal/bwd": _diff_attention(4096, 128, backward=True),
}


def _compile(name: str, chip: str) -> dict[str, Any]:
  """Compiles a case for a chip, and says what its program tells of each kernel."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from pallas_kernels import mosaic_tpu

  device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
  mesh = jax.make_mesh((1,), ("x",), devices=[device], axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    fn, shapes = CASES[name].build()
    whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(s, jnp.dtype(d), sharding=whole) for s, d in shapes]
    text = jax.jit(fn).lower(*args).compile().as_text()
    info = mosaic_tpu.chip()
    per_cycle = mosaic_tpu.flops_per_cycle()
  hertz = info.bf16_ops_per_second / per_cycle
  kernels = {}
  for line in text.splitlines():
    if 'custom_call_target="tpu_custom_call"' not in line:
      continue
    number = lambda field, line=line: int(re.search(rf'"{field}":"?(\d+)', line)[1])
    used = re.search(r'"used_scoped_memory_configs":\[.*?"size":"(\d+)"', line)
    kernels[re.search(r"%(\S+) =", line)[1]] = dict(
      flops=number("flops"),
      bytes=number("bytes_accessed"),
      vmem_bytes=int(used[1]),
      vmem_limit_bytes=int(re.search(r'"scoped_memory_configs":\[.*?"size":"(\d+)"', line)[1]),
    )
  return dict(
    kernels=kernels,
    cores=info.num_cores,
    flops_per_cycle=per_cycle,
    bytes_per_cycle=info.mem_bw_bytes_per_second / hertz,
  )


def _measure(name: str, chip: str) -> list[dict[str, Any]]:
  """Compiles a case in a process of its own, and reads its dump: an entry per kernel."""
  with tempfile.TemporaryDirectory() as dump:
    environment = os.environ | dict(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",
      TPU_WORKER_HOSTNAMES="localhost",
      TPU_ACCELERATOR_TYPE="v5litepod-4",
      ALLOW_MULTIPLE_LIBTPU_LOAD="1",
      LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    )
    command = [sys.executable, "-m", "experiments.benchmarks.tpu_static"]
    command += [f"--worker={name}", f"--chips={chip}"]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    compiled = json.loads(done.stdout.splitlines()[-1])
    entries = []
    for kernel, facts in compiled["kernels"].items():
      read = lambda kind, kernel=kernel: _only(pathlib.Path(dump), f"*-{kernel}-*-{kind}.txt")
      schedule = read_schedule(
        read("final_bundles"), read("final_hlo-static-per-bundle-utilization")
      )
      steady = schedule.loop - schedule.rare
      steps = schedule.steps * compiled["cores"]  # Cores of a chip share the grid.
      ideal = facts["flops"] / steps / compiled["flops_per_cycle"]
      moved = facts["bytes"] / steps / compiled["bytes_per_cycle"]
      per_step = CASES[name].token_heads / steps
      entries.append(
        dict(
          case=name,
          chip=chip,
          # Under a gradient the name of the call says so.
          kernel=re.sub(r"^(transpose_|jvp_)+|_*(\.\d+)?$", "", kernel),
          grid_steps=steps,
          bundles_per_step=steady,
          rare_bundles=schedule.rare,
          ideal_mxu_cycles=round(ideal, 1),
          hbm_cycles=round(moved, 1),
          ratio=round(steady / ideal, 3),
          ratio_with_rare=round(schedule.loop / ideal, 3),
          cycles_per_token_head=round(steady / per_step, 3),
          spills=schedule.units["spill"],
          fills=schedule.units["fill"],
          vmem_bytes=facts["vmem_bytes"],
          vmem_limit_bytes=facts["vmem_limit_bytes"],
        )
      )
    return entries


def _only(folder: pathlib.Path, pattern: str) -> str:
  (path,) = folder.glob(pattern)
  return path.read_text()


def _versions() -> dict[str, str]:
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
  )
  names = ("jax", "jaxlib", "libtpu")
  return {n: importlib.metadata.version(n) for n in names} | {"commit": commit.stdout.strip()}


def main(argv: list[str]) -> None:
  del argv
  if _WORKER.value:
    print(json.dumps(_compile(_WORKER.value, _CHIPS.value[0])))
    return
  chosen = [n for n in CASES if not _CASES.value or n.startswith(tuple(_CASES.value))]
  rows, versions = [], _versions()
  for name in chosen:
    for chip in _CHIPS.value:
      for row in _measure(name, chip):
        print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        rows.append(row | versions)
  if _OUTPUT.value:
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Rows of cases and chips that were left out stay, with the versions that they were made by.
    old = json.loads(path.read_text())["kernels"] if path.exists() else []
    made = {(row["case"], row["chip"]) for row in rows}
    rows += [row for row in old if (row["case"], row["chip"]) not in made]
    rows.sort(key=lambda row: (row["case"], row["chip"], row["kernel"]))
    path.write_text(json.dumps(dict(kernels=rows), indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
