r"""Outliers among activations: table 5 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/diff_transformer/table5_outliers.py

The largest magnitudes of attention logits and of hidden states of some batches, and the median. The
paper's are on 0.4M tokens, of 3B parameters and 350B tokens; here the runs are those of table 6, so
that nothing more is trained.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 5: outliers among activations"
BASE = "transformer"
_COLUMNS = {**{f"top {k}": f"top_{k}" for k in (1, 2, 3, 10, 100)}, "median": "median"}
METRICS = {
  f"{what}, {column}": f"activations/{what}_{metric}"
  for what in ("logits", "hidden")
  for column, metric in _COLUMNS.items()
}
SCALES, RUNS = common.SCALES, common.RUNS

_FIGURES = {
  "transformer": (
    *(318.0, 308.2, 304.9, 284.7, 251.5, 5.4),
    *(3608.6, 3607.4, 3603.6, 3552.1, 2448.2, 0.6),
  ),
  "diff": (
    *(38.8, 38.8, 37.3, 32.0, 27.4, 3.3),
    *(1688.2, 1672.5, 1672.1, 1624.3, 740.9, 1.2),
  ),
  "diff_v2": 12 * (None,),
}
ROWS = {
  model: common.row(model, "ablation", dict(zip(METRICS, figures, strict=True)))
  for model, figures in _FIGURES.items()
}
