"""What the two settings of nanoGPT's character benchmark share (https://github.com/karpathy/nanoGPT).

Its Adam and batches, weights without biases, and its split: the first nine tenths of the text's
characters are training. README.md beside this file says where ours differs.
"""

from typing import Any

import ml_collections

from experiments.configs import common

BASE = "transformer"
COLUMN = "nats per character"
METRICS = {COLUMN: "validation/loss"}
MODELS = {
  "transformer": dict(name="transformer", positions="rope"),
  "retnet": dict(name="retnet"),
  "gpt2": dict(name="transformer", positions="learned"),
}


def rows(published: float) -> dict[str, dict[str, Any]]:
  """The rows; the published loss is of nanoGPT's own model, whose form `gpt2` has."""
  return {
    "transformer": dict(about="our Transformer: GPT-2's form, with RoPE", expected={}),
    "retnet": dict(about="RetNet with as many parameters", expected={}),
    "gpt2": dict(about="GPT-2's form, with learned positions", expected={COLUMN: published}),
  }


def get_config(
  arg: str | None,
  scale: str,
  *,
  model: dict[str, Any],
  seq_length: int,
  batch_size: int,
  train_steps: int,
  eval_steps: int,
) -> ml_collections.ConfigDict:
  """The run of a row, with the arguments `row`, `scale`, `smoke` and `seed`.

  Args:
    arg: What stands behind the colon of `--config`.
    scale: The only one.
    model: Sizes of the model.
    seq_length: Characters of a window.
    batch_size: Windows of a batch.
    train_steps: Steps.
    eval_steps: Steps between two evaluations.
  """
  arg = common.parse_arg(arg, row=tuple(MODELS), scale=(scale,), smoke=False, seed=0)
  c = common.language_model(seed=arg.seed)
  options = dict(norm="layer", tie_embeddings=True, max_length=seq_length)
  c.model = common.model(**MODELS[arg.row], **options, **model)
  # Nothing stands in for the text, for other text has other losses.
  c.data.update(source="path", tokenizer="chars", validation_fraction=0.1, seq_length=seq_length)
  c.batch_size = batch_size
  c.optimizer.update(name="adamw", peak_lr=1e-3, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0)
  c.optimizer.update(schedule="cosine", warmup_steps=100, end_lr_ratio=0.1)
  c.train_steps, c.log_steps, c.checkpoint_steps = train_steps, 50, eval_steps
  c.evals.validation.update(every_steps=eval_steps, max_batches=0)  # The whole split.
  return common.smoke(c) if arg.smoke else c
