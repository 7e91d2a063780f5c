r"""Emoji drawn from their names: LatentLM (https://arxiv.org/abs/2412.08635) from text to image.

  python -m experiments.prepare --source=emoji
  python -m experiments.train --config=experiments/configs/latentlm/emoji.py --workdir=runs/emoji
  python -m experiments.generate --workdir=runs/emoji --prompt='red heart' --num_samples=8

The first command fetches 1,911 emoji with their names, "grinning face", "nauru flag", and
categories (npm's package emoji-datasource-twitter; the images are Twemoji, CC BY 4.0). Images are
of 32x32 pixels and 64 latents, names are bytes, of which 40 at most are read; a tenth is held out.
This is little to learn how words and pictures go together from: names that training has seen are
drawn, and what is drawn of others shows what it has made of the words in them. Some five minutes on
two CPU cores. Images and texts of yours: `--config.tokenizer.data.source=captioned_images
--config.tokenizer.data.path=captions.jsonl`, and the same under `config.data.media`. Arguments:
`smoke`, a run of seconds on digits; `seed`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm


def get_config(arg=None):
  arg = common.parse_arg(arg, smoke=False, seed=0)
  body = dict(image_size=32, channels=3, patch_size=4, num_layers=2, embed_dim=96, num_heads=4)
  tokenizer = latentlm.latent_tokenizer(
    "vit_tokenizer", seed=arg.seed, dim=16, std=0.2, init="fan_in", **body
  )
  tokenizer.data = latentlm.media("emoji", size=32, channels=3)
  tokenizer.batch_size = 32
  tokenizer.train_steps, tokenizer.log_steps, tokenizer.checkpoint_steps = 800, 50, 400
  tokenizer.evals.reconstruction = dict(
    type="reconstruction", split="validation", every_steps=800, max_batches=0, perturbation=0.2
  )
  c = latentlm.latentlm(tokenizer, seed=arg.seed)
  c.data.update(condition="text", max_text=40)
  c.batch_size = 16
  c.latents.loss_weight = 5.0
  c.train_steps, c.log_steps, c.checkpoint_steps = 800, 50, 400
  c.sample.update(num_samples=64, guidance=2.0)
  c.evals.generation = latentlm.generation(800, num_samples=160, guidance=2.0)
  c.evals.generation.update(reconstruction=True)
  return latentlm.smoke(c) if arg.smoke else c
