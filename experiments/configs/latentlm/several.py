r"""Words, pictures and sounds in one model: LatentLM over two kinds of latents at once.

  python -m experiments.train --workdir=runs/several \
      --config=experiments/configs/latentlm/several.py:row=both

Digits are drawn from their words, and named; vowels are said. Each kind of latents has a tokenizer,
a head and a pair of tokens around its runs of its own; one decoder and one softmax serve both
(https://arxiv.org/abs/2412.08635, section 3). Rows are the model of both, and models of the same
size of either alone. The paper has no such table:

  python -m experiments.tables --config=experiments/configs/latentlm/several.py \
      --scale=small --seeds=0,1,2

A model of several kinds is told what to draw:

  python -m experiments.generate --workdir=runs/several --prompt=three --num_samples=4
  python -m experiments.generate --workdir=runs/several --prompt=a --modality=speech

Arguments: `row`; `scale`, of which there is one; `smoke` for a run of seconds; `seed`. Your own
sounds: `--config.others.speech.tokenizer.data.path=`, and the same under
`--config.others.speech.data.media`, with the fields that `speech.py` sets for files.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from experiments.configs.latentlm import models, speech

TITLE = "Words, pictures and sounds in one model"
BASE = "both"
IMAGES = {
  "caption accuracy": "captions/exact",
  "FD": "generation/fd",
  "agreement": "generation/agreement",
}
SPEECH = {
  "WER(classifier)": "speech/wer",
  "WER(classifier), decoded": "speech/wer_reconstructed",
  "distance of durations, s": "speech/seconds_distance",
}
METRICS = IMAGES | SPEECH
_SIZES = (
  "16 latents of 4 channels for 8x8 digits (scikit-learn's 1,797), 50 of 32 a second of sound; "
  "three layers of width 64, 1200 steps of 32 documents (17.5 of digits), or of 16 of one kind."
)
SCALES = {"small": f"240 vowels of 6 made-up speakers, and digits both ways. {_SIZES}"}
UNKNOWN = dict.fromkeys(METRICS)

ROWS = {
  "images": dict(about="pictures alone", expected=UNKNOWN, metrics=dict.fromkeys(SPEECH)),
  "speech": dict(about="sounds alone", expected=UNKNOWN, metrics=dict.fromkeys(IMAGES)),
  "both": dict(about="one model of both", expected=UNKNOWN),
}

_STEPS, _DOCUMENTS = 1_200, 16  # Of each kind in a step, about.


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  sounds = speech.get_config(f"row=rate_50,seed={arg.seed}")
  if arg.row == "speech":
    c = sounds
    evaluations = _of_speech(c)
  else:
    c = models.get_config(f"row=latentlm,seed={arg.seed}")
    c.data.condition = "both"
    evaluations = _of_images()
  documents = _DOCUMENTS
  if arg.row == "both":
    part = latentlm.add_modality(c, "speech", sounds.tokenizer, condition=sounds.data.condition)
    part.data.media, part.latents.stop = sounds.data.media, sounds.latents.stop
    part.data.repeats = 12  # 2,664 documents of vowels, beside 3,232 of digits.
    evaluations = {n: e | {"modality": c.data.modality} for n, e in evaluations.items()}
    evaluations |= {n: e | {"modality": "speech"} for n, e in _of_speech(sounds).items()}
    documents *= 2
  for head in [c.latents.head, *(part.latents.head for part in c.others.values())]:
    head.num_draws = 2
  c.batch_size, c.train_steps, c.log_steps, c.checkpoint_steps = documents, _STEPS, 50, _STEPS // 2
  c.data.documents_per_row = 1
  c.optimizer.ema_decay = 0.99
  c.evals = dict(validation=c.evals.validation.to_dict() | {"every_steps": _STEPS // 2})
  for name, evaluation in evaluations.items():
    c.evals[name] = evaluation | {"every_steps": _STEPS}
  c.sample.update(num_samples=10, guidance=2.0, num_steps=10)
  return _smoke(c) if arg.smoke else c


def _of_images():
  solver = dict(guidance=1.5, num_steps=20)
  captions = dict(type="captions", split="validation", max_batches=0, max_media=0, max_tokens=0)
  return dict(generation=latentlm.generation(_STEPS, **solver), captions=captions)


def _of_speech(c):
  return dict(speech=c.evals.speech.to_dict())


def _smoke(c):
  """Shrinks a run to seconds on a CPU."""
  if c.data.modality == "speech":
    return speech.smoke(c)
  latentlm.smoke(c)
  for part in c.others.values():
    latentlm.smoke_tokenizer(part.tokenizer)
    part.data.media = part.tokenizer.data.copy_and_resolve_references()
    part.latents.head.depth = 1
  if "speech" in c.evals:
    c.evals.speech.update(prompt_seconds=0.02, recognizer="")
  return c
