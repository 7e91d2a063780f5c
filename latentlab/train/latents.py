"""Latents to train on: encoded once by a tokenizer of another run, found again by their digest.

A run on several modalities has the first in `config.data`, `config.latents` and `config.tokenizer`,
and each other one in a section of `config.others`, by name, with the same three.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from latentlab import data as data_lib
from latentlab.data import latent_store, media, mixed
from latentlab.data import prepare as prepare_text
from latentlab.data.latent_store import LatentItem, LatentStore
from latentlab.models import latent_tokenizer
from latentlab.models.latent_tokenizer import (
  LatentTokenizer,
  LatentTokenizerConfig,
  SignalCache,
)
from latentlab.models.latentlm import SpecialTokens
from latentlab.models.tokenizer_bodies import SpeechBody
from latentlab.ops.latents import to_sphere
from latentlab.train import checkpoint, tokenizer_task, workdir_files
from latentlab.train.state import unbox
from latentlab.typing import Params

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"
"""Where the tokenizer's run lies in the workdir of a run that trains its own."""


def of_latents(config: ml_collections.ConfigDict) -> bool:
  """Whether a run is trained on latents."""
  return config.data.get("source") == "latents"


def modalities(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
  """By name of each modality the config that has its `data`, `latents` and `tokenizer`.

  That of the first is the config itself.

  Raises:
    ValueError: a name stands twice, or is not that of a section's data; or the task is of one.
  """
  found, others = {config.data.modality: config}, config.get("others") or {}
  if others and config.task.type != "latentlm":
    raise ValueError(
      f"config.task.type={config.task.type!r} is of one modality, and config.others has "
      f"{sorted(others)}; 'latentlm' takes several."
    )
  for name in sorted(others):
    if name in found:
      raise ValueError(f"config.others.{name} is of the first modality's name; choose another.")
    if others[name].data.modality != name:
      raise ValueError(
        f"config.others.{name}.data.modality={others[name].data.modality!r} must be its section's "
        f"name, {name!r}."
      )
    found[name] = others[name]
  return found


def config_of(config: ml_collections.ConfigDict, modality: str) -> ml_collections.ConfigDict:
  """The config of a run as if it were on one of its `modalities` alone; `KeyError` of another."""
  alone = ml_collections.ConfigDict(config.to_dict())
  part = modalities(alone)[modality]
  lengths = {name: config.data[name] for name in mixed.OF_ROWS}
  with alone.unlocked():
    alone.data, alone.tokenizer = part.data, part.get("tokenizer")
    alone.latents = ml_collections.ConfigDict(alone.latents.to_dict() | part.latents.to_dict())
    alone.data.update(lengths)
    alone.others = ml_collections.ConfigDict()
  return alone


def resolved(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> ml_collections.ConfigDict:
  """The config of a run with its tokenizers' places filled in, where it trains its own.

  Raises:
    ValueError: as of `modalities`.
  """
  if not of_latents(config):
    return config
  config = config.copy_and_resolve_references()
  for i, (name, part) in enumerate(modalities(config).items()):
    if not part.data.tokenizer_run:
      place = TOKENIZER if i == 0 else f"{TOKENIZER}_{name}"
      part.data.tokenizer_run = str(pathlib.Path(workdir).absolute() / place)
  return config


def missing_tokenizers(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> list[tuple[ml_collections.ConfigDict, str]]:
  """Tokenizers that a run trains itself and has not trained to the end: configs and workdirs.

  Args:
    config: The experiment as it was asked for; where it names a tokenizer's run it trains none.
    workdir: Of the run.

  Raises:
    ValueError: as of `modalities`.
  """
  if not of_latents(config):
    return []
  missing, places = [], modalities(resolved(config, workdir))
  for name, part in modalities(config).items():
    if part.data.tokenizer_run or not part.get("tokenizer"):
      continue
    place = pathlib.Path(places[name].data.tokenizer_run)
    saved = place / "checkpoints"
    steps = [int(p.name) for p in saved.iterdir() if p.name.isdigit()] if saved.is_dir() else []
    if max(steps, default=0) < part.tokenizer.train_steps:
      missing.append((part.tokenizer, str(place)))
  return missing


@dataclasses.dataclass(frozen=True)
class TrainedTokenizer:
  """A trained tokenizer, on the devices of this process.

  Attributes:
    model: The tokenizer.
    params: Its parameters, or their average where its run kept one.
    batch_size: Of its run.
  """

  model: LatentTokenizer
  params: Params
  batch_size: int

  @functools.cached_property
  def decode(self) -> Callable[[np.ndarray], np.ndarray]:
    """Media of latents `[B N Z]`, which a model may have drawn beside the sphere of theirs."""

    decode = self._decoder("decode")
    return lambda latents: np.asarray(decode(self.params, latents))

  @functools.cached_property
  def decode_step(self) -> Callable[[np.ndarray, SignalCache], tuple[np.ndarray, SignalCache]]:
    """As `decode` in pieces, of a tokenizer of sounds: a chunk's samples, and the new cache."""
    decode = self._decoder("decode_step")

    def step(latents, cache):
      samples, cache = decode(self.params, latents, cache)
      return np.asarray(samples), cache

    return step

  def _decoder(self, method: str) -> Callable[..., Any]:
    @jax.jit
    def decode(params, latents, *cache):
      latents = to_sphere(latents) if self.model.config.noise.on_sphere else latents
      return self.model.apply({"params": params}, latents, *cache, method=method)

    return decode

  @functools.cached_property
  def posterior(self) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]:
    """Means of media, and log-variances where it has some."""
    encode = jax.jit(lambda p, x: self.model.apply({"params": p}, x, method="posterior"))
    return lambda media: jax.device_get(encode(self.params, media))

  @property
  def codebook_size(self) -> int:
    """Codes that it has; 0 of tokenizers without any."""
    return self.model.config.codebook_size

  @functools.cached_property
  def codes(self) -> Callable[[np.ndarray], np.ndarray]:
    """Codes of media, of a tokenizer that has some."""
    codes = jax.jit(lambda p, x: self.model.apply({"params": p}, x, method="codes"))
    return lambda media: jax.device_get(codes(self.params, media))

  @functools.cached_property
  def code_vectors(self) -> Callable[[np.ndarray], np.ndarray]:
    """Latents that codes `[B N]` stand for."""
    vectors = jax.jit(lambda p, i: self.model.apply({"params": p}, i, method="code_vectors"))
    return lambda codes: jax.device_get(vectors(self.params, codes))


@functools.lru_cache(maxsize=4)
def load_tokenizer(run_dir: str) -> TrainedTokenizer:
  """Restores the tokenizer of a run.

  Raises:
    ValueError: there is none.
  """
  config = workdir_files.read_config(run_dir)
  if config.task.type != "latent_tokenizer":
    raise ValueError(
      f"data.tokenizer_run={run_dir!r} trained {config.task.type!r}, and no latent tokenizer."
    )
  # What it was trained by is not needed: feature functions may be of another program.
  model = LatentTokenizer(latent_tokenizer.build_config(config.model.to_dict()))
  media = jnp.zeros((1, *model.config.media_shape))
  fresh = jax.jit(lambda key: unbox(model.init(key, media))["params"])(jax.random.key(0))
  renames = ((f"^{tokenizer_task.DISCRIMINATOR}/.*", ""),)
  params = checkpoint.restore_params(run_dir, fresh, renames=renames, average=True)
  return TrainedTokenizer(model, params, config.batch_size)


def build_data(config: ml_collections.ConfigDict) -> mixed.LatentData:
  """The data of a run on latents, which are encoded where they are not at hand.

  Args:
    config: The experiment, `resolved`.

  Raises:
    ValueError: there is no tokenizer, or its latents and `config` do not fit.
  """
  first, *others = [
    (mixed.LatentDataConfig.of(part.data.to_dict()), part.latents.stop)
    for part in modalities(config).values()
  ]
  for c, _ in others:
    if has_classes(c.condition):
      raise ValueError(
        f"config.others.{c.modality}.data.condition={c.condition!r}: classes are of the first "
        "modality alone, as nothing stands between a class and its latents; choose 'text', "
        "'caption' or 'both'."
      )
  c, stop = first
  store = prepare(c)
  parts = [mixed.Part(other, prepare(other), its_stop) for other, its_stop in others]
  text = data_lib.ByteTokenizer()
  num_classes = 1 if c.condition == "none" else store.meta["num_classes"]
  num_classes = num_classes if has_classes(c.condition) else 0
  tokens = SpecialTokens(text.vocab_size, 1 + len(parts), num_classes)
  place = jax.process_index(), jax.process_count()
  return mixed.build(c, store, tokens, stop, config.batch_size, *place, others=parts)


def has_classes(condition: str) -> bool:
  """Whether documents begin with a class."""
  return condition in ("class", "none")


def prepare(config: mixed.LatentDataConfig) -> LatentStore:
  """The latents of `config.media` under a tokenizer, encoded unless they have been.

  Raises:
    ValueError: there is no tokenizer, or it was trained on other media.
  """
  tokenizer = load_tokenizer(config.tokenizer_run)
  c = tokenizer.model.config
  found = media.build(config.media, tokenizer.batch_size)
  shape = tuple(found.summary["shape"])
  if not _fits(c, shape):
    raise ValueError(
      f"data.media has examples of shape {shape}, and the tokenizer of data.tokenizer_run="
      f"{config.tokenizer_run!r} was trained on {tuple(c.media_shape)}; make them alike; "
      "lengths of sounds may differ, where they make whole latents."
    )
  # Two runs of one tokenizer have other parameters and hence other latents. What a configuration
  # looks like may change while a run stays the same, and costs no more than to encode again.
  sums = _sums(tokenizer)
  identity = latent_store.digest(sums, dataclasses.asdict(c.noise), c.bottleneck)
  key = latent_store.digest(_contents(found), sums, repr(c))
  path = prepare_text.cache_dir(config.cache_dir) / "latents" / key
  if path.exists():
    logger.info("Latents: %s.", path)
    store = latent_store.read(path)
    return dataclasses.replace(store, meta=dict(store.meta) | {"latent_tokenizer": identity})
  corpus, split = found.summary["corpus"], found.splits["train"]
  logger.info("Encoding %s by %s into %s.", corpus, config.tokenizer_run, path)
  meta = dict(
    key=key,
    latent_tokenizer=identity,
    modality=config.modality,
    dim=c.dim,
    noise=dataclasses.asdict(c.noise),
    num_latents=c.num_latents * shape[0] // c.media_shape[0],
    codebook_size=c.codebook_size,
    num_classes=split.num_classes,
    class_names=list(split.class_names),
    media_shape=list(shape),
    corpus=corpus,
    sample_rate=found.summary["sample_rate"],
  )
  items = {name: _encode(tokenizer, rows, name) for name, rows in found.splits.items()}
  return latent_store.write(path, items, meta)


def prepare_run(run_dir: str, cache_dir: str = "") -> LatentStore:
  """The latents of a tokenizer's own media, for models that will be trained on them.

  Args:
    run_dir: Workdir of the tokenizer's run.
    cache_dir: Where latents are kept, as of `DataConfig`.

  Raises:
    ValueError: there is no tokenizer, or its media are not at hand.
  """
  config = workdir_files.read_config(run_dir)
  place = str(pathlib.Path(run_dir).absolute())
  of_latents = dict(tokenizer_run=place, cache_dir=cache_dir)
  return prepare(mixed.LatentDataConfig(media=config.data.to_dict(), **of_latents))


def _fits(config: LatentTokenizerConfig, shape: tuple[int, ...]) -> bool:
  """Whether a tokenizer encodes media of a shape; its training may have seen parts of sounds."""
  if isinstance(config.body, SpeechBody):
    return shape[1] == config.media_shape[1] and shape[0] % config.body.hop == 0
  return shape == tuple(config.media_shape)


def _contents(found: media.MediaData) -> tuple[Any, ...]:
  """What latents and all that is kept beside them are made of, beyond the media's own contents."""
  collection = found.splits["train"].collection
  items = {
    name: [list(rows.names), rows.labels.tolist(), list(rows.captions)]
    for name, rows in found.splits.items()
  }
  return found.summary, list(collection.class_names), repr(collection.transform), items


def _sums(tokenizer: TrainedTokenizer) -> list[float]:
  """Of magnitudes, one for each array of parameters."""
  leaves = jax.tree.leaves(jax.device_get(tokenizer.params))
  return [float(np.abs(np.asarray(x, np.float64)).sum()) for x in leaves]


def _encode(tokenizer: TrainedTokenizer, rows: media.MediaRows, name: str) -> Iterator[LatentItem]:
  size = tokenizer.batch_size
  starts = range(0, rows.num_rows, size)
  for start in tqdm.tqdm(starts, desc=f"encoding {name}", unit="batch", disable=None, leave=False):
    batch = rows.rows(np.arange(start, start + size))
    codes = log_variances = None
    if tokenizer.codebook_size:
      codes = tokenizer.codes(batch["media"])
      means = tokenizer.code_vectors(codes)
    else:
      means, log_variances = tokenizer.posterior(batch["media"])
    for j in range(min(size, rows.num_rows - start)):
      used = means.shape[1]
      if "lengths" in batch:  # The latents of padding stay out.
        used = -(-int(batch["lengths"][j]) * used // batch["media"].shape[1])
      yield LatentItem(
        means[j, :used],
        int(rows.labels[start + j]),
        rows.captions[start + j],
        None if log_variances is None else np.exp(0.5 * log_variances[j, :used]),
        None if codes is None else codes[j, :used],
      )
