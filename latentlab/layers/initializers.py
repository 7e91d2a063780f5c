"""Initialisers: one table of choices, each of which names an initialiser per role of a kernel.

`retnet` is the scheme of the original release (torchscale's `multiscale_retention.py`): Xavier-
uniform with the gains of the DeepNet principle built in, feed-forward as in a default torch linear
layer.
"""

import dataclasses
import math

from flax import linen as nn
from jax.nn.initializers import Initializer


@dataclasses.dataclass(frozen=True)
class Initializers:
  """One initialiser per role.

  Attributes:
    mixer_in: Projections into queries, keys, values and gates.
    mixer_out: Projection out of a mixer.
    mlp_in: First matrices of a feed-forward.
    mlp_out: Last matrix of a feed-forward.
    embedding: Embedding and vocabulary head.
  """

  mixer_in: Initializer
  mixer_out: Initializer
  mlp_in: Initializer
  mlp_out: Initializer
  embedding: Initializer


def _normal(num_layers: int, embed_dim: int) -> Initializers:
  del embed_dim
  base = nn.initializers.normal(0.02)
  # Two branches a layer add to the residual stream: keep its variance from growing with depth.
  out = nn.initializers.normal(0.02 / math.sqrt(2 * num_layers))
  return Initializers(base, out, base, out, base)


def _fan_in(num_layers: int, embed_dim: int) -> Initializers:
  base = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
  out = nn.initializers.variance_scaling(0.5 / num_layers, "fan_in", "normal")
  return Initializers(base, out, base, out, nn.initializers.normal(embed_dim**-0.5))


def _retnet(num_layers: int, embed_dim: int) -> Initializers:
  del num_layers
  # A gain g multiplies the bound, so the variance by g^2: 2^-2.5 -> 2^-5, 2^-1 -> 2^-2.
  mixer_in = nn.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
  mixer_out = nn.initializers.variance_scaling(2.0**-2, "fan_avg", "uniform")
  linear = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")  # U(+-1/sqrt(fan_in)).
  return Initializers(mixer_in, mixer_out, linear, linear, nn.initializers.normal(embed_dim**-0.5))


SCHEMES = {"normal": _normal, "fan_in": _fan_in, "retnet": _retnet}


def make(scheme: str, *, num_layers: int, embed_dim: int) -> Initializers:
  """The initialisers of a scheme named in `SCHEMES`.

  Raises:
    ValueError: the scheme is unknown.
  """
  if scheme not in SCHEMES:
    raise ValueError(f"unknown init {scheme=}; choose one of {sorted(SCHEMES)}")
  return SCHEMES[scheme](num_layers, embed_dim)
