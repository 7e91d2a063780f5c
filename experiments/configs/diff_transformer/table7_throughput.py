r"""Speed of training: table 7 of the Differential Transformer, https://arxiv.org/abs/2410.05258.

  python -m experiments.train --workdir=runs/speed \
      --config=experiments/configs/diff_transformer/table7_throughput.py:row=diff_3b_2k

Twenty steps, at the end of which `perf/tokens_per_sec` stands beside the paper's. Those are of an
unknown number of H100 of 80 GB and an unknown batch, with a FlashAttention-2 for unequal head sizes
under both models; of the forward pass alone it has others, which nothing here measures.

Arguments: `row`, a name of `SPEEDS`; `smoke` for a run of seconds; `seed`.
"""

from experiments.configs import common as configs
from experiments.configs.diff_transformer import common

# Tokens a second, forward and backward, and forward alone.
SPEEDS = {
  "transformer_3b_2k": (7247, 51228),
  "diff_3b_2k": (6635, 46811),
  "transformer_3b_4k": (7491, 48762),
  "diff_3b_4k": (6718, 44521),
  "transformer_13b1_2k": (998, 14346),
  "diff_13b1_2k": (942, 13653),
}


def get_config(arg=None):
  arg = configs.parse_arg(arg, row=tuple(SPEEDS), smoke=False, seed=0)
  model, size, length = arg.row.split("_")
  c = common.get_config(f"row={model}_{size},seed={arg.seed}{',smoke' * arg.smoke}")
  c.evals = {}
  if not arg.smoke:
    c.data.seq_length = 1024 * int(length[:-1])
    c.batch_size = 8
    c.train_steps, c.log_steps, c.checkpoint_steps = 20, 5, 20
    c.optimizer.warmup_steps = 10
    c.mesh.update(data=-1, fsdp=8)
  both, forward = SPEEDS[arg.row]
  c.expected["perf/tokens_per_sec"] = both
  c.expected["tokens_per_sec of a forward pass, not measured"] = forward
  return c
