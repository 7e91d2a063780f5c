r"""Perplexity by length of context: table 8 of https://arxiv.org/abs/2307.08621.

One row, at the size of tables 5 and 6 (table 8 does not tell its own; needs accelerators):

  python -m experiments.train --workdir=runs/retnet \
      --config=experiments/configs/retnet/table8_context.py:row=retnet

The table at a scale for two CPU cores, three seeds a row; beside the paper's, in
experiments/results/retnet/table8_context.md:

  python -m experiments.tables --config=experiments/configs/retnet/table8_context.py \
      --scale=small --seeds=0,1,2 --num_workers=2

One model a row, trained at the longest of the contexts. Chunks of that length are cut from the
documents; of each its last sixteenth is scored, behind the whole chunk, its last half or its last
quarter: the same tokens behind every context.

Arguments: `row`, a name of `ROWS`; `scale`, `paper` or `small`; `smoke` for a run of seconds;
`seed`.
"""

from experiments.configs.retnet import common

TITLE = "RetNet, table 8: length of context"
BASE = "transformer"
METRICS = {
  f"context {length}": f"{name}/perplexity"
  for length, name in zip((512, 1024, 2048), common.CONTEXTS, strict=True)
}
AXIS = dict(
  name="context, the paper's tokens; 16 times ours at the small scale",
  values=dict(zip(METRICS, (512, 1024, 2048), strict=True)),
  log=True,
)
SCALES = {
  "paper": "The 200M parameters of tables 5 and 6; the size of table 8's models is unknown.",
  "small": f"{common.SCALES['small']} Contexts are 32, 64 and 128 bytes, of which the last 8 are "
  "scored.",
}
RUNS = common.RUNS

ROWS = {
  "transformer": dict(
    common.TRANSFORMER, expected=dict(zip(METRICS, (13.55, 12.56, 12.35), strict=True))
  ),
  "retnet": dict(common.RETNET, expected=dict(zip(METRICS, (13.09, 12.14, 11.98), strict=True))),
}


def get_config(arg=None):
  return common.get_config(arg, ROWS, METRICS)
