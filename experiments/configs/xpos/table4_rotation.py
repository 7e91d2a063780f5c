r"""xPos, table 4: rotation and decay at the trained length, each without the other.

https://arxiv.org/abs/2212.10554. Reads the runs of table 2:

  python -m experiments.tables --config=experiments/configs/xpos/table4_rotation.py \
      --scale=small --seeds=0,1,2
"""

from experiments.configs.xpos.common import RUNS, SCALES, get_config, row

__all__ = ["BASE", "METRICS", "ROWS", "RUNS", "SCALES", "TITLE", "get_config"]

TITLE = "xPos, table 4: rotation and decay, in-domain perplexity"
BASE = "xpos"
METRICS = {"1024": "validation/perplexity"}
ROWS = {
  "xpos": row("xpos", METRICS),
  "rope": row("rope", METRICS),
  "decay": row("decay", METRICS),
  "xpos_512": row("xpos_512", METRICS),
}
