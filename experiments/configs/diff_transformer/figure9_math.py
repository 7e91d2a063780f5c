r"""Mathematics: figure 9 of the Differential Transformer, https://arxiv.org/abs/2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/figure9_math.py

The runs go on from those of 3B with 20B tokens of synthetic mathematics, which are not public. The
evaluation, the mean accuracy over eight sets, is not here: its figures are listed (recovered from
the paper's vector graphics), and what is measured is the loss.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figure 9: mathematics, first stage"
BASE = "transformer"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, 350B tokens and 20B of mathematics.")

_FIGURES = {
  "transformer": (11.2, 6.9, 10.4, 9.7, 9.4, 12.7, 14.4, 20.1),
  "diff": (9.9, 5.7, 11.2, 10.5, 11.1, 21.6, 28.7, 31.4),
}
ROWS = {
  model: common.row(
    model, "math", common.UNKNOWN | {f"after {6 + 2 * i}B tokens": x for i, x in enumerate(figures)}
  )
  for model, figures in _FIGURES.items()
}
