"""Training a latent tokenizer: reconstruction, and what holds its latents in place."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from latentlab import ops
from latentlab.models import latent_tokenizer
from latentlab.models.latent_tokenizer import LatentTokenizer, LatentTokenizerConfig, Output
from latentlab.train import optim
from latentlab.train.state import axis_names
from latentlab.train.task import Batch, Group, LossTerms
from latentlab.typing import Array, Float, Key, Params

RECONSTRUCTIONS = ("l2", "l1")
REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True)
class Objective:
  """The fields of `config.task` of a tokenizer: `reconstruction + beta * bottleneck + ...`.

  Attributes:
    reconstruction: Squared (`l2`) or absolute (`l1`) errors.
    reduction: Of an example's errors over its media, and of its bottleneck's terms over its
      latents: `mean`, as the release has it, or `sum`, as a likelihood has it. What `beta` is worth
      depends on it.
    beta: Weight of the bottleneck's term: the squared means, where the noise is imposed, or the KL
      divergence of a plain VAE.
    commitment: Weight of what draws means to their codes, beside 1 for codes to their means.
  """

  reconstruction: str = "l2"
  reduction: str = "mean"
  beta: float = 1e-2
  commitment: float = 0.25

  @classmethod
  def of(cls, section: Mapping[str, Any]) -> "Objective":
    """From `config.task`, whose `type` and `trainable` are others' to read."""
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
    for name in ("beta", "commitment"):
      if getattr(self, name) < 0:
        raise ValueError(f"config.task.{name}={getattr(self, name)} must not be negative.")

  def reduce(self, x: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Of an example's elements."""
    x = x.reshape(x.shape[0], -1)
    return x.mean(1) if self.reduction == "mean" else x.sum(1)

  def errors(self, media: Float[Array, "B ..."], output: Output) -> Float[Array, " B"]:
    """Of the reconstruction."""
    difference = output.reconstruction - media
    return self.reduce(
      jnp.square(difference) if self.reconstruction == "l2" else jnp.abs(difference)
    )

  def bottleneck(self, config: LatentTokenizerConfig, output: Output) -> Float[Array, " B"]:
    """What holds latents in place, before `beta`."""
    if config.bottleneck == "plain":
      return self.reduce(ops.gaussian_kl(output.means, output.log_variances))
    return self.reduce(jnp.square(output.means))

  def code_errors(self, output: Output) -> Float[Array, " B"]:
    """What draws codes and means together."""
    means, vectors = output.means, output.code_vectors
    fixed = jax.lax.stop_gradient
    draw = jnp.square(vectors - fixed(means)) + self.commitment * jnp.square(means - fixed(vectors))
    return self.reduce(draw)


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
  """Reconstruction of media.

  Batches hold `media` and `weights`.

  Attributes:
    model: The tokenizer.
    config: The experiment; reads `task`, `optimizer`, `train_steps`, `batch_size` and `sample`.
    objective: What is minimised.
  """

  model: LatentTokenizer
  config: ml_collections.ConfigDict
  objective: Objective

  def init(self, key: Key[Array, ""]) -> Params:
    media = jnp.zeros((1, *self.model.config.media_shape))
    return self.model.init(key, media)["params"]

  @functools.cached_property
  def groups(self) -> tuple[Group, ...]:
    axes = axis_names(jax.eval_shape(self.init, jax.random.key(0)))
    schedule = optim.make_schedule(self.config.optimizer, self.config.train_steps)
    optimizer = optim.make_optimizer(self.config.optimizer, axes)
    trainable = tuple(self.config.task.get("trainable", (".*",)))
    return (Group("model", self.loss, optimizer, schedule, trainable),)

  @property
  def items_per_step(self) -> int:
    return self.config.batch_size * self.model.config.num_latents

  @property
  def flops_per_item(self) -> float:
    # A backward pass takes twice the flops of a forward pass.
    return 3 * self.model.config.flops() / self.model.config.num_latents

  def loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> LossTerms:
    media, weights = batch["media"], batch["weights"]
    output = self.model.apply({"params": params}, media, key)
    losses, parts = self.example_losses(media, output)
    total = jnp.sum(weights)
    metrics = {name: (jnp.sum(weights * x), total) for name, x in parts.items()}
    metrics |= {name: (x * total, total) for name, x in self._statistics(output, weights).items()}
    return LossTerms(total=jnp.sum(weights * losses), weight=total, metrics=metrics)

  def example_losses(
    self, media: Float[Array, "B ..."], output: Output
  ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
    """Losses of examples, and what they are made of."""
    c, objective = self.model.config, self.objective
    losses = objective.errors(media, output)
    parts = {"reconstruction": losses}
    if c.bottleneck == "vq":
      parts["codes"] = objective.code_errors(output)
      losses = losses + parts["codes"]
    elif c.bottleneck != "spherical":
      parts["bottleneck"] = objective.bottleneck(c, output)
      losses = losses + objective.beta * parts["bottleneck"]
    squares = jnp.square(output.reconstruction - media)
    parts["mse"] = squares.reshape(squares.shape[0], -1).mean(1)
    return losses, parts

  def _statistics(self, output: Output, weights: Float[Array, " B"]) -> dict[str, Float[Array, ""]]:
    """Of a batch's latents. The ratio is what remains of the noise once latents are normalised."""
    c = self.model.config
    std = ops.weighted_std(output.means, weights)
    found = {"latent_std": std}
    if c.noise.kind != "none":
      found["noise_ratio"] = c.noise.level(output.log_variances) / std
    if c.bottleneck == "vq":
      perplexity, used = ops.code_usage(output.codes, weights, c.codebook_size)
      found |= {"code_perplexity": perplexity, "code_usage": used}
    return jax.lax.stop_gradient(found)


def build(config: ml_collections.ConfigDict) -> TokenizerTask:
  """The task of a config.

  Raises:
    ValueError: a field is unknown, or a value is bad.
  """
  model = LatentTokenizer(latent_tokenizer.build_config(config.model.to_dict()))
  objective = Objective.of(config.task.to_dict())
  if model.config.bottleneck in ("spherical", "vq") and objective.beta:
    raise ValueError(
      f"config.task.beta={objective.beta} weighs nothing where "
      f"config.model.bottleneck={model.config.bottleneck!r}; set it to 0."
    )
  return TokenizerTask(model, config, objective)
