"""What the tables of xPos share: one run a row, whose evaluations serve all of them.

A row is a model trained at one length. At the end it is evaluated at lengths from a quarter to
eight times that, without and with blockwise causal attention: parameters do not depend on the mask.
The config of a row is the same in every table's file, so that tables share their runs.
"""

from typing import Any

import ml_collections

from experiments.configs import common

SCALES = {
  "paper": "The paper's 24 layers of width 1024, trained in windows of 1024; its steps, warm-up, "
  "tokenizer and the weights of its corpora are unknown.",
  "small": "147k parameters (without embeddings) on bytes of Python's standard library, 1200 steps "
  "of 16 windows of 64. Perplexity is per byte, over the same bytes of the same validation files "
  "at every length, so only ratios and orders compare with the paper's.",
}

# Lengths in units of the trained one, with blocks or a window at those beyond it.
LENGTHS = {"1_4": 0.25, "1_2": 0.5, "1": 1, "2": 2, "4": 4, "8": 8}
MASKS = {"": None, "_blocks": "blockwise_causal", "_window": "sliding_window"}

# `expected` are the figures of tables 2 to 5 by our metrics, whatever the table they stand in;
# "unknown" is not in here. Table 2 has LeX at 2048 and 4096 with blocks and the others without:
# their figures are those of table 5's rows without blocks, although section 4.2 says otherwise.
VARIANTS = {
  "xpos": dict(
    about="xPos",
    model=dict(positions="xpos"),
    expected={
      "x1_4/perplexity": 34.3,
      "x1_2/perplexity": 27.55,
      "x1/perplexity": 23.31,
      "x2/perplexity": 22.56,
      "x4/perplexity": 28.43,
      "x2_blocks/perplexity": 21.6,
      "x4_blocks/perplexity": 20.73,
      "resolution_x1/resolution": 0.98,
      "resolution_x2/resolution": 0.54,
      "resolution_x2_blocks/resolution": 1.08,
      "validation/perplexity": 17.54,
    },
  ),
  "xpos_512": dict(
    about="xPos with a scale base of 512 at every scale",
    model=dict(positions="xpos", xpos_scale_base=512.0),
    expected={},
  ),
  "decay": dict(
    about="xPos without its rotation",
    model=dict(positions="xpos", xpos_rotation=False),
    expected={"validation/perplexity": 33.68},
  ),
  "rope": dict(
    about="RoPE",
    model=dict(positions="rope"),
    expected={
      "x1_4/perplexity": 38.09,
      "x1_2/perplexity": 30.38,
      "x1/perplexity": 25.52,
      "x2/perplexity": 73.6,
      "x4/perplexity": 294.45,
      "x2_blocks/perplexity": 25.57,
      "x4_blocks/perplexity": 25.65,
      "resolution_x1/resolution": 0.91,
      "resolution_x2/resolution": 0.08,
      "validation/perplexity": 17.74,
    },
  ),
  "alibi": dict(
    about="ALiBi",
    model=dict(positions="alibi"),
    expected={
      "x1_4/perplexity": 37.66,
      "x1_2/perplexity": 29.92,
      "x1/perplexity": 24.99,
      "x2/perplexity": 23.14,
      "x4/perplexity": 24.26,
      "x2_blocks/perplexity": 24.6,
      "x4_blocks/perplexity": 25.37,
      "resolution_x1/resolution": 0.81,
      "resolution_x2/resolution": 0.88,
    },
  ),
  "sinusoidal": dict(
    about="sinusoidal embeddings",
    model=dict(positions="sinusoidal"),
    expected={
      "x1_4/perplexity": 46.34,
      "x1_2/perplexity": 36.39,
      "x1/perplexity": 29.94,
      "x2/perplexity": 132.63,
      "x4/perplexity": 1283.79,
      "resolution_x1/resolution": 0.87,
      "resolution_x2/resolution": 0.28,
    },
  ),
}


