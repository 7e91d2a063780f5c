"""Feature functions by name, for perceptual losses.

A feature function maps media to a list of arrays, a layer each, channels last. This library brings
no trained one; a config file, or whoever calls the library, registers theirs:

  perceptual.register("vgg", lambda media_shape: my_vgg_features)
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.typing import Array, Float

Features = Callable[[Float[Array, "B ..."]], Sequence[Float[Array, "B ..."]]]
"""Layers' features of media."""

FEATURES: dict[str, Callable[[tuple[int, ...]], Features]] = {}
"""Makers of feature functions, given the shape of an example."""


def register(name: str, make: Callable[[tuple[int, ...]], Features]) -> None:
  """Gives a maker of feature functions a name.

  Raises:
    ValueError: the name is another's.
  """
  if FEATURES.get(name, make) is not make:
    raise ValueError(f"features {name!r} are registered already; give yours another name")
  FEATURES[name] = make


def make_features(name: str, media_shape: tuple[int, ...]) -> Features:
  """The feature function of a name.

  Raises:
    ValueError: there is none.
  """
  if name not in FEATURES:
    raise ValueError(
      f"config.task.perceptual={name!r} is no feature function; choose one of {sorted(FEATURES)}, "
      "or register yours with latentlab.train.perceptual.register."
    )
  return FEATURES[name](media_shape)


def random_convolutions(media_shape: tuple[int, ...]) -> Features:
  """Three strided convolutions of images with fixed random filters.

  Even untrained, they see edges and textures at several scales.
  """
  if len(media_shape) != 3:
    raise ValueError(f"features 'random_convolutions' are of images, not of media {media_shape}")
  rng = np.random.default_rng(0)
  kernels, channels = [], media_shape[2]
  for width in (16, 32, 64):
    scale = (9 * channels) ** -0.5
    kernels.append((rng.normal(size=(3, 3, channels, width)) * scale).astype(np.float32))
    channels = width

  def features(media: Float[Array, "B H W C"]) -> list[Float[Array, "B h w D"]]:
    x, layers = media.astype(jnp.float32), []
    for i, kernel in enumerate(kernels):
      stride = (1, 1) if i == 0 else (2, 2)
      layout = ("NHWC", "HWIO", "NHWC")
      x = jax.lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=layout)
      x = jax.nn.relu(x)
      layers.append(x)
    return layers

  return features


register("random_convolutions", random_convolutions)
