r"""Tokenizers of the papers' sizes, for images and for speech (https://arxiv.org/abs/2412.08635).

  python -m experiments.train --workdir=runs/imagenet \
      --config=experiments/configs/latentlm/tokenizers_paper.py:row=imagenet \
      --config.data.path=imagenet/train
  python -m experiments.train --workdir=runs/speech_3200 \
      --config=experiments/configs/latentlm/tokenizers_paper.py:row=speech_3200 \
      --config.data.path=libritts

These need accelerators, and media of yours. Figures are of table 5 (LibriTTS test-other); what the
paper trained on, and the widths and depths of its speech tokenizers, are not public. Arguments:
`row`; `scale`, of which there is one; `smoke`, a run of seconds, on digits where the row is one of
images; `seed`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from latentlab.models.latent_tokenizer import PRESETS

TITLE = "LatentLM, table 5 and the image tokenizer: reconstruction"
BASE = "imagenet"
METRICS = {"MSE": "reconstruction/mse"}
SCALES = common.paper_alone("The released image tokenizer's sizes, VibeVoice's, and the paper's.")
UNKNOWN = {"MSE": None}


def _table5(*figures: float) -> dict[str, float | None]:
  names = ("Mel", "PESQ", "STOI", "ViSQOL", "UTMOS")
  return UNKNOWN | dict(zip(names, figures, strict=True))


ROWS = {
  "speech_1600": dict(
    about="speech sigma-VAE, 15 latents of 32 channels a second",
    expected=_table5(0.813, 2.724, 0.926, 4.268, 3.491),
    name="speech_tokenizer",
    preset="stride_1600",
  ),
  "speech_3200": dict(
    about="speech sigma-VAE, 7.5 latents of 64 channels a second",
    expected=_table5(0.798, 2.756, 0.929, 4.289, 3.505),
    name="speech_tokenizer",
    preset="stride_3200",
  ),
  "speech_6400": dict(
    about="speech sigma-VAE, 3.75 latents of 128 channels a second",
    expected=_table5(0.852, 2.533, 0.916, 4.165, 3.460),
    name="speech_tokenizer",
    preset="stride_6400",
  ),
  "vibevoice": dict(
    about="VibeVoice's, 7.5 latents of 64 channels a second, about 340M parameters a side",
    expected=UNKNOWN,
    name="speech_tokenizer",
    preset="vibevoice",
  ),
  "imagenet": dict(
    about="image sigma-VAE, 172M parameters, 256 latents of 16 channels",
    expected=UNKNOWN,
    name="vit_tokenizer",
    preset="imagenet",
  ),
  "imagenet_beit": dict(
    about="the same as the release has it, a BEiT-3 and a ViT with biases; its weights fit",
    expected=UNKNOWN,
    name="beit_tokenizer",
    preset="imagenet",
  ),
  "imagenet_conv": dict(
    about="a convolutional plain VAE of stride 16, 16 channels",
    expected=UNKNOWN,
    name="conv_tokenizer",
    model=dict(image_size=256, bottleneck="plain"),
    beta=1e-6,
  ),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  row = ROWS[arg.row]
  fields = PRESETS[row["name"]].get(row.get("preset"), {}) | row.get("model", {})
  c = latentlm.latent_tokenizer(row["name"], seed=arg.seed, **fields, dtype="bfloat16")
  c.task.beta = row.get("beta", 1e-2)
  if row["name"] == "speech_tokenizer":
    c.data = latentlm.media(
      "wav_folder", path="libritts", sample_rate=24_000, num_samples=c.model.num_samples
    )
    c.task.update(reconstruction="l1", spectral_weight=1.0)
    # Rates, batches and steps of the speech tokenizers are unknown.
    c.batch_size, c.train_steps = 64, 400_000
  else:
    c.data = latentlm.media("image_folder", path="imagenet/train", size=256, channels=3)
    c.data.update(random_crop=True, flip=True)
    # 200 epochs of 1.28M images at this batch, which is unknown; layer-wise decay is left out.
    c.batch_size, c.train_steps = 1_024, 250_000
  c.optimizer.update(peak_lr=3e-4, weight_decay=0.05, warmup_steps=5_000)
  c.log_steps, c.checkpoint_steps = 100, 5_000
  c.evals.reconstruction = dict(
    type="reconstruction", split="validation", every_steps=5_000, max_batches=16, perturbation=0.2
  )
  return latentlm.smoke_tokenizer(c) if arg.smoke else c
