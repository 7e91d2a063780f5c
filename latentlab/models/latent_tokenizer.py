"""Tokenizers into latent vectors: what LatentLM reads and writes (https://arxiv.org/abs/2412.08635).

An encoder predicts means, a bottleneck makes latents of them, a decoder makes media of latents.
The paper's bottleneck is the sigma-VAE's; beside it are those that it is compared with. (Another
sigma-VAE, of https://arxiv.org/abs/2006.13202, calibrates its decoder; they share the name alone.)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers.convolution import ConvState, init_states
from latentlab.models import registry
from latentlab.models.beit_body import beit_body
from latentlab.models.tokenizer_bodies import Body, SpeechBody, conv_body, speech_body, vit_body
from latentlab.ops.latents import Noise
from latentlab.typing import Array, Bool, Float, Int, Key

BOTTLENECKS = ("sigma_gaussian", "sigma_fixed", "mean", "plain", "spherical", "vq")

_STD = 0.75  # The release's, of the sigma-VAE.


@dataclasses.dataclass(frozen=True)
class LatentTokenizerConfig:
  """A tokenizer.

  Attributes:
    body: Encoder and decoder.
    dim: Latent channels `Z`.
    bottleneck: `sigma_gaussian` (means, noise of a scale drawn for each example), `sigma_fixed`
      (means, noise of one scale), `mean` (means alone), `plain` (means and variances, as any VAE),
      `spherical` (means on a sphere of radius `sqrt(Z)`), `vq` (the nearest of `codebook_size`
      vectors).
    std: Scale of the noise that is imposed; the release's 0.75, or none on a sphere, if `None`.
    scale_per: What `sigma_gaussian` draws a scale for, an `example` or a `token`.
    codebook_size: Codes of `vq`; 0 for others.
    unit_codes: Whether codes and what they stand for are compared and decoded at length 1, which
      keeps more of them in use.
  """

  body: Body
  dim: int
  bottleneck: str = "sigma_gaussian"
  std: float | None = None
  scale_per: str = "example"
  codebook_size: int = 0
  unit_codes: bool = True

  def __post_init__(self):
    if self.bottleneck not in BOTTLENECKS:
      raise ValueError(f"unknown bottleneck={self.bottleneck!r}; choose one of {BOTTLENECKS}")
    if self.dim < 1:
      raise ValueError(f"dim={self.dim} latent channels must be at least 1")
    if (self.codebook_size > 0) != (self.bottleneck == "vq"):
      raise ValueError(
        f"codebook_size={self.codebook_size} must be positive for bottleneck='vq', and 0 for "
        f"others, not {self.bottleneck!r}"
      )
    if self.scale_per != "example" and self.bottleneck != "sigma_gaussian":
      raise ValueError(
        f"scale_per={self.scale_per!r} is about the scales that bottleneck='sigma_gaussian' draws; "
        f"{self.bottleneck!r} draws none"
      )
    if self.std and self.bottleneck in ("mean", "plain", "vq"):
      raise ValueError(f"std={self.std} means nothing to bottleneck={self.bottleneck!r}; leave it")
    assert self.noise  # Raises where its fields are bad.

  @property
  def noise(self) -> Noise:
    """What is added to means where latents are drawn."""
    if self.bottleneck == "sigma_gaussian":
      return Noise("gaussian_scale", _STD if self.std is None else self.std, self.scale_per)
    if self.bottleneck == "sigma_fixed":
      return Noise("fixed", _STD if self.std is None else self.std)
    if self.bottleneck == "spherical":
      kind = "fixed" if self.std else "none"
      return Noise(kind, self.std or 0.0, on_sphere=True)
    return Noise("learned" if self.bottleneck == "plain" else "none", 0.0)

  @property
  def media_shape(self) -> tuple[int, ...]:
    """Of an example, batch aside."""
    return self.body.media_shape

  @property
  def num_latents(self) -> int:
    """Latents of an example."""
    return self.body.num_latents

  def flops(self) -> float:
    """Matmul flops of encoding and decoding one example."""
    lookup = 2 * self.num_latents * self.dim * self.codebook_size
    return self.body.flops(self.dim) + lookup

  def init_encode_cache(self, batch_size: int) -> "SignalCache":
    """The cache of `LatentTokenizer.encode_step` before a signal."""
    body = self._speech("init_encode_cache")
    return _empty(body.encoder_layers(self.encoder_features), batch_size, body)

  def init_decode_cache(self, batch_size: int) -> "SignalCache":
    """The cache of `LatentTokenizer.decode_step` before a signal."""
    body = self._speech("init_decode_cache")
    return _empty(body.decoder_layers(self.dim), batch_size, body)

  @property
  def encoder_features(self) -> int:
    """What the encoder predicts for a latent: means, and for a plain VAE log-variances."""
    return self.dim * (2 if self.bottleneck == "plain" else 1)

  def _speech(self, what: str) -> SpeechBody:
    if not isinstance(self.body, SpeechBody):
      raise ValueError(f"{what} is of tokenizers of sounds; {type(self.body).__name__} sees all")
    return self.body


@struct.dataclass
class SignalCache:
  """What the layers of a coder remember of a signal.

  Attributes:
    layers: By layer.
    reaches: By layer, inputs before a chunk that its outputs depend on.
  """

  layers: tuple[ConvState, ...]
  reaches: tuple[int, ...] = struct.field(pytree_node=False)

  def reset(self, rows: Bool[Array, " B"]) -> "SignalCache":
    """As before a signal, in rows that are true: where a segment ended, the next one begins.

    Raises:
      ValueError: rows hold a part of a latent, so that they would no longer go in step.
    """
    lengths = tuple(state.history.shape[1] for state in self.layers)
    if lengths != self.reaches:
      raise ValueError(
        "reset of a cache that holds a part of a latent; give encode_step whole latents' samples "
        "before a segment ends"
      )
    return self.replace(layers=tuple(state.reset(rows) for state in self.layers))

  def fork(self, indices: Int[Array, " R"]) -> "SignalCache":
    """Row `r` of the result is a copy of row `indices[r]`."""
    return self.replace(layers=tuple(state.fork(indices) for state in self.layers))


def _empty(layers: tuple[Any, ...], batch_size: int, body: SpeechBody) -> SignalCache:
  states = init_states(layers, batch_size, body.shared.dtype)
  return SignalCache(states, tuple(layer.reach for layer in layers))


@struct.dataclass
class Output:
  """What a tokenizer makes of media.

  Attributes:
    reconstruction: Media decoded from `latents`.
    latents: Drawn around the means; for `vq`, the codes' vectors.
    means: The encoder's.
    log_variances: Of a plain VAE.
    codes: Of a `vq`.
    code_vectors: Of a `vq`, with the gradient of the codebook.
  """

  reconstruction: Float[Array, "B ..."]
  latents: Float[Array, "B N Z"]
  means: Float[Array, "B N Z"]
  log_variances: Float[Array, "B N Z"] | None = None
  codes: Int[Array, "B N"] | None = None
  code_vectors: Float[Array, "B N Z"] | None = None


class LatentTokenizer(nn.Module):
  """A tokenizer; latents lie in raster order, or in order of time.

  Attributes:
    config: What it is made of.
  """

  config: LatentTokenizerConfig

  def setup(self):
    c = self.config
    self.encoder = c.body.encoder(c.encoder_features)
    self.decoder = c.body.decoder(c.dim)
    if c.bottleneck == "vq":
      init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", None))
      self.codebook = self.param("codebook", init, (c.codebook_size, c.dim))

  def __call__(self, media: Float[Array, "B ..."], key: Key[Array, ""] | None = None) -> Output:
    """Encodes and decodes.

    Args:
      media: Examples.
      key: Of the noise; latents are the means if `None`.
    """
    means, log_variances = self.posterior(media)
    codes = vectors = None
    if self.config.bottleneck == "vq":
      codes = self._codes(means)
      vectors = self._vectors(codes)
      latents = ops.straight_through(means, vectors)
    elif key is None:
      latents = means
    else:
      latents = ops.sample_latents(key, means, self.config.noise, log_variances)
    return Output(self.decode(latents), latents, means, log_variances, codes, vectors)

  def encode(self, media: Float[Array, "B ..."]) -> Float[Array, "B N Z"]:
    """Means, in float32; on their sphere or at length 1 where the bottleneck has them there."""
    return self.posterior(media)[0]

  def posterior(
    self, media: Float[Array, "B ..."]
  ) -> tuple[Float[Array, "B N Z"], Float[Array, "B N Z"] | None]:
    """Means, and log-variances where the encoder predicts them."""
    self._check(media.shape)
    return self._bottleneck(self.encoder(media))

  def decode(self, latents: Float[Array, "B N Z"]) -> Float[Array, "B ..."]:
    """Media, in float32."""
    return self.decoder(latents)

  def codes(self, media: Float[Array, "B ..."]) -> Int[Array, "B N"]:
    """Indices of the codes that stand for media."""
    self._check_vq("codes")
    return self._codes(self.encode(media))

  def decode_codes(self, codes: Int[Array, "B N"]) -> Float[Array, "B ..."]:
    """Media from indices of codes."""
    self._check_vq("decode_codes")
    return self.decode(self.code_vectors(codes))

  def code_vectors(self, codes: Int[Array, "B N"]) -> Float[Array, "B N Z"]:
    """Latents that codes stand for, as `decode` takes them."""
    self._check_vq("code_vectors")
    return self._vectors(codes)

  def encode_step(
    self, media: Float[Array, "B S C"], cache: SignalCache
  ) -> tuple[Float[Array, "B N Z"], SignalCache]:
    """Means that a chunk of samples completes, after those that the cache has seen."""
    self.config._speech("encode_step")
    features, states = self.encoder.step(media, cache.layers)
    return self._bottleneck(features)[0], cache.replace(layers=states)

  def decode_step(
    self, latents: Float[Array, "B N Z"], cache: SignalCache
  ) -> tuple[Float[Array, "B S C"], SignalCache]:
    """Samples of a chunk of latents, after those that the cache has seen."""
    self.config._speech("decode_step")
    media, states = self.decoder.step(latents, cache.layers)
    return media, cache.replace(layers=states)

  def _bottleneck(self, features):
    c = self.config
    if c.bottleneck == "plain":
      means, log_variances = jnp.split(features, 2, axis=-1)
      # exp of what an untrained or diverging encoder says must stay finite.
      return means, jnp.clip(log_variances, -30.0, 20.0)
    if c.bottleneck == "spherical":
      return ops.to_sphere(features), None
    if c.bottleneck == "vq" and c.unit_codes:
      return ops.to_sphere(features, 1.0), None
    return features, None

  def _codes(self, means):
    return ops.nearest_codes(means, self._codebook())

  def _vectors(self, codes):
    return jnp.take(self._codebook(), codes, axis=0)

  def _codebook(self):
    return ops.to_sphere(self.codebook, 1.0) if self.config.unit_codes else self.codebook

  def _check(self, shape: tuple[int, ...]) -> None:
    body, expected = self.config.body, self.config.media_shape
    if isinstance(body, SpeechBody):
      if len(shape) != 3 or shape[2] != expected[1]:
        raise ValueError(f"media of shape {shape} are no sounds of {expected[1]} channels")
      body.check_length(shape[1])
    elif shape[1:] != expected:
      raise ValueError(
        f"media of shape {shape[1:]} do not fit a tokenizer of {expected}; set config.model's "
        "sizes to those of the data"
      )

  def _check_vq(self, what: str) -> None:
    if self.config.bottleneck != "vq":
      raise ValueError(f"{what} needs bottleneck='vq', not {self.config.bottleneck!r}")


def num_params(config: LatentTokenizerConfig) -> dict[str, int]:
  """Parameters of the parts of a tokenizer, and in `total`."""
  model = LatentTokenizer(config)
  # A sound of one latent is enough to shape all parameters.
  shape = (config.body.hop, 1) if isinstance(config.body, SpeechBody) else config.media_shape
  media = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), media)["params"])
  sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
  return sizes | {"total": sum(sizes.values())}


def _bottleneck(
  *,
  dim: int = 16,
  bottleneck: str = "sigma_gaussian",
  std: float | None = None,
  scale_per: str = "example",
  codebook_size: int = 0,
  unit_codes: bool = True,
) -> dict[str, Any]:
  """Fields that every tokenizer has beside its body's; see `LatentTokenizerConfig`."""
  return dict(locals())


