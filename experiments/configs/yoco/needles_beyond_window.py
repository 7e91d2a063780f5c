r"""Needles beyond the window: what the cross-decoder adds to a window of attention.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/yoco/needles_beyond_window.py

Section 3 of YOCO, https://arxiv.org/abs/2405.05254, in small; the paper has no figures of this. A
self-decoder alone, a Transformer with a window in all layers, cannot see a needle that lies further
back than its windows reach together; a shared cache shows it to the cross-decoder.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO in small: needles beyond the window"
BASE = "sparse_transformer"
METRICS = {"accuracy": "needles/accuracy"} | {
  f"depth {depth} %": f"needles/accuracy_depth_{depth}" for depth in (0, 25, 50, 75, 100)
}
AXIS = dict(
  name="depth, % of the hay before the needle",
  values={f"depth {depth} %": depth for depth in (0, 25, 50, 75, 100)},
)
SCALES, RUNS = dict(small=common.WINDOW_SMALL), common.RUNS

ROWS = {
  model: common.row(model, "window", dict.fromkeys(METRICS))
  for model in ("sparse_transformer", "yoco_swa", "yoco_gret")
}
