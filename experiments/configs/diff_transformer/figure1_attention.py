r"""Where attention goes: figure 1 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/diff_transformer/figure1_attention.py

The parts of a sequence, over all depths of the needle (the figure has the middle), by the sum of
signed weights and by the sum of magnitudes. Of the figure's context, our noise is both sides of the
answer; a needle's mark and key are a part of their own. The runs are those of table 2.
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figure 1: where attention goes"
BASE = "transformer"
METRICS = {
  f"{part}, {way}": f"attention/{name}_{way}"
  for way in ("signed", "absolute")
  for part, name in (("BOS", "bos"), ("context", "noise"), ("answer", "answer"), ("query", "query"))
}
RUNS = common.RUNS
SCALES = dict(small=common.NEEDLES_SMALL)

_FIGURES = {
  "transformer": (0.32, 0.52, 0.03, 0.13),
  "diff": (0.19, 0.02, 0.31, 0.48),
  "diff_v2": 4 * (None,),
}
ROWS = {
  # How the paper normalises is unknown: its figures stand beside those that sum to 1 by sign.
  model: common.row(model, "needles", dict(zip(METRICS, figures, strict=False)))
  for model, figures in _FIGURES.items()
}
