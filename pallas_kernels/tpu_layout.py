"""How heads lie in the arrays that TPU kernels read and write.

Where a head is a multiple of 128 wide, heads lie side by side in the lanes of `B T (N D)`, which is
how a projection made them. Others are put before the length, `B N T D`, by a copy.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Shaped

from pallas_kernels.mosaic_tpu import LANES


def side_by_side(x: Shaped[Array, "B T N D"]) -> Array:
  """The view that kernels read."""
  batch, length, _, dim = x.shape
  return x.reshape(batch, length, -1) if dim % LANES == 0 else x.swapaxes(1, 2)


def apart(x: Array, dim: int) -> Shaped[Array, "B T N {dim}"]:
  """Undoes `side_by_side`."""
  return x.reshape(*x.shape[:2], -1, dim) if dim % LANES == 0 else x.swapaxes(1, 2)


def struct(batch: int, length: int, heads: int, dim: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
  """Of a result that `apart` reads."""
  shape = (batch, length, heads * dim) if dim % LANES == 0 else (batch, heads, length, dim)
  return jax.ShapeDtypeStruct(shape, dtype)


def blocks(
  dim: int,
  count: int,
  place: Callable[..., tuple[Any, Any, Any]],
  *,
  heads: int | None = None,
) -> pl.BlockSpec:
  """Blocks of `count` tokens of some heads.

  Args:
    dim: Of a head.
    count: Tokens of a block.
    place: From the grid's indices and the scalars to the row of the batch, and to which block it is
      of the tokens and of the heads.
    heads: Of a block, which `head` tells apart; `None` for a block `[count, dim]` of one.
  """
  if dim % LANES == 0:
    return pl.BlockSpec((None, count, (heads or 1) * dim), place)

  def before_length(*grid):
    row, tokens, head = place(*grid)
    return row, head, tokens, 0

  return pl.BlockSpec((None, heads, count, dim), before_length)


def head(i: int, dim: int) -> tuple[Any, ...]:
  """Where the `i`th head lies in a block of several."""
  return (slice(None), pl.ds(i * dim, dim)) if dim % LANES == 0 else (i,)
