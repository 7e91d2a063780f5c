r"""Several needles in 4K tokens: table 2 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/diff_transformer/table2_needles.py

N needles, of which R are asked for, at five depths, 50 samples each. At the paper's scale hay is
the validation split and needles are sentences about cities; at the small one a model of 3 layers is
trained on the synthetic task with six needles, all of which are asked for, and evaluated with as
many and with fewer.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 2: needles"
BASE = "transformer"
METRICS = {f"N={n}, R={r}": f"needles_{n}/accuracy" for n, r in common.NEEDLES.items()}
RUNS = common.RUNS
SCALES = dict(
  paper="The paper's 3B parameters, 350B tokens in windows of 4096.", small=common.NEEDLES_SMALL
)

_FIGURES = {
  "transformer": (1.00, 0.85, 0.62, 0.55),
  "diff": (1.00, 0.92, 0.84, 0.85),
  "diff_v2": (None, None, None, None),  # Of a later note, without a table.
}
ROWS = {
  model: common.row(model, "needles", dict(zip(METRICS, figures, strict=True)))
  for model, figures in _FIGURES.items()
}
