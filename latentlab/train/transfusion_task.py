"""Training of a Transfusion on the rows that a LatentLM would be trained on."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from latentlab import sample
from latentlab.data import Data
from latentlab.layers.diffusion_head import Diffusion
from latentlab.models import flops_per_token, registry, transfusion
from latentlab.models.latentlm import SpecialTokens
from latentlab.models.transfusion import Transfusion, TransfusionConfig
from latentlab.ops.latents import Noise
from latentlab.sample.codes import CodeTokens
from latentlab.sample.transfusion import CaptionStepper
from latentlab.train import latent_rows, media_sample
from latentlab.train import latents as latents_lib
from latentlab.train.latent_rows import DenoisingTask
from latentlab.train.task import Batch, LossTerms
from latentlab.typing import Array, Float, Key, Params


@dataclasses.dataclass(frozen=True)
class TransfusionTask(DenoisingTask):
  """Prediction of text's tokens, and denoising of images, one timestep each.

  Batches are those of `data.mixed`, with something behind each run of latents, so that all of a run
  are read. An image with a caption behind it, which could not be told of noise, is under the first
  `latents.caption_noise` of all timesteps, half of them in https://arxiv.org/abs/2408.11039.
  """

  def init(self, key: Key[Array, ""]) -> Params:
    shape = (1, 2)
    zeros, latents = jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, self.model.config.dim))
    params = self.model.init(key, zeros, zeros > 0, latents, zeros)["params"]
    return self.with_normalizer({"transfusion": params})

  @property
  def flops_per_item(self) -> float:
    return 3 * flops_per_token(self.model.config.language, self.seq_length)

  @property
  def scores_tokens(self) -> bool:
    """Whether there is text to be predicted."""
    return not latents_lib.has_classes(self.config.data.condition)

  def generator(self, params: Params, data: Data) -> "Generator":
    """Draws from the model with these parameters."""
    return Generator(self, params, data)

  def count(self, batch: Batch) -> dict[str, Float[Array, ""]]:
    return dict(tokens=_token_weights(batch).sum(), latents=_is_latent(batch).sum(dtype=float))

  def loss(
    self, params: Params, batch: Batch, key: Key[Array, ""], counts: Mapping[str, Array]
  ) -> LossTerms:
    sums, weights = self.sums(params, batch, key)
    scales = dict(latents=self.config.latents.loss_weight)
    return latent_rows.joint_loss(sums, weights, counts, scales)

  def sums(
    self, params: Params, batch: Batch, key: Key[Array, ""], *, deterministic: bool = False
  ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
    """Summed losses of `latents`, and of `tokens` where there is text; their counts.

    Args:
      params: Parameters.
      batch: Of `data.mixed`.
      key: Of the latents' noise, of timesteps and their noise, and of what training drops.
      deterministic: Whether nothing is dropped.
    """
    latents_key, t_key, noise_key, drop_key, dropout_key = jax.random.split(key, 5)
    c, diffusion = self.config.latents, self.model.config.diffusion
    normalize = functools.partial(self.normalize, params)
    args = (batch, self.modality, self.noise, c.target, c.target, normalize, latents_key)
    clean, _ = latent_rows.draw_latents(*args)
    is_latent, (rows, length) = _is_latent(batch), batch["inputs"].shape
    clean = jnp.where(is_latent[..., None], clean, 0.0)
    t = diffusion.timesteps(t_key, (rows, length + 1))  # One for each document.
    t = jnp.take_along_axis(t, batch["segment_ids"], axis=1)
    limited = (c.caption_noise * t).astype(t.dtype)
    t = jnp.where(latent_rows.captioned(batch, self.tokens), limited, t)
    noisy, target, each = diffusion.noisy(clean, jax.random.normal(noise_key, clean.shape), t)
    tokens = batch["inputs"]
    if c.prompt_dropout and not deterministic:
      dropped = latent_rows.dropped_prompts(batch, c.prompt_dropout, drop_key)
      tokens = jnp.where(dropped, self.tokens.null, tokens)
    apply = functools.partial(self.model.apply, {"params": params["transfusion"]})
    hidden, said = apply(
      tokens,
      is_latent,
      noisy,
      t,
      batch["segment_ids"],
      deterministic=deterministic,
      rngs={"dropout": dropout_key},
    )
    errors = jnp.square(said - target).mean(-1) * (1.0 if each is None else each)
    sums = {"latents": jnp.where(is_latent, errors, 0.0).sum()}
    weights = {"latents": is_latent.sum().astype(jnp.float32)}
    if self.scores_tokens:
      nll, scored = apply(hidden, batch["targets"], method="token_losses"), _token_weights(batch)
      sums["tokens"] = jnp.where(scored > 0, nll * scored, 0.0).sum()
      weights["tokens"] = scored.sum()
    return sums, weights

  @property
  def special(self) -> SpecialTokens:
    return self.tokens

  def text_losses(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """What each target costs in nats, latents being read as their means, without noise."""
    normalize = functools.partial(self.normalize, params)
    args = (batch, self.modality, self.noise, "mean", "mean", normalize, jax.random.key(0))
    latents, _ = latent_rows.draw_latents(*args)
    apply = functools.partial(self.model.apply, {"params": params["transfusion"]})
    t = jnp.zeros(batch["inputs"].shape, jnp.int32)
    ids = batch["segment_ids"]
    hidden, _ = apply(batch["inputs"], _is_latent(batch), latents, t, ids)
    return apply(hidden, batch["targets"], method="token_losses")


class Generator(media_sample.Generator):
  """A trained Transfusion with its tokenizer."""

  def runs(self, prompts, settings, keys):
    task = self.task
    lengths = np.array([len(p) for p in prompts], np.int32)
    rows = np.stack([np.pad(p, (0, lengths.max() - len(p))) for p in prompts]).astype(np.int32)
    null = CodeTokens(task.tokens, 0).null_of(self.data.tokenizer.bos_id)[rows]
    args = (task.model.config, self.params["transfusion"], *map(jnp.asarray, (rows, null, lengths)))
    drawn = transfusion.generate(*args, keys=keys, settings=settings)
    return list(np.asarray(task.denormalize(self.params, drawn))), [""] * len(prompts)

  def captions(
    self,
    media: Float[np.ndarray, "B ..."],
    key: Key[Array, ""],
    max_tokens: int,
    tokens: sample.TokenSampler | None = None,
  ) -> list[str]:
    """Texts of media, which are read without noise; as `LatentGenerator.captions`."""
    task, (means, _) = self.task, self.tokenizer.posterior(media)
    rows, count = means.shape[:2]
    prompt = self.caption_prompt(count)
    (places,) = np.nonzero(prompt == task.tokens.latent(0))
    latents = jnp.zeros((rows, len(prompt), means.shape[-1]))
    latents = latents.at[:, places].set(task.normalize(self.params, jnp.asarray(means)))
    stops = np.array([self.data.tokenizer.bos_id], np.int32)
    config, special = task.model.config, task.tokens
    drawn, _ = sample.begin(
      CaptionStepper(config, self.params["transfusion"], latents, stops),
      media_sample.text_sampler(special.text_vocab_size, special.vocab_size, tokens),
      jnp.asarray(np.tile(prompt, (rows, 1)), jnp.int32),
      jnp.full(rows, len(prompt)),
      sample.row_keys(key, np.arange(rows)),
      max_tokens,
      capacity=len(prompt) + max_tokens,
      num_items=max_tokens,
    )
    return self.texts(drawn)


def _is_latent(batch: Batch) -> Array:
  return batch["kinds"] > 0


def _token_weights(batch: Batch) -> Array:
  """Weights of text's targets: an image is begun by a token, and its end is known."""
  text = (batch["kinds"] == 0) & (batch["next_kinds"] == 0)
  return jnp.where(text, batch["weights"], 0.0)


