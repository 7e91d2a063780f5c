r"""Loss by size: figure 3 of YOCO, https://arxiv.org/abs/2405.05254.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/yoco/figure3_scaling.py

The figure's values are unknown: gated retention lies below the Transformer, and the window about on
it, from 160M to 13B parameters. Sizes between these are runs of common.py.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, figure 3: loss by size"
BASE = "transformer_160m"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's sizes, 10B tokens.")

ROWS = {
  f"{model}_{size}": common.row(model, size, common.UNKNOWN, base=f"transformer_{size}")
  for size in ("160m", "13b")
  for model in common.COMPARED
}
