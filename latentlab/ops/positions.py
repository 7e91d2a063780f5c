"""Position encodings: rotary (RoPE), xPos, sinusoidal, and the slopes of ALiBi.

xPos: https://arxiv.org/abs/2212.10554, section 2.2 and algorithm 1. RetNet's rotation,
https://arxiv.org/abs/2307.08621 section 2.1, is RoPE on the "linspace" grid of its release.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.typing import Array, DTypeLike, Float, Int

Grid = Literal["rope", "linspace"]
Layout = Literal["interleaved", "half"]


def rope_frequencies(head_dim: int, base: float = 10000.0, grid: Grid = "rope") -> np.ndarray:
  """Radians per token of each feature pair, in float64 for tables that are rounded once.

  Args:
    head_dim: Features per head, even.
    base: The longest wavelength, over 2 pi.
    grid: "rope" leaves the end point `1 / base` out of its geometric grid; "linspace" has it in.
  """
  if head_dim % 2:
    raise ValueError(f"Features rotate in pairs; {head_dim=} must be even.")
  pairs = head_dim // 2
  if grid == "rope":
    return base ** -(np.arange(pairs) / pairs)
  if grid == "linspace":
    return base ** -np.linspace(0, 1, pairs)
  raise ValueError(f"{grid=} must be 'rope' or 'linspace'.")


def apply_rope(
  x: Float[Array, "B T N H"],
  positions: Int[Array, "#B T"],
  *,
  base: float = 10000.0,
  grid: Grid = "rope",
  layout: Layout = "interleaved",
) -> Float[Array, "B T N H"]:
  """Rotates each feature pair of a query or key by its position; the same map serves both.

  Args:
    x: Queries or keys.
    positions: Position of each token, of any sign and size.
    base: See `rope_frequencies`.
    grid: See `rope_frequencies`.
    layout: Which features pair: neighbours, or one of each half.
  """
  angles = _angles(positions, rope_frequencies(x.shape[-1], base, grid), x.dtype)
  return _rotate(x, jnp.cos(angles), jnp.sin(angles), layout)


def apply_xpos(
  x: Float[Array, "B T N H"],
  positions: Int[Array, "#B T"],
  *,
  role: Literal["query", "key"],
  base: float | None = 10000.0,
  grid: Grid = "rope",
  layout: Layout = "interleaved",
  gamma: float = 0.4,
  scale_base: float = 512,
  center: int | Int[Array, "#B #T"] = 0,
) -> Float[Array, "B T N H"]:
  """Rotates as RoPE does, and scales so that the score of a pair decays with its distance.

  Scores depend on position differences alone, so a center common to queries and keys is exact; it
  keeps the scales within range, for a while: the largest is `((1 + gamma) / gamma) ** (distance to
  the center / scale_base)`. It must not move while scaled keys are cached. Without a limit, rotate
  by `apply_rope` and give `xpos_decay` to `ops.attention`.

  Args:
    x: Queries or keys.
    positions: Position of each token.
    role: A query is multiplied by the scale, a key divided by it.
    base: See `rope_frequencies`; `None` rotates nothing (table 4's decay without rotation).
    grid: See `rope_frequencies`.
    layout: See `apply_rope`.
    gamma: See `xpos_decay`.
    scale_base: See `xpos_decay`.
    center: Position of scale one; an array moves it along, tile by tile.
  """
  if role not in ("query", "key"):
    raise ValueError(f"{role=} must be 'query' or 'key'.")
  half = x.shape[-1] // 2
  frequencies = np.zeros(half) if base is None else rope_frequencies(x.shape[-1], base, grid)
  angles = _angles(positions, frequencies, x.dtype)
  rates = jnp.asarray(_xpos_rates(half, gamma, scale_base), angles.dtype)
  exponent = (positions - center)[..., None] * rates
  scale = jnp.exp(exponent if role == "query" else -exponent)
  return _rotate(x, jnp.cos(angles) * scale, jnp.sin(angles) * scale, layout)


def xpos_decay(
  head_dim: int, *, gamma: float = 0.4, scale_base: float = 512, layout: Layout = "interleaved"
) -> Float[np.ndarray, "H"]:
  """Log of what a token of distance leaves of each feature's share in a score, in float64.

  Args:
    head_dim: Features per head, even.
    gamma: Flattens the decay's dependence on frequency (eq. 9); the release has 0.4.
    scale_base: Tokens per unit of decay; infinite for RoPE. Half the training length.
    layout: See `apply_rope`.

  Raises:
    ValueError: `head_dim` is odd, or `scale_base` or `gamma` is not positive.
  """
  if head_dim % 2:
    raise ValueError(f"Features decay in pairs; {head_dim=} must be even.")
  rates = _xpos_rates(head_dim // 2, gamma, scale_base)
  return np.repeat(rates, 2) if layout == "interleaved" else np.tile(rates, 2)


def xpos_curve(
  length: int,
  head_dim: int,
  *,
  base: float = 10000.0,
  gamma: float = 0.4,
  scale_base: float = 512,
) -> Float[np.ndarray, "length"]:
  """`g(n)`, the expected score at distance `n` (eq. 8, figure 1), in float64.

  Args:
    length: Distances, from 0 on.
    head_dim: Features per head, even.
    base: See `rope_frequencies`.
    gamma: See `xpos_decay`.
    scale_base: See `xpos_decay`; infinite for RoPE's curve.
  """
  distance = np.arange(length)[:, None]
  decay = np.exp(distance * _xpos_rates(head_dim // 2, gamma, scale_base))
  return (np.cos(distance * rope_frequencies(head_dim, base)) * decay).sum(1)


def _xpos_rates(pairs: int, gamma: float, scale_base: float) -> np.ndarray:
  """`log(zeta) / scale_base` of each pair; the fastest rotation decays most."""
  if not (gamma > 0 and scale_base > 0):
    raise ValueError(f"{gamma=} and {scale_base=} of xPos must be positive.")
  return np.log((np.arange(pairs) / pairs + gamma) / (1 + gamma)) / scale_base


def document_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
  """Places within packed documents, counted from 0 where a row's segment id changes."""
  places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  opens = segment_ids[:, 1:] != segment_ids[:, :-1]
  starts = jnp.where(jnp.pad(opens, ((0, 0), (1, 0))), places, 0)
  return places - jax.lax.cummax(starts, axis=1)


def sinusoidal(positions: Int[Array, "#B T"], dim: int) -> Float[Array, "#B T {dim}"]:
  """Absolute embeddings (xPos eq. 12): cosines at even features, sines at odd ones."""
  angles = _angles(positions, rope_frequencies(dim), jnp.float32)
  return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1).reshape(*positions.shape, dim)


