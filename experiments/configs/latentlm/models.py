r"""LatentLM and what it is compared with, on 8x8 digits (https://arxiv.org/abs/2412.08635).

  python -m experiments.train --workdir=runs/digits_latentlm \
      --config=experiments/configs/latentlm/models.py:row=latentlm

All rows draw the same media by class: a LatentLM, its DiT twin, a language model of codes, a
Transfusion, and LatentLMs with the diffusion head of MAR, or one that gives the mean or a mixture
of Gaussians in the place of diffusion. Of the paper's claims, LatentLM gains more from a sigma-VAE
than DiT does; hence both on both. Samples are compared with the training images in the features of
a small classifier, which also says how often the class that was asked for is seen. The table, three
seeds a row:

  python -m experiments.tables --config=experiments/configs/latentlm/models.py \
      --scale=small --seeds=0,1,2

Arguments: `row`, a name of `ROWS`; `tokenizer`, `sigma` or `plain` in the place of the row's;
`scale`, of which there is one; `smoke` for a run of seconds; `seed`. A run trains its tokenizer
first; rows of one seed and tokenizer train equal ones, as all that those depend on is equal. The
paper compares LatentLM and DiT by the FID of ImageNet at 256 x 256 pixels, which is nothing to set
beside digits.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm

TITLE = "LatentLM and its baselines on digits, by class"
BASE = "latentlm"
METRICS = {
  "FD": "generation/fd",
  "agreement": "generation/agreement",
}
SCALES = {
  "small": "16 latents for 8x8 digits (scikit-learn's 1,797); three layers of width 64, 2000 steps "
  "of 64; 500 samples in 20 steps at guidance 1.5.",
}
UNKNOWN = dict.fromkeys(METRICS)

ROWS = {
  "latentlm": dict(about="LatentLM, sigma-VAE", expected=UNKNOWN),
  "latentlm_one_draw": dict(
    about="LatentLM, one noise a latent in each step, as DiT has",
    expected=UNKNOWN,
    head_fields=dict(num_draws=1),
  ),
  "dit": dict(about="DiT, all latents at once", expected=UNKNOWN, model="dit"),
  "vq": dict(
    about="a language model of 64 codes, dropout 0.2",  # Without, it learns its codes by heart.
    expected=UNKNOWN,
    model="vq",
    tokenizer="vq",
    model_fields=dict(dropout_rate=0.2),
  ),
  "transfusion": dict(
    about="Transfusion, all latents at once", expected=UNKNOWN, model="transfusion"
  ),
  "mar": dict(
    about="MAR's head, which learns its variance",
    expected=UNKNOWN,
    head="mar",
    head_fields=dict(width=64),
    # It predicts the noise, whose errors the noisiest levels magnify a thousandfold and more.
    lambda_min=-3.0,
  ),
  "regression": dict(
    about="the mean in the place of diffusion", expected=UNKNOWN, head="regression"
  ),
  "mixture": dict(about="a mixture of Gaussians", expected=UNKNOWN, head="mixture"),
  "latentlm_plain": dict(about="LatentLM, plain VAE", expected=UNKNOWN, tokenizer="plain"),
  "dit_plain": dict(
    about="DiT, plain VAE",
    expected=UNKNOWN,
    model="dit",
    tokenizer="plain",
    base="latentlm_plain",
  ),
}
TOKENIZERS = {
  "sigma": (dict(bottleneck="sigma_gaussian", std=0.3), 1e-2),
  "plain": (dict(bottleneck="plain"), 1e-6),
  "vq": (dict(bottleneck="vq", codebook_size=64), 0.0),
}


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    row=tuple(ROWS),
    tokenizer=("", "sigma", "plain"),
    scale=tuple(SCALES),
    smoke=False,
    seed=0,
  )
  row = ROWS[arg.row]
  model, of_row = row.get("model", "latentlm"), row.get("tokenizer", "sigma")
  if arg.tokenizer and model == "vq":
    raise ValueError(f"row={arg.row} has codes, and tokenizer={arg.tokenizer} has none; leave it.")
  tokenizer = _tokenizer(arg.tokenizer or of_row, arg.seed)
  options = {"head": row["head"]} if "head" in row else {}
  c = getattr(latentlm, model)(tokenizer, seed=arg.seed, **options)
  c.model.update(row.get("model_fields", {}))
  if "head_fields" in row:
    c.latents.head.update(row["head_fields"])
  c.train_steps, c.log_steps, c.checkpoint_steps = 2_000, 50, 500
  c.sample.update(num_samples=100, guidance=1.5)
  c.evals.generation = latentlm.generation(2_000, guidance=1.5)
  if "lambda_min" in row:
    c.sample.lambda_min = c.evals.generation.lambda_min = row["lambda_min"]
  return latentlm.smoke(c) if arg.smoke else c


def _tokenizer(name, seed):
  bottleneck, beta = TOKENIZERS[name]
  body = dict(image_size=8, channels=1, patch_size=2, num_layers=2, embed_dim=64, num_heads=4)
  c = latentlm.latent_tokenizer(
    "vit_tokenizer", seed=seed, dim=4, init="fan_in", **body, **bottleneck
  )
  c.task.beta = beta
  c.train_steps, c.log_steps, c.checkpoint_steps = 1_500, 50, 500
  return c
