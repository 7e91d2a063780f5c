r"""Words and digits, both ways: LatentLM's table 3 in the small (https://arxiv.org/abs/2412.08635).

  python -m experiments.train --workdir=runs/words \
      --config=experiments/configs/latentlm/captions.py:row=latentlm

Every digit is in two documents, `three <begin> z1 .. z16 <end>` and `<begin> z1 .. z16 <end>
three`, and one model learns to draw from words and to write them. Rows are what the paper compares:
latents one after another, whole images of noise (Transfusion), and codes. Texts are told by their
loss and by how many held-out digits get their word, images by the distance of samples to training
images in the features of a small classifier, and by how often it sees the digit that was asked for.
The table, three seeds a row:

  python -m experiments.tables --config=experiments/configs/latentlm/captions.py \
      --scale=small --seeds=0,1,2

Loss of text cannot go to 0: a document may begin with a word, of which there are ten, or with an
image. That of captions can. Arguments: `row`, a name of `ROWS`; `scale`, of which there is one;
`smoke` for a run of seconds; `seed`. Tokenizers, backbones and dropout are those of `models.py`;
the paper's sizes are in `multimodal_paper.py`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from experiments.configs.latentlm import models

TITLE = "LatentLM and its baselines on digits and their words, both ways"
BASE = "latentlm"
METRICS = {
  "text CE": "captions/text_loss",
  "caption CE": "captions/caption_loss",
  "caption accuracy": "captions/exact",
  "FD": "generation/fd",
  "agreement": "generation/agreement",
}
SCALES = {
  "small": "16 latents for 8x8 digits (scikit-learn's 1,797) and the word of each; three layers of "
  "width 64, 800 steps of 64; 500 samples in 20 steps at guidance 1.5.",
}
UNKNOWN = dict.fromkeys(METRICS)

ROWS = {
  "latentlm": dict(about="LatentLM, sigma-VAE", expected=UNKNOWN),
  "transfusion": dict(about="Transfusion, all latents at once", expected=UNKNOWN),
  "vq": dict(about="a language model of 64 codes, dropout 0.2", expected=UNKNOWN),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  c = models.get_config(f"row={arg.row},seed={arg.seed}")
  c.data.condition = "both"
  if "loss_weight" in c.latents:
    c.latents.loss_weight = 5.0  # As in the paper, where it leaves the loss of text as it is.
  c.train_steps, c.checkpoint_steps = 800, 400
  c.sample.num_samples = 40
  c.evals.validation.every_steps = 400
  c.evals.captions = dict(
    type="captions", split="validation", every_steps=400, max_batches=0, max_media=0, max_tokens=0
  )
  c.evals.generation.every_steps = 800
  return latentlm.smoke(c) if arg.smoke else c
