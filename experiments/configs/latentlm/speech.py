r"""Speech by next-token diffusion, in the small (after tables 4 and 6 of arXiv 2412.08635).

  python -m experiments.train --workdir=runs/vowels \
      --config=experiments/configs/latentlm/speech.py:row=rate_50

A causal sigma-VAE of sounds, and a LatentLM that says a word: from its text, until it draws the end
itself. Rows are rates of latents and their channels. What is asked of samples is what the paper
asks, by stand-ins that need no download: WER(classifier), the errors of a small classifier of the
split's words, and SIM(MFCC), the cosine of cepstral statistics, of what is drawn behind the first
0.16 seconds of a held-out utterance to other utterances of its speaker, as they were recorded
(SIM-o) and as the tokenizer decodes them (SIM-r); how long drawn words are; and the mel distance of
reconstructions. The table, over seeds:

  python -m experiments.tables --config=experiments/configs/latentlm/speech.py \
      --scale=small --seeds=0,1,2

Scales: `small`, vowels that are made in memory; `spoken_digits`, the free spoken digit data set
(github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0; 3,000 wav files of 6 speakers in
English, `{digit}_{speaker}_{index}.wav`), which is to be unpacked anywhere:

  python -m experiments.tables --config=experiments/configs/latentlm/speech.py \
      --scale=spoken_digits --seeds=0 -- --config.tokenizer.data.path=digits/ \
      --config.data.media.path=digits/

Its files are read as they lie: classes are found in names (`label_pattern`), words are those of
the classes (`class_captions`), and recordings 0 to 4 of each speaker and digit are held out, as is
usual (`split_pattern`). Its speakers' levels differ by 30 dB, so all are scaled to one peak.

Other arguments: `row`; `condition`, `text` or `class`; `stop`, `token` or `classifier`; `smoke` for
a run of seconds, on vowels; `seed`. A tokenizer is trained on fifths of a second, cut out anywhere.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from latentlab.data.images import DIGIT_WORDS

TITLE = "LatentLM's speech in the small: rates of latents and their channels"
BASE = "rate_50"
METRICS = {
  "mel distance": "speech/mel_distance",
  "WER(classifier)": "speech/wer",
  "WER(classifier), decoded": "speech/wer_reconstructed",
  "WER(classifier), real": "speech/wer_real",
  "SIM-o(MFCC)": "speech/similarity",
  "SIM-o(MFCC), decoded": "speech/similarity_reconstructed",
  "SIM-o(MFCC), real": "speech/similarity_real",
  "SIM-o(MFCC), others": "speech/similarity_others",
  "SIM-r(MFCC)": "speech/similarity_r",
  "SIM-r(MFCC), decoded": "speech/similarity_r_reconstructed",
  "SIM-r(MFCC), others": "speech/similarity_r_others",
  "distance of durations, s": "speech/seconds_distance",
}
_SIZES = (
  "Tokenizers of 1200 steps of 16 x 0.2 s, three layers of width 64 for 600 steps of 16 words."
)
SCALES = {
  "small": f"240 vowels of 6 made-up speakers. {_SIZES}",
  "spoken_digits": f"2,700 spoken digits of 6 speakers; 300 are held out. {_SIZES}",
}
UNKNOWN = dict.fromkeys(METRICS)

ROWS = {
  "rate_100": dict(
    about="100 latents of 16 channels a second", expected=UNKNOWN, strides=(8, 5, 2), dim=16
  ),
  "rate_50": dict(
    about="50 latents of 32 channels a second", expected=UNKNOWN, strides=(8, 5, 4), dim=32
  ),
  "rate_25": dict(
    about="25 latents of 64 channels a second", expected=UNKNOWN, strides=(8, 5, 4, 2), dim=64
  ),
  "rate_25_narrow": dict(
    about="25 latents of 16 channels a second", expected=UNKNOWN, strides=(8, 5, 4, 2), dim=16
  ),
}

RATE = 8_000
_SEGMENT, _LONGEST = 1_600, 6_400  # Samples: whole latents of all rates.


def get_config(arg=None):
  arg = common.parse_arg(
    arg,
    row=tuple(ROWS),
    scale=tuple(SCALES),
    condition=("text", "class"),
    stop=("token", "classifier"),
    smoke=False,
    seed=0,
  )
  scale = "small" if arg.smoke else arg.scale
  row = ROWS[arg.row]
  c = latentlm.latentlm(_tokenizer(row, scale, arg.seed), seed=arg.seed)
  c.data.update(modality="speech", condition=arg.condition)
  c.data.media.num_samples = _LONGEST
  c.latents.update(stop=arg.stop)
  c.latents.head.num_draws = 2
  c.batch_size, c.train_steps, c.log_steps, c.checkpoint_steps = 16, 600, 50, 300
  c.optimizer.ema_decay = 0.99
  c.evals.validation.update(every_steps=300)
  c.evals.speech = evaluation(600, prompt_seconds=0.16, speaker_pattern=r"_(\w+)_")
  c.evals.speech.update(recognizer="classifier", guidance=2.0, num_steps=10)
  c.sample.update(num_samples=10, guidance=2.0, num_steps=10)
  return smoke(c) if arg.smoke else c


def evaluation(every_steps, **values):
  """An evaluation of drawn speech, with every field that it has."""
  fields = dict(split="validation", num_samples=100, recognizer="", seed=0)
  fields |= dict(prompt_seconds=0.0, speaker_pattern="")
  return dict(type="speech", every_steps=every_steps) | fields | latentlm.solver_fields() | values


def smoke(c):
  """Shrinks a run of speech to seconds on a CPU, on vowels, of which it hears the beginning."""
  c.tokenizer.data = latentlm.media("vowels", sample_rate=RATE)
  latentlm.smoke(c)
  for e in c.evals.values():
    if e.type == "speech":
      e.update(prompt_seconds=min(e.prompt_seconds, 0.02), recognizer="")
  return c


def _tokenizer(row, scale, seed):
  levels = len(row["strides"])
  c = latentlm.latent_tokenizer(
    "speech_tokenizer",
    seed=seed,
    num_samples=_SEGMENT,
    dim=row["dim"],
    width=16,
    strides=row["strides"],
    depths=(0,) + levels * (1,),  # Blocks at the rate of samples would cost more than all others.
    init_std=0.0,
    layer_scale=0.1,
    std=0.5,
  )
  c.data = latentlm.media("vowels", sample_rate=RATE, num_samples=_SEGMENT)
  if scale == "spoken_digits":
    c.data.update(
      source="wav_folder",
      path="spoken_digits",
      label_pattern="^([0-9])_",
      class_captions=DIGIT_WORDS,
      split_pattern=r"_[0-4]\.wav$",
      peak=0.5,
    )
  c.task.update(beta=1e-3, reconstruction="l1", spectral_weight=1.0, spectral_windows=(64, 256))
  c.optimizer.ema_decay = 0.99
  c.batch_size, c.train_steps, c.log_steps, c.checkpoint_steps = 16, 1_200, 50, 400
  c.evals.reconstruction = dict(
    type="reconstruction", split="validation", every_steps=1_200, max_batches=0, perturbation=0.2
  )
  c.sample.num_samples = 4
  return c
