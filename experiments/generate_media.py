"""What `experiments.generate` does with a model over latents: images, sounds, and captions of them.

Written are `images.png` (a row of samples for each prompt) or a wav file for each sample, and
`samples.jsonl`, which says what was asked for. Sounds grow while they are drawn.
"""

import json
import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags

from latentlab import sample
from latentlab.data import images
from latentlab.data.media_files import WavWriter
from latentlab.layers.diffusion_head import check_solver
from latentlab.layers.latent_heads import SolverSettings
from latentlab.train import media_sample, media_stream

_BLOCK_SIZE = 8

CLASSES = flags.DEFINE_list(
  "classes", None, "Classes to draw, by name or number; all of them in turn if not given."
)
CAPTION = flags.DEFINE_multi_string("caption", [], "An image file to write a text for.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Scale of classifier-free guidance; 1 is none.")
NUM_STEPS = flags.DEFINE_integer("num_steps", None, "Steps of the head's solver.", lower_bound=1)
SOLVER = flags.DEFINE_string("solver", None, "Solver of the head: dpm_2m, ddim, sde_2m, ...")
LAMBDA_MIN = flags.DEFINE_float(
  "lambda_min",
  None,
  "Leaves out levels whose ln(alpha / sigma) lies below; -3 for a model that predicts noise.",
)
BLOCK_SIZE = flags.DEFINE_integer(
  "block_size",
  None,
  f"Latents between two pieces of a sound that grows; {_BLOCK_SIZE} if not given.",
  lower_bound=1,
)
MODALITY = flags.DEFINE_string(
  "modality", None, "What to draw, of a model of several modalities; the first if not given."
)
FLAGS = (CLASSES, CAPTION, GUIDANCE, NUM_STEPS, SOLVER, LAMBDA_MIN, BLOCK_SIZE, MODALITY)

logger = logging.getLogger("latentlab.generate")


def main(
  run: Any,
  workdir: str,
  *,
  prompts: list[str],
  num_samples: int,
  num_tokens: int,
  tokens: sample.TokenSampler,
  temperature: float | None,
  seed: int,
  output: str | None,
  stream: bool | None,
) -> None:
  """Draws and writes what the flags ask for.

  Args:
    run: A `loop.Trained`.
    workdir: Of the run.
    prompts: Texts of `--prompt`.
    num_samples: Of each prompt.
    num_tokens: Of a caption at most.
    tokens: Draws text.
    temperature: Of the noise that the solver starts from; the run's own if `None`.
    seed: Of the samples.
    output: Folder; `samples` of the workdir if `None`.
    stream: Whether sounds are written while they are drawn; if `None`, where they can be.

  Raises:
    ValueError: the flags ask for what the model does not do.
  """
  task, data, modality = _of_modality(run)
  generator = task.generator(run.params, data)
  logger.info("Sampling from step %d of %s.", run.step, workdir)
  if CAPTION.value:
    if prompts or CLASSES.value:
      raise ValueError("--caption writes texts of images: leave --prompt and --classes out.")
    _write_captions(generator, num_tokens, tokens, seed)
    return
  asked = _asked(data, prompts)
  each = [a for a in asked for _ in range(num_samples)]
  key = jax.random.key(seed)
  folder = pathlib.Path(output or media_sample.folder(workdir, run.data, modality))
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"--output={str(folder)!r} is a file; give a folder.")
  arguments = [t for _, t in each], _settings(run.config.sample, temperature, task.diffusion), key
  if _streams(generator, stream):
    paths, lengths = _stream(generator, *arguments, folder)
  else:
    drawn = generator(*arguments)
    columns = num_samples if num_samples > 1 else media_sample.columns(data, len(each))
    paths = media_sample.write(drawn.media, folder, columns, data.summary["sample_rate"])
    lengths = drawn.lengths
  lines = [
    dict(what | {"sample": i % num_samples, "seed": seed, "step": run.step, "latents": length})
    for i, ((what, _), length) in enumerate(zip(each, lengths, strict=True))
  ]
  listing = folder / "samples.jsonl"
  text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
  listing.write_text(text, "utf-8")
  for path in (*paths, listing):
    print(path)


def _of_modality(run: Any) -> tuple[Any, Any, str]:
  """The task and the data of what is drawn, and its name."""
  modality = run.data.modalities[0] if MODALITY.value is None else MODALITY.value
  try:
    data = run.data.of(modality)
  except ValueError as e:
    raise ValueError(f"--{e}") from e
  return run.task.of(modality), data, modality


def _streams(generator: Any, stream: bool | None) -> bool:
  """Whether media are written while they are drawn."""
  possible = media_stream.can_stream(generator)
  if stream and not possible:
    raise ValueError("--stream: only sounds that a LatentLM draws can be heard so; use --nostream.")
  wanted = possible if stream is None else stream
  if BLOCK_SIZE.value and not wanted:
    raise ValueError(
      f"--block_size={BLOCK_SIZE.value} is of sounds that grow while they are drawn; leave it out."
    )
  return wanted


