r"""xPos, table 2: perplexity of texts shorter and longer than trained on.

https://arxiv.org/abs/2212.10554. A row as the paper trained it (give it a corpus with
--config.data.path; needs accelerators):

  python -m experiments.train --workdir=runs/rope \
      --config=experiments/configs/xpos/table2_length.py:row=rope

The table at a scale for one CPU core; tables 3 to 5 read the same runs:

  python -m experiments.tables --config=experiments/configs/xpos/table2_length.py \
      --scale=small --seeds=0,1,2

Arguments: `row`, a variant of `common.VARIANTS`; `scale`; `smoke`; `seed`.
"""

from experiments.configs.xpos import common
from experiments.configs.xpos.common import RUNS, SCALES, get_config, row

__all__ = ["AXIS", "BASE", "METRICS", "ROWS", "RUNS", "SCALES", "TITLE", "get_config"]

TITLE = "xPos, table 2: perplexity by length, trained at 1024"
BASE = "lex"
METRICS = {
  "256": "x1_4/perplexity",
  "512": "x1_2/perplexity",
  "1024": "x1/perplexity",
  "2048": "x2/perplexity",
  "4096": "x4/perplexity",
  "8 times": "x8/perplexity",
}
# Without blocks but for LeX: section 4.2 says that all have them, but the figures of RoPE and ALiBi
# are those of table 5's rows without. Table 5 has every variant both ways.
ROWS = {
  "lex": row("xpos", METRICS, "_blocks"),
  "alibi": row("alibi", METRICS),
  "rope": row("rope", METRICS),
  "sinusoidal": row("sinusoidal", METRICS),
  "lex_512": row("xpos_512", METRICS, "_blocks"),
}
AXIS = dict(
  name="length, in trained lengths",
  values=dict(zip(METRICS, common.LENGTHS.values(), strict=True)),
  log=True,
  log_figures=True,
)
