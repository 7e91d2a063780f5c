r"""Accuracy after 1T tokens: table 1 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/table1_accuracy.py

The run is the paper's, on a corpus of your own (`-- --config.data.path=...`). The evaluations,
seven tasks of the LM Eval Harness without examples, are not here: their figures are listed for
whoever adds them, and what is measured is the loss. Other rows of the table are others' models.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 1: accuracy of 3B parameters after 1T tokens"
BASE = "diff"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, 1T tokens.")

ROWS = {
  "diff": common.row(
    "diff", "3b_1t", common.harness(37.8, 72.9, 69.0, 71.4, 29.0, 76.8, 67.1, 60.6)
  )
}
