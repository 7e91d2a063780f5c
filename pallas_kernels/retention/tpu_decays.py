"""Decays of a chunk on a TPU: the exponents that a kernel is given, and what it makes of them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from pallas_kernels.retention.gates import RESET
from pallas_kernels.retention.tpu_walk import Input, Walk, whole_rows


def decay_operands(
  walk: Walk, gates: Float[Array, "N"] | Float[Array, "B T N"]
) -> tuple[dict[str, Array], dict[str, Input]]:
  """A kernel's scalars and inputs for `decays`: fixed exponents per token, or sums of gates.

  Within a chunk an exponent is a difference of two sums from its start. Sums reach `RESET` times
  the chunk, so each gate is split in two: multiples of a step that makes sums exact, and a rest
  whose sums are small. Differences of the two lose nothing, whatever came before.
  """
  if gates.ndim == 1:
    return {"log_decay": gates}, {}
  (batch, length, _), chunk, heads = gates.shape, walk.tile.chunk, walk.tile.heads
  step = 2.0 ** (math.ceil(math.log2(-RESET * chunk)) - 23)
  coarse = jnp.round(gates / step) * step
  both = jnp.stack([coarse, gates - coarse], 1)  # B 2 T N
  both = jnp.pad(both, ((0, 0), (0, 0), (0, walk.padded_length - length), (0, 0)))
  sums = jnp.cumsum(both.reshape(batch, 2, walk.num_chunks, chunk, -1), 3)
  sums = sums.reshape(batch, 2, walk.padded_length, walk.steps, heads)
  sums = sums.transpose(0, 3, 1, 4, 2).reshape(batch, walk.steps, 2 * heads, -1)
  filled = whole_rows(2 * heads) - 2 * heads
  return {}, {"sums": walk.rows(jnp.pad(sums, ((0, 0), (0, 0), (0, filled), (0, 0))))}


class Decays(NamedTuple):
  """Of one head over one chunk, all at most 1.

  Attributes:
    inner: From token j to token i, zero for j after i; `i j`, or `j i` if transposed.
    enter: From the entering state to each token.
    leave: From each token to the leaving state.
    carry: From the one state to the other.
  """

  inner: Float[Array, "C C"]
  enter: Float[Array, "C 1"]
  leave: Float[Array, "C 1"]
  carry: Float[Array, "1 1"]


def decays(
  walk: Walk, count: Any, log_decay: Any, sums: Any, *, transposed: bool = False
) -> Callable[[int], Decays]:
  """Makes the function from one of the step's heads to its decays.

  Args:
    walk: The kernel's.
    count: How many of the chunk's tokens are valid, or `None` for all.
    log_decay: Reference to one per head, or `None`.
    sums: Reference to what `decay_operands` made, or `None`.
    transposed: How `inner` is laid out.
  """
  chunk, heads = walk.tile.chunk, walk.tile.heads
  row, column = iota((chunk, 1)), iota((1, chunk))
  seen = row <= column if transposed else column <= row
  between = (lambda x, y: y - x) if transposed else (lambda x, y: x - y)

  if sums is None:  # A fixed decay acts once per token, and no more after the last valid one.
    count = chunk if count is None else count
    row, column = (jnp.minimum(x + 1, count).astype(jnp.float32) for x in (row, column))
    last = jnp.full((1, 1), count, jnp.int32).astype(jnp.float32)
    gap = between(row, column)

    def fixed(i):
      g = log_decay[pl.program_id(1) * heads + i]
      inner = jnp.exp(jnp.where(seen, g * gap, RESET))
      return Decays(inner, jnp.exp(g * row), jnp.exp(g * (last - row)), jnp.exp(g * last))

    return fixed

  # Exponentials of rows fill the lanes; one transpose makes columns of them all.
  coarse, fine = sums[:heads], sums[heads : 2 * heads]
  enter = jnp.exp(coarse + fine)
  leave = jnp.exp((coarse[:, chunk - 1 :] - coarse) + (fine[:, chunk - 1 :] - fine))
  columns = jnp.concatenate([coarse, fine, enter, leave]).T

  def per_token(i):
    coarse_i, fine_i, enter_i, leave_i = (columns[:, j : j + 1] for j in range(i, 4 * heads, heads))
    gap = between(coarse_i, coarse[i : i + 1]) + between(fine_i, fine[i : i + 1])
    inner = jnp.exp(jnp.where(seen, gap, RESET))
    return Decays(inner, enter_i, leave_i, enter[i : i + 1, chunk - 1 :])

  return per_token


def iota(shape: tuple[int, int]) -> Array:
  """Of a row or a column, along it."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))