PRESETS = {
  # The release's `sigma_vae`, of 256 x 256 pixels.
  "beit_tokenizer": {"imagenet": dict(image_size=256)},
  "vit_tokenizer": {
    # 172M parameters: its strides and widths, without biases and class tokens.
    "imagenet": dict(image_size=256, patch_size=16, num_layers=12, embed_dim=768, num_heads=12),
  },
  "conv_tokenizer": {},
  "speech_tokenizer": {
    # About 340M parameters a side.
    "vibevoice": dict(num_samples=48_000, dim=64, std=0.5),
    # Strides and channels of the paper's table 5; its widths and depths are unknown. These depths
    # make about the paper's 120M parameters at stride 1600.
    "stride_1600": dict(
      num_samples=24_000, dim=32, strides=(2, 4, 5, 5, 8), depths=(3, 3, 3, 3, 3, 5)
    ),
    "stride_3200": dict(
      num_samples=25_600,
      dim=64,
      width=16,
      strides=(2, 2, 4, 5, 5, 8),
      depths=(3, 3, 3, 3, 3, 3, 5),
    ),
    "stride_6400": dict(
      num_samples=25_600,
      dim=128,
      width=16,
      strides=(2, 4, 4, 5, 5, 8),
      depths=(3, 3, 3, 3, 3, 3, 5),
    ),
  },
}
BODIES = {
  "beit_tokenizer": beit_body,
  "conv_tokenizer": conv_body,
  "speech_tokenizer": speech_body,
  "vit_tokenizer": vit_body,
}


