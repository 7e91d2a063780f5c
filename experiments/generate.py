r"""Continues prompts with a trained model.

  python -m experiments.generate --workdir=runs/a --prompt="def main(" --top_p=0.9

Text goes to stdout as it is drawn, all else to stderr. Every prompt starts a document; a row ends
where the model starts the next one. A sample depends on `--seed`, its prompt's place and its own
number, and on nothing else that is drawn beside it. `--model=mask=blockwise_causal` lets a model go
on beyond the length that it was trained at, in a cache of that length.

A model over latents draws images or sounds, and writes captions (`experiments/generate_media.py`):

  python -m experiments.generate --workdir=runs/quickstart_latent --classes=3,7 --num_samples=8
  python -m experiments.generate --workdir=runs/speech --prompt=seven --block_size=4
"""

import json
import logging
import pathlib
import sys
import time
from collections.abc import Iterable

import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import generate_media, model_flag
from latentlab import app, sample
from latentlab.train import loop

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
_PROMPT_FILE = flags.DEFINE_string(
  "prompt_file", None, "A text file that is one prompt, or a .jsonl file with a 'prompt' a line."
)
_NUM_TOKENS = flags.DEFINE_integer("num_tokens", 256, "Tokens to draw at most.", lower_bound=1)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 1, "Samples of each prompt.", lower_bound=1, upper_bound=1 << 16
)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Divides logits; 1 if not given.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Keeps the best tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Keeps the fewest best tokens of this mass.")
_MIN_P = flags.DEFINE_float("min_p", None, "Keeps tokens this probable relative to the best.")
_PENALTY = flags.DEFINE_float(
  "repetition_penalty", None, "Makes recent tokens less probable; 1 does nothing."
)
_GREEDY = flags.DEFINE_bool("greedy", False, "Takes the best token instead of drawing one.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
_STEP = flags.DEFINE_string("step", "latest", "A step, 'latest' or 'best'.")
_PREFILL_SIZE = flags.DEFINE_integer(
  "prefill_size",
  2048,
  "Longer prompts are read in slices of this many tokens, so that memory beside the cache does not "
  "grow with them; 0 reads any prompt at once.",
  lower_bound=0,
)
_STREAM = flags.DEFINE_bool(
  "stream", True, "Writes text, and a LatentLM's sounds, while they are drawn, not at the end."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "A .jsonl file for samples of text; a folder for images and sounds."
)
_FLAGS = (
  _PROMPT,
  _PROMPT_FILE,
  _NUM_TOKENS,
  _NUM_SAMPLES,
  _TEMPERATURE,
  _TOP_K,
  _TOP_P,
  _MIN_P,
  _PENALTY,
  _GREEDY,
  _SEED,
  _STEP,
  model_flag.MODEL,
  _PREFILL_SIZE,
  _STREAM,
  _OUTPUT,
  *generate_media.FLAGS,
)

logger = logging.getLogger("latentlab.generate")


def main(config: ml_collections.ConfigDict | None, workdir: str) -> None:
  sampler = _sampler()
  if (config or loop.read_config(workdir)).task.type != "language_model":
    _draw_media(config, workdir, sampler)
    return
  for flag in generate_media.FLAGS:
    if flag.present:
      raise ValueError(f"--{flag.name}={flag.value} is of models over latents; leave it out.")
  prompts = _prompts()
  if _OUTPUT.value and not pathlib.Path(_OUTPUT.value).parent.is_dir():
    raise ValueError(f"--output={_OUTPUT.value!r} lies in no existing folder; make it first.")
  run = loop.load(workdir, config, step=_STEP.value, model=model_flag.fields(config, workdir))
  each = np.repeat(np.arange(len(prompts)), _NUM_SAMPLES.value)
  number = np.tile(np.arange(_NUM_SAMPLES.value), len(prompts))
  reading = _ReadingBar()
  try:
    blocks = sample.stream_text(
      run.task.model,
      run.params,
      run.tokenizer,
      [prompts[p] for p in each],
      sampler=sampler,
      key=sample.row_keys(_SEED.value, (each << 16) + number),
      max_new_tokens=_NUM_TOKENS.value,
      prefill_size=_PREFILL_SIZE.value or None,
      on_read=reading,
    )
  except ValueError as e:
    raise ValueError(f"--prompt or --num_tokens={_NUM_TOKENS.value} does not fit: {e}") from e
  logger.info("Sampling from step %d of %s.", run.step, workdir)
  titles = [f"prompt {p + 1}, sample {s + 1}" for p, s in zip(each, number, strict=True)]
  drawn = _write(
    reading.until(blocks), [prompts[p] for p in each], titles if len(titles) > 1 else [""]
  )
  if _OUTPUT.value:
    with open(_OUTPUT.value, "w", encoding="utf-8") as f:
      for p, s, fields in zip(each.tolist(), number.tolist(), drawn, strict=True):
        line = {"prompt": prompts[p], "sample": s, **fields, "step": run.step, "seed": _SEED.value}
        f.write(json.dumps(line, ensure_ascii=False) + "\n")


def _draw_media(
  config: ml_collections.ConfigDict | None, workdir: str, sampler: sample.TokenSampler
) -> None:
  run = loop.load(workdir, config, step=_STEP.value, model=model_flag.fields(config, workdir))
  if not hasattr(run.task, "generator"):
    raise ValueError(f"{workdir!r} trained {run.config.task.type!r}, which draws nothing.")
  generate_media.main(
    run,
    workdir,
    prompts=_prompts() if _PROMPT.value or _PROMPT_FILE.value else [],
    num_samples=_NUM_SAMPLES.value,
    num_tokens=_NUM_TOKENS.value,
    tokens=sampler,
    temperature=_TEMPERATURE.value,
    seed=_SEED.value,
    output=_OUTPUT.value,
    stream=_STREAM.value if _STREAM.present else None,
  )


def _prompts() -> list[str]:
  """The prompts of the flags; the empty one if there is none."""
  path = _PROMPT_FILE.value
  if path is None:
    return _PROMPT.value or [""]
  if _PROMPT.value:
    raise ValueError("--prompt and --prompt_file are both given; choose one.")
  try:
    text = pathlib.Path(path).read_text("utf-8")
    if not path.endswith(".jsonl"):
      return [text.removesuffix("\n")]
    prompts = [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
  except OSError as e:
    raise ValueError(f"--prompt_file={path!r} cannot be read: {e.strerror}.") from e
  except UnicodeDecodeError as e:
    raise ValueError(f"--prompt_file={path!r} is not utf-8 at byte {e.start}; convert it.") from e
  except (json.JSONDecodeError, KeyError, TypeError) as e:
    raise ValueError(f'--prompt_file={path!r} needs {{"prompt": "..."}} on every line: {e}') from e
  if not prompts or not all(isinstance(p, str) for p in prompts):
    raise ValueError(f"--prompt_file={path!r} needs a line or more, with a string as its 'prompt'.")
  return prompts


def _sampler() -> sample.TokenSampler:
  if _GREEDY.value:
    useless = [f for f in (_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P) if f.value is not None]
    useless += [_NUM_SAMPLES] if _NUM_SAMPLES.value > 1 else []
    for flag in useless:
      raise ValueError(f"--{flag.name}={flag.value} means nothing with --greedy; drop one of them.")
  try:
    return sample.token_sampler(
      temperature=1.0 if _TEMPERATURE.value is None else _TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      min_p=_MIN_P.value,
      repetition_penalty=_PENALTY.value,
      greedy=_GREEDY.value,
    )
  except ValueError as e:
    given = (_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _PENALTY)
    named = ", ".join(f"--{f.name}={f.value}" for f in given if f.value is not None)
    raise ValueError(f"{named}: {e}.") from e


class _Printer:
  """Writes rows one below the other: the first that is not done as it grows, others behind it."""

  def __init__(self, titles: list[str], prompts: list[str]):
    self._pieces = [
      [f"--- {title}\n" * bool(title) + prompt]
      for title, prompt in zip(titles, prompts, strict=True)
    ]
    self._done = [False] * len(titles)
    self._front = 0

  def add(self, row: int, text: str, done: bool) -> None:
    self._pieces[row].append(text)
    self._done[row] = done

  def show(self) -> None:
    while self._front < len(self._pieces):
      sys.stdout.write("".join(self._pieces[self._front]))
      self._pieces[self._front].clear()
      if not self._done[self._front]:
        break
      sys.stdout.write("\n")
      self._front += 1
    sys.stdout.flush()


def _bar(**options) -> tqdm.tqdm:
  """A bar, unless it would write over the text on the same terminal."""
  disable = True if _STREAM.value and sys.stdout.isatty() else None
  return tqdm.tqdm(unit="token", leave=False, file=sys.stderr, disable=disable, **options)


class _ReadingBar:
  """A bar from the first slice of long prompts to the first block behind them."""

  def __init__(self):
    self._bar = None

  def __call__(self, num_tokens: int) -> None:
    if self._bar is None:
      self._bar = _bar(desc="prompt")
    self._bar.update(num_tokens)

  def until(self, blocks: Iterable[list[sample.Piece]]) -> Iterable[list[sample.Piece]]:
    for block in blocks:
      if self._bar is not None:
        self._bar.close()
      yield block


def _write(
  blocks: Iterable[list[sample.Piece]], prompts: list[str], titles: list[str]
) -> list[dict]:
  """Writes the text of blocks to stdout as they come; returns what there is to say of each row."""
  printer = _Printer(titles, prompts)
  rows = [{"text": "", "tokens": [], "log_prob": 0.0, "finished": False} for _ in prompts]
  start = time.monotonic()
  if _STREAM.value:
    printer.show()  # The first prompt, while the first block is compiled.
  with _bar(total=_NUM_TOKENS.value) as bar:
    for pieces in blocks:
      for r, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
        row["text"] += piece.text
        row["tokens"] += piece.tokens
        row["log_prob"] += piece.log_prob
        row["finished"] = piece.finished
        printer.add(r, piece.text, piece.done)
      if _STREAM.value:
        printer.show()
      bar.update(max(len(piece.tokens) for piece in pieces))
  printer.show()
  seconds = time.monotonic() - start
  count = sum(len(row["tokens"]) for row in rows)
  logger.info(
    "%d tokens in %.1f s (%.1f tokens/s, compilation included).", count, seconds, count / seconds
  )
  return rows


if __name__ == "__main__":
  app.run(main, config_required=False, flag_names=[f.name for f in _FLAGS])
