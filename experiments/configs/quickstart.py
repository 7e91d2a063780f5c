r"""The main job: a language model of 4 million parameters that visibly learns Python in minutes.

  python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart

It trains on the running Python's standard library (nothing is downloaded), prints its validation
bits per byte beside n-grams trained on exactly the bytes that it saw, writes the loss curves to
`plots/` and streams a sample. Four minutes of two cores read about a million tokens, so the corpus
is cut to a million bytes and read nearly three times: the n-grams have had the same bytes, and gain
nothing from reading them again. Arguments: `model=transformer` (default) or `retnet`; `smoke` for a
run of seconds; `seed`.
"""

from experiments.configs import common


def get_config(arg=None):
  arg = common.parse_arg(arg, model=("transformer", "retnet"), smoke=False, seed=0)
  c = common.language_model(seed=arg.seed)
  c.model = common.model(arg.model, num_layers=4, embed_dim=256, num_heads=4, tie_embeddings=True)
  if arg.model == "transformer":
    c.model.update(feed_forward="swiglu", init="fan_in")
  c.data.update(tokenizer="bpe", vocab_size=2048, seq_length=256, max_train_bytes=1_000_000)
  c.batch_size = 8
  c.optimizer.update(
    name="muon",
    peak_lr=1e-2,
    b1=0.95,
    b2=0.95,
    weight_decay=0.1,
    warmup_steps=30,
    end_lr_ratio=0.02,
  )
  c.train_steps, c.log_steps, c.checkpoint_steps = 450, 10, 100
  c.evals.validation.update(every_steps=150, max_batches=48)
  c.sample.update(prompt="def read_", num_tokens=160)
  c = common.smoke(c) if arg.smoke else c
  # Counted on exactly the bytes that the model has seen, and scored on the same validation bytes;
  # references, so that they follow a flag that shortens the run.
  c.evals.ngram = dict(type="ngram", whole_corpus=not arg.smoke)
  c.evals.ngram.every_steps = c.evals.ngram.num_batches = c.get_ref("train_steps")
  c.evals.ngram.seed = c.get_ref("seed")
  c.evals.ngram.max_batches = c.evals.validation.get_ref("max_batches")
  return c