def _stream(
  generator: Any,
  prompts: Sequence[np.ndarray],
  settings: SolverSettings,
  key: Any,
  folder: pathlib.Path,
) -> tuple[list[pathlib.Path], list[int]]:
  """Writes sounds block by block; returns their files and the latents of each."""
  paths = [folder / f"{i}.wav" for i in range(len(prompts))]
  lengths, hop = [0] * len(paths), generator.tokenizer.model.config.body.hop
  size = BLOCK_SIZE.value or _BLOCK_SIZE
  # Before there are files: what cannot be drawn leaves those that lie there as they are.
  blocks = media_stream.stream(generator, prompts, settings, key, block_size=size)
  files = [WavWriter(path, generator.data.summary["sample_rate"]) for path in paths]
  for pieces in tqdm.tqdm(blocks, unit="block", leave=False, disable=None):
    for i, (file, piece) in enumerate(zip(files, pieces, strict=True)):
      file.write(piece)
      lengths[i] += len(piece) // hop
  return paths, lengths


def _asked(data: Any, prompts: list[str]) -> list[tuple[dict[str, Any], np.ndarray]]:
  """What to draw, and the tokens that ask for it."""
  documents, names = data.documents, list(data.store.meta["class_names"])
  if documents.condition in ("class", "none"):
    if prompts:
      raise ValueError(
        f"--prompt={prompts[0]!r} is a text, and this model draws from classes; choose --classes "
        f"among {names}."
      )
    if documents.condition == "none":
      return [({}, documents.prompt(0))]
    wanted = names if CLASSES.value is None else CLASSES.value
    if not wanted:
      raise ValueError(f"--classes= names none; choose among {names}, or leave it out.")
    return [({"class": name}, documents.prompt(_class(name, names))) for name in wanted]
  if CLASSES.value is not None:
    raise ValueError(f"--classes={CLASSES.value}: this model draws from texts; give --prompt.")
  for text in prompts:
    length = len(documents.tokenizer.encode(text))
    if length > documents.max_text:
      logger.warning(
        "--prompt=%r has %d tokens, and this model reads %d (config.data.max_text): it is cut.",
        text,
        length,
        documents.max_text,
      )
  return [({"prompt": text}, documents.prompt(text=text)) for text in prompts or [""]]


def _class(name: str, names: list[str]) -> int:
  if name in names:
    return names.index(name)
  if name.isdigit() and int(name) < len(names):
    return int(name)
  raise ValueError(f"--classes has {name!r}; choose among {names}, or their numbers from 0.")


def _settings(section: Any, temperature: float | None, diffusion: Any) -> SolverSettings:
  given = dict(guidance=GUIDANCE.value, num_steps=NUM_STEPS.value, solver=SOLVER.value)
  given["lambda_min"] = LAMBDA_MIN.value
  given["temperature"] = temperature
  section = section.copy_and_resolve_references()
  for name, value in given.items():
    if value is not None:
      section[name] = value
  for name in ("guidance", "temperature"):
    if not math.isfinite(section[name]):
      raise ValueError(f"--{name}={section[name]} must be finite.")
  where = "--guidance, --num_steps, --solver, --lambda_min or --temperature"
  chosen = media_sample.settings(section, where)
  try:
    check_solver(diffusion, chosen)
  except ValueError as e:
    raise ValueError(f"{where}: {e}") from e
  return chosen


def _write_captions(generator: Any, num_tokens: int, tokens: Any, seed: int) -> None:
  collection = generator.data.media.splits["train"].collection
  if collection.kind != "image":
    raise ValueError("--caption is of images, and this model is of sounds.")
  try:
    generator.caption_prompt(0)  # Before any image is read.
  except ValueError as e:
    raise ValueError(f"--caption: {e}") from e
  media = []
  for path in CAPTION.value:
    try:
      content = pathlib.Path(path).read_bytes()
    except OSError as e:
      raise ValueError(f"--caption={path!r} cannot be read: {e.strerror}.") from e
    image = collection.transform(images.decode(content, path, collection.shape[-1]), None)
    if image.shape != tuple(collection.shape):
      raise ValueError(
        f"--caption={path!r} is an image of {image.shape}, and this model reads "
        f"{tuple(collection.shape)}; cut it, or scale it."
      )
    media.append(image)
  texts = generator.captions(np.stack(media), jax.random.key(seed), num_tokens, tokens)
  for path, text in zip(CAPTION.value, texts, strict=True):
    print(json.dumps({"image": path, "text": text}, ensure_ascii=False))
