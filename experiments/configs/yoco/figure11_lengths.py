r"""Long inputs of 160M parameters: figure 11 of YOCO, https://arxiv.org/abs/2405.05254.

  python -m experiments.tables --scale=paper --seeds=0 \
      --config=experiments/configs/yoco/figure11_lengths.py

The models of table 5, which `config.init_from` names, go on with 2B tokens in windows of
16,384. The evaluation, perplexity of ZeroSCROLLS' answers behind 4K to 16K tokens of GovReport,
QMSum, Qasper and NarrativeQA, is not here, and its values are unknown: YOCO and the Transformer are
the best. What is measured is the loss by position. Mamba is not in the library.
"""

from experiments.configs.yoco import common
from experiments.configs.yoco.common import get_config  # noqa: F401

TITLE = "YOCO, figure 11: long inputs of 160M parameters"
BASE = "transformer"
_EDGES = [4096 * i for i in range(5)]
METRICS = {
  f"{first} to {end - 1}": f"validation/position_{first}_{end - 1}"
  for first, end in zip(_EDGES, _EDGES[1:], strict=False)
}
AXIS = dict(name="position", values=dict(zip(METRICS, _EDGES[1:], strict=True)))
RUNS = common.RUNS
SCALES = common.paper_alone("160M parameters; the paper's recipe is unknown but for its tokens.")

ROWS = {
  model: common.row(model, "160m_16k", dict.fromkeys(METRICS))
  for model in ("sparse_transformer", "h3", *common.COMPARED)
}
