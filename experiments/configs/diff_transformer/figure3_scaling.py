r"""Loss by size and by tokens: figure 3 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/figure3_scaling.py

The points are recovered from the paper's vector graphics; that of 1.4B returns table 6. Of the runs
of 3B the loss along the way is compared by hand, in their `metrics.jsonl`: every 10k steps are 42B
tokens.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figure 3: loss by size and by tokens"
BASE = "transformer_1b4"
METRICS, RUNS = common.LOSS, common.RUNS
SCALES = common.paper_alone("The paper's sizes, 10B tokens; 3B, 350B tokens.")

_BY_SIZE = {
  "transformer": (3.170, 3.087, 3.003, 2.961, 2.899),
  "diff": (3.138, 3.062, 2.977, 2.934, 2.872),
}
_BY_TOKENS = {
  "transformer": (2.947, 2.689, 2.618, 2.580, 2.555, 2.540, 2.544, 2.510, 2.508),
  "diff": (2.855, 2.636, 2.573, 2.535, 2.518, 2.510, 2.490, 2.478, 2.474),
}
_RECIPES = {"830m": "830m", "1b4": "ablation", "2b8": "2b8", "6b8": "6b8", "13b1": "13b1"}
ROWS = {
  f"{model}_{size}": common.row(model, recipe, {common.COLUMN: figure}, base=f"transformer_{size}")
  for model, figures in _BY_SIZE.items()
  for (size, recipe), figure in zip(_RECIPES.items(), figures, strict=True)
} | {
  f"{model}_3b": common.row(
    model,
    "3b",
    common.UNKNOWN | {f"after {40 * i}B tokens": x for i, x in enumerate(figures, 1)},
    base="transformer_3b",
  )
  for model, figures in _BY_TOKENS.items()
}
