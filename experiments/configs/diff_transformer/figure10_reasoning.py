r"""Reasoning at length: figure 10 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/figure10_reasoning.py

The runs go on from those of figure 9 with 2B tokens of OpenThoughts-114K-Math. The evaluations are
not here: their accuracies are listed, and what is measured is the loss.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figure 10: reasoning, second stage"
BASE = "transformer"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters behind the first stage, and 2B tokens.")

_SETS = ("GSM-8K", "MATH", "SVAMP", "ASDiv", "MAWPS", "CARP", "TABMWP", "CollegeMath", "average")
_SETS += ("tokens of an answer",)
_FIGURES = {
  "transformer": (41.2, 19.9, 55.0, 78.8, 75.1, 32.3, 27.5, 16.4, 43.3, 6913),
  "diff": (42.6, 25.0, 63.7, 83.8, 86.2, 42.5, 32.4, 30.0, 50.8, 6144),
}
ROWS = {
  model: common.row(model, "reasoning", common.UNKNOWN | dict(zip(_SETS, figures, strict=True)))
  for model, figures in _FIGURES.items()
}
