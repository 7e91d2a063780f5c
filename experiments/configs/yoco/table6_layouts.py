r"""Where the shared cache lies: table 6 of YOCO, https://arxiv.org/abs/2405.05254.

  python -m experiments.tables --config=experiments/configs/yoco/table6_layouts.py \
      --scale=small --seeds=0,1,2

Arguments: `row`, a run of common.py; `scale`, `paper` or `small`; `smoke` for a run of seconds;
`seed`. Table 5 shares the runs.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, table 6: layouts of [self-decoder : cross-decoder]"
BASE = "yoco_gret"
METRICS = common.BY_RECALL | {"AR-hit, 4-grams": "validation_4/recall_loss"}
SCALES, RUNS = common.SCALES, common.RUNS

_FIGURES = {
  "yoco_gret": (3.530, 1.199, 4.067),
  "yoco_3_1": (3.526, 1.207, 4.060),
  "yoco_1_3": (3.565, 1.230, 4.102),
  "yoco_0_1": (3.898, 1.827, 4.374),
  "yoco_unstacked": (3.531, 1.188, 4.071),
  "yoco_interleaved": (3.542, 1.204, 4.081),
}
ROWS = {
  model: common.row(model, "160m", dict(zip(common.BY_RECALL, figures, strict=True)))
  for model, figures in _FIGURES.items()
}
