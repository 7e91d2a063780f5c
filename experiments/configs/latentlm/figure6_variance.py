r"""How much noise a tokenizer's latents should have: figure 6 of LatentLM (arXiv 2412.08635).

  python -m experiments.tables --config=experiments/configs/latentlm/figure6_variance.py \
      --scale=small --seeds=0,1,2

The paper's claim is that next-token diffusion gains from a larger variance, while DiT, which draws
all latents at once, hardly changes. Rows are both models on a plain VAE, whose noise is what it has
learnt, and on sigma-VAEs of C from 0.1 to 0.75; each is compared with its own model on the plain
VAE. Nothing is guided. At the scale `small` these are the 8x8 digits of `models.py`, where 16
latents are few for errors to add up over; `paper` is ImageNet, for which accelerators and a copy
are needed, the paper's swept values and size of model being unknown. Its figures are FIDs of two
points alone: MAR's convolutional tokenizer and C = 0.75. Arguments: `row`, `scale`, `smoke`,
`seed`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from experiments.configs.latentlm import imagenet, models, tokenizers_paper

TITLE = "LatentLM, figure 6: DiT and LatentLM by the variance of their tokenizer's latents"
BASE = "latentlm_plain"
METRICS = {"FD": "generation/fd", "agreement": "generation/agreement"}
SCALES = {
  "small": models.SCALES["small"].replace(" at guidance 1.5", ", not guided"),
  "paper": "256 x 256 pixels, 256 latents of 16 channels; models of 455M.",
}
UNKNOWN = dict.fromkeys(METRICS)
_STDS = {"plain": None, "c10": 0.1, "c30": 0.3, "c75": 0.75}
_FIDS = {"latentlm_plain": 9.64, "latentlm_c75": 4.10, "dit_plain": 8.16, "dit_c75": 7.35}

ROWS = {
  f"{model}_{name}": dict(
    about=f"{title}, {'a plain VAE' if std is None else f'sigma-VAE, C = {std}'}",
    expected=UNKNOWN | {"FID": _FIDS.get(f"{model}_{name}")},
    model=model,
    std=std,
    base=f"{model}_plain",
  )
  for model, title in (("latentlm", "LatentLM"), ("dit", "DiT"))
  for name, std in _STDS.items()
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  row = ROWS[arg.row]
  plain = row["std"] is None
  if arg.scale == "small":
    c = models.get_config(f"row={row['model']}{'_plain' * plain},seed={arg.seed}")
  else:
    size = "medium" if row["model"] == "latentlm" else "dit_medium"
    c = imagenet.get_config(f"row={size},seed={arg.seed}")
    if plain:
      c.tokenizer = tokenizers_paper.get_config(f"row=imagenet_conv,seed={arg.seed}")
  if not plain:
    c.tokenizer.model.std = row["std"]
  c.evals.generation.guidance = c.sample.guidance = 1.0
  return latentlm.smoke(c) if arg.smoke else c
