"""Transfusion (https://arxiv.org/abs/2408.11039): one decoder for text and whole images of noise.

The baseline of LatentLM (https://arxiv.org/abs/2412.08635) that denoises an image at once: text is
causal, the latents of an image see one another, and all of them have one timestep. Heads are as
DiT's last layer, modulated by the timestep.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers import AttentionConfig, DecoderCache, Shared
from latentlab.layers.diffusion_head import (
  Diffusion,
  FinalLayer,
  LatentProjection,
  TimeEmbedding,
  solve,
  solver_times,
)
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.language_model import LanguageModel, LanguageModelConfig, init_cache
from latentlab.models.latentlm import SpecialTokens
from latentlab.typing import Array, Bool, Float, Int, Key, Params


@dataclasses.dataclass(frozen=True)
class TransfusionConfig:
  """A decoder of text and images.

  Attributes:
    language: Embedding, decoder and softmax; its layers have softmax attention.
    dim: Channels `Z` of a latent.
    num_latents: Of an image.
    special: Tokens that are no text, which `language` has in its vocabulary.
    diffusion: What is predicted, at which noise.
  """

  language: LanguageModelConfig
  dim: int
  num_latents: int
  special: SpecialTokens
  diffusion: Diffusion = Diffusion()

  def __post_init__(self):
    if self.dim < 1 or self.num_latents < 1:
      raise ValueError(f"dim={self.dim} and num_latents={self.num_latents} must be positive")
    for stage in self.language.decoder.stages:
      for block in stage.pattern:
        if not isinstance(block.mixer, AttentionConfig) or block.mixer.mask.kind != "causal":
          raise ValueError(
            "latents of an image see one another, which needs layers of causal softmax attention; "
            f"this model has {block.mixer.kind!r} under {getattr(block.mixer, 'mask', None)}"
          )

  @property
  def masked(self) -> LanguageModelConfig:
    """The language model with its masks left to `visible`."""
    decoder = self.language.decoder
    stages = tuple(
      dataclasses.replace(stage, pattern=tuple(map(_full, stage.pattern)))
      for stage in decoder.stages
    )
    return dataclasses.replace(self.language, decoder=dataclasses.replace(decoder, stages=stages))

  @property
  def shared(self) -> Shared:
    """What ends share with the decoder."""
    c = self.language.decoder
    return Shared(c.embed_dim, c.dtype, c.initializers, c.norm_eps, num_layers=c.num_layers)


def _full(block):
  mixer = dataclasses.replace(block.mixer, mask=ops.Mask("full"))
  return dataclasses.replace(block, mixer=mixer)


def visible(is_latent: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Keys that a query sees: those before it, and those of its image.

  A document has one image. Packed documents are kept apart elsewhere, by their ids.
  """
  causal = jnp.tril(jnp.ones((is_latent.shape[1],) * 2, bool))
  return causal | (is_latent[:, :, None] & is_latent[:, None, :])


