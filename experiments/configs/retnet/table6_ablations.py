r"""What each part of a RetNet is worth: table 6 of https://arxiv.org/abs/2307.08621.

One row, as the paper trained it (give it a corpus with --config.data.path; needs accelerators):

  python -m experiments.train --workdir=runs/no_gate \
      --config=experiments/configs/retnet/table6_ablations.py:row=no_gate

The table at a scale for two CPU cores, three seeds a row; beside the paper's, in
experiments/results/retnet/table6_ablations.md:

  python -m experiments.tables --config=experiments/configs/retnet/table6_ablations.py \
      --scale=small --seeds=0,1,2 --num_workers=2

Arguments: `row`, a name of `ROWS`; `scale`, `paper` or `small`; `smoke` for a run of seconds;
`seed`. README.md beside this file says what the two scales share.
"""

from experiments.configs import common

TITLE = "RetNet, table 6: ablations"
BASE = "retnet"
# Which column of the paper stands beside which evaluation of ours, and what else of ours is shown.
METRIC = dict(paper="In-domain", ours="validation/perplexity")
ALSO = ("validation_4x/perplexity",)
SCALES = {
  "paper": "The paper's 200M parameters (without embeddings), 5B tokens in windows of 2048; its "
  "corpus, tokenizer and learning rate are unknown.",
  "small": "147k parameters (without embeddings) on bytes of Python's standard library, 1200 "
  "steps of 8 windows of 128; perplexity is per byte, so only ratios compare with the "
  "paper's. `validation_4x` are the same bytes in windows of 512.",
}


def _paper(in_domain, pg22, qmsum, gov_report, summ_screen):
  """Perplexities of table 6; the base row is also table 5's."""
  return {
    "In-domain": in_domain,
    "PG22": pg22,
    "QMSum": qmsum,
    "GovReport": gov_report,
    "SummScreen": summ_screen,
  }


# `heads` multiplies the number of heads at equal width: d_k 64 and d_v 128 instead of 256 and 512.
ROWS = {
  "retnet": dict(about="the whole model", expected=_paper(26.05, 45.27, 21.33, 16.52, 22.48)),
  "no_gate": dict(
    about="no swish gate; a Transformer's split of parameters (d_v = d_k, feed-forward 4d)",
    expected=_paper(27.84, 49.44, 22.52, 17.45, 23.72),
    model=dict(gate=False, value_factor=1.0),
  ),
  # What took the norm's place is unknown. Bare retention grows with the position, so the row is
  # divided by s_n, the scale-free part of the norm's work (section 2.2; the decay's row sum).
  "no_group_norm": dict(
    about="no head norm; rows are divided by s_n instead (the paper does not say)",
    expected=_paper(27.54, 46.95, 22.61, 17.59, 23.73),
    model=dict(head_norm="none", normalization="decay"),
  ),
  "no_decay": dict(
    about="gamma = 1", expected=_paper(27.86, 47.85, 21.99, 17.49, 23.70), model=dict(decay="one")
  ),
  "no_multi_scale": dict(
    about="gamma = 127/128 in every head",
    expected=_paper(27.02, 47.18, 22.08, 17.17, 23.38),
    model=dict(decay="const", decay_value=127 / 128),
  ),
  "small_heads": dict(
    about="four times as many heads, each a quarter as wide",
    expected=_paper(27.68, 47.72, 23.09, 17.46, 23.41),
    heads=4,
  ),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  row = ROWS[arg.row]
  c = common.language_model(seed=arg.seed)
  c.optimizer.update(schedule="linear", end_lr_ratio=0.0, b1=0.9, b2=0.98, clip_norm=2.0)
  if arg.scale == "paper":
    c.model = common.model(
      "retnet", num_layers=16, embed_dim=1024, num_heads=4, dropout_rate=0.1, dtype="bfloat16"
    )
    c.data.update(tokenizer="bpe", vocab_size=32_000, seq_length=2048)
    c.batch_size = 256  # 0.5M tokens.
    # The rate is unknown for this size; table 2 has 6e-4 for the next larger one.
    c.optimizer.update(name="adamw", peak_lr=6e-4, weight_decay=0.05, warmup_steps=375)
    c.train_steps, c.log_steps, c.checkpoint_steps = 10_000, 50, 500
    evaluation = dict(type="perplexity", split="validation", every_steps=1_000, max_batches=16)
    c.expected = {
      f"{'validation' if name == METRIC['paper'] else name}/perplexity": x
      for name, x in row["expected"].items()
    }
  else:
    c.model = common.model("retnet", num_layers=3, embed_dim=64, num_heads=2)
    c.data.update(tokenizer="bytes", vocab_size=0, seq_length=128)
    c.batch_size = 8
    # The warm-up is the paper's share of a run.
    c.optimizer.update(name="adam", peak_lr=2e-3, weight_decay=0.0, warmup_steps=45)
    c.train_steps, c.log_steps, c.checkpoint_steps = 1_200, 20, 200
    evaluation = dict(type="perplexity", split="validation", every_steps=1_200, max_batches=128)
  c.evals = dict(validation=dict(evaluation), validation_4x=dict(evaluation))
  if arg.smoke:
    common.smoke(c)
  longer = c.evals.validation_4x
  longer.seq_length = 4 * c.data.seq_length
  longer.max_batches = -(-longer.max_batches // 4)  # The same text.
  c.model.num_heads *= row.get("heads", 1)
  c.model.update(row.get("model", {}))
  return c
