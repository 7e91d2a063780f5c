"""What a training step of the papers' sizes holds and sends, compiled for TPUs that are not there.

  python -m experiments.benchmarks.tpu_train --train_cases=yoco_3b_seq,diff_transformer_3b

A step of `experiments.train` is compiled ahead of time from shapes alone, with every layer's remat,
for a slice of TPUs; the compiler says what each chip holds, and the program which collectives it
has. Those within a loop over layers are listed once, by what they bring to a chip. Needs libtpu and
no TPU; minutes a case. README.md has the rest.
"""

import collections
import json
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from experiments.configs import common
from experiments.inference_cost import WITHOUT_TPU
from latentlab.models import num_params, registry
from latentlab.train import partition, tasks

# Topology, mesh, model and the shape of a batch; 3B models at 4096 tokens as in both papers, and
# YOCO's chunk parallelism at 32k tokens a row.
_CHIPS = "v5p:2x2x2"
CASES: dict[str, dict[str, Any]] = {
  "yoco_160m_seq": dict(
    model=dict(name="yoco", preset="160m"), mesh=dict(fsdp=2, seq=4), shape=(2, 2048)
  ),
  "transformer_2b7": dict(
    model=dict(name="transformer", preset="2b7"), mesh=dict(fsdp=8), shape=(8, 4096)
  ),
  "diff_transformer_3b": dict(
    model=dict(name="diff_transformer", preset="3b", num_kv_heads=4),
    mesh=dict(fsdp=8),
    shape=(8, 4096),
  ),
  "yoco_3b": dict(model=dict(name="yoco", preset="3b"), mesh=dict(fsdp=8), shape=(8, 4096)),
  "yoco_3b_seq": dict(
    model=dict(name="yoco", preset="3b"), mesh=dict(fsdp=2, seq=4), shape=(2, 32768)
  ),
  "transformer_2b7_seq": dict(
    model=dict(name="transformer", preset="2b7"), mesh=dict(fsdp=2, seq=4), shape=(2, 32768)
  ),
}
VOCAB_SIZE = 100_288

_CASES = flags.DEFINE_list("train_cases", list(CASES), "Programs to compile.")
_TOPOLOGY = flags.DEFINE_string("topology", _CHIPS, "Slice of TPUs to compile for.")
_OUTPUT = flags.DEFINE_string(
  "tpu_train_output", "experiments/results/benchmarks/tpu_train.json", "File; '' for none."
)

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = dict(f32=4, bf16=2, s32=4, u32=4, pred=1, f16=2, s8=1, u8=1)


def compile_step(case: Mapping[str, Any], topology: str) -> dict[str, Any]:
  """Compiles a case; returns bytes per chip, and the program's collectives."""
  config = common.language_model()
  fields = {f: x for f, (_, x) in registry.fields(case["model"]["name"]).items() if x is not None}
  config.model = fields | case["model"] | dict(dtype="bfloat16", remat="full", unroll=1)
  config.mesh = dict(data=1, fsdp=1, tensor=1, seq=1) | case["mesh"]
  chips = math.prod(config.mesh.values())
  devices = topologies.get_topology_desc(topology, platform="tpu").devices[:chips]
  language_model = tasks.build_task(config, VOCAB_SIZE)
  trainer = partition.make_trainer(language_model, config, devices)
  rows, length = (dict(trainer.rules)[name] for name in ("act_batch", "act_length"))
  layout = NamedSharding(trainer.mesh, PartitionSpec(rows, length))
  ids, weights = (
    jax.ShapeDtypeStruct(case["shape"], dtype, sharding=layout)
    for dtype in (jnp.int32, jnp.float32)
  )
  batch = dict(inputs=ids, targets=ids, weights=weights, positions=None, segment_ids=ids)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    # `as_text` fails for programs with asynchronous calls of several operands.
    options = dict(xla_dump_to=folder, xla_dump_hlo_as_text=True)
    compiled = trainer.lower(trainer.abstract_state, batch).compile(options)
    program = _newest(pathlib.Path(folder))
  held = compiled.memory_analysis()
  arguments, temporaries = held.argument_size_in_bytes, held.temp_size_in_bytes
  outputs, aliased = held.output_size_in_bytes, held.alias_size_in_bytes
  return dict(
    num_params=num_params(language_model.model.config),
    chips=chips,
    state_bytes_per_chip=arguments,
    temporary_bytes_per_chip=temporaries,
    total_bytes_per_chip=arguments + outputs - aliased + temporaries,
    collectives=collectives(program),
    compile_seconds=round(time.perf_counter() - start, 1),
  )


def _newest(dumps: pathlib.Path) -> str:
  """The last program that was written."""
  programs = sorted(
    dumps.glob("*after_codegen.txt"), key=lambda path: (path.stat().st_mtime, path.stat().st_size)
  )
  if not programs:
    raise RuntimeError(f"libtpu wrote no program: {sorted(p.name for p in dumps.iterdir())[:20]}")
  return programs[-1].read_text()


def collectives(text: str) -> dict[str, dict[str, int]]:
  """Collectives of a program by kind: how many there are, and the bytes of their results."""
  found = {kind: collections.Counter() for kind in _COLLECTIVES}
  for line in text.splitlines():
    match = re.search(rf"= (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(", line)
    if match is None:
      continue
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
    if match[3] and match[2] == "collective-permute":  # Operand, result, and two words of context.
      shapes = shapes[1:2]
    elif match[3] and match[2] != "all-reduce":  # Operands, then results.
      shapes = shapes[len(shapes) // 2 :]
    size = sum(
      _BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
      for dtype, dims in shapes
    )
    found[match[2]].update(count=1, bytes=size)
  return {kind: dict(count) for kind, count in found.items() if count}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"arguments without a flag: {argv[1:]}")
  if unknown := sorted(set(_CASES.value) - set(CASES)):
    raise app.UsageError(f"--train_cases: unknown {unknown}; choose among {list(CASES)}")
  for name, value in WITHOUT_TPU.items():
    os.environ.setdefault(name, value)
  output = _OUTPUT.value and pathlib.Path(_OUTPUT.value)
  result = json.loads(output.read_text()) if output and output.exists() else dict(cases={})
  for name in _CASES.value:
    report = compile_step(CASES[name], _TOPOLOGY.value)
    result["cases"][name] = dict(
      topology=_TOPOLOGY.value, **CASES[name], jax=jax.__version__, **report
    )
    print(
      f"{name}: {report['total_bytes_per_chip'] / 2**30:.1f} GiB a chip; {report['collectives']}",
      flush=True,
    )
    if output:
      output.parent.mkdir(parents=True, exist_ok=True)
      output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
  app.run(main)