def build(config: ml_collections.ConfigDict, summary: Mapping[str, Any]) -> TransfusionTask:
  """The task that a config describes, given what its data is (`LatentData.summary`).

  Raises:
    ValueError: a field is unknown or bad, or the data is not for a Transfusion.
  """
  latent_rows.check_latents(config)
  c, condition = config.latents, config.data.condition
  if not 0 <= c.caption_noise <= 1:
    raise ValueError(
      f"config.latents.caption_noise={c.caption_noise} is the part of all noise that an image with "
      "a caption behind it is under, and must be in [0, 1]."
    )
  if c.stop != "token" or not summary["equal_lengths"]:
    raise ValueError(
      f"config.latents.stop={c.stop!r} of a Transfusion must be 'token', so that all latents of a "
      "run are read, and runs must be alike."
    )
  classes = latents_lib.has_classes(condition)
  num_classes = (summary["num_classes"] if condition == "class" else 1) * classes
  tokens = SpecialTokens(summary["text_vocab_size"], 1, num_classes)
  language = registry.build_config(config.model.to_dict(), vocab_size=tokens.vocab_size)
  diffusion = Diffusion(**{n: x for n, x in c.diffusion.items() if x is not None})
  model = TransfusionConfig(language, summary["dim"], summary["num_latents"], tokens, diffusion)
  noise, place = Noise(**summary["noise"]), (summary["mean"], summary["std"])
  config = latent_rows.built(config, summary)
  name = config.data.modality
  return TransfusionTask(Transfusion(model), config, name, noise, tokens, *place)
