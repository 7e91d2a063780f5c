r"""xPos, table 5: blockwise causal attention, with every position scheme.

https://arxiv.org/abs/2212.10554. Reads the runs of table 2; rows with blocks, or with a window of
the trained length, are compared with the same run without:

  python -m experiments.tables --config=experiments/configs/xpos/table5_blocks.py \
      --scale=small --seeds=0,1,2
"""

from experiments.configs.xpos import common
from experiments.configs.xpos.common import RUNS, SCALES, get_config, row

__all__ = ["AXIS", "BASE", "METRICS", "ROWS", "RUNS", "SCALES", "TITLE", "get_config"]

TITLE = "xPos, table 5: blockwise causal attention"
BASE = "xpos"
METRICS = {"2048": "x2/perplexity", "4096": "x4/perplexity", "8 times": "x8/perplexity"}
ROWS = {
  f"{variant}{mask}": row(variant, METRICS, mask, base=variant if mask else None)
  for variant in ("xpos", "rope", "alibi", "sinusoidal", "xpos_512", "decay")
  for mask in common.MASKS
}
AXIS = dict(
  name="length, in trained lengths",
  values={"2048": 2, "4096": 4, "8 times": 8},
  log=True,
  log_figures=True,
)