def alibi_slopes(num_heads: int) -> Float[Array, "N"]:
  """Slopes of ALiBi (https://arxiv.org/abs/2108.12409): `2^(-8 (h + 1) / N)`.

  A head count that is no power of two takes the slopes of the power below it, then every other one
  of the power above.
  """

  def powers(n):
    return 2.0 ** (-8 * np.arange(1, n + 1) / n)

  below = 1 << (num_heads.bit_length() - 1)
  slopes = np.concatenate([powers(below), powers(2 * below)[::2][: num_heads - below]])
  return jnp.asarray(slopes, jnp.float32)


def _angles(
  positions: Int[Array, "B T"], frequencies: np.ndarray, dtype: DTypeLike
) -> Float[Array, "B T pairs"]:
  """`positions * frequencies` modulo a turn, to float32's rounding at every position.

  A float32 product is off by 6e-5 radians at position 1000 and by 3e-2 at a million. Counting in
  2^-32 turns makes the integer product's overflow the modulus, which is exact: a shift of all
  positions leaves their differences alone.
  """
  dtype = jnp.promote_types(dtype, jnp.float32)
  turns = frequencies / (2 * np.pi)
  steps = np.round(turns * 2.0**32)
  rest = jnp.asarray((turns * 2.0**32 - steps) * 2.0**-32, dtype)
  wrapped = positions.astype(jnp.int32)[..., None] * steps.astype(np.uint32).view(np.int32)
  return 2 * np.pi * (wrapped.astype(dtype) * 2.0**-32 + positions[..., None] * rest)


def _rotate(
  x: Float[Array, "B T N H"],
  cos: Float[Array, "#B T pairs"],
  sin: Float[Array, "#B T pairs"],
  layout: Layout,
) -> Float[Array, "B T N H"]:
  if layout not in ("interleaved", "half"):
    raise ValueError(f"{layout=} must be 'interleaved' or 'half'.")
  # (a, b) -> (a cos - b sin, b cos + a sin): each feature times cos, and its partner times -+ sin.
  # Where features are swapped, and not stacked, all of it is one loop over x.
  pairs = (-1, 2) if layout == "interleaved" else (2, -1)
  axis = -1 if layout == "interleaved" else -2
  full = (*cos.shape[:2], 1, x.shape[-1])
  cos, sin = (jnp.stack(t, axis).reshape(full) for t in ((cos, cos), (-sin, sin)))
  partner = jnp.flip(x.reshape(*x.shape[:-1], *pairs), axis).reshape(x.shape)
  return (x * cos + partner * sin).astype(x.dtype)
