r"""Accuracy of the 6.7B models: table 3 of https://arxiv.org/abs/2307.08621.

  python -m experiments.train --workdir=runs/retnet_6b7 \
      --config=experiments/configs/retnet/table3_accuracy.py:row=retnet

The runs are those of 6.7B in table2_sizes.py. The evaluations are not here: HellaSwag, BoolQ, COPA,
PIQA, Winograd, Winogrande and StoryCloze, zero and four examples in front, need the data sets and
a scorer of choices, and the paper does not tell its prompts. Their figures are listed for whoever
adds them; what is measured is perplexity.

Arguments: `row`, `scale`, `smoke` and `seed`, as in table2_sizes.py.
"""

from experiments.configs import common
from experiments.configs.retnet import table2_sizes as sizes

TITLE = "RetNet, table 3: accuracy at 6.7B"
BASE = "transformer"
COLUMN = "validation perplexity"
METRICS = {COLUMN: "validation/perplexity"}
SCALES = sizes.SCALES

_TASKS = (
  "HellaSwag",
  "BoolQ",
  "COPA",
  "PIQA",
  "Winograd",
  "Winogrande",
  "StoryCloze",
  "average",
)


def _row(about, zero_shot, four_shot):
  figures = {}
  for shots, accuracies in ((0, zero_shot), (4, four_shot)):
    names = (f"{task}, {shots} examples" for task in _TASKS)
    figures |= dict(zip(names, accuracies, strict=True))
  return dict(about=about, expected={COLUMN: None, **figures})


ROWS = {
  "transformer": _row(
    "Transformer with RoPE",
    (55.9, 62.0, 69.0, 74.6, 69.5, 56.5, 75.0, 66.07),
    (55.8, 58.7, 71.0, 75.0, 71.9, 57.3, 75.4, 66.44),
  ),
  "retnet": _row(
    "RetNet",
    (60.7, 62.2, 77.0, 75.4, 77.2, 58.1, 76.0, 69.51),
    (60.5, 60.1, 78.0, 76.0, 77.9, 59.9, 75.9, 69.76),
  ),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  smoke = ",smoke" if arg.smoke else ""
  c = sizes.get_config(f"row={arg.row}_6b7,scale={arg.scale},seed={arg.seed}{smoke}")
  if arg.scale == "paper":
    figures = ROWS[arg.row]["expected"]
    c.expected = {f"accuracy, {name}": x for name, x in figures.items() if x is not None}
  return c
