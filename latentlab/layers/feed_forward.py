"""Position-wise feed-forward layers, plain and gated, without biases."""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
  """A feed-forward layer.

  Attributes:
    mlp_dim: Hidden width `F`.
    kind: `gelu` or `relu` (two matrices), `swiglu` or `geglu` (three).
  """

  mlp_dim: int
  kind: str = "gelu"

  def __post_init__(self):
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
    act = _ACTIVATIONS[self.config.kind]
    hidden = self._dense("in_proj")(x)
    hidden = act(self._dense("gate_proj")(x)) * hidden if self.config.gated else act(hidden)
    hidden = nn.with_logical_constraint(hidden, ("act_batch", "act_length", "act_mlp"))
    return Projection(
      (x.shape[-1],),
      ("mlp", "embed"),
      self.shared.init.mlp_out,
      self.shared.dtype,
      name="out_proj",
    )(hidden)

  def _dense(self, name):
    return Projection(
      (self.config.mlp_dim,),
      ("embed", "mlp"),
      self.shared.init.mlp_in,
      self.shared.dtype,
      name=name,
    )
