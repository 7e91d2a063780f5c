"""Training a latent tokenizer: its losses, its adversary, and what it shows at the end."""

import dataclasses
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from latentlab import ops
from latentlab.data import Data, media_files
from latentlab.models import latent_tokenizer
from latentlab.models.latent_tokenizer import LatentTokenizer, Output
from latentlab.train import optim
from latentlab.train.state import axis_names
from latentlab.train.task import Batch, Group, LossTerms
from latentlab.train.tokenizer_losses import Losses, Objective
from latentlab.typing import Array, Bool, Float, Key, Params

logger = logging.getLogger(__name__)

DISCRIMINATOR = "discriminator"
"""Where an adversary's parameters are, beside the tokenizer's own."""


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
  """Reconstruction of media.

  Batches hold `media`, `weights`, and of sounds `lengths`, the samples that are no padding.
  Parameters are the model's; those of an adversary lie beside them.

  Attributes:
    model: The tokenizer.
    config: The experiment; reads `task`, `optimizer`, `train_steps`, `batch_size`, `seed` and
      `sample.num_samples`.
    losses: What is minimised.
  """

  model: LatentTokenizer
  config: ml_collections.ConfigDict
  losses: Losses

  def init(self, key: Key[Array, ""]) -> Params:
    media = jnp.zeros((1, *self.model.config.media_shape))
    params = dict(self.model.init(key, media)["params"])
    if self.losses.discriminator is not None:
      key = jax.random.fold_in(key, 1)
      params[DISCRIMINATOR] = self.losses.discriminator.init(key, media)["params"]
    return params

  @functools.cached_property
  def groups(self) -> tuple[Group, ...]:
    c = self.config
    axes = axis_names(jax.eval_shape(self.init, jax.random.key(0)))
    optimizer = optim.make_optimizer(c.optimizer, axes)
    schedule = optim.make_schedule(c.optimizer, c.train_steps)
    trainable = tuple(f"(?!{DISCRIMINATOR}/){p}" for p in c.task.get("trainable", (".*",)))
    group = Group("model", self.loss, optimizer, schedule, trainable)
    if self.losses.discriminator is None:
      return (group,)
    section = ml_collections.ConfigDict(c.optimizer.to_dict())
    section.peak_lr = self.losses.objective.discriminator_lr or section.peak_lr
    schedule = optim.make_schedule(section, c.train_steps)
    patterns = (f"{DISCRIMINATOR}/.*",)
    return group, Group(DISCRIMINATOR, self.discriminator_loss, optimizer, schedule, patterns)

  @property
  def items_per_step(self) -> int:
    return self.config.batch_size * self.model.config.num_latents

  @property
  def flops_per_item(self) -> float:
    # A backward pass takes twice the flops of a forward pass. An adversary's are left out.
    return 3 * self.model.config.flops() / self.model.config.num_latents

  def loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> LossTerms:
    """Of the tokenizer."""
    media, weights = batch["media"], batch["weights"]
    output, valid, valid_latents = self._reconstruct(params, batch, key)
    losses, parts = self.losses.of_media(media, output.reconstruction, valid)
    of_latents, more = self.losses.of_latents(output, valid_latents)
    losses, parts = losses + of_latents, parts | more
    if self.losses.discriminator is not None:
      verdict = lambda x: ops.hinge_fooled(self._judge(params, x))
      parts["adversarial"] = verdict(output.reconstruction)
      scale = self.losses.adversarial_scale(media, output.reconstruction, valid, verdict)
      losses += self.losses.objective.adversarial_weight * scale * parts["adversarial"]
    total = jnp.sum(weights)
    metrics = {name: (jnp.sum(weights * x), total) for name, x in parts.items()}
    statistics = self._statistics(output, weights, valid_latents)
    metrics |= {name: (x * total, total) for name, x in statistics.items()}
    return LossTerms(total=jnp.sum(weights * losses), weight=total, metrics=metrics)

  def discriminator_loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> LossTerms:
    """Of the adversary."""
    weights = batch["weights"]
    output, *_ = self._reconstruct(params, batch, key)
    fake = self._judge(params, jax.lax.stop_gradient(output.reconstruction))
    losses = ops.hinge_real_fake(self._judge(params, batch["media"]), fake)
    return LossTerms(total=jnp.sum(weights * losses), weight=jnp.sum(weights))

  def check_sample(self, data: Data) -> None:
    count, shape = self.config.sample.num_samples, tuple(data.summary["shape"])
    if count < 0:
      raise ValueError(f"config.sample.num_samples={count} must not be negative; 0 shows none.")
    if count:
      media_files.check_sample(shape, data.summary["sample_rate"])
    if shape != self.model.config.media_shape:
      raise ValueError(
        f"config.data has examples of shape {shape}, and config.model is a tokenizer of "
        f"{self.model.config.media_shape}; make them alike."
      )

  def show_sample(self, params: Params, data: Data, workdir: pathlib.Path) -> None:
    """Writes originals and, below or beside each, its reconstruction, into `samples/`."""
    if not self.config.sample.num_samples:
      return
    if jax.process_count() > 1:
      logger.info("No sample here, where a run has several hosts.")
      return
    rows = data.splits.get("validation", data.splits["train"])
    count = min(self.config.sample.num_samples, rows.num_rows)
    media = rows.rows(np.arange(count))["media"]
    run = jax.jit(lambda p, x: self.model.apply({"params": p}, x).reconstruction)
    pairs = media, np.asarray(run(params, media))
    paths = _write_pairs(*pairs, workdir / "samples", data.summary.get("sample_rate", 0))
    print("\nReconstructions: " + " ".join(str(p.relative_to(workdir)) for p in paths))

  def _reconstruct(
    self, params: Params, batch: Batch, key: Key[Array, ""]
  ) -> tuple[Output, Bool[Array, "B S"] | None, Bool[Array, "B N"] | None]:
    """What becomes of a batch, its padding left as it is, and what is no padding."""
    media = batch["media"]
    output = self.model.apply({"params": params}, media, key)
    if "lengths" not in batch:
      return output, None, None
    lengths, count = batch["lengths"][:, None], output.means.shape[1]
    valid = jnp.arange(media.shape[1]) < lengths
    valid_latents = jnp.arange(count) * (media.shape[1] // count) < lengths
    reconstruction = jnp.where(valid[..., None], output.reconstruction, media)
    return output.replace(reconstruction=reconstruction), valid, valid_latents

  def _judge(self, params: Params, media: Float[Array, "B ..."]) -> list[Float[Array, "B ..."]]:
    return self.losses.discriminator.apply({"params": params[DISCRIMINATOR]}, media)

  def _statistics(
    self, output: Output, weights: Float[Array, " B"], valid: Bool[Array, "B N"] | None
  ) -> dict[str, Float[Array, ""]]:
    """Of a batch's latents. The ratio is what remains of the noise once latents are normalised."""
    c = self.model.config
    weights = weights[:, None] * (jnp.ones(output.means.shape[:2]) if valid is None else valid)
    flat = lambda x: x.reshape(weights.size, -1)
    std = ops.weighted_std(flat(output.means), weights.ravel())
    found = {"latent_std": std}
    if c.noise.kind != "none":
      found["noise_ratio"] = c.noise.level(output.log_variances, weights) / std
    if c.bottleneck == "vq":
      usage = ops.code_usage(output.codes.ravel(), weights.ravel(), c.codebook_size)
      found |= dict(zip(("code_perplexity", "code_usage"), usage, strict=True))
    return jax.lax.stop_gradient(found)


def build(config: ml_collections.ConfigDict) -> TokenizerTask:
  """The task of a config.

  Raises:
    ValueError: a field is unknown, or a value is bad.
  """
  model = LatentTokenizer(latent_tokenizer.build_config(config.model.to_dict()))
  objective = Objective.of(config.task.to_dict())
  sample_rate = config.get("data", {}).get("sample_rate", 0)
  return TokenizerTask(model, config, Losses(objective, model.config, sample_rate))


def _write_pairs(
  originals: np.ndarray, others: np.ndarray, folder: pathlib.Path, sample_rate: int
) -> list[pathlib.Path]:
  if originals.ndim == 3:
    paths = []
    for i, pair in enumerate(zip(originals, others, strict=True)):
      for name, sound in zip(("original", "reconstruction"), pair, strict=True):
        paths.append(folder / f"{i}_{name}.wav")
        media_files.write_wav(paths[-1], sound[:, :1], sample_rate)
    return paths
  columns = min(8, len(originals))
  missing = -len(originals) % columns
  lines = [
    np.concatenate([x, -np.ones((missing, *x.shape[1:]), x.dtype)]).reshape(
      -1, columns, *x.shape[1:]
    )
    for x in (originals, others)
  ]
  grid = np.stack(lines, axis=1).reshape(-1, *originals.shape[1:])
  path = folder / "reconstructions.png"
  scale = max(1, 48 // originals.shape[1])  # What is a few pixels wide is drawn large.
  media_files.write_png(path, grid, columns=columns, scale=scale)
  return [path]
