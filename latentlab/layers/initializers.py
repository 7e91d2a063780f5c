"""Initialisers: one table of choices, each of which names an initialiser per role of a kernel.

`retnet` is the scheme of the original release (torchscale's `multiscale_retention.py`): Xavier-
uniform with the gains of the DeepNet principle built in, feed-forward as in a default torch linear
layer. `deepnorm` is what that release makes of it beside DeepNorm's residual (DeepNet,
https://arxiv.org/abs/2203.00555): weights of values, outputs and feed-forwards are divided by
`(8 L)^(1/4)`, those of queries, keys and gates are not.
"""

import dataclasses
import math

from flax import linen as nn
from jax.nn.initializers import Initializer


@dataclasses.dataclass(frozen=True)
class Initializers:
  """One initialiser per role.

  Attributes:
    mixer_in: Projections into queries, keys and gates.
    mixer_value: Projection into values.
    mixer_out: Projection out of a mixer.
    mlp_in: The matrix of a feed-forward whose product is activated.
    mlp_linear: The other factor of a gated one.
    mlp_out: Last matrix of a feed-forward.
    embedding: Embedding and vocabulary head.
  """

  mixer_in: Initializer
  mixer_value: Initializer
  mixer_out: Initializer
  mlp_in: Initializer
  mlp_linear: Initializer
  mlp_out: Initializer
  embedding: Initializer


def _alike(base: Initializer, out: Initializer, embedding: Initializer) -> Initializers:
  """Two branches a layer add to the residual stream: `out` keeps its variance from growing."""
  return Initializers(
    mixer_in=base,
    mixer_value=base,
    mixer_out=out,
    mlp_in=base,
    mlp_linear=base,
    mlp_out=out,
    embedding=embedding,
  )


def _normal(num_layers: int, embed_dim: int) -> Initializers:
  del embed_dim
  base = nn.initializers.normal(0.02)
  return _alike(base, nn.initializers.normal(0.02 / math.sqrt(2 * num_layers)), base)


def _fan_in(num_layers: int, embed_dim: int) -> Initializers:
  base = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
  out = nn.initializers.variance_scaling(0.5 / num_layers, "fan_in", "normal")
  return _alike(base, out, nn.initializers.normal(embed_dim**-0.5))


def _retnet(num_layers: int, embed_dim: int) -> Initializers:
  del num_layers
  return _release(embed_dim, divisor=1.0)


def _deepnorm(num_layers: int, embed_dim: int) -> Initializers:
  return _release(embed_dim, divisor=(8 * num_layers) ** 0.25)


def _linear(num_layers: int, embed_dim: int) -> Initializers:
  """Torch's default of a linear layer, for all of them: the Differential Transformer's release."""
  del num_layers
  base = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
  return _alike(base, base, nn.initializers.normal(embed_dim**-0.5))


def _release(embed_dim: int, divisor: float) -> Initializers:
  # A gain g multiplies the bound, so the variance by g^2.
  def xavier(gain):
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")

  def linear(gain):  # U(+-gain / sqrt(fan_in)).
    return nn.initializers.variance_scaling(gain**2 / 3.0, "fan_in", "uniform")

  return Initializers(
    mixer_in=xavier(2**-2.5),
    mixer_value=xavier(2**-2.5 / divisor),
    mixer_out=xavier(2**-1 / divisor),
    mlp_in=linear(1 / divisor),
    mlp_linear=linear(1.0),
    mlp_out=linear(1 / divisor),
    embedding=nn.initializers.normal(embed_dim**-0.5),
  )


SCHEMES = {
  "normal": _normal,
  "fan_in": _fan_in,
  "linear": _linear,
  "retnet": _retnet,
  "deepnorm": _deepnorm,
}


def make(scheme: str, *, num_layers: int, embed_dim: int) -> Initializers:
  """The initialisers of a scheme named in `SCHEMES`.

  Raises:
    ValueError: the scheme is unknown.
  """
  if scheme not in SCHEMES:
    raise ValueError(f"unknown init {scheme=}; choose one of {sorted(SCHEMES)}")
  return SCHEMES[scheme](num_layers, embed_dim)
