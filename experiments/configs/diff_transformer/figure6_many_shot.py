r"""Many shots, and their order: figures 6, 7 and 11 of the Differential Transformer.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/diff_transformer/figure6_many_shot.py

https://arxiv.org/abs/2410.05258. The paper has four classification sets in 64K tokens (accuracies
and ranges are recovered from its vector graphics); here the task is synthetic, mappings from items
to labels that every row makes anew. The margin is between the best and the worst order of the same
examples, as many as a row of the trained length holds, or one of twice that length.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figures 6, 7 and 11: many shots, and their order"
BASE = "transformer"
METRICS = {
  "accuracy": "shots/accuracy",
  "margin, random order": "shots/spread",
  "margin, classes in turn": "shots_in_turn/spread",
  "accuracy, twice the length": "shots_longer/accuracy",
  "margin, twice the length": "shots_longer/spread",
}
RUNS = common.RUNS
SCALES = dict(small=common.SHOTS_SMALL)

_COLUMNS = (
  *(f"{name}, accuracy" for name in ("TREC", "TREC-fine", "Banking-77", "Clinic-150")),
  *(f"{name}, margin" for name in ("TREC", "TREC-fine", "Banking-77", "Clinic-150")),
  "TREC, margin, classes in turn",
)
_FIGURES = {
  "transformer": (69.9, 61.0, 65.2, 74.0, 19.0, 24.0, 13.0, 12.0, 56.7),
  "diff": (87.9, 82.6, 75.6, 79.2, 4.0, 9.0, 9.0, 6.0, 13.4),
  "diff_v2": 9 * (None,),
}
ROWS = {
  model: common.row(
    model, "shots", dict.fromkeys(METRICS) | dict(zip(_COLUMNS, figures, strict=True))
  )
  for model, figures in _FIGURES.items()
}
