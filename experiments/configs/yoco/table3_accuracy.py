r"""Accuracy of 3B parameters: table 3 of YOCO, https://arxiv.org/abs/2405.05254.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/yoco/table3_accuracy.py

The runs are the paper's, on a corpus of your own (`-- --config.data.path=...`): 1.6T tokens of a
schedule of 5T, and what it is extended to. The evaluations, eight tasks of the LM Eval Harness
without examples, are not here: their figures are listed, and what is measured is the loss. Other
rows of the table are others' models.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, table 3: accuracy of 3B parameters"
BASE = "yoco_3b"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters.")

_TASKS = ("ARC-C", "ARC-E", "BoolQ", "HellaSwag", "OBQA", "PIQA", "WinoG", "SciQ", "average")
_FIGURES = {
  "yoco_3b": ("3b", (0.396, 0.733, 0.644, 0.698, 0.300, 0.764, 0.631, 0.921, 0.636)),
  "yoco_3b_1m": ("3b_1m", (0.413, 0.747, 0.638, 0.705, 0.300, 0.773, 0.651, 0.932, 0.645)),
}
# Of the same run after 1T tokens.
_EARLIER = (0.379, 0.731, 0.645, 0.689, 0.298, 0.763, 0.639, 0.924, 0.634)
ROWS = {
  name: common.row("yoco_gret", recipe, common.UNKNOWN | dict(zip(_TASKS, figures, strict=True)))
  for name, (recipe, figures) in _FIGURES.items()
}
ROWS["yoco_3b"]["expected"] |= {
  f"{task}, after 1T tokens": x for task, x in zip(_TASKS, _EARLIER, strict=True)
}
