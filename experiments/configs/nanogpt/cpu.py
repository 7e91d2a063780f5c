r"""nanoGPT's character benchmark in its setting for a CPU; a few minutes a run.

The text is nanoGPT's `data/shakespeare_char/input.txt`, of 1,115,394 characters:

  python -m experiments.tables --config=experiments/configs/nanogpt/cpu.py --seeds=0,1,2 \
      -- --config.data.path=input.txt

One row alone:

  python -m experiments.train --workdir=runs/shakespeare --config.data.path=input.txt \
      --config=experiments/configs/nanogpt/cpu.py:row=transformer

Arguments: `row`, a name of `ROWS`; `smoke` for a run of seconds; `seed`.
"""

from experiments.configs.nanogpt import common

TITLE = "Characters of Shakespeare, nanoGPT's setting for a CPU"
BASE, METRICS = common.BASE, common.METRICS
SCALES = {
  "small": "4 layers of width 128, context 64, 2000 steps of 12 windows, no dropout. Losses are of "
  "every character of the text's last tenth, in windows of 64 end to end, after the last step; the "
  "published one is a mean over windows at random places of it."
}
ROWS = common.rows(published=1.88)


def get_config(arg=None):
  return common.get_config(
    arg,
    "small",
    model=dict(num_layers=4, embed_dim=128, num_heads=4),
    seq_length=64,
    batch_size=12,
    train_steps=2_000,
    eval_steps=500,
  )