class Transfusion(nn.Module):
  """The model.

  Attributes:
    config: What it is made of.
  """

  config: TransfusionConfig

  def setup(self):
    c, shared = self.config, self.config.shared
    self.language = LanguageModel(c.masked)
    self.latent_proj = LatentProjection(shared)
    self.time = TimeEmbedding(shared)
    self.final = FinalLayer(shared, c.dim)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    is_latent: Bool[Array, "B T"],
    noisy: Float[Array, "B T Z"],
    t: Float[Array, "B T"] | Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B T D"], Float[Array, "B T Z"]]:
    """Hidden vectors, and predictions at latents; those at tokens mean nothing.

    Args:
      tokens: Tokens; anything at latents.
      is_latent: Where latents are.
      noisy: Latents under noise; anything at tokens.
      t: Timesteps of latents, those of an image alike.
      segment_ids: Packed documents.
      deterministic: Whether dropout is off.
    """
    time = self.time(t)
    hidden, _ = self._hidden(
      tokens,
      is_latent,
      noisy,
      time,
      segment_ids=segment_ids,
      allowed=visible(is_latent),
      deterministic=deterministic,
    )
    if self.is_initializing():
      self.language.logits(hidden)
    return hidden, self._predict(hidden, time)

  def token_losses(
    self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
  ) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats."""
    chunk_size = self.config.language.loss_chunk_size
    return ops.cross_entropy(hidden, self.language.head_kernel(), targets, chunk_size=chunk_size)

  def draw(
    self,
    prompts: Int[Array, "B P"],
    null_prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: SolverSettings,
    *,
    guided: bool,
  ) -> Float[Array, "B T Z"]:
    """An image behind each prompt, float32; a row depends on no other row.

    Prompts are read once. Every step of the solver reads all latents behind what is remembered of
    them, and forgets them again.

    Args:
      prompts: Tokens, padded on the right.
      null_prompts: As guidance's second stream has them.
      lengths: Of the prompts.
      keys: One for each row.
      settings: The solver, and the guidance.
      guided: Whether guidance is on, which runs every image twice.
    """
    c = self.config
    scale = settings.scale(None) if guided else None
    if guided:
      prompts = jnp.concatenate([prompts, null_prompts])
      lengths = jnp.concatenate([lengths, lengths])
    (rows, width), room = prompts.shape, prompts.shape[1] + c.num_latents
    causal = jnp.arange(width)[:, None] >= jnp.arange(room)
    cache = init_cache(c.masked, rows, room)
    options = dict(lengths=lengths, cache=cache, allowed=causal[None], fresh=True)
    _, cache = self.language.hidden(prompts, **options)
    model, variables = self.unbind()
    network = lambda x, time: model.apply(variables, x, time, cache, method="predict_behind")
    times = self.time(solver_times(c.diffusion, settings))
    return solve(c.diffusion, network, times, (c.num_latents, c.dim), keys, settings, scale)

  def predict_behind(
    self, noisy: Float[Array, "B T Z"], time: Float[Array, " D"], cache: DecoderCache
  ) -> Float[Array, "B T Z"]:
    """Predictions of an image behind a cache's prompts, given its timestep's embedding."""
    rows, count = noisy.shape[:2]
    time = jnp.broadcast_to(time, (rows, count, *time.shape))
    tokens = jnp.full((rows, count), self.config.special.latent(0))
    latent = jnp.ones((rows, count), bool)
    hidden, _ = self._hidden(tokens, latent, noisy, time, cache=cache)
    return self._predict(hidden, time)

  def read(
    self, tokens: Int[Array, "B T"], latents: Float[Array, "B T Z"], capacity: int
  ) -> tuple[Float[Array, "B vocab"], DecoderCache]:
    """Scores of the token behind rows with images without noise, and a cache that holds them.

    Args:
      tokens: Tokens, and what stands in for latents.
      latents: Latents; anything at tokens.
      capacity: Items that the cache has room for.
    """
    is_latent = tokens == self.config.special.latent(0)
    rows, width = tokens.shape
    room = ((0, 0), (0, 0), (0, capacity - width))
    hidden, cache = self._hidden(
      tokens,
      is_latent,
      latents,
      self.time(jnp.zeros(tokens.shape)),
      cache=init_cache(self.config.masked, rows, capacity),
      allowed=jnp.pad(visible(is_latent), room),
      fresh=True,
    )
    return self.language.logits(hidden[:, -1]), cache

  def _hidden(self, tokens, is_latent, noisy, time, **options):
    latents = jnp.where(is_latent[..., None], noisy, 0.0).astype(time.dtype)
    replaced = is_latent, self.latent_proj(latents) + time
    return self.language.hidden(tokens, replaced=replaced, **options)

  def _predict(self, hidden, time):
    return self.final(hidden, nn.silu(time)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "guided"))
def _draw(config, params, prompts, null_prompts, lengths, keys, settings, *, guided):
  args = (prompts, null_prompts, lengths, keys, settings)
  return Transfusion(config).apply({"params": params}, *args, guided=guided, method="draw")


def generate(
  config: TransfusionConfig,
  params: Params,
  prompts: Int[Array, "B P"],
  null_prompts: Int[Array, "B P"],
  lengths: Int[Array, " B"],
  *,
  keys: Key[Array, " B"],
  settings: SolverSettings,
  guided: bool | None = None,
) -> Float[Array, "B T Z"]:
  """Draws images' latents in one compiled program; arguments as of `Transfusion.draw`.

  Guidance is on, if `guided` is `None`, where `settings.guidance` is not 1.
  """
  guided = float(settings.guidance) != 1.0 if guided is None else guided
  args = (config, params, prompts, null_prompts, lengths, keys, settings)
  return _draw(*args, guided=guided)
