r"""xPos, table 3: attention resolution at the trained length and at twice that.

https://arxiv.org/abs/2212.10554. Reads the runs of table 2:

  python -m experiments.tables --config=experiments/configs/xpos/table3_resolution.py \
      --scale=small --seeds=0,1,2
"""

from experiments.configs.xpos.common import RUNS, SCALES, get_config, row

__all__ = ["BASE", "METRICS", "ROWS", "RUNS", "SCALES", "TITLE", "get_config"]

TITLE = "xPos, table 3: attention resolution"
BASE = "lex"
METRICS = {"1024": "resolution_x1/resolution", "2048": "resolution_x2/resolution"}
ROWS = {
  "lex": row("xpos", METRICS, "_blocks"),
  "lex_without_blocks": row("xpos", METRICS),
  "rope": row("rope", METRICS),
  "alibi": row("alibi", METRICS),
  "sinusoidal": row("sinusoidal", METRICS),
  "rope_blocks": row("rope", METRICS, "_blocks"),
  "alibi_blocks": row("alibi", METRICS, "_blocks"),
  "lex_512": row("xpos_512", METRICS, "_blocks"),
}
