"""What a tokenizer's encoder and decoder are made of: transformers, or convolutions in 2-D or 1-D.

The ViT is LatentLM's for images (https://arxiv.org/abs/2412.08635, appendix; widths as in its
release), the causal convolutions are VibeVoice's for speech (https://arxiv.org/abs/2508.19205).
Latents are in raster order. Media are float32, images in [-1, 1].
"""

import dataclasses
import math
from typing import Protocol

import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers.attention import AttentionConfig
from latentlab.layers.convolution import (
  CausalLayer,
  CausalStack,
  ConvShared,
  ResidualBlock2D,
  group_norm,
)
from latentlab.layers.decoder import BlockConfig, Decoder, DecoderConfig, Stage
from latentlab.layers.feed_forward import FeedForwardConfig
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float


class Body(Protocol):
  """What a tokenizer asks of its body.

  Attributes:
    media_shape: Of one example, batch aside; sounds may be of other lengths than this.
  """

  media_shape: tuple[int, ...]

  @property
  def num_latents(self) -> int:
    """Latents of an example of `media_shape`."""

  def encoder(self, features: int) -> nn.Module:
    """A module `media -> [B, N, features]`."""

  def decoder(self, dim: int) -> nn.Module:
    """A module `[B, N, dim] -> media`."""

  def flops(self, dim: int) -> float:
    """Matmul flops of encoding and decoding one example with `dim` latent channels."""