def fields(name: str) -> dict[str, tuple[type, Any]]:
  """Type and default of each field of `config.model`.

  A default of `None` means that the field must be given, or that the tokenizer works it out.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in BODIES:
    raise ValueError(f"unknown config.model.{name=} of a tokenizer; choose one of {sorted(BODIES)}")
  return registry.keyword_fields(_bottleneck, BODIES[name])


def build_config(model: Mapping[str, Any]) -> LatentTokenizerConfig:
  """The configuration that a config file's `model` section asks for.

  Args:
    model: `name` (a key of `BODIES`), optionally `preset`, and fields of that tokenizer, which
      override the preset's where they are not `None`.

  Raises:
    ValueError: a name, preset or field is unknown, or a value is bad.
  """
  given = {field: value for field, value in model.items() if value is not None}
  name, preset = given.pop("name", None), given.pop("preset", None)
  known = fields(name)
  if preset is not None and preset not in PRESETS[name]:
    raise ValueError(
      f"unknown config.model.{preset=} of {name}; choose one of {sorted(PRESETS[name])}"
    )
  if unknown := sorted(set(given) - set(known)):
    raise ValueError(
      f"config.model has fields that {name} does not: {unknown}; choose among {sorted(known)}"
    )
  given = PRESETS[name].get(preset, {}) | given
  size = "num_samples" if name == "speech_tokenizer" else "image_size"
  if size not in given:
    raise ValueError(f"config.model lacks {size!r}; set it, or config.model.preset")
  own = registry.keyword_fields(_bottleneck)
  body = BODIES[name](**{field: x for field, x in given.items() if field not in own})
  options = _bottleneck(**{field: x for field, x in given.items() if field in own})
  return LatentTokenizerConfig(body=body, **options)
