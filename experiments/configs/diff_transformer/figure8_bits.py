r"""Quantised attention logits: figure 8 of the Differential Transformer, arXiv 2410.05258.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/diff_transformer/figure8_bits.py

Trained models, whose attention logits are rounded to 16, 8, 6 and 4 bits. The paper has HellaSwag's
accuracy of its models of 3B (points recovered from its vector graphics); ours is the loss, of the
runs of table 6, on a scale of each head's map of a text (the paper's granularity is unknown).
"""

from experiments.configs.diff_transformer import common
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, figure 8: quantised attention logits"
BASE = "transformer"
METRICS = {
  "loss, not quantised": "bits_all/loss",
  **{f"loss, {bits} bits": f"bits_{bits}/loss" for bits in common.BITS},
}
SCALES, RUNS = common.SCALES, common.RUNS

_FIGURES = {
  "transformer": (63.4, 62.7, 58.9, 33.9),
  "diff": (66.2, 66.3, 66.0, 58.8),
  "diff_v2": 4 * (None,),
}
_COLUMNS = [f"HellaSwag, {bits} bits" for bits in common.BITS]
ROWS = {
  model: common.row(
    model, "ablation", dict.fromkeys(METRICS) | dict(zip(_COLUMNS, figures, strict=True))
  )
  for model, figures in _FIGURES.items()
}
