r"""Attention to answer and noise: table 3 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/diff_transformer/table3_attention.py

By the depth of the needle that is asked for. Signed weights are divided by their sum; how the paper
normalises them is unknown. figure1_attention.py has them divided by the sum of magnitudes too. The
runs are those of table 2.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 3: attention to answer and noise"
BASE = "transformer"
DEPTHS = (0, 25, 50, 75, 100)
METRICS = {
  f"{part}, {depth} %": f"attention/{part}_signed_depth_{depth}"
  for part in ("answer", "noise")
  for depth in DEPTHS
}
RUNS = common.RUNS
SCALES = dict(small=common.NEEDLES_SMALL)

_FIGURES = {
  "transformer": (0.03, 0.03, 0.03, 0.07, 0.09, 0.51, 0.54, 0.52, 0.49, 0.49),
  "diff": (0.27, 0.30, 0.31, 0.32, 0.40, 0.01, 0.02, 0.02, 0.02, 0.01),
  "diff_v2": 10 * (None,),
}
ROWS = {
  model: common.row(model, "needles", dict(zip(METRICS, figures, strict=True)))
  for model, figures in _FIGURES.items()
}
