r"""nanoGPT's character benchmark in its setting for a GPU.

  python -m experiments.tables --config=experiments/configs/nanogpt/gpu.py --scale=paper \
      -- --config.data.path=input.txt

The text, the arguments and a run alone are as in cpu.py.
"""

from experiments.configs.nanogpt import common

TITLE = "Characters of Shakespeare, nanoGPT's setting for a GPU"
BASE, METRICS = common.BASE, common.METRICS
SCALES = {
  "paper": "6 layers of width 384, context 256, 5000 steps of 64 windows, dropout 0.2. Losses are "
  "of every character of the text's last tenth, in windows of 256 end to end, after the last step; "
  "the published one is the lowest in training, a mean over windows at random places of it."
}
ROWS = common.rows(published=1.4697)


def get_config(arg=None):
  return common.get_config(
    arg,
    "paper",
    model=dict(num_layers=6, embed_dim=384, num_heads=6, dropout_rate=0.2, dtype="bfloat16"),
    seq_length=256,
    batch_size=64,
    train_steps=5_000,
    eval_steps=250,
  )
