"""Training of a DiT on the latents that a LatentLM would be trained on, and sampling from it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from latentlab.data import Data
from latentlab.layers.diffusion_head import Diffusion
from latentlab.models import dit
from latentlab.models.dit import DiT, DiTConfig
from latentlab.models.latentlm import SpecialTokens
from latentlab.ops.latents import Noise
from latentlab.train import latent_rows, latent_task, media_sample
from latentlab.train import latents as latents_lib
from latentlab.train.latent_rows import DenoisingTask
from latentlab.train.task import Batch, LossTerms
from latentlab.typing import Array, Float, Int, Key, Params

OF_DATA = ("dim", "num_classes", "class_dropout")
"""Fields of a `DiTConfig` that are not `config.model`'s."""


@dataclasses.dataclass(frozen=True)
class DiTTask(DenoisingTask):
  """Denoising of all latents of an image at once, given its class.

  Batches are those of `data.mixed` whose documents are a class and a run of latents.
  """

  def init(self, key: Key[Array, ""]) -> Params:
    c = self.model.config
    latents, zero = jnp.zeros((1, c.num_latents, c.dim)), jnp.zeros(1, jnp.int32)
    params = self.model.init(key, latents, zero, zero)["params"]
    return self.with_normalizer({"dit": params})

  @property
  def items_per_step(self) -> int:
    return self.config.batch_size * self._per_row * self.model.config.num_latents

  @property
  def flops_per_item(self) -> float:
    return 3 * self.model.config.flops_per_latent

  def generator(self, params: Params, data: Data) -> "Generator":
    """Draws from the model with these parameters."""
    return Generator(self, params, data)

  def loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> LossTerms:
    return latent_rows.mean_loss("latents", *self.sums(params, batch, key))

  def sums(
    self, params: Params, batch: Batch, key: Key[Array, ""], *, deterministic: bool = False
  ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
    """Summed loss of `latents`, and their number.

    Args:
      params: Parameters.
      batch: Of `data.mixed`.
      key: Of the latents' noise, of timesteps and their noise, and of classes left out.
      deterministic: Whether no class is left out.
    """
    noise_key, loss_key = jax.random.split(key)
    latents, labels, valid = self.images(params, batch, noise_key)
    model = self.model
    if deterministic:
      model = DiT(dataclasses.replace(model.config, class_dropout=0.0))
    args = ({"params": params["dit"]}, latents, labels, loss_key)
    losses = model.apply(*args, method="losses")
    count = self.model.config.num_latents
    sums = {"latents": count * jnp.where(valid, losses, 0.0).sum()}
    return sums, {"latents": count * valid.astype(jnp.float32).sum()}

  def images(
    self, params: Params, batch: Batch, key: Key[Array, ""]
  ) -> tuple[Float[Array, "images T Z"], Int[Array, " images"], Array]:
    """Normalised latents of the documents of rows, their classes, and which places hold one."""
    normalize = functools.partial(self.normalize, params)
    c = self.config.latents
    args = (batch, self.modality, self.noise, c.target, c.target, normalize, key)
    _, latents = latent_rows.draw_latents(*args)
    count, used = self.model.config.num_latents, self._per_row * self.model.config.num_latents
    first = slice(0, used, count)
    valid = (batch["segment_ids"][:, first] > 0).reshape(-1)
    labels = (batch["inputs"][:, first] - self.tokens.class_token(0)).reshape(-1)
    latents = latents[:, :used].reshape(-1, count, latents.shape[-1])
    return jnp.where(valid[:, None, None], latents, 0.0), labels, valid

  @property
  def _per_row(self) -> int:
    return self.config.data.documents_per_row


class Generator(media_sample.Generator):
  """A trained DiT with its tokenizer; its prompts are classes."""

  def runs(self, prompts, settings, keys):
    task = self.task
    labels = np.concatenate(prompts) - task.tokens.class_token(0)
    args = (task.model.config, self.params["dit"], jnp.asarray(labels, jnp.int32))
    drawn = dit.generate(*args, key=keys, settings=settings)
    return list(np.asarray(task.denormalize(self.params, drawn))), [""] * len(prompts)


def grid(media_shape: tuple[int, ...], num_latents: int) -> tuple[int, int]:
  """Rows and columns of an image's latents; of sounds, one row.

  Raises:
    ValueError: latents are no grid of squares.
  """
  if len(media_shape) < 3:
    return 1, num_latents
  height, width = media_shape[:2]
  stride = math.isqrt(height * width // num_latents)
  if height % stride or width % stride or (height // stride) * (width // stride) != num_latents:
    raise ValueError(
      f"{num_latents} latents of images of {height} x {width} are no grid of squares; choose a "
      "tokenizer whose patches are squares."
    )
  return height // stride, width // stride


def model_fields() -> dict[str, type]:
  """The fields of `config.model` beside `name` and `preset`, and their types."""
  known = latent_task.plain_fields(DiTConfig)
  return {name: kind for name, kind in known.items() if name not in OF_DATA} | {"dtype": str}


def build(config: ml_collections.ConfigDict, summary: Mapping[str, Any]) -> DiTTask:
  """The task that a config describes, given what its data is (`LatentData.summary`).

  Raises:
    ValueError: a field is unknown or bad, or the data is not for a DiT.
  """
  latent_rows.check_latents(config)
  condition, c = config.data.condition, config.latents
  if not latents_lib.has_classes(condition):
    raise ValueError(f"data.condition={condition!r} of a DiT must be 'class' or 'none'.")
  if c.stop != "fixed" or not summary["equal_lengths"]:
    raise ValueError(
      f"config.latents.stop={c.stop!r} of a DiT must be 'fixed', and all runs of latents alike."
    )
  num_classes = summary["num_classes"] if condition == "class" else 1
  given = {name: x for name, x in config.model.items() if x is not None}
  name, preset = given.pop("name", None), given.pop("preset", None)
  if name != "dit":
    raise ValueError(f"config.model.name={name!r} of config.task.type='dit' must be 'dit'.")
  if unknown := sorted(set(given) - set(model_fields())):
    raise ValueError(
      f"config.model has fields that a DiT does not: {unknown}; choose among "
      f"{sorted(model_fields())}."
    )
  given["dtype"] = jnp.dtype(given.get("dtype", "float32"))
  given |= dict(
    dim=summary["dim"],
    grid=grid(tuple(summary["media_shape"]), summary["num_latents"]),
    num_classes=num_classes,
    class_dropout=c.prompt_dropout,
    diffusion=Diffusion(**{n: x for n, x in c.diffusion.items() if x is not None}),
  )
  if lacking := sorted({"num_layers", "embed_dim", "num_heads"} - set(given)) * (preset is None):
    raise ValueError(f"config.model lacks {lacking}; set them, or config.model.preset.")
  model = DiTConfig(**given) if preset is None else dit.preset(preset, **given)
  tokens = SpecialTokens(summary["text_vocab_size"], 1, num_classes)
  noise, place = Noise(**summary["noise"]), (summary["mean"], summary["std"])
  config = latent_rows.built(config, summary)
  return DiTTask(DiT(model), config, config.data.modality, noise, tokens, *place)
