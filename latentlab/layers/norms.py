"""Norms of the residual stream, and the norm inside a head."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from latentlab.layers.common import Shared
from latentlab.typing import Array, Float

NORMS = ("rms", "layer")
HEAD_NORMS = ("rms", "group", "none")


def residual_norm(kind: str, shared: Shared, *, name: str) -> nn.Module:
  """`rms` or `layer` norm over the last axis; statistics in float32, a scale, no bias.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind not in NORMS:
    raise ValueError(f"unknown norm {kind=}; choose one of {NORMS}")
  module = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[kind]
  options = {"use_bias": False} if kind == "layer" else {}
  scale = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
  return module(epsilon=shared.norm_eps, dtype=shared.dtype, scale_init=scale, name=name, **options)


class HeadScale(nn.Module):
  """The scale of a norm over a head's features, for ops that norm by themselves; heads share it.

  Attributes:
    features: Head size `V`.
  """

  features: int

  @nn.compact
  def __call__(self) -> Float[Array, " V"]:
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("head_dim",))
    return self.param("scale", init, (self.features,))


class HeadNorm(nn.Module):
  """Normalises each token's head over its own features only, in float32.

  A stock group norm over `B T features` reduces over time too, which leaks the future; here the
  last axis of `B T N V` is all that is seen.

  Attributes:
    kind: `rms` (no mean, as the original release), `group` (mean and variance, as the paper).
    eps: Epsilon; 0 makes the norm exactly invariant to a row's scale.
    affine: Whether a scale of size `V`, shared by the heads, follows.
  """

  kind: str = "rms"
  eps: float = 1e-6
  affine: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "B T N V"]) -> Float[Array, "B T N V"]:
    x = x.astype(jnp.float32)
    if self.kind == "group":
      x = x - x.mean(-1, keepdims=True)
    square = jnp.square(x).mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(square + self.eps)
    if self.affine:
      init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("head_dim",))
      x = x * self.param("scale", init, (x.shape[-1],))
    return x