RUNS = "xpos"
"""The folder of runs that the tables share."""


def row(
  variant: str, columns: dict[str, str], mask: str = "", lengths: str = "2 4 8", **fields: Any
) -> dict[str, Any]:
  """A row of a table: a variant, at lengths beyond its own under a mask of `MASKS`.

  Args:
    variant: One of `VARIANTS`, which is trained.
    columns: Our metric by column, without masks.
    mask: Suffix of the evaluations that have it.
    lengths: Where it is used.
    **fields: Others of the row.
  """
  masked = {f"x{n}" for n in lengths.split()}

  def metric(name: str) -> str:
    evaluation, _, what = name.partition("/")
    beyond = evaluation.removeprefix("resolution_") in masked
    return f"{evaluation}{mask if beyond else ''}/{what}"

  metrics = {column: metric(name) for column, name in columns.items()}
  found = VARIANTS[variant]
  expected = {column: found["expected"].get(metrics[column]) for column in columns}
  about = found["about"] + {"": "", "_blocks": ", with blocks", "_window": ", with a window"}[mask]
  return dict(about=about, run=variant, metrics=metrics, expected=expected) | fields


def get_config(arg: str | None) -> ml_collections.ConfigDict:
  """The run of a row, with the arguments `row`, `scale`, `smoke` and `seed`."""
  arg = common.parse_arg(arg, row=tuple(VARIANTS), scale=tuple(SCALES), smoke=False, seed=0)
  c = common.language_model(seed=arg.seed)
  # Section 4.1: Adam, and a learning rate that falls by a polynomial, the first by default.
  c.optimizer.update(name="adam", b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.0)
  c.optimizer.update(schedule="linear", end_lr_ratio=0.0)
  if arg.scale == "paper":
    c.model = common.model("transformer", preset="lex", dtype="bfloat16")
    c.data.update(tokenizer="bpe", vocab_size=32_000, seq_length=1024)
    c.batch_size = 512
    c.optimizer.update(peak_lr=3e-4, warmup_steps=750)
    c.train_steps, c.log_steps, c.checkpoint_steps = 50_000, 50, 1_000
    batches = 4
  else:
    c.model = common.model("transformer", num_layers=3, embed_dim=64, num_heads=4)
    c.data.update(tokenizer="bytes", vocab_size=0, seq_length=64)
    c.batch_size = 16
    c.optimizer.update(peak_lr=2e-3, warmup_steps=60)
    c.train_steps, c.log_steps, c.checkpoint_steps = 1_200, 20, 200
    batches = 12
  # Absolute embeddings are as large as their sum with the words' needs to be (torchscale's way).
  c.model.scale_embeddings = True
  c.model.update(VARIANTS[arg.row]["model"])
  c.evals = {}
  c.evals.validation = dict(type="perplexity", split="validation", max_batches=8 * batches)
  if arg.smoke:
    c.evals.validation.every_steps = 1
    common.smoke(c)
    batches = 1
  length = c.data.seq_length
  # The paper takes 4k tokens of each document (section 4.2); eight lengths, which it has not, take
  # other texts there.
  shortest = 4 if arg.scale == "paper" else 8
  for name, factor in LENGTHS.items():
    for suffix, mask in MASKS.items() if factor > 1 else [("", None)]:
      options = dict(split="validation", max_batches=batches, seq_length=int(factor * length))
      options["document_length"] = max(shortest, int(factor)) * length
      if mask is not None:
        options["model"] = dict(mask=mask)
      c.evals[f"x{name}{suffix}"] = dict(type="perplexity", **options)
      if factor in (1, 2) and mask != "sliding_window":
        c.evals[f"resolution_x{name}{suffix}"] = dict(type="attention_resolution", **options)
  for evaluation in c.evals.values():
    evaluation.every_steps = c.train_steps
  c.expected = dict(VARIANTS[arg.row]["expected"])
  return c
