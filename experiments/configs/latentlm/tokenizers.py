r"""What noise on its latents makes of a tokenizer, on 8x8 digits (https://arxiv.org/abs/2412.08635).

  python -m experiments.train --workdir=runs/digits_sigma \
      --config=experiments/configs/latentlm/tokenizers.py:row=digits_sigma

The paper's claim is that a variance which cannot collapse makes latents bear errors. So each row
reports what its noise amounts to once latents are normalised, and how much worse a reconstruction
becomes when the means are off by a fifth of their standard deviation. The table, three seeds a row:

  python -m experiments.tables --config=experiments/configs/latentlm/tokenizers.py \
      --scale=small --seeds=0,1,2 --num_workers=2

Arguments: `row`, a name of `ROWS`; `scale`, of which there is one; `smoke` for a run of seconds;
`seed`. The paper has no such table; the tokenizers of its own sizes are in `tokenizers_paper.py`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm

TITLE = "LatentLM's tokenizers on digits: noise, reconstruction, and what errors of latents cost"
BASE = "digits_plain"
METRICS = {
  "noise ratio": "reconstruction/noise_ratio",
  "MSE, means": "reconstruction/mse",
  "MSE, sampled": "reconstruction/mse_sampled",
  "MSE, means off": "reconstruction/mse_perturbed",
  "sensitivity": "reconstruction/sensitivity",
}
SCALES = {
  "small": "16 latents of 2 channels for 8x8 digits (scikit-learn's 1,797), two layers of width 64 "
  "a side, 2000 steps of 64; losses are means over pixels and latents.",
}
UNKNOWN = dict.fromkeys(METRICS)
SILENT = {"noise ratio": None}  # Nothing is added to the latents of these.

ROWS = {
  "digits_plain": dict(
    about="a plain VAE, beta 1e-6",
    expected=UNKNOWN,
    model=dict(bottleneck="plain"),
    beta=1e-6,
  ),
  "digits_plain_beta": dict(
    about="a plain VAE, beta 1e-2",
    expected=UNKNOWN,
    model=dict(bottleneck="plain"),
    beta=1e-2,
  ),
  "digits_sigma": dict(about="sigma-VAE, C = 0.75", expected=UNKNOWN, model=dict(std=0.75)),
  "digits_sigma_30": dict(about="sigma-VAE, C = 0.3", expected=UNKNOWN, model=dict(std=0.3)),
  "digits_sigma_10": dict(about="sigma-VAE, C = 0.1", expected=UNKNOWN, model=dict(std=0.1)),
  "digits_sigma_token": dict(
    about="C = 0.75, a scale for each token", expected=UNKNOWN, model=dict(scale_per="token")
  ),
  "digits_fixed": dict(
    about="noise of one scale, 0.75", expected=UNKNOWN, model=dict(bottleneck="sigma_fixed")
  ),
  "digits_mean": dict(
    about="no noise", expected=UNKNOWN, model=dict(bottleneck="mean"), metrics=SILENT
  ),
  "digits_spherical": dict(
    about="no noise, on a sphere of radius sqrt(3), three channels",
    expected=UNKNOWN,
    model=dict(bottleneck="spherical", dim=3),  # Two would leave an angle.
    beta=0.0,
    metrics=SILENT,
  ),
  "digits_vq": dict(
    about="the nearest of 64 codes of 4 channels",
    expected=UNKNOWN,
    model=dict(bottleneck="vq", codebook_size=64, dim=4),
    beta=0.0,
    metrics=SILENT,
  ),
  "digits_conv": dict(
    about="sigma-VAE, C = 0.75, of convolutions",
    expected=UNKNOWN,
    name="conv_tokenizer",
    model=dict(width=32, multipliers=(1, 2), strides=(2,), depth=1),
  ),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  row = ROWS[arg.row]
  name = row.get("name", "vit_tokenizer")
  sizes = dict(image_size=8, channels=1, dim=2)
  if name == "vit_tokenizer":
    sizes |= dict(patch_size=2, num_layers=2, embed_dim=64, num_heads=4, init="fan_in")
  c = latentlm.latent_tokenizer(name, seed=arg.seed, **(sizes | row["model"]))
  c.task.beta = row.get("beta", 1e-2)
  c.optimizer.update(peak_lr=1e-3, warmup_steps=100)
  c.train_steps, c.log_steps, c.checkpoint_steps = 2_000, 50, 1_000
  c.evals.reconstruction = dict(
    type="reconstruction", split="validation", every_steps=1_000, max_batches=0, perturbation=0.2
  )
  return latentlm.smoke_tokenizer(c) if arg.smoke else c
