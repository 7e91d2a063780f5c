r"""What each part of a RetNet is worth: table 6 of https://arxiv.org/abs/2307.08621.

One row, as the paper trained it (give it a corpus with --config.data.path; needs accelerators):

  python -m experiments.train --workdir=runs/no_gate \
      --config=experiments/configs/retnet/table6_ablations.py:row=no_gate

The table at a scale for two CPU cores, three seeds a row; beside the paper's, in
experiments/results/retnet/table6_ablations.md:

  python -m experiments.tables --config=experiments/configs/retnet/table6_ablations.py \
      --scale=small --seeds=0,1,2 --num_workers=2

Arguments: `row`, a name of `ROWS`; `scale`, `paper` or `small`; `smoke` for a run of seconds;
`seed`. README.md beside this file says what the two scales share.
"""

from experiments.configs.retnet import common

TITLE = "RetNet, table 6: ablations"
BASE = "retnet"
METRICS, SCALES, RUNS = common.METRICS, common.SCALES, common.RUNS

ROWS = {
  "retnet": common.RETNET,
  "no_gate": dict(
    about="no swish gate; a Transformer's split of parameters (d_v = d_k, feed-forward 4d)",
    expected=common.in_domain(27.84, 49.44, 22.52, 17.45, 23.72),
    model=dict(gate=False, value_factor=1.0),
  ),
  # What took the norm's place is unknown. Bare retention grows with the position, so the row is
  # divided by s_n, the scale-free part of the norm's work (section 2.2; the decay's row sum).
  "no_group_norm": dict(
    about="no head norm; rows are divided by s_n instead (the paper does not say)",
    expected=common.in_domain(27.54, 46.95, 22.61, 17.59, 23.73),
    model=dict(head_norm="none", normalization="decay"),
  ),
  "no_decay": dict(
    about="gamma = 1",
    expected=common.in_domain(27.86, 47.85, 21.99, 17.49, 23.70),
    model=dict(decay="one"),
  ),
  "no_multi_scale": dict(
    about="gamma = 127/128 in every head",
    expected=common.in_domain(27.02, 47.18, 22.08, 17.17, 23.38),
    model=dict(decay="const", decay_value=127 / 128),
  ),
  "small_heads": dict(
    about="four times as many heads, each a quarter as wide",
    expected=common.in_domain(27.68, 47.72, 23.09, 17.46, 23.41),
    head_dim=dict(paper=64, small=8),
  ),
}


def get_config(arg=None):
  return common.get_config(arg, ROWS, METRICS)