@dataclasses.dataclass(frozen=True)
class Patches:
  """An image in square patches, in raster order.

  Attributes:
    media_shape: Height, width, channels of the image.
    size: Height and width of a patch.
  """

  media_shape: tuple[int, int, int]
  size: int

  def __post_init__(self):
    height, width, _ = self.media_shape
    if self.size < 1 or height % self.size or width % self.size:
      raise ValueError(f"patch_size={self.size} must divide image_size={height, width}")

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns."""
    return tuple(size // self.size for size in self.media_shape[:2])

  @property
  def count(self) -> int:
    return math.prod(self.grid)

  @property
  def features(self) -> int:
    """Numbers of a patch."""
    return self.size**2 * self.media_shape[2]

  def split(self, media: Float[Array, "B height width C"]) -> Float[Array, "B N D"]:
    """Patches, each flat as (row, column, channel)."""
    (rows, columns), p = self.grid, self.size
    x = media.reshape(media.shape[0], rows, p, columns, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(media.shape[0], self.count, self.features)

  def join(self, x: Float[Array, "B N D"]) -> Float[Array, "B height width C"]:
    """The inverse of `split`."""
    (rows, columns), p = self.grid, self.size
    x = x.reshape(x.shape[0], rows, columns, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], *self.media_shape)


@dataclasses.dataclass(frozen=True)
class PatchBody:
  """What bodies have alike that make one latent of each patch.

  Attributes:
    patches: Of an image.
  """

  patches: Patches

  @property
  def media_shape(self) -> tuple[int, int, int]:
    """Height, width, channels."""
    return self.patches.media_shape

  @property
  def num_latents(self) -> int:
    """Patches of an image."""
    return self.patches.count


@dataclasses.dataclass(frozen=True)
class VitBody(PatchBody):
  """Patches through a transformer that sees all of them, and the same on the grid of latents.

  Attributes:
    transformers: The encoder's and the decoder's.
  """

  transformers: tuple[DecoderConfig, DecoderConfig]

  def encoder(self, features: int) -> nn.Module:
    return PatchEncoder(self, features)

  def decoder(self, dim: int) -> nn.Module:
    del dim
    return PatchDecoder(self)

  def flops(self, dim: int) -> float:
    count, pixels = self.num_latents, self.patches.features
    encoder, decoder = (t.flops_per_token(count) for t in self.transformers)
    wide, width = (t.embed_dim for t in self.transformers)
    outside = wide * (pixels + dim) + width * (dim + width + pixels)
    return count * (encoder + decoder + 2 * outside)


def vit_body(
  *,
  image_size: int,
  channels: int = 3,
  patch_size: int = 16,
  num_layers: int = 12,
  embed_dim: int = 768,
  num_heads: int = 12,
  mlp_dim: int | None = None,
  norm: str = "layer",
  feed_forward: str = "gelu",
  decoder_layers: int | None = None,
  init: str = "normal",
  remat: str = "none",
  dtype: DTypeLike = jnp.float32,
) -> VitBody:
  """A body of transformers, alike but for the decoder's `decoder_layers`.

  Args:
    image_size: Height and width.
    channels: Of a pixel.
    patch_size: Pixels of height and width that become one latent.
    num_layers: Layers of the encoder.
    embed_dim: Width.
    num_heads: Heads.
    mlp_dim: Of the feed-forwards; four times the width if `None`.
    norm: `rms` or `layer`.
    feed_forward: Kind of the feed-forwards.
    decoder_layers: Layers of the decoder; as many as the encoder's if `None`.
    init: Scheme of initialisation.
    remat: What the backward pass keeps.
    dtype: Of activations.
  """
  if embed_dim % num_heads:
    raise ValueError(f"{embed_dim=} is no multiple of {num_heads=}")
  mixer = AttentionConfig(
    num_heads=num_heads,
    head_dim=embed_dim // num_heads,
    positions=PositionConfig(kind="none"),
    mask=ops.Mask("full"),
  )
  block = BlockConfig(mixer, FeedForwardConfig(mlp_dim or 4 * embed_dim, feed_forward), norm)

  def transformer(layers: int) -> DecoderConfig:
    options = dict(final_norm=norm, init=init, remat=remat, dtype=dtype)
    return DecoderConfig(embed_dim, (Stage((block,), layers),), **options)

  patches = Patches((image_size, image_size, channels), patch_size)
  return VitBody(patches, (transformer(num_layers), transformer(decoder_layers or num_layers)))


class PatchEncoder(nn.Module):
  """Patches, embedded with their places, through a transformer and a linear head.

  Attributes:
    body: Sizes.
    features: Of its output.
  """

  body: VitBody
  features: int

  @nn.compact
  def __call__(self, media: Float[Array, "B height width C"]) -> Float[Array, "B N D"]:
    c = self.body.transformers[0]
    x = _dense(c, c.embed_dim, (None, "embed"), "patch_embed")(self.body.patches.split(media))
    x = x + _places(self, c, self.body.num_latents)
    x, _ = Decoder(c, name="transformer")(x)
    return _dense(c, self.features, ("embed", None), "head")(x).astype(jnp.float32)


class PatchDecoder(nn.Module):
  """Latents, embedded with their places, through a transformer and a head of two layers.

  Attributes:
    body: Sizes.
  """

  body: VitBody

  @nn.compact
  def __call__(self, latents: Float[Array, "B N Z"]) -> Float[Array, "B height width C"]:
    c = self.body.transformers[1]
    x = _dense(c, c.embed_dim, (None, "embed"), "latent_embed")(latents)
    x = x + _places(self, c, self.body.num_latents)
    x, _ = Decoder(c, name="transformer")(x)
    x = nn.tanh(_dense(c, c.embed_dim, ("embed", "mlp"), "head_in")(x))
    x = _dense(c, self.body.patches.features, ("mlp", None), "head_out")(x)
    return self.body.patches.join(x.astype(jnp.float32))


def _dense(c: DecoderConfig, features: int, axes: tuple[str | None, ...], name: str) -> nn.Module:
  init = nn.with_logical_partitioning(c.initializers.mixer_in, axes)
  return nn.Dense(features, dtype=c.dtype, kernel_init=init, name=name)


def _places(module: nn.Module, c: DecoderConfig, count: int) -> Float[Array, "N D"]:
  init = nn.with_logical_partitioning(c.initializers.embedding, ("positions", "embed"))
  return module.param("position_embedding", init, (count, c.embed_dim)).astype(c.dtype)


@dataclasses.dataclass(frozen=True)
class ConvBody:
  """Residual convolutions over an image, halved (or so) between levels, and their mirror.

  Attributes:
    media_shape: Height, width, channels.
    widths: Channels of each level, from the image inwards.
    strides: Between one level and the next; one fewer.
    depth: Residual blocks of a level.
    dtype: Of activations.
  """

  media_shape: tuple[int, int, int]
  widths: tuple[int, ...]
  strides: tuple[int, ...]
  depth: int
  dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    if len(self.widths) != len(self.strides) + 1 or min((self.depth, *self.widths)) < 1:
      raise ValueError(
        f"widths={self.widths} must be positive, one more than strides={self.strides}, and "
        f"depth={self.depth} at least 1"
      )
    if min(self.strides, default=1) < 1 or any(s % self.hop for s in self.media_shape[:2]):
      raise ValueError(
        f"the product of strides={self.strides} must divide image_size={self.media_shape[:2]}"
      )

  @property
  def hop(self) -> int:
    return math.prod(self.strides)

  @property
  def grid(self) -> tuple[int, int]:
    return tuple(size // self.hop for size in self.media_shape[:2])

  @property
  def num_latents(self) -> int:
    return math.prod(self.grid)

  def encoder(self, features: int) -> nn.Module:
    return ConvEncoder(self, features)

  def decoder(self, dim: int) -> nn.Module:
    del dim
    return ConvDecoder(self)

  def flops(self, dim: int) -> float:
    pixels = math.prod(self.media_shape[:2])
    ends = 9 * self.media_shape[2] * self.widths[0] * pixels + 9 * dim * self.widths[-1] * (
      self.num_latents
    )
    inner, area = 0.0, pixels
    for i, width in enumerate(self.widths):
      inner += area * 2 * self.depth * 9 * width**2
      if i < len(self.strides):
        after = area / self.strides[i] ** 2
        inner += (after if self.strides[i] > 1 else area) * 9 * width * self.widths[i + 1]
        area = after
    return 2 * 2 * (ends + inner)  # Both ways, two flops a product.


def conv_body(
  *,
  image_size: int,
  channels: int = 3,
  width: int = 128,
  multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
  strides: tuple[int, ...] = (2, 2, 2, 2),
  depth: int = 2,
  dtype: DTypeLike = jnp.float32,
) -> ConvBody:
  """A body of convolutions over images.

  Args:
    image_size: Height and width.
    channels: Of a pixel.
    width: Channels that `multipliers` multiply.
    multipliers: Of the channels of each level, from the image inwards.
    strides: Between levels; their product is the side of what becomes one latent.
    depth: Residual blocks of a level.
    dtype: Of activations.
  """
  shape = (image_size, image_size, channels)
  widths = tuple(width * m for m in multipliers)
  return ConvBody(shape, widths, tuple(strides), depth, dtype)


class ConvEncoder(nn.Module):
  """From pixels inwards.

  Attributes:
    body: Sizes.
    features: Of its output.
  """

  body: ConvBody
  features: int

  @nn.compact
  def __call__(self, media: Float[Array, "B height width C"]) -> Float[Array, "B N D"]:
    c = self.body
    x = nn.Conv(c.widths[0], (3, 3), dtype=c.dtype, name="stem")(media)
    for i, width in enumerate(c.widths):
      if i:
        stride = c.strides[i - 1]
        x = nn.Conv(width, (3, 3), (stride, stride), dtype=c.dtype, name=f"down_{i}")(x)
      for j in range(c.depth):
        x = ResidualBlock2D(width, c.dtype, name=f"block_{i}_{j}")(x)
    x = nn.silu(group_norm(x.shape[-1], c.dtype, "norm")(x))
    x = nn.Conv(self.features, (3, 3), dtype=c.dtype, name="head")(x)
    return x.astype(jnp.float32).reshape(x.shape[0], c.num_latents, self.features)


class ConvDecoder(nn.Module):
  """From the grid of latents outwards; pixels are repeated, then convolved, where it grows.

  Attributes:
    body: Sizes.
  """

  body: ConvBody

  @nn.compact
  def __call__(self, latents: Float[Array, "B N Z"]) -> Float[Array, "B height width C"]:
    c = self.body
    x = latents.reshape(latents.shape[0], *c.grid, -1)
    x = nn.Conv(c.widths[-1], (3, 3), dtype=c.dtype, name="stem")(x)
    for i, width in reversed(list(enumerate(c.widths))):
      for j in range(c.depth):
        x = ResidualBlock2D(width, c.dtype, name=f"block_{i}_{j}")(x)
      if i:
        stride = c.strides[i - 1]
        x = jnp.repeat(jnp.repeat(x, stride, axis=1), stride, axis=2)
        x = nn.Conv(c.widths[i - 1], (3, 3), dtype=c.dtype, name=f"up_{i}")(x)
    x = nn.silu(group_norm(x.shape[-1], c.dtype, "norm")(x))
    return nn.Conv(c.media_shape[2], (3, 3), dtype=c.dtype, name="head")(x).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SpeechBody:
  """Causal convolutions over time and their mirror; a latent for each `hop` samples.

  Attributes:
    media_shape: Samples, and channels of a sample.
    width: Channels of the first level; they double from level to level.
    strides: Between levels, from the signal inwards. A resampling filter is two strides long.
    depths: Blocks of each level; one more than strides.
    kernel_size: Taps of the other filters.
    shared: What all layers have in common.
  """

  media_shape: tuple[int, int]
  width: int
  strides: tuple[int, ...]
  depths: tuple[int, ...]
  kernel_size: int = 7
  shared: ConvShared = ConvShared()

  def __post_init__(self):
    if len(self.depths) != len(self.strides) + 1 or min(self.depths) < 0:
      raise ValueError(
        f"depths={self.depths} must not be negative, and one more than strides={self.strides}"
      )
    if min(self.strides, default=1) < 1 or self.width < 1:
      raise ValueError(f"strides={self.strides} and width={self.width} must be positive")
    self.check_length(self.media_shape[0])

  def check_length(self, num_samples: int) -> None:
    """Raises `ValueError` where samples make no whole number of latents."""
    if num_samples < 1 or num_samples % self.hop:
      raise ValueError(
        f"{num_samples} samples are no multiple of {self.hop}, those of a latent (the product of "
        f"strides={self.strides}); cut the sound, or fill it up with zeros"
      )

  @property
  def hop(self) -> int:
    """Samples of a latent."""
    return math.prod(self.strides)

  @property
  def num_latents(self) -> int:
    return self.media_shape[0] // self.hop

  @property
  def widths(self) -> tuple[int, ...]:
    return tuple(self.width * 2**i for i in range(len(self.depths)))

  def encoder_layers(self, features: int) -> tuple[CausalLayer, ...]:
    k, widths = self.kernel_size, self.widths
    layers = [CausalLayer("stem", "conv", self.media_shape[1], widths[0], k)]
    for i, (width, depth) in enumerate(zip(widths, self.depths, strict=True)):
      if i:
        stride = self.strides[i - 1]
        layers.append(CausalLayer(f"down_{i}", "conv", widths[i - 1], width, 2 * stride, stride))
      layers += [CausalLayer(f"block_{i}_{j}", "block", width, width, k) for j in range(depth)]
    return (*layers, CausalLayer("head", "conv", widths[-1], features, k))

  def decoder_layers(self, dim: int) -> tuple[CausalLayer, ...]:
    k, widths = self.kernel_size, self.widths
    layers = [CausalLayer("stem", "conv", dim, widths[-1], k)]
    for i, width in reversed(list(enumerate(widths))):
      blocks = range(self.depths[i])
      layers += [CausalLayer(f"block_{i}_{j}", "block", width, width, k) for j in blocks]
      if i:
        stride = self.strides[i - 1]
        sizes = (width, widths[i - 1], 2 * stride, stride)
        layers.append(CausalLayer(f"up_{i}", "transposed", *sizes))
    return (*layers, CausalLayer("head", "conv", widths[0], self.media_shape[1], k))

  def encoder(self, features: int) -> nn.Module:
    return CausalStack(self.encoder_layers(features), self.shared)

  def decoder(self, dim: int) -> nn.Module:
    return CausalStack(self.decoder_layers(dim), self.shared)

  def flops(self, dim: int) -> float:
    total = 0.0
    for layers in (self.encoder_layers(dim), self.decoder_layers(dim)):
      length = self.media_shape[0] if layers[-1].features == dim else self.num_latents
      for layer in layers:
        total += layer.flops(length)
        length = length * layer.stride if layer.kind == "transposed" else length // layer.stride
    return total


def speech_body(
  *,
  num_samples: int,
  channels: int = 1,
  width: int = 32,
  strides: tuple[int, ...] = (2, 2, 4, 5, 5, 8),
  depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3, 8),
  kernel_size: int = 7,
  layer_scale: float = 1e-6,
  init_std: float = 0.01,
  norm_eps: float = 1e-5,
  dtype: DTypeLike = jnp.float32,
) -> SpeechBody:
  """A body of causal convolutions over time; VibeVoice's by default.

  Args:
    num_samples: Of a training example.
    channels: Of a sample.
    width: Channels of the first level; they double from level to level.
    strides: Between levels, from the signal inwards; their product is the samples of a latent.
    depths: Blocks of each level.
    kernel_size: Taps of filters that do not resample.
    layer_scale: What the branches of blocks are multiplied by at first.
    init_std: Of kernels; by their fan-in if 0.
    norm_eps: Of the blocks' norms.
    dtype: Of activations.
  """
  shared = ConvShared(dtype, init_std, layer_scale, norm_eps)
  shape = (num_samples, channels)
  return SpeechBody(shape, width, tuple(strides), tuple(depths), kernel_size, shared)
