"""What the chunkwise TPU kernels do with a chunk besides its products."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from pallas_kernels import mosaic_tpu
from pallas_kernels.mosaic_tpu import dot
from pallas_kernels.retention.tpu_decays import iota
from pallas_kernels.retention.tpu_walk import Walk


def start(state: Any, initial: Any) -> None:
  """Sets the state at the beginning of the walk."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    state[...] = jnp.zeros(state.shape, jnp.float32) if initial is None else initial[...]


def valid_count(walk: Walk, lengths: Any) -> Int[Array, ""] | None:
  """How many tokens of the chunk are valid; `None` if all of every chunk are."""
  if lengths is None and not walk.ragged:
    return None
  end = walk.sizes.length if lengths is None else lengths[pl.program_id(0)]
  first = walk.chunk_index(pl.program_id(2)) * walk.tile.chunk
  return jnp.clip(end - first, 0, walk.tile.chunk)


def clean(x: Float[Array, "C D"], count: Int[Array, ""] | None) -> Float[Array, "C D"]:
  """Zero after the valid tokens: what lies there may be a NaN."""
  return x if count is None else jnp.where(iota((x.shape[0], 1)) < count, x, 0)


def scale(x: Float[Array, "C D"], rows: Float[Array, "C 1"]) -> Float[Array, "C D"]:
  """Each row by its own factor, rounded to what a product takes."""
  return mosaic_tpu.rounded(x.astype(jnp.float32) * rows, x.dtype).astype(x.dtype)


def dot_state(
  x: Float[Array, "C D"],
  state: Float[Array, "H V"],
  contract: tuple[int, int] = (1, 0),
  *,
  whole: bool = False,
) -> Float[Array, "C X"]:
  """A product with a float32 state: with as much of it as `x`'s dtype holds, or with the `whole`.

  The gradient of a decay is a long sum of differences, where what rounding takes from a state
  would pile up.
  """
  high = mosaic_tpu.rounded(state, x.dtype)
  out = dot(x, high.astype(x.dtype), contract)
  if whole and x.dtype != state.dtype:
    out += dot(x, (state - high).astype(x.dtype), contract)
  return out


def row_dot(x: Float[Array, "C D"], y: Float[Array, "C D"]) -> Float[Array, "C 1"]:
  """Of each row of the one with its row of the other."""
  return jnp.sum(x.astype(jnp.float32) * y, 1, keepdims=True)


def as_rows(columns: list[Float[Array, "C 1"]], shape: tuple[int, int]) -> Float[Array, "rows C"]:
  """Columns, one number per token, as the first rows of an array of `shape`."""
  lane = iota((1, shape[0]))
  return sum(jnp.where(lane == i, x, 0) for i, x in enumerate(columns)).T
