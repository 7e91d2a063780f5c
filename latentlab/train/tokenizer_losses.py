"""What a latent tokenizer's training minimises, and its adversary.

`reconstruction + beta * bottleneck + perceptual + spectral + adversarial`, each an example's own,
so that sums over microbatches and devices are those of the batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from latentlab import ops
from latentlab.eval import metrics
from latentlab.layers.discriminators import MultiPeriodDiscriminator, PatchDiscriminator
from latentlab.models.latent_tokenizer import LatentTokenizerConfig, Output
from latentlab.train import perceptual
from latentlab.typing import Array, Bool, Float

RECONSTRUCTIONS = ("l2", "l1")
REDUCTIONS = ("mean", "sum")

PerExample = Float[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Objective:
  """The fields of `config.task` of a tokenizer.

  Attributes:
    reconstruction: Squared (`l2`) or absolute (`l1`) errors.
    reduction: Of an example's errors over its media, and of its bottleneck's terms over its
      latents: `mean`, as the release has it, or `sum`, as a likelihood has it. What `beta` is worth
      depends on it.
    beta: Weight of the bottleneck's term: the squared means, where the noise is imposed, or the KL
      divergence of a plain VAE.
    commitment: Weight of what draws means to their codes, beside 1 for codes to their means.
    perceptual: Name of the feature function that images are compared by, of `train.perceptual`.
    perceptual_weight: Of `ops.perceptual_distance`; 0 for none.
    spectral_weight: Of `ops.spectral_distance`, of sounds; 0 for none.
    spectral_windows: Samples of its transforms, which have a sixteenth as many bands.
    adversarial_weight: Of a discriminator's verdict; 0 for none, and no discriminator. Train
      without one first: its run starts from that one's parameters by `init_from`, with
      `init_new=("discriminator/.*",)`.
    adaptive: Whether that weight is multiplied by the ratio of the gradients' norms at the
      reconstruction, all other losses' to the adversary's (VQGAN takes them at the last layer).
    discriminator_width: Channels of its first layer.
    discriminator_depth: Its strided layers.
    discriminator_lr: Its peak learning rate; that of `config.optimizer` if 0.
  """

  reconstruction: str = "l2"
  reduction: str = "mean"
  beta: float = 1e-2
  commitment: float = 0.25
  perceptual: str = "random_convolutions"
  perceptual_weight: float = 0.0
  spectral_weight: float = 0.0
  spectral_windows: tuple[int, ...] = (128, 512, 2048)
  adversarial_weight: float = 0.0
  adaptive: bool = False
  discriminator_width: int = 64
  discriminator_depth: int = 3
  discriminator_lr: float = 0.0

  @classmethod
  def of(cls, section: Mapping[str, Any]) -> "Objective":
    """From `config.task`, whose `type` and `trainable` are the task's to read."""
    own = {name: x for name, x in section.items() if name not in ("type", "trainable")}
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(own) - set(known)):
      raise ValueError(f"config.task has unknown fields {unknown}; choose among {known}.")
    return cls(**own)

  def __post_init__(self):
    for name, choices in (("reconstruction", RECONSTRUCTIONS), ("reduction", REDUCTIONS)):
      if getattr(self, name) not in choices:
        raise ValueError(
          f"config.task.{name}={getattr(self, name)!r} is unknown; choose one of {choices}."
        )
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in (int, float) and not value >= 0:
        raise ValueError(f"config.task.{field.name}={value} must not be negative.")
    if self.adversarial_weight and min(self.discriminator_width, self.discriminator_depth) < 1:
      raise ValueError(
        f"config.task.discriminator_width={self.discriminator_width} and discriminator_depth="
        f"{self.discriminator_depth} of an adversary must be at least 1."
      )
    if not self.spectral_windows or any(w < 32 or w % 16 for w in self.spectral_windows):
      raise ValueError(
        f"config.task.spectral_windows={self.spectral_windows} must be multiples of 16 from 32 on."
      )


