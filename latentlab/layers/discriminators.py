"""Discriminators of media: maps of numbers, high where patches look real."""

import jax.numpy as jnp
from flax import linen as nn

from latentlab.layers.convolution import group_norm
from latentlab.typing import Array, Float


class PatchDiscriminator(nn.Module):
  """Strided convolutions over an image: each output judges a patch (pix2pix).

  Attributes:
    width: Channels of the first convolution; they double up to eight times as many.
    depth: Convolutions, each of which halves the image.
  """

  width: int = 64
  depth: int = 3

  @nn.compact
  def __call__(self, media: Float[Array, "B H W C"]) -> list[Float[Array, "B h w"]]:
    x = media
    for i in range(self.depth):
      x = nn.Conv(self.width * min(2**i, 8), (4, 4), (2, 2), name=f"conv_{i}")(x)
      if i:
        x = group_norm(x.shape[-1], jnp.float32, f"norm_{i}")(x)
      x = nn.leaky_relu(x, 0.2)
    return [nn.Conv(1, (3, 3), name="head")(x)[..., 0]]


class MultiPeriodDiscriminator(nn.Module):
  """A sound, folded at several periods, each under convolutions over every `period`-th sample.

  It is HiFi-GAN's (https://arxiv.org/abs/2010.05646), smaller.

  Attributes:
    width: Channels of the first convolution; they double up to eight times as many.
    depth: Convolutions, each of which keeps every third place.
    periods: In samples.
  """

  width: int = 32
  depth: int = 4
  periods: tuple[int, ...] = (2, 3, 5, 7, 11)

  @nn.compact
  def __call__(self, media: Float[Array, "B S C"]) -> list[Float[Array, "B t period"]]:
    maps = []
    for period in self.periods:
      x = jnp.pad(media, ((0, 0), (0, -media.shape[1] % period), (0, 0)))
      x = x.reshape(x.shape[0], -1, period, x.shape[-1])
      for i in range(self.depth):
        features = self.width * min(2**i, 8)
        x = nn.Conv(features, (5, 1), (3, 1), name=f"period_{period}_conv_{i}")(x)
        x = nn.leaky_relu(x, 0.1)
      maps.append(nn.Conv(1, (3, 1), name=f"period_{period}_head")(x)[..., 0])
    return maps
