r"""LatentLM and DiT on ImageNet by class: table 1, figure 4, table 2 (arXiv 2412.08635).

  python -m experiments.train --workdir=runs/table1 \
      --config=experiments/configs/latentlm/imagenet.py:row=table1 \
      --config.data.media.path=imagenet/train --config.data.tokenizer_run=runs/imagenet

`runs/imagenet` is the tokenizer of `tokenizers_paper.py:row=imagenet`, trained before. These need
accelerators and a copy of ImageNet. FID is of a pretrained Inception network, which is not here:
what is measured is the distance in features of a classifier trained on the data, which says how
models compare with each other and nothing beside the paper's figures. The learning rates of figure
4's models and the values of its curves are unknown. Arguments: `row`; `scale`, of which there is
one; `smoke`, a run of seconds on digits; `seed`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from experiments.configs.latentlm import tokenizers_paper
from latentlab.models import dit
from latentlab.models.latentlm import PRESETS, RELEASE

TITLE = "LatentLM, table 1 and figure 4: ImageNet by class"
BASE = "table1"
METRICS = {"FD": "generation/fd"}
SCALES = common.paper_alone("256 x 256 pixels, 256 latents of 16 channels.")
UNKNOWN = {"FD": None}

ROWS = {
  "table1": dict(
    about="LatentLM-L, 479M parameters, 400 epochs",
    expected=UNKNOWN | {"FID": 2.24, "IS": 253.8},
    steps=250_000,
    batch_size=2048,
    peak_lr=5e-4,
  ),
  "medium": dict(about="figure 4, 455M", expected=UNKNOWN),
  "large": dict(about="figure 4, 1.03B", expected=UNKNOWN),
  "xl": dict(about="figure 4, 1.82B", expected=UNKNOWN),
  "xl_100k": dict(
    about="table 2, 1.82B, 100k steps", expected=UNKNOWN | {"FID": 3.19}, preset="xl", steps=100_000
  ),
  "3b": dict(about="figure 4, 3.68B", expected=UNKNOWN),
}
# DiTs of as many parameters; in the paper each is behind the LatentLM of its size.
ROWS |= {
  f"dit_{size}": dict(about=f"figure 4, DiT, {count}", expected=UNKNOWN, model="dit", base=size)
  for size, count in (("medium", "454M"), ("large", "1.03B"), ("xl", "1.82B"), ("3b", "3.79B"))
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  row = ROWS[arg.row]
  tokenizer = tokenizers_paper.get_config(f"row=imagenet,seed={arg.seed}")
  if row.get("model") == "dit":
    sizes = dit.PRESETS[row["base"]]
    c = latentlm.dit(tokenizer, seed=arg.seed, **sizes, init="linear", dtype="bfloat16")
  else:
    c = latentlm.latentlm(tokenizer, seed=arg.seed)
    sizes = dict(PRESETS[row.get("preset", arg.row)])
    c.latents.head.update(depth=sizes.pop("head_depth"), mlp_dim=sizes["mlp_dim"])
    c.model.update(**sizes, **RELEASE, dtype="bfloat16")
  c.latents.prompt_dropout = 0.1
  c.optimizer.update(
    peak_lr=row.get("peak_lr", 5e-4),
    b2=0.98,
    weight_decay=0.01,
    ema_decay=0.9999,
    end_lr_ratio=0.0,
  )
  c.batch_size, c.train_steps = row.get("batch_size", 2048), row.get("steps", 75_000)
  c.log_steps, c.checkpoint_steps = 100, 5_000
  c.evals.validation.update(every_steps=5_000, max_batches=4)
  c.evals.generation = latentlm.generation(25_000, num_samples=50_000, guidance=1.65)
  c.sample.update(num_samples=64, guidance=1.65)
  return latentlm.smoke(c) if arg.smoke else c
