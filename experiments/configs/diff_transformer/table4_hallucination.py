r"""Hallucination in context: table 4 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/table4_hallucination.py

The runs are those of 3B and 350B tokens. The evaluation, a judgment by GPT-4o of summaries and
answers (100 samples each; the latter from LongBench), is not here: its figures are listed, and what
is measured is the loss.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 4: free of hallucination"
BASE = "transformer"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, 350B tokens.")

_SETS = ("XSum", "CNN/DM", "MultiNews", "Qasper", "HotpotQA", "2WikiMQA")
_FIGURES = {
  "transformer": (0.44, 0.32, 0.42, 0.28, 0.36, 0.29),
  "diff": (0.53, 0.41, 0.61, 0.39, 0.46, 0.36),
}
ROWS = {
  model: common.row(model, "3b", common.UNKNOWN | dict(zip(_SETS, figures, strict=True)))
  for model, figures in _FIGURES.items()
}
