r"""Loss by position in 1M tokens: figure 5 of YOCO, https://arxiv.org/abs/2405.05254.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/yoco/figure5_positions.py

On books and repositories of your own (`-- --config.data.path=...`). The figure's values are
unknown: the loss falls with the length about as a power of it.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, figure 5: loss by position"
BASE = "yoco_3b_1m"
_EDGES = [2**17 * i for i in range(9)]
METRICS = {
  f"{first} to {end - 1}": f"validation/position_{first}_{end - 1}"
  for first, end in zip(_EDGES, _EDGES[1:], strict=False)
}
AXIS = dict(name="position", values=dict(zip(METRICS, _EDGES[1:], strict=True)))
RUNS = common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, extended to 1M tokens.")

ROWS = {"yoco_3b_1m": common.row("yoco_gret", "3b_1m", dict.fromkeys(METRICS))}
