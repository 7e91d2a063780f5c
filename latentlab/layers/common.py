"""What every block is told: the sizes it shares with its neighbours, and the tokens' context."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.nn.initializers import Initializer
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
    residual_scale: What the residual stream is multiplied by before a norm behind each branch
      (DeepNorm's alpha); `None` for norms before the branches.
    num_layers: Layers of the decoder.
  """

  embed_dim: int
  dtype: DTypeLike
  init: Initializers
  norm_eps: float = 1e-6
  dropout_rate: float = 0.0
  deterministic: bool = True
  residual_scale: float | None = None
  num_layers: int = 1


@struct.dataclass
class Context:
  """What a mixer must know of the tokens besides their hidden vectors.

  Attributes:
    positions: Position of each token, for rotations and causal masks; of a row for all rows where
      they are alike.
    segment_ids: Packed documents; `None` for one document a row.
    lengths: Valid tokens per row (right padding); `None` if all are.
    allowed: Which keys a query may see at all (a tree, say): those of this pass, or the slots of
      the cache where there is one.
    key_bias: Added to the scores of each key, of this pass or of the cache alike.
    layer: Index of the layer, for what depends on depth.
    in_place: Whether positions ascend by one along each document of this pass, so that the places
      of two of its tokens in the row are as far apart as their positions.
    fresh: Whether these are the first tokens of their rows, so that a cache holds none yet.
    shared: Keys and values that the decoder projects once for layers with `shared_kv`, a
      `shared_kv.SharedKV`; `None` before it has.
  """

  positions: Int[Array, "#B T"]
  segment_ids: Int[Array, "B T"] | None = None
  lengths: Int[Array, " B"] | None = None
  allowed: Bool[Array, "#B T S"] | None = None
  key_bias: Float[Array, "B S"] | None = None
  layer: Int[Array, ""] | int = 0
  shared: Any = None
  in_place: bool = struct.field(pytree_node=False, default=False)
  fresh: bool = struct.field(pytree_node=False, default=False)

  @property
  def among_themselves(self) -> bool:
    """Whether tokens see tokens of this pass alone, although a cache is there to keep them.

    The first tokens of rows do, whatever slots the cache gives them; but masks of a caller's own
    name slots.
    """
    return self.fresh and self.in_place and self.allowed is None and self.key_bias is None

  @property
  def valid(self) -> Bool[Array, "B T"] | None:
    """Tokens that are not padding; `None` if all are valid."""
    if self.lengths is None:
      return None
    return jnp.arange(self.positions.shape[1]) < self.lengths[:, None]


def wanted(module: nn.Module, collection: str) -> bool:
  """Whether a caller asks for what a module would sow; initialisation asks for nothing."""
  return module.is_mutable_collection(collection) and not module.is_initializing()


class Projection(nn.Module):
  """A bias-free linear map of the last axes, `in -> features`, without a reshape in between.

  Linen's own dense layers initialise a flat kernel and reshape it, which a kernel with named axes
  does not survive under a mesh.

  Attributes:
    features: Sizes of the axes it makes.
    axes: Logical axes of its kernel, those contracted first.
    initializer: Of the kernel, seen as a matrix.
    dtype: Of the product; the kernel is float32.
    num_contracted: How many of the last axes of its input it contracts.
  """

  features: tuple[int, ...]
  axes: tuple[str, ...]
  initializer: Initializer
  dtype: DTypeLike
  num_contracted: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    shape = (*x.shape[x.ndim - self.num_contracted :], *self.features)

    def init(key, shape, dtype=jnp.float32):
      matrix = (math.prod(shape[: self.num_contracted]), math.prod(self.features))
      return self.initializer(key, matrix, dtype).reshape(shape)

    kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if any(mesh_spec("act_length") or ()):
      # Rows and positions that lie on different mesh axes do not flatten without a gather.
      return jnp.tensordot(x, kernel, self.num_contracted)
    # One flat product: of a batched one, XLA's CPU backend copies the transposed activations.
    lead = x.shape[: x.ndim - self.num_contracted]
    matrix = kernel.reshape(-1, math.prod(self.features))
    return (x.reshape(-1, matrix.shape[0]) @ matrix).reshape(*lead, *self.features)


def heads_projection(
  shared: Shared,
  num_heads: int,
  head_dim: int,
  *,
  heads_axis: str = "heads",
  role: str = "mixer_in",
  name: str,
) -> Projection:
  """A projection `D -> (heads, head_dim)`, as every mixer has several of."""
  axes, init = ("embed", heads_axis, "head_dim"), getattr(shared.init, role)
  return Projection((num_heads, head_dim), axes, init, shared.dtype, name=name)


def output_projection(shared: Shared, *, name: str = "out_proj") -> Projection:
  """A projection `(heads, head_dim) -> D`."""
  axes = ("heads", "head_dim", "embed")
  return Projection(
    (shared.embed_dim,), axes, shared.init.mixer_out, shared.dtype, num_contracted=2, name=name
  )


def mesh_spec(*logical: str | None) -> PartitionSpec | None:
  """The mesh layout of an activation under the rules in force; `None` where no rule is.

  Axes of size one are left out: nothing is split over them.
  """
  if not nn.get_logical_axis_rules():
    return None
  sizes = jax.sharding.get_abstract_mesh().shape

  def split(axes: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1) or None

  return PartitionSpec(*map(split, nn.logical_to_mesh_axes(logical)))
