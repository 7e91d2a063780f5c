r"""Needles in 128K to 1M tokens: table 4 and figure 4 of YOCO, https://arxiv.org/abs/2405.05254.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/yoco/table4_needles.py

N needles, of which one is asked for, in 128K tokens, at depths of k/11, five runs each; one needle
in up to 1M tokens at depths of k/10, ten runs each. Hay is the validation split. The figure has no
values: it is close to perfect everywhere. Other rows of the table are others' models.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, table 4 and figure 4: needles in 128K to 1M tokens"
BASE = "yoco_3b_1m"
METRICS = {f"128K, N={n}": f"needles_{n}/accuracy" for n in common.NEEDLES} | {
  f"{k}K, N=1": f"needle_{k}k/accuracy" for k in common.NEEDLE_LENGTHS
}
RUNS = common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, extended to 1M tokens.")

ROWS = {
  "yoco_3b_1m": common.row(
    "yoco_gret",
    "3b_1m",
    dict.fromkeys(METRICS) | dict(zip(METRICS, (0.98, 0.98, 0.84, 0.56), strict=False)),
  )
}
