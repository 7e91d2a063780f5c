r"""Eight needles in 64K tokens: figure 5 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/figure5_needles.py

One of eight is asked for, by length and depth. The runs are those of figure 4.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figure 5: eight needles in up to 64K tokens"
BASE = "transformer"
_LENGTHS = common.NEEDLE_LENGTHS
METRICS = {f"{k}K": f"needles_{k}k/accuracy" for k in _LENGTHS} | {
  f"{k}K, depth {depth} %": f"needles_{k}k/accuracy_depth_{depth}"
  for depth in (0, 25, 50, 75, 100)
  for k in _LENGTHS
}
RUNS = common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, 350B tokens and 1.5B of its extension.")

# Averages, then a line a depth.
_FIGURES = {
  "transformer": """
    .95 .84 .78 .64 .50 .75 .78 .52
    .96 .96 .90 .88 .50 .82 .78 .04
    .92 .58 .66 .16 .12 .58 .66 .12
    .90 .76 .72 .40 .28 .48 .56 .70
    .96 .92 .64 .76 .58 .88 .88 .72
    1 1 1 1 1 1 1 1""",
  "diff": """
    1.00 .94 .87 .83 .83 .92 .84 .86
    1.00 1.00 1.00 .44 1.00 .98 .66 .60
    1.00 .86 .66 .80 .52 .80 .64 .88
    1.00 .96 .74 .92 .90 .92 .92 .92
    .98 .90 .94 .98 .74 .88 .98 .90
    1 1 1 1 1 1 1 1""",
}
ROWS = {
  model: common.row(model, "64k", dict(zip(METRICS, map(float, figures.split()), strict=True)))
  for model, figures in _FIGURES.items()
}
