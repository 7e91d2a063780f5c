r"""Accuracy of equal runs: table 8 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/table8_accuracy.py

Both models of 3B parameters after 350B tokens. The evaluations, seven tasks of the LM Eval Harness
without and with five examples, are not here: their figures are listed, and what is measured is the
loss. Tables 4 and 5 and figures 3b and 8 are of these runs.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 8: accuracy of 3B parameters after 350B tokens"
BASE = "transformer"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, 350B tokens.")

_FIGURES = {
  "transformer": (
    (32.2, 66.8, 62.9, 63.4, 26.2, 74.5, 61.6, 55.4),
    (34.0, 69.5, 65.3, 63.4, 25.0, 75.2, 62.6, 56.4),
  ),
  "diff": (
    (33.0, 68.3, 60.1, 66.2, 27.6, 75.5, 62.7, 56.2),
    (35.0, 69.5, 67.2, 66.9, 27.6, 76.1, 63.8, 58.0),
  ),
}
ROWS = {
  model: common.row(model, "3b", common.harness(*zero, shots=0) | common.harness(*five, shots=5))
  for model, (zero, five) in _FIGURES.items()
}
