r"""Loss by position in 64K tokens: figure 4 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/diff_transformer/figure4_positions.py

The runs go on from those of 3B, which `config.init_from` names, with 1.5B tokens in windows
of 65,536. The figure has no values on its axis: the Differential Transformer lies below everywhere.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figure 4: loss by position"
BASE = "transformer"
_EDGES = [2**13 * i for i in range(9)]
METRICS = {
  f"{first} to {end - 1}": f"validation/position_{first}_{end - 1}"
  for first, end in zip(_EDGES, _EDGES[1:], strict=False)
}
AXIS = dict(name="position", values=dict(zip(METRICS, _EDGES[1:], strict=True)))
RUNS = common.RUNS
SCALES = common.paper_alone("The paper's 3B parameters, 350B tokens and 1.5B of its extension.")

ROWS = {
  model: common.row(model, "64k", dict.fromkeys(METRICS)) for model in ("transformer", "diff")
}
