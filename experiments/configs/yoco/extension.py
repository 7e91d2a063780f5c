r"""A longer window behind a larger RoPE base: appendix F of YOCO, arXiv 2405.05254, in small.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/yoco/extension.py

Models of table 5, trained in windows of 128, score windows of 512 by position: as they are, with a
larger RoPE base alone, and with it after a tenth as many steps more, in windows of 512. The paper
has no figures of this.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, appendix F in small: from 128 tokens to 512"
BASE = "transformer"
_EDGES = [128 * i for i in range(5)]
METRICS = {
  f"{first} to {end - 1}": f"long/position_{first}_{end - 1}"
  for first, end in zip(_EDGES, _EDGES[1:], strict=False)
}
AXIS = dict(name="position", values=dict(zip(METRICS, _EDGES[1:], strict=True)))
SCALES, RUNS = dict(small=common.SCALES["small"]), common.RUNS


def _of(evaluation):
  return {column: metric.replace("long", evaluation) for column, metric in METRICS.items()}


def _rows(model):
  short = common.row(model, "160m", dict.fromkeys(METRICS), base=None)
  longer = common.row(model, "longer", dict.fromkeys(METRICS), base=model)
  name = short["about"]
  return {
    model: short,
    f"{model}_base": short
    | dict(about=f"{name}, larger RoPE base", base=model, metrics=_of("long_base")),
    f"{model}_longer": longer
    | dict(about=f"{name}, larger RoPE base, trained on", metrics=_of("validation")),
  }


ROWS = {name: row for model in common.COMPARED for name, row in _rows(model).items()}
