r"""What each part is worth: table 6 of the Differential Transformer, https://arxiv.org/abs/2410.05258.

  python -m experiments.tables --config=experiments/configs/diff_transformer/table6_ablations.py \
      --scale=small --seeds=0,1,2

Arguments: `row`, a run of common.py; `scale`, `paper` or `small`; `smoke` for a run of seconds;
`seed`.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 6: ablations"
BASE = "transformer"
METRICS = {
  "valid": "validation/loss",
  "AR-hit": "validation/recall_loss",
  "others": "validation/other_loss",
  "AR-hit, 4-grams": "validation_4/recall_loss",
}
SCALES, RUNS = common.SCALES, common.RUNS

# 1.4B parameters, 40k steps.
_FIGURES = {
  "transformer": (3.087, 0.898, 3.272),
  "transformer_wide": (3.088, 0.899, 3.273),
  "transformer_norm": (3.086, 0.899, 3.271),
  "diff": (3.062, 0.880, 3.247),
  "diff_no_norm": (3.122, 0.911, 3.309),
  "diff_init_0.8": (3.065, 0.883, 3.250),
  "diff_init_0.5": (3.066, 0.882, 3.251),
  "diff_v2": (None, None, None),  # Of a later note, without a table.
}
ROWS = {
  model: common.row(model, "ablation", dict(zip(METRICS, figures, strict=False)))
  for model, figures in _FIGURES.items()
}
