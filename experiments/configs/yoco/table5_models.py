r"""YOCO beside other models of 160M parameters: table 5 of https://arxiv.org/abs/2405.05254.

  python -m experiments.tables --config=experiments/configs/yoco/table5_models.py \
      --scale=small --seeds=0,1,2

Arguments: `row`, a run of common.py; `scale`, `paper` or `small`; `smoke` for a run of seconds;
`seed`. Table 6 shares the runs.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, table 5: models of 160M parameters"
BASE = "transformer"
METRICS = common.BY_RECALL | {"AR-hit, 4-grams": "validation_4/recall_loss"}
SCALES, RUNS = common.SCALES, common.RUNS

_FIGURES = {
  "retnet": (3.633, 1.466, 4.131),
  "h3": (3.591, 1.251, 4.130),
  "gretnet": (3.600, 1.354, 4.116),
  "transformer": (3.564, 1.219, 4.104),
  "yoco_swa": (3.553, 1.202, 4.094),
  "yoco_gret": (3.530, 1.199, 4.067),
}
ROWS = {
  model: common.row(model, "160m", dict(zip(common.BY_RECALL, figures, strict=True)))
  for model, figures in _FIGURES.items()
}
