"""What RetNet's tables 5, 6 and 8 share: one run a row, whose evaluations serve all three.

The config of a row is the same in every table's file, so that tables may share their runs.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments.configs import common

SCALES = {
  "paper": "The paper's 200M parameters (without embeddings), 5B tokens in windows of 2048; its "
  "corpus, tokenizer and learning rate are unknown.",
  "small": "147k parameters (without embeddings) on bytes of Python's standard library, 1200 "
  "steps of 8 windows of 128; perplexity is per byte, so only ratios compare with the "
  "paper's. Windows four times as long hold the same bytes.",
}

# Table 8: contexts as parts of the trained length, of which the last sixteenth is scored.
CONTEXTS = {"context_1_4": 4, "context_1_2": 2, "context_1": 1}


def in_domain(ours: float | None, *elsewhere: float | None) -> dict[str, float | None]:
  """Perplexities of tables 5 and 6: in domain, then on corpora that the paper alone has."""
  names = ("In-domain", "PG22", "QMSum", "GovReport", "SummScreen")
  return dict(zip(names, (ours, *elsewhere), strict=True))


# Of tables 5 and 6.
METRICS = {
  "In-domain": "validation/perplexity",
  "windows four times as long": "validation_4x/perplexity",
}
RUNS = "tables_5_6_8"

# Rows that several tables have. Heads of the baselines are unknown, but for H3's of 8.
HEADS = dict(paper=64, small=16)
RETNET = dict(about="the whole model", expected=in_domain(26.05, 45.27, 21.33, 16.52, 22.48))
TRANSFORMER = dict(
  about="softmax attention with RoPE",
  name="transformer",
  head_dim=HEADS,
  expected=in_domain(None, None, None, None, None),  # No row of tables 5 and 6.
)


def get_config(
  arg: str | None, rows: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]
) -> ml_collections.ConfigDict:
  """The run of a row, with the arguments `row`, `scale`, `smoke` and `seed`.

  Args:
    arg: What stands behind the colon of `--config`.
    rows: Rows as `experiments.tables` wants them, which may have `name`, a model of the registry
      (RetNet by default); `head_dim`, by scale; `model`, fields that differ; and `small`, those
      that differ at that scale alone.
    metrics: What of ours a figure of the paper stands beside, by column.
  """
  arg = common.parse_arg(arg, row=tuple(rows), scale=tuple(SCALES), smoke=False, seed=0)
  row = rows[arg.row]
  c = common.language_model(seed=arg.seed)
  c.optimizer.update(schedule="linear", end_lr_ratio=0.0, b1=0.9, b2=0.98, clip_norm=2.0)
  name = row.get("name", "retnet")
  if arg.scale == "paper":
    c.model = common.model(name, num_layers=16, embed_dim=1024, dropout_rate=0.1, dtype="bfloat16")
    c.data.update(tokenizer="bpe", vocab_size=32_000, seq_length=2048)
    c.batch_size = 256  # 0.5M tokens.
    # The rate is unknown for this size; table 2 has 6e-4 for the next larger one.
    c.optimizer.update(name="adamw", peak_lr=6e-4, weight_decay=0.05, warmup_steps=375)
    c.train_steps, c.log_steps, c.checkpoint_steps = 10_000, 50, 500
    every, batches = 1_000, 16
  else:
    c.model = common.model(name, num_layers=3, embed_dim=64)
    c.data.update(tokenizer="bytes", vocab_size=0, seq_length=128)
    c.batch_size = 8
    # The warm-up is the paper's share of a run.
    c.optimizer.update(name="adam", peak_lr=2e-3, weight_decay=0.0, warmup_steps=45)
    c.train_steps, c.log_steps, c.checkpoint_steps = 1_200, 20, 200
    every, batches = 1_200, 128
  # One norm and one initialisation for all rows: RetNet's.
  c.model.update(norm="layer", init="retnet")
  c.evals = dict(validation=dict(type="perplexity", every_steps=every, max_batches=batches))
  if arg.smoke:
    common.smoke(c)
    every, batches = c.evals.validation.every_steps, c.evals.validation.max_batches
  sizes = "small" if arg.smoke else arg.scale  # Of what has to fit into the width.
  if "num_heads" in c.model:
    head_dim = row.get("head_dim", {"paper": 256, "small": 32})[sizes]
    c.model.num_heads = c.model.embed_dim // head_dim
  c.model.update(row.get("model", {}))
  if sizes == "small":
    c.model.update(row.get("small", {}))

  length = c.data.seq_length
  longer = dict(seq_length=4 * length, max_batches=-(-batches // 4))  # The same text.
  c.evals.validation_4x = c.evals.validation.to_dict() | longer
  pieces = dict(document_length=length, score_last=length // 16)
  for name, part in CONTEXTS.items():
    c.evals[name] = c.evals.validation.to_dict() | pieces | dict(seq_length=length // part)
  for evaluation in c.evals.values():
    evaluation.split = "validation"
  if arg.scale == "paper":
    c.expected = {
      metrics.get(column, f"{column}/perplexity"): x
      for column, x in row["expected"].items()
      if x is not None
    }
  return c
