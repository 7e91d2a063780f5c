"""What tasks over rows of `data.mixed` share: noise of latents, prompts left out, samples."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections

from latentlab.data import Data
from latentlab.eval.common import loss_name
from latentlab.layers.diffusion_head import Diffusion
from latentlab.models.latentlm import NOT_TRAINED, Normalizer, SpecialTokens
from latentlab.ops.latents import Noise, behind_latents, to_sphere
from latentlab.train import media_sample, optim
from latentlab.train.state import axis_names
from latentlab.train.task import Batch, Group, LossTerms
from latentlab.typing import Array, Bool, Float, Key, Params


@dataclasses.dataclass(frozen=True)
class LatentRowsTask:
  """A model over rows of tokens and latents; a base, of which tasks have their losses.

  Attributes:
    model: The model.
    config: The experiment; reads `optimizer`, `train_steps`, `latents`, `data` and `sample`.
  """

  model: Any
  config: ml_collections.ConfigDict

  count = None  # Of objectives of several means; see `task.Group`.
  diffusion: ClassVar[Diffusion | None] = None  # What a solver draws from, of models that have one.

  @functools.cached_property
  def groups(self) -> tuple[Group, ...]:
    axes = axis_names(jax.eval_shape(self.init, jax.random.key(0)))
    schedule = optim.make_schedule(self.config.optimizer, self.config.train_steps)
    optimizer = optim.make_optimizer(self.config.optimizer, axes)
    trainable = tuple(f"(?!{NOT_TRAINED}){p}" for p in self.config.task.trainable)
    return (Group("model", self.loss, optimizer, schedule, trainable, self.count),)

  @property
  def seq_length(self) -> int:
    return self.config.data.seq_length

  @property
  def items_per_step(self) -> int:
    return self.config.batch_size * self.seq_length

  def check_sample(self, data: Data) -> None:
    for name in data.modalities:
      task = self.of(name)
      media_sample.check(task.config, data.of(name), task.diffusion)

  def show_sample(self, params: Params, data: Data, workdir: pathlib.Path) -> None:
    for name in data.modalities:
      generator = self.of(name).generator(params, data.of(name))
      folder = media_sample.folder(workdir, data, name)
      media_sample.show(generator.task.config, generator, folder, workdir)

  def of(self, modality: str) -> "LatentRowsTask":
    """The same task, whose samples are of this modality; there is one."""
    del modality
    return self

  def text_sums(
    self, params: Params, batch: Batch
  ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
    """Summed cross-entropy of `text`, wherever it stands, and of `caption`, behind an image.

    Of a task with `special`, its special tokens, and `text_losses`, what each target costs. Latents
    are read as their means, and nothing is left out. What ends a text is a part of it; what opens
    a run of latents is none, so that models with different tokens for images are told alike.
    """
    losses = self.text_losses(params, batch)
    behind = behind_latents(batch["kinds"], batch["segment_ids"])
    text = (batch["weights"] > 0) & (batch["targets"] < self.special.text_vocab_size)
    text &= (batch["kinds"] == 0) & (batch["next_kinds"] == 0)
    # Where an image is the last item of its document, nothing is said behind it.
    text &= ~behind | captioned(batch, self.special)
    masks = {"text": text, "caption": text & behind}
    sums = {name: jnp.where(mask, losses, 0.0).sum() for name, mask in masks.items()}
    return sums, {name: mask.sum().astype(jnp.float32) for name, mask in masks.items()}


@dataclasses.dataclass(frozen=True)
class DenoisingTask(LatentRowsTask):
  """A model that denoises all latents of an image at once; a base too.

  Parameters are the model's, and two numbers that its latents are normalised by.

  Attributes:
    modality: Name of the latents.
    noise: What was added to means when the tokenizer drew latents.
    tokens: Special tokens of rows.
    mean: Mean of all latents.
    std: Their standard deviation.
  """

  modality: str
  noise: Noise
  tokens: SpecialTokens
  mean: float
  std: float

  @property
  def diffusion(self) -> Diffusion:
    return self.model.config.diffusion

  def with_normalizer(self, params: Params) -> Params:
    """New parameters of the model with those of its latents."""
    normalizer = Normalizer(self.mean, self.std).init(jax.random.key(0))["params"]
    return params | {f"{self.modality}_normalizer": normalizer}

  def normalize(self, params: Params, latents: Float[Array, "... Z"]) -> Float[Array, "... Z"]:
    """Latents as the model sees them."""
    mean, std = self._normalizer(params)
    return (latents - mean) / std

  def denormalize(self, params: Params, latents: Float[Array, "... Z"]) -> Float[Array, "... Z"]:
    """Latents as the tokenizer's decoder wants them."""
    mean, std = self._normalizer(params)
    return latents * std + mean

  def _normalizer(self, params: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
    normalizer = Normalizer(self.mean, self.std)
    return normalizer.apply({"params": params[f"{self.modality}_normalizer"]})

  def check_sample(self, data: Data) -> None:
    super().check_sample(data)
    if self.config.sample.get("guidance_kind", "constant") != "constant":
      raise ValueError(
        f"config.sample.guidance_kind={self.config.sample.guidance_kind!r} follows the share of "
        "latents that is drawn, and this model draws all at once; set 'constant'."
      )


def joint_loss(
  sums: Mapping[str, Array],
  weights: Mapping[str, Array],
  counts: Mapping[str, Array],
  scales: Mapping[str, float],
) -> LossTerms:
  """The terms of an objective of a mean for each kind of target, over those of the whole step.

  Args:
    sums: Summed losses by kind.
    weights: How many targets they are of.
    counts: How many the step has.
    scales: Factors of means; 1 where none is given.
  """
  # A step without any target of a kind has nothing to divide by, and nothing to divide.
  total = sum(scales.get(n, 1.0) * sums[n] / jnp.maximum(counts[n], 1.0) for n in sums)
  share = sum(weights.values()) / sum(counts[n] for n in sums)
  metrics = {loss_name(n): (sums[n], jnp.maximum(weights[n], 1e-30)) for n in sums}
  return LossTerms(total=total, weight=share, metrics=metrics)


def mean_loss(kind: str, sums: Mapping[str, Array], weights: Mapping[str, Array]) -> LossTerms:
  """The terms of an objective that is the mean of one kind of targets."""
  total, weight = sums[kind], weights[kind]
  return LossTerms(total, weight, {loss_name(kind): (total, jnp.maximum(weight, 1e-30))})


def draw_latents(
  batch: Batch,
  name: str,
  noise: Noise,
  read: str,
  target: str,
  normalize: Callable[[Float[Array, "B T Z"]], Float[Array, "B T Z"]],
  key: Key[Array, ""],
) -> tuple[Float[Array, "B T Z"], Float[Array, "B T Z"]]:
  """Normalised latents of the items that are read, and of those to be predicted.

  An item that is both has the same noise in both places, and a document one scale, as an image or
  clip has in its tokenizer.

  Args:
    batch: Of `data.mixed`.
    name: Of the modality.
    noise: What is added to means.
    read: Whether items are read as a `sample` or as their `mean`.
    target: Whether they are to be predicted as one.
    normalize: From the tokenizer's latents to the model's.
    key: Random key.
  """
  means = batch[f"latents/{name}"], batch[f"next_latents/{name}"]
  scale_key, noise_key = jax.random.split(key)
  rows, length, dim = means[0].shape
  draws = jax.random.normal(noise_key, (rows, length + 1, dim))
  if noise.kind == "learned":
    scales = batch[f"scales/{name}"], batch[f"next_scales/{name}"]
  elif noise.kind == "gaussian_scale" and noise.per == "example":
    of_documents = noise.draw_scales(scale_key, (rows, length + 1))
    scale = jnp.take_along_axis(of_documents, batch["segment_ids"], axis=1)[..., None]
    scales = scale, scale
  elif noise.kind == "gaussian_scale":
    scale = noise.draw_scales(scale_key, (rows, length + 1, 1))
    scales = scale[:, :-1], scale[:, 1:]
  else:
    scales = noise.std, noise.std
  noisy = [
    mean + scale * drawn
    for mean, scale, drawn in zip(means, scales, (draws[:, :-1], draws[:, 1:]), strict=True)
  ]
  if noise.on_sphere:
    noisy = [to_sphere(x) for x in noisy]
  sampled = (read == "sample", target == "sample")
  chosen = [x if s else mean for x, s, mean in zip(noisy, sampled, means, strict=True)]
  here, following = map(normalize, chosen)
  return here, following


def captioned(batch: Batch, special: SpecialTokens) -> Bool[Array, "B T"]:
  """Items of documents in which text follows latents."""
  ids = batch["segment_ids"]
  ends = jnp.array([special.end(i) for i in range(special.num_modalities)])
  text = behind_latents(batch["kinds"], ids) & ~jnp.isin(batch["inputs"], ends)
  rows, length = ids.shape
  found = jnp.zeros((rows, length + 1), jnp.int32)
  found = found.at[jnp.arange(rows)[:, None], ids].max(text.astype(jnp.int32))
  return jnp.take_along_axis(found, ids, axis=1) > 0


def dropped_prompts(batch: Batch, rate: float, key: Key[Array, ""]) -> Bool[Array, "B T"]:
  """Tokens of the prompts that are left out, each document's whole or not at all."""
  rows, length = batch["inputs"].shape
  drop = jax.random.bernoulli(key, rate, (rows, length + 1))
  return jnp.take_along_axis(drop, batch["segment_ids"], axis=1) & batch["droppable"]


def check_latents(config: ml_collections.ConfigDict) -> None:
  """Raises a `ValueError` where fields of `config.latents` that tasks share are bad."""
  c = config.latents
  sections = {"config": config} | {
    f"config.others.{name}": section for name, section in (config.get("others") or {}).items()
  }
  for where, section in sections.items():
    for name in ("input", "target"):
      value = section.latents.get(name, "mean")
      if value not in ("sample", "mean"):
        raise ValueError(f"{where}.latents.{name}={value!r} must be 'sample' or 'mean'.")
    weight = section.latents.get("loss_weight", 1.0)
    if not weight > 0:
      raise ValueError(f"{where}.latents.loss_weight={weight} must be positive.")
  if not 0 <= c.prompt_dropout < 1:
    raise ValueError(f"config.latents.prompt_dropout={c.prompt_dropout} is not in [0, 1).")


def built(
  config: ml_collections.ConfigDict, summary: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """The config with what data were built with, where it leaves that to them."""
  config = ml_collections.ConfigDict(config.to_dict())
  config.data.seq_length = summary["seq_length"]
  config.data.documents_per_row = summary["documents_per_row"]
  return config
