r"""RetNet beside other mixers of linear cost: table 5 of https://arxiv.org/abs/2307.08621.

One row, as the paper trained it (give it a corpus with --config.data.path; needs accelerators):

  python -m experiments.train --workdir=runs/rwkv \
      --config=experiments/configs/retnet/table5_baselines.py:row=rwkv

The table at a scale for two CPU cores, three seeds a row; beside the paper's, in
experiments/results/retnet/table5_baselines.md:

  python -m experiments.tables --config=experiments/configs/retnet/table5_baselines.py \
      --scale=small --seeds=0,1,2 --num_workers=2

Arguments: `row`, a name of `ROWS`; `scale`, `paper` or `small`; `smoke` for a run of seconds;
`seed`. README.md beside this file says what the two scales share, and what the paper leaves open.
"""

from experiments.configs.retnet import common

TITLE = "RetNet, table 5: other mixers of linear cost"
BASE = "retnet"
METRICS, SCALES, RUNS = common.METRICS, common.SCALES, common.RUNS

ROWS = {
  "retnet": common.RETNET,
  "rwkv": dict(
    about="RWKV's time mixing, with the others' feed-forward",
    name="rwkv",
    expected=common.in_domain(30.92, 51.41, 28.17, 19.80, 25.78),
  ),
  "h3": dict(
    about="H3, heads of 8",
    name="h3",
    head_dim=dict(paper=8, small=8),
    # A sixteenth of the paper's window would leave 4 of the original release's 64 taps.
    small=dict(state_dim=16),
    expected=common.in_domain(29.97, 49.17, 24.29, 19.19, 25.11),
  ),
  "hyena": dict(
    about="Hyena of order 2",
    name="hyena",
    # The filters' network would have a third of a layer's parameters.
    small=dict(filter_dim=16, filter_features=9),
    expected=common.in_domain(32.08, 52.75, 28.18, 20.55, 26.51),
  ),
  "linear_transformer": dict(
    about="linear attention, sinusoidal embeddings",
    name="linear_transformer",
    # Sinusoids are as large as words made for a sum with them.
    model=dict(scale_embeddings=True),
    head_dim=common.HEADS,
    expected=common.in_domain(40.24, 63.86, 28.45, 25.33, 32.02),
  ),
  "transformer": common.TRANSFORMER,
}


def get_config(arg=None):
  return common.get_config(arg, ROWS, METRICS)
