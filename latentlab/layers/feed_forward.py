"""Position-wise feed-forward layers, plain and gated, without biases."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from latentlab.layers.common import Projection, Shared
from latentlab.typing import Array, Float

# The exact GELU of the papers, not its tanh approximation.
_ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "relu": nn.relu,
  "swiglu": nn.silu,
  "geglu": lambda x: nn.gelu(x, approximate=False),
}
KINDS = tuple(_ACTIVATIONS)


def default_width(kind: str, embed_dim: int) -> int:
  """Hidden width of `8 D^2` parameters: `4 D`, or `8/3 D` rounded up to 32 with a gate."""
  return -(-8 * embed_dim // 96) * 32 if kind.endswith("glu") else 4 * embed_dim


def ratio_width(embed_dim: int, ratio: float) -> int:
  """A gated layer's width for a `ratio` of two matrices, `2/3 ratio D`, down to a multiple of 64.

  LatentLM's rule (its release); at least 64.
  """
  return max(int(embed_dim * ratio * 2 / 3 / 64) * 64, 64)


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
  """A feed-forward layer.

  Attributes:
    mlp_dim: Hidden width `F`.
    kind: `gelu` or `relu` (two matrices), `swiglu` or `geglu` (three).
    float32_activation: Whether the activation is computed in float32, as RetNet's release does,
      whatever the model's dtype.
  """

  mlp_dim: int
  kind: str = "gelu"
  float32_activation: bool = False

  def __post_init__(self):
    if self.mlp_dim < 1:
      raise ValueError(f"mlp_dim={self.mlp_dim} must be positive")
    if self.kind not in KINDS:
      raise ValueError(f"unknown feed_forward {self.kind!r}; choose one of {KINDS}")

  @property
  def gated(self) -> bool:
    return self.kind.endswith("glu")

  def flops_per_token(self, embed_dim: int) -> float:
    return (6 if self.gated else 4) * embed_dim * self.mlp_dim


class FeedForward(nn.Module):
  """`act(x W_in) W_out`, or `(act(x W_gate) * x W_in) W_out`.

  Attributes:
    config: Kind and width.
    shared: What it shares with the other layers.
  """

  config: FeedForwardConfig
  shared: Shared

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    c, init = self.config, self.shared.init
    name = "gate_proj" if c.gated else "in_proj"
    active = self._dense(name, init.mlp_in)(x)
    active = active.astype(jnp.float32) if c.float32_activation else active
    hidden = _ACTIVATIONS[c.kind](active).astype(self.shared.dtype)
    if c.gated:
      hidden = hidden * self._dense("in_proj", init.mlp_linear)(x)
    hidden = nn.with_logical_constraint(hidden, ("act_batch", "act_length", "act_mlp"))
    return Projection(
      (x.shape[-1],),
      ("mlp", "embed"),
      self.shared.init.mlp_out,
      self.shared.dtype,
      name="out_proj",
    )(hidden)

  def _dense(self, name, init):
    return Projection((self.config.mlp_dim,), ("embed", "mlp"), init, self.shared.dtype, name=name)
