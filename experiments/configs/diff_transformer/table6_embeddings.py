r"""Table 6 of the Differential Transformer, arXiv 2410.05258, with embeddings of unit size.

  python -m experiments.tables --scale=small --seeds=0,1,2 \
      --config=experiments/configs/diff_transformer/table6_embeddings.py

Small rows of table 6 whose embeddings are multiplied by `sqrt(D)`, and nothing else: how they begin
in the paper is unknown.
"""

from experiments.configs.diff_transformer import common, table6_ablations
from experiments.configs.diff_transformer.common import get_config  # noqa: F401

TITLE = "Differential Transformer, table 6 with embeddings of unit size"
BASE, METRICS, RUNS = table6_ablations.BASE, table6_ablations.METRICS, common.RUNS
SCALES = dict(small=common.SCALES["small"] + " Embeddings begin with a standard deviation of 1.")

ROWS = {
  model: common.row(model, "scaled", table6_ablations.ROWS[model]["expected"])
  for model, recipe in common.runs().values()
  if recipe == "scaled"
}
