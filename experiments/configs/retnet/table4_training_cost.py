r"""Memory and speed of training at 8192 tokens: table 4 of https://arxiv.org/abs/2307.08621.

  python -m experiments.train --workdir=runs/cost \
      --config=experiments/configs/retnet/table4_training_cost.py:row=retnet_1b3

Twenty steps, at the end of which `perf/tokens_per_sec` and `perf/memory` (bytes) stand beside the
paper's. Those are of eight A100 of 80 GB, in fp16 or bf16 (it does not say); unknown are the batch
size, the degree of tensor parallelism (6.7B and 13B) and whether words a second are of one device.
Its RetNet was written in plain PyTorch, and FlashAttention was the first.

Arguments: `row`, a name of `COSTS`; `smoke` for a run of seconds; `seed`.
"""

from experiments.configs import common
from latentlab.models import retnet, transformer

# GB a device and words a second: of the Transformer, the same with FlashAttention, and RetNet.
COSTS = {
  "1b3": dict(memory=(74.8, 38.8, 34.5), speed=(10832.4, 63965.2, 73344.8)),
  "2b7": dict(memory=(69.6, 42.1, 42.0), speed=(5186.0, 34990.2, 38921.2)),
  "6b7": dict(memory=(69.0, 51.4, 48.0), speed=(2754.4, 16230.1, 17458.6), tensor=8),
  "13b": dict(memory=(61.4, 46.3, 45.9), speed=(1208.9, 7945.1, 8642.2), tensor=8),
}
MODELS = dict(retnet=retnet, transformer=transformer)


def get_config(arg=None):
  rows = tuple(f"{name}_{size}" for size in COSTS for name in MODELS)
  arg = common.parse_arg(arg, row=rows, smoke=False, seed=0)
  name, _, size = arg.row.partition("_")
  cost = COSTS[size]
  c = common.language_model(seed=arg.seed)
  c.model = common.model(name, **MODELS[name].PRESETS[size], dtype="bfloat16", remat="full")
  c.model.update(norm="layer", init="retnet")
  if name == "retnet":
    c.model.chunk_size = 512
  c.data.update(tokenizer="bpe", vocab_size=32_000, seq_length=8192)
  c.batch_size = 8
  c.mesh.tensor = cost.get("tensor", 1)
  c.mesh.fsdp, c.mesh.data = (8, -1) if c.mesh.tensor == 1 else (1, -1)
  c.optimizer.update(name="adamw", peak_lr=3e-4, b2=0.98, clip_norm=2.0, warmup_steps=10)
  c.train_steps, c.log_steps, c.checkpoint_steps = 20, 5, 20
  c.evals = {}
  names = ("without FlashAttention", "with FlashAttention", "RetNet")
  paper = range(2, 3) if name == "retnet" else range(2)
  for i in paper:
    c.expected[f"perf/memory in GB ({names[i]})"] = cost["memory"][i]
    c.expected[f"perf/tokens_per_sec ({names[i]})"] = cost["speed"][i]
  if arg.smoke:
    common.smoke(c)
    c.mesh.update(data=-1, fsdp=1, tensor=1)
  return c
