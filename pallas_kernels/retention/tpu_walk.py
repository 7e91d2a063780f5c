"""How the TPU kernels of retention go over a sequence: the grid, and the blocks of each operand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels import mosaic_tpu, tpu_layout
from pallas_kernels.mosaic_tpu import PARALLEL, SEQUENTIAL, SUBLANES
from pallas_kernels.retention.blocks import Sizes, TpuTile

Input = tuple[Array, pl.BlockSpec]
Output = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]


@dataclasses.dataclass(frozen=True)
class Walk:
  """A kernel's way: batch, steps over heads, and chunk by chunk along or against the sequence.

  Attributes:
    sizes: Of the call.
    tile: What a step takes in.
    reverse: Whether the last chunk comes first.
  """

  sizes: Sizes
  tile: TpuTile
  reverse: bool = False

  @property
  def num_chunks(self) -> int:
    return pl.cdiv(self.sizes.length, self.tile.chunk)

  @property
  def padded_length(self) -> int:
    return self.num_chunks * self.tile.chunk

  @property
  def ragged(self) -> bool:
    """Whether the last chunk hangs over the end, where memory holds anything."""
    return self.sizes.length % self.tile.chunk != 0

  @property
  def kv_heads(self) -> int:
    """Key heads per step."""
    return max(1, self.tile.heads // self.sizes.groups)

  @property
  def groups(self) -> int:
    """Query heads of a step that share a key head."""
    return self.tile.heads // self.kv_heads

  @property
  def steps_per_key(self) -> int:
    """Steps that read the same key head, where each has part of its group."""
    return max(1, self.sizes.groups // self.tile.heads)

  @property
  def steps(self) -> int:
    """Steps that the heads take."""
    return self.sizes.heads // self.tile.heads

  @property
  def grid(self) -> tuple[int, int, int]:
    return self.sizes.batch, self.steps, self.num_chunks

  def chunk_index(self, step: Any) -> Any:
    return self.num_chunks - 1 - step if self.reverse else step

  def queries(self, x: Float[Array, "B T N D"]) -> Input:
    """An operand with a head for each query head."""
    return tpu_layout.side_by_side(x), self._tokens(x.shape[-1], self.tile.heads)

  def keys(self, x: Float[Array, "B T K D"]) -> Input:
    """One with a head for each key head."""
    spec = self._tokens(x.shape[-1], self.kv_heads, shared=self.steps_per_key)
    return tpu_layout.side_by_side(x), spec

  def rows(self, x: Float[Array, "B steps count padded"]) -> Input:
    """Numbers of a token, whose tokens fill the lanes."""
    return x, self._rows(x.shape[2])

  def states(self, x: Float[Array, "B N H V"]) -> Input:
    return x, self._states()

  def query_results(self, dim: int, dtype: DTypeLike) -> Output:
    """A result laid out as `queries`."""
    return self._struct(self.sizes.heads, dim, dtype), self._tokens(dim, self.tile.heads)

  def key_results(self, dim: int, dtype: DTypeLike) -> Output:
    """A result for the key heads of each step, `key_parts` in all."""
    return self._struct(self.key_parts, dim, dtype), self._tokens(dim, self.kv_heads)

  @property
  def key_parts(self) -> int:
    """As many as key heads; more where several steps make up a group, and each has its part."""
    return self.steps * self.kv_heads

  def row_results(self, count: int) -> Output:
    """A result laid out as `rows`, `count` of them filled up to whole tiles."""
    count = whole_rows(count)
    shape = (self.sizes.batch, self.steps, count, self.padded_length)
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._rows(count)

  def state_results(self) -> Output:
    sizes = self.sizes
    shape = (sizes.batch, sizes.heads, sizes.head_dim, sizes.value_dim)
    return jax.ShapeDtypeStruct(shape, jnp.float32), self._states()

  def state_scratch(self) -> Any:
    """A step's states, in memory that outlives it."""
    shape = (self.tile.heads, self.sizes.head_dim, self.sizes.value_dim)
    return pltpu.VMEM(shape, jnp.float32)

  def _tokens(self, dim, heads, *, shared=1):
    place = lambda b, n, c, *_: (b, self.chunk_index(c), n // shared)
    return tpu_layout.blocks(dim, self.tile.chunk, place, heads=heads)

  def _struct(self, heads, dim, dtype):
    return tpu_layout.struct(self.sizes.batch, self.sizes.length, heads, dim, dtype)

  def _rows(self, count):
    index = lambda b, n, c, *_: (b, n, 0, self.chunk_index(c))
    return pl.BlockSpec((None, None, count, self.tile.chunk), index)

  def _states(self):
    block = (None, self.tile.heads, self.sizes.head_dim, self.sizes.value_dim)
    return pl.BlockSpec(block, lambda b, n, c, *_: (b, n, 0, 0))


def whole_rows(count: int) -> int:
  """`count`, rounded up to whole tiles of float32."""
  return pl.cdiv(count, SUBLANES) * SUBLANES


def run(
  walk: Walk,
  kernel: Callable[..., None],
  name: str,
  scalars: dict[str, Array],
  inputs: dict[str, Input],
  outputs: dict[str, Output],
  scratch: dict[str, Any],
  flops: int,
) -> dict[str, Array]:
  """Calls a kernel, whose references have the operands' names.

  Args:
    walk: Its way.
    kernel: Function of the walk, and of references by name.
    name: As the compiled program shows it.
    scalars: Operands in scalar memory.
    inputs: Operands and their blocks.
    outputs: Results and their blocks.
    scratch: Memories.
    flops: Per token and query head.
  """
  names = (*scalars, *inputs, *outputs, *scratch)
  args = [*scalars.values(), *(x for x, _ in inputs.values())]
  out_shape = [x for x, _ in outputs.values()]
  tokens = walk.sizes.batch * walk.sizes.length * walk.sizes.heads
  out = mosaic_tpu.call(
    lambda *refs: kernel(walk, **dict(zip(names, refs, strict=True))),
    *args,
    name=name,
    out_shape=out_shape,
    grid=walk.grid,
    in_specs=[spec for _, spec in inputs.values()],
    out_specs=[spec for _, spec in outputs.values()],
    semantics=(PARALLEL, PARALLEL, SEQUENTIAL),
    cost=mosaic_tpu.cost_estimate(
      args, out_shape, flops=flops * tokens, transcendentals=walk.tile.chunk * tokens
    ),
    scratch_shapes=list(scratch.values()),
    num_scalar_prefetch=len(scalars),
  )
  return dict(zip(outputs, out, strict=True))
