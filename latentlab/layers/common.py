"""What every block is told: the sizes it shares with its neighbours, and the tokens' context."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import PartitionSpec

from latentlab.layers.initializers import Initializers
from latentlab.typing import Array, Bool, DTypeLike, Float, Int


@dataclasses.dataclass(frozen=True)
class Shared:
  """What all layers of one decoder have in common.

  Attributes:
    embed_dim: Width of the residual stream.
    dtype: Dtype of activations and matmuls; parameters are float32.
    init: Initialisers by role.
    norm_eps: Epsilon of the norms on the residual stream.
    dropout_rate: Dropout of each branch before it is added to the residual stream.
    deterministic: Whether dropout is off.
  """

  embed_dim: int
  dtype: DTypeLike
  init: Initializers
  norm_eps: float = 1e-6
  dropout_rate: float = 0.0
  deterministic: bool = True


@struct.dataclass
class Context:
  """What a mixer must know of the tokens besides their hidden vectors.

  Attributes:
    positions: Position of each token, for rotations and causal masks.
    segment_ids: Packed documents; `None` for one document a row.
    lengths: Valid tokens per row (right padding); `None` if all are.
    allowed: Which keys a query may see at all (a tree, say): those of this pass, or the slots of the
      cache where there is one.
    key_bias: Added to the scores of each key, of this pass or of the cache alike.
    layer: Index of the layer, for what depends on depth.
  """

  positions: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"] | None = None
  lengths: Int[Array, " B"] | None = None
  allowed: Bool[Array, "#B T S"] | None = None
  key_bias: Float[Array, "B S"] | None = None
  layer: Int[Array, ""] | int = 0

  @property
  def valid(self) -> Bool[Array, "B T"] | None:
    """Tokens that are not padding; `None` if all are valid."""
    if self.lengths is None:
      return None
    return jnp.arange(self.positions.shape[1]) < self.lengths[:, None]


def heads_projection(
  shared: Shared, num_heads: int, head_dim: int, *, heads_axis: str = "heads", name: str
) -> nn.DenseGeneral:
  """A bias-free projection `D -> (heads, head_dim)`, as every mixer has several of."""
  init = nn.with_logical_partitioning(shared.init.mixer_in, ("embed", heads_axis, "head_dim"))
  return nn.DenseGeneral(
    (num_heads, head_dim), use_bias=False, dtype=shared.dtype, kernel_init=init, name=name
  )


def output_projection(shared: Shared, *, name: str = "out_proj") -> nn.DenseGeneral:
  """A bias-free projection `(heads, head_dim) -> D`."""
  init = nn.with_logical_partitioning(shared.init.mixer_out, ("heads", "head_dim", "embed"))
  return nn.DenseGeneral(
    shared.embed_dim, axis=(-2, -1), use_bias=False, dtype=shared.dtype, kernel_init=init, name=name
  )


def mesh_spec(*logical: str | None) -> PartitionSpec | None:
  """The mesh layout of an activation under the rules in force; `None` where no rule is."""
  if not nn.get_logical_axis_rules():
    return None
  return nn.logical_to_mesh_axes(logical)
