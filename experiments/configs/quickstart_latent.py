r"""Digits drawn by next-token diffusion: a tokenizer and a LatentLM, trained in minutes.

  python -m experiments.train --config=experiments/configs/quickstart_latent.py \
      --workdir=runs/quickstart_latent

Trains a sigma-VAE on scikit-learn's 8x8 digits (1,797 images, nothing is downloaded), encodes them,
trains a class-conditional LatentLM on the latents, and writes a picture of ten digits of each class
to `samples/images.png`. It prints the Fréchet distance of samples to the training images in the
features of a small classifier, and how often that classifier sees the digit that was asked for.
Arguments: `smoke` for a run of seconds; `seed`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm


def get_config(arg=None):
  arg = common.parse_arg(arg, smoke=False, seed=0)
  body = dict(image_size=8, channels=1, patch_size=2, num_layers=2, embed_dim=64, num_heads=4)
  tokenizer = latentlm.latent_tokenizer(
    "vit_tokenizer", seed=arg.seed, dim=4, std=0.3, init="fan_in", **body
  )
  tokenizer.train_steps, tokenizer.log_steps, tokenizer.checkpoint_steps = 1_500, 50, 500
  c = latentlm.latentlm(tokenizer, seed=arg.seed)
  c.train_steps, c.log_steps, c.checkpoint_steps = 2_000, 50, 500
  c.sample.update(num_samples=100, guidance=1.5)
  c.evals.generation = latentlm.generation(1_000, num_samples=500, reconstruction=True)
  c.evals.generation.update(guidance=1.5)
  return latentlm.smoke(c) if arg.smoke else c
