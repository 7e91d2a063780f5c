"""Media drawn by a trained model: prompts in, images or sounds and texts out."""

import abc
import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from latentlab import sample
from latentlab.data import collection, media_files
from latentlab.data.mixed import LatentData
from latentlab.layers.diffusion_head import Diffusion, check_solver
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latentlm import Items
from latentlab.sample import latent
from latentlab.train import latents as latents_lib
from latentlab.typing import Array, Float, Key, Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What was drawn.

  Attributes:
    media: Images or sounds, one for each row.
    latents: Their latents as the tokenizer has them.
    lengths: Latents of each row.
    texts: Text of each row.
  """

  media: list[np.ndarray]
  latents: list[np.ndarray]
  lengths: list[int]
  texts: list[str]


@dataclasses.dataclass(frozen=True)
class Generator(abc.ABC):
  """A trained model with its tokenizer; a base, of which models have their `runs`.

  Attributes:
    task: The model's.
    params: Parameters of its model.
    data: Its data, of which prompts are made.
    batch_size: Rows that are drawn at once.
  """

  task: Any
  params: Params
  data: LatentData
  batch_size: int = 64

  @property
  def tokenizer(self) -> latents_lib.TrainedTokenizer:
    return latents_lib.load_tokenizer(self.task.config.data.tokenizer_run)

  @abc.abstractmethod
  def runs(
    self,
    prompts: Sequence[np.ndarray | Items],
    settings: SolverSettings,
    keys: Key[Array, " B"],
    **options: Any,
  ) -> tuple[list[np.ndarray], list[str]]:
    """Behind each prompt, latents `[n Z]` as the tokenizer has them, and a text."""

  def __call__(
    self,
    prompts: Sequence[np.ndarray | Items],
    settings: SolverSettings,
    key: Key[Array, ""],
    **options: Any,
  ) -> Drawn:
    """Draws a run of latents behind each prompt of tokens, and makes media of them.

    Row `i` is drawn with a key of its own, whatever the batches.

    Args:
      prompts: Tokens; see `data.mixed.Documents.prompt`. Of a LatentLM also items.
      settings: How latents are drawn.
      key: Random key.
      **options: Of the model's `runs`.
    """
    runs, texts = [], []
    keys = sample.row_keys(key, np.arange(len(prompts)))
    for start in range(0, len(prompts), self.batch_size):
      rows = list(prompts[start : start + self.batch_size])
      count = len(rows)
      rows += [rows[0]] * (min(self.batch_size, len(prompts)) - count)  # One program for all.
      here = keys[np.minimum(np.arange(start, start + len(rows)), len(prompts) - 1)]
      drawn, text = self.runs(rows, settings, here, **options)
      runs += drawn[:count]
      texts += text[:count]
    return Drawn(self.decode(runs), runs, [len(run) for run in runs], texts)

  def prompts(self, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Prompts, and the classes that they ask for, -1 where they ask for nothing.

    Classes in turn, or captions of the held-out split.
    """
    documents, store = self.data.documents, self.data.store
    if documents.condition == "class":
      classes = np.arange(count) % documents.tokens.num_classes
      return [documents.prompt(int(label)) for label in classes], classes
    if documents.condition in ("none", "caption"):
      return [documents.prompt()] * count, np.full(count, collection.NO_LABEL)
    split = store.splits.get("validation", store.splits["train"])
    chosen = np.arange(count) % len(split)
    texts = [split.captions[i] for i in chosen]
    return [documents.prompt(text=text) for text in texts], split.labels[chosen]

  def caption_prompt(self, count: int) -> np.ndarray:
    """The tokens before a caption of `count` latents.

    Raises:
      ValueError: the model was not trained to write texts of media.
    """
    documents = self.data.documents
    if documents.condition not in ("caption", "both"):
      raise ValueError(
        f"data.condition={documents.condition!r} trains no captions; 'caption' or 'both' does."
      )
    return documents.captioned(count)

  def texts(self, drawn: sample.Generated) -> list[str]:
    """What rows of tokens say."""
    rows = zip(np.asarray(drawn.tokens), np.asarray(drawn.lengths), strict=True)
    return [self.data.tokenizer.decode(row[:n]) for row, n in rows]

  @property
  def longest(self) -> int:
    """Latents of a run at most."""
    return int(max(split.lengths.max() for split in self.data.store.splits.values()))

  def decode(self, runs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Media of runs of latents; those of short runs are cut accordingly."""
    dim, longest = self.data.store.meta["dim"], self.data.store.meta["num_latents"]
    media: list[np.ndarray] = []
    for start in range(0, len(runs), self.batch_size):
      part = runs[start : start + self.batch_size]
      padded = np.zeros((self.batch_size, longest, dim), np.float32)
      for row, run in enumerate(part):
        padded[row, : len(run)] = run[:longest]
      for row, run in zip(self.tokenizer.decode(padded), part, strict=False):
        media.append(row[: len(run) * row.shape[0] // longest] if row.ndim == 2 else row)
    return media


class LatentGenerator(Generator):
  """A trained LatentLM with its tokenizer; options of its `runs` are `generate_items`'s.

  Its prompts are tokens, or items of runs that have begun; see `begun`.
  """

  def runs(self, prompts, settings, keys, **options):
    model, m, number = self.task.model, self.task.modality, self.task.number
    options = self.limits | options
    items = [p if isinstance(p, Items) else latent.prompt_items(model.config, p) for p in prompts]
    drawn = latent.generate_items(model, self.params, items, settings=settings, key=keys, **options)
    runs = latent.drawn_latents(drawn, m.name, number)
    # At once: a call for each row would take as long as drawing them.
    whole = self.denormalize(np.concatenate(runs))
    runs = np.split(whole, np.cumsum([len(run) for run in runs])[:-1])
    text, size = self.data.tokenizer, model.config.text_vocab_size
    return runs, [text.decode(t[t < size]) for t in latent.drawn_tokens(drawn)]

  @property
  def limits(self) -> dict[str, int]:
    """Lengths of runs, where nothing else is asked for: the data's, and none is empty."""
    return {"max_items": self.longest + 1, "min_latents": 1, "max_latents": self.longest}

  def begun(self, prompt: np.ndarray, latents: Float[np.ndarray, "n Z"]) -> Items:
    """A prompt whose run has begun with these latents; what is drawn goes on with it."""
    model, name = self.task.model, self.task.modality.name
    args = (name, jnp.asarray(latents))
    normal = model.apply({"params": self.params}, *args, method="normalize")
    return latent.begun(model.config, prompt, np.asarray(normal), self.task.number)

  def captions(
    self,
    media: Float[np.ndarray, "B ..."],
    key: Key[Array, ""],
    max_tokens: int,
    tokens: sample.TokenSampler | None = None,
  ) -> list[str]:
    """Texts of media, of which the model reads the latents' means.

    Args:
      media: Images or sounds, as the tokenizer takes them.
      key: Random key.
      max_tokens: Of a text at most.
      tokens: How tokens are drawn.

    Raises:
      ValueError: the model was not trained to write texts of media.
    """
    documents, model, m = self.data.documents, self.task.model, self.task.modality
    means, _ = self.tokenizer.posterior(media)
    tokens_of = self.caption_prompt(means.shape[1])
    variables = {"params": self.params}
    normal = np.asarray(model.apply(variables, m.name, jnp.asarray(means), method="normalize"))
    prompts = [latent.prompt_items(model.config, tokens_of, {m.name: z}) for z in normal]
    bos, special = documents.tokenizer.bos_id, model.config.tokens
    drawn = latent.generate_items(
      model,
      self.params,
      prompts,
      key=key,
      max_items=max_tokens,
      settings=SolverSettings(),
      # No further run either.
      tokens=text_sampler(special.text_vocab_size, special.vocab_size, tokens),
      ends_with_run=False,
      stop_tokens=(bos,),
    )
    return [documents.tokenizer.decode(t[t < 256]) for t in latent.drawn_tokens(drawn)]

  def denormalize(self, run: np.ndarray) -> np.ndarray:
    """Latents as the tokenizer has them."""
    args = (self.task.modality.name, jnp.asarray(run))
    return np.asarray(
      self.task.model.apply({"params": self.params}, *args, method="denormalize"), np.float32
    )


def text_sampler(
  text_vocab_size: int, vocab_size: int, sampler: sample.TokenSampler | None
) -> sample.TokenSampler:
  """A sampler of text alone, as tokens come if `None`; tokens of text come first."""
  ban = sample.LogitBias.ban(range(text_vocab_size, vocab_size), vocab_size)
  sampler = sample.token_sampler() if sampler is None else sampler
  return sampler.replace(filters=(ban, *sampler.filters))


def settings(section: ml_collections.ConfigDict, where: str = "config.sample") -> SolverSettings:
  """How latents are drawn, from fields of `SolverSettings`.

  Raises:
    ValueError: a value is bad.
  """
  fields = ("solver", "num_steps", "guidance_kind", "guidance_interval", "lambda_min")
  given = {name: section[name] for name in fields if section.get(name) is not None}
  scales = dict(guidance=float(section.guidance), temperature=float(section.temperature))
  try:
    return SolverSettings(**scales, **given)
  except ValueError as e:
    raise ValueError(f"{where}: {e}") from e


def check(config: ml_collections.ConfigDict, data: LatentData, diffusion: Diffusion | None) -> None:
  """Raises a `ValueError` where `config.sample` asks for what cannot be drawn.

  Args:
    config: The experiment.
    data: Its data.
    diffusion: The model's; `None` where no solver draws from it.
  """
  if config.sample.num_samples < 0:
    raise ValueError(
      f"config.sample.num_samples={config.sample.num_samples} must not be negative; 0 draws none."
    )
  chosen = settings(config.sample)
  try:
    check_solver(diffusion, chosen)
  except ValueError as e:
    raise ValueError(f"config.sample: {e}") from e
  if config.sample.num_samples:
    media_files.check_sample(data.summary["media_shape"], data.summary["sample_rate"])


def folder(workdir: str | pathlib.Path, data: LatentData, modality: str) -> pathlib.Path:
  """Where a run's samples are: those of several modalities lie apart."""
  samples = pathlib.Path(workdir) / "samples"
  return samples / modality if data.parts else samples


def show(
  config: ml_collections.ConfigDict,
  generator: Generator,
  folder: pathlib.Path,
  workdir: pathlib.Path,
) -> None:
  """Writes a picture of images, or sounds, into a folder of the workdir."""
  count, data = config.sample.num_samples, generator.data
  if not count:
    return
  if jax.process_count() > 1:
    logger.info("No sample here, where a run has several hosts: use experiments.generate.")
    return
  generator = dataclasses.replace(generator, batch_size=min(count, generator.batch_size))
  prompts, _ = generator.prompts(count)
  drawn = generator(prompts, settings(config.sample), jax.random.key(config.seed))
  paths = write(drawn.media, folder, columns(data, count), data.summary["sample_rate"])
  print("\nSamples: " + " ".join(str(p.relative_to(workdir)) for p in paths))


def columns(data: LatentData, count: int) -> int:
  """Images side by side: one of each class, where there are classes."""
  tokens = data.documents.tokens
  return min(tokens.num_classes if tokens.num_classes > 1 else 8, count)


def write(
  media: Sequence[np.ndarray], folder: pathlib.Path, columns: int, sample_rate: int = 0
) -> list[pathlib.Path]:
  """Writes images as one picture, sounds as a file each; returns what was written."""
  if media[0].ndim == 3:
    path = folder / "images.png"
    # What is a few pixels wide is drawn large.
    scale = max(1, 48 // media[0].shape[0])
    media_files.write_png(path, np.stack(media), columns=columns, scale=scale)
    return [path]
  paths = [folder / f"{i}.wav" for i in range(len(media))]
  for path, sound in zip(paths, media, strict=True):
    media_files.write_wav(path, sound, sample_rate)
  return paths