@dataclasses.dataclass(frozen=True)
class Losses:
  """An objective, made for a tokenizer.

  Attributes:
    objective: What is minimised.
    config: The tokenizer's.
    sample_rate: Of sounds; 0 for images.
  """

  objective: Objective
  config: LatentTokenizerConfig
  sample_rate: int = 0

  def __post_init__(self):
    o, kind = self.objective, self.config.bottleneck
    if kind in ("spherical", "vq") and o.beta:
      raise ValueError(
        f"config.task.beta={o.beta} weighs nothing where config.model.bottleneck={kind!r}; set it "
        "to 0."
      )
    if self.of_sounds and o.perceptual_weight:
      raise ValueError(
        f"config.task.perceptual_weight={o.perceptual_weight} is of images; sounds have "
        "spectral_weight."
      )
    if o.spectral_weight and not (self.of_sounds and self.sample_rate > 0):
      raise ValueError(
        f"config.task.spectral_weight={o.spectral_weight} is of sounds of a known sample rate; set "
        "it to 0, or config.data.sample_rate."
      )
    assert self.features is not None and self.banks is not None  # Raise where fields are bad.

  @property
  def of_sounds(self) -> bool:
    return len(self.config.media_shape) == 2

  @functools.cached_property
  def features(self) -> perceptual.Features:
    if not self.objective.perceptual_weight:
      return lambda media: []
    return perceptual.make_features(self.objective.perceptual, self.config.media_shape)

  @functools.cached_property
  def banks(self) -> list[np.ndarray]:
    if not self.objective.spectral_weight:
      return []
    return [
      metrics.mel_filterbank(window // 16, window, self.sample_rate)
      for window in self.objective.spectral_windows
    ]

  @functools.cached_property
  def discriminator(self) -> nn.Module | None:
    o = self.objective
    if not o.adversarial_weight:
      return None
    module = MultiPeriodDiscriminator if self.of_sounds else PatchDiscriminator
    return module(o.discriminator_width, o.discriminator_depth)

  def of_media(
    self,
    media: Float[Array, "B ..."],
    reconstruction: Float[Array, "B ..."],
    valid: Bool[Array, "B S"] | None = None,
  ) -> tuple[PerExample, dict[str, PerExample]]:
    """Losses of reconstructions, their adversary aside, and what they are made of.

    Args:
      media: Originals.
      reconstruction: What was made of them; like the originals where those are not `valid`.
      valid: Samples of sounds that are no padding.
    """
    o = self.objective
    difference = reconstruction - media
    elements = jnp.square(difference) if o.reconstruction == "l2" else jnp.abs(difference)
    losses = self._reduce(elements, valid)
    parts = {"reconstruction": losses, "mse": _mean(jnp.square(difference), valid)}
    if o.perceptual_weight:
      pair = self.features(reconstruction), self.features(media)
      parts["perceptual"] = ops.perceptual_distance(*pair)
      losses = losses + o.perceptual_weight * parts["perceptual"]
    if o.spectral_weight:
      channels = [jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1]) for x in (reconstruction, media)]
      distances = ops.spectral_distance(*channels, self.banks)
      parts["spectral"] = distances.reshape(media.shape[0], -1).mean(1)
      losses = losses + o.spectral_weight * parts["spectral"]
    return losses, parts

  def of_latents(
    self, output: Output, valid: Bool[Array, "B N"] | None = None
  ) -> tuple[PerExample, dict[str, PerExample]]:
    """What holds latents in place, and what it is made of."""
    o, kind = self.objective, self.config.bottleneck
    if kind == "vq":
      fixed = jax.lax.stop_gradient
      means, vectors = output.means, output.code_vectors
      draw = jnp.square(vectors - fixed(means)) + o.commitment * jnp.square(means - fixed(vectors))
      losses = self._reduce(draw, valid)
      return losses, {"codes": losses}
    if kind == "spherical":
      return jnp.zeros(output.means.shape[0]), {}
    if kind == "plain":
      elements = ops.gaussian_kl(output.means, output.log_variances)
    else:
      elements = jnp.square(output.means)
    term = self._reduce(elements, valid)
    return o.beta * term, {"bottleneck": term}

  def adversarial_scale(
    self,
    media: Float[Array, "B ..."],
    reconstruction: Float[Array, "B ..."],
    valid: Bool[Array, "B S"] | None,
    verdict: Callable[[Float[Array, "B ..."]], PerExample],
  ) -> Float[Array, ""]:
    """What the adversary's weight is multiplied by.

    Args:
      media: As of `of_media`, and the next two.
      reconstruction: What was made of them.
      valid: Samples that are no padding.
      verdict: What the adversary makes of media.
    """
    if not self.objective.adaptive:
      return jnp.float32(1.0)
    others = jax.grad(lambda x: self.of_media(media, x, valid)[0].sum())(reconstruction)
    adversary = jax.grad(lambda x: verdict(x).sum())(reconstruction)
    others, adversary = (jnp.sqrt(jnp.square(g).sum()) for g in (others, adversary))
    return jax.lax.stop_gradient(jnp.clip(others / (adversary + 1e-6), 0.0, 1e4))

  def _reduce(self, elements, valid):
    if self.objective.reduction == "mean":
      return _mean(elements, valid)
    return _masked(elements, valid).reshape(elements.shape[0], -1).sum(1)


def _mean(elements: Float[Array, "B ..."], valid: Bool[Array, "B S"] | None) -> PerExample:
  elements = _masked(elements, valid)
  if valid is None:
    return elements.reshape(elements.shape[0], -1).mean(1)
  # Padding rows have no valid element, and no weight.
  return elements.mean(2).sum(1) / jnp.maximum(valid.sum(1), 1)


def _masked(elements, valid):
  return elements if valid is None else jnp.where(valid[..., None], elements, 0.0)
