r"""Zero-shot speech by LatentLM: tables 4 and 6 and figure 10 of arXiv 2412.08635.

  python -m experiments.train --workdir=runs/tts_15 \
      --config=experiments/configs/latentlm/speech_paper.py:row=rate_15 \
      --config.data.tokenizer_run=runs/speech_1600 --config.data.media.path=libriheavy/train.jsonl

`runs/speech_1600` is the tokenizer of `tokenizers_paper.py:row=speech_1600`, trained before; the
jsonl file names sounds with their texts (see `latentlab/data/listing.py`). These need accelerators,
and a corpus of yours: the paper's is Libriheavy, 50,000 hours of about 7,000 speakers. Figures are
of LibriSpeech test-clean. In table 4 "ref" is prompted by another utterance of the speaker, "3 s"
by the first three seconds of the utterance itself; the latter is drawn here. What the paper
measures it by is not here: its SIM is of WavLM's embeddings and its WER of two recognisers, our SIM
is of cepstral statistics, and WER of what is registered (`latentlab.eval.speech.register`).

Unknown are the tokens of a text (here bytes), the unit of the batch ("5M"), the rate of texts that
are left out for guidance (here 0.1), weight decay, and how a run ends (here by a token); of figure
10 the values: guidance is best at 4, and more than 5 steps of the head gain nothing. Its rows are
evaluations of one run.

Arguments: `row`; `scale`, of which there is one; `smoke`, a run of seconds on vowels; `seed`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from experiments.configs.latentlm import speech, tokenizers_paper

TITLE = "LatentLM, tables 4 and 6 and figure 10: zero-shot speech"
BASE = "rate_15"
METRICS = {
  "SIM-o(MFCC), 3 s": "speech/similarity",
  "distance of durations, s": "speech/seconds_distance",
}
SCALES = common.paper_alone("24 layers of width 1,024, 50,000 hours.")
UNKNOWN = dict.fromkeys(METRICS)

_TABLE4 = tuple(
  f"{metric}, {prompt}" for prompt in ("ref", "3 s") for metric in ("SIM", "WER-C", "WER-H")
)
_TABLE6 = ("decoded Mel", "decoded SIM", "decoded WER-C", "SIM", "WER-C")


def _row(about, columns, figures, strides, dim, **more):
  expected = UNKNOWN | dict(zip(columns, figures, strict=True))
  return dict(about=about, expected=expected, strides=strides, dim=dim) | more


def _figure10(guidance, steps):
  name = _name(guidance, steps)
  return dict(
    about=f"figure 10, guidance {guidance}, {steps} steps",
    expected=UNKNOWN,
    run=BASE,
    metrics={column: metric.replace("speech", name) for column, metric in METRICS.items()},
  )


def _name(guidance, steps):
  return f"guidance_{guidance}_steps_{steps}"


# Of guidance and steps; all else is measured at 4 and 5, and one of them varies here.
FIGURE10 = tuple((g, 5) for g in (1, 2, 3, 5)) + tuple((4, s) for s in (1, 2, 3, 10, 20))

ROWS = {
  "rate_15": _row(
    "table 4, 15 latents of 32 channels a second",
    _TABLE4,
    (0.697, 1.2, 1.8, 0.571, 1.4, 2.0),
    None,
    32,
    preset="speech_1600",
  ),
  "rate_7_5": _row(
    "table 4, 7.5 latents of 64 channels a second",
    _TABLE4,
    (0.656, 1.2, 1.7, 0.532, 1.6, 2.3),
    None,
    64,
    preset="speech_3200",
  ),
  "rate_3_75": _row(
    "table 4, 3.75 latents of 128 channels a second",
    _TABLE4,
    (0.598, 1.7, 2.3, 0.467, 3.1, 4.5),
    None,
    128,
    preset="speech_6400",
  ),
  "table6_37_5_narrow": _row(
    "table 6, 37.5 latents of 16 channels a second",
    _TABLE6,
    (0.929, 0.866, 1.9, 0.655, 1.4),
    (2, 4, 5, 4, 4),
    16,
  ),
  "table6_15_narrow": _row(
    "table 6, 15 latents of 16 channels a second",
    _TABLE6,
    (1.080, 0.700, 2.7, 0.545, 1.6),
    (2, 4, 5, 5, 8),
    16,
  ),
  "table6_15": _row(
    "table 6, 15 latents of 32 channels a second",
    _TABLE6,
    (0.950, 0.870, 1.9, 0.661, 1.5),
    (2, 4, 5, 5, 8),
    32,
  ),
}
ROWS |= {_name(*values): _figure10(*values) for values in FIGURE10}


def get_config(arg=None):
  trained = tuple(name for name, row in ROWS.items() if "run" not in row)
  arg = common.parse_arg(arg, row=trained, scale=tuple(SCALES), smoke=False, seed=0)
  row = ROWS[arg.row]
  tokenizer = tokenizers_paper.get_config(f"row={row.get('preset', 'speech_1600')},seed={arg.seed}")
  if row["strides"] is not None:
    length = 25_600  # Whole latents of all.
    tokenizer.model.update(strides=row["strides"], dim=row["dim"], num_samples=length)
    tokenizer.data.num_samples = length
  c = latentlm.latentlm(tokenizer, seed=arg.seed)
  c.model.update(num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096, dtype="bfloat16")
  c.latents.head.update(depth=3, mlp_dim=4096)
  c.latents.update(stop="token", prompt_dropout=0.1)
  c.data.update(modality="speech", condition="text", max_text=512)
  c.data.media.update(path="libriheavy/train.jsonl", num_samples=480_000)  # 20 s.
  c.optimizer.update(peak_lr=7.5e-4, warmup_steps=10_000, b2=0.98, end_lr_ratio=0.0)
  c.batch_size, c.train_steps = 256, 100_000
  c.log_steps, c.checkpoint_steps = 100, 5_000
  c.evals.validation.update(every_steps=5_000, max_batches=8)
  evaluate = lambda guidance, steps: speech.evaluation(
    25_000, num_samples=1_000, prompt_seconds=3.0, guidance=float(guidance), num_steps=steps
  )
  c.evals.speech = evaluate(4, 5)
  if arg.row == BASE:
    for values in FIGURE10:
      c.evals[_name(*values)] = evaluate(*values)
  c.sample.update(num_samples=8, guidance=4.0, num_steps=5)
  return speech.smoke(c) if arg.smoke else c
