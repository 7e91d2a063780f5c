"""Position schemes as configuration: what a mixer does to queries, keys and scores.

Schemes that act on embeddings (`sinusoidal`, `learned`) live in `layers.embedding`.
"""

import dataclasses
from typing import Literal

import numpy as np

from latentlab import ops
from latentlab.typing import Array, Float, Int

MIXER_SCHEMES = ("none", "rope", "xpos", "alibi")
EMBEDDING_SCHEMES = ("none", "sinusoidal", "learned")
GRIDS = ("rope", "linspace")
LAYOUTS = ("interleaved", "half")


def split_scheme(positions: str) -> tuple[str, str]:
  """A scheme as `(of the embedding, of the mixer)`, one of which is `none`.

  Raises:
    ValueError: it is neither's.
  """
  if positions in EMBEDDING_SCHEMES:
    return positions, "none"
  if positions in MIXER_SCHEMES:
    return "none", positions
  choices = sorted({*EMBEDDING_SCHEMES, *MIXER_SCHEMES})
  raise ValueError(f"unknown {positions=}; choose one of {choices}")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
  """How a mixer is told where its tokens are.

  Attributes:
    kind: One of `MIXER_SCHEMES`.
    base: Wave length base of the rotation; xPos with `None` decays without one.
    grid: `rope` (end point excluded) or `linspace` (included, as RetNet's release has it).
    layout: Which features form a pair: `interleaved` (2i, 2i+1) or `half` (i, i + H/2).
    gamma: xPos: offset of the decay's exponent base.
    scale_base: xPos: tokens over which the base is applied once; half the training length.
    center: xPos: `tile` scales queries and keys where scores are computed, about the middle of a
      tile of queries, and overflows at no length. A number is the position about which they are
      scaled at once, as the paper does; float16 then bears `17.7 scale_base` tokens around it,
      others 141.6.
  """

  kind: str = "rope"
  base: float | None = 10_000.0
  grid: str = "rope"
  layout: str = "interleaved"
  gamma: float = 0.4
  scale_base: float = 512.0
  center: int | Literal["tile"] = "tile"

  def __post_init__(self):
    if self.kind not in MIXER_SCHEMES:
      raise ValueError(f"unknown position scheme {self.kind!r}; choose one of {MIXER_SCHEMES}")
    if self.grid not in GRIDS or self.layout not in LAYOUTS:
      raise ValueError(f"{self.grid=} must be one of {GRIDS}, and {self.layout=} of {LAYOUTS}")
    if self.base is None and self.kind != "xpos":
      raise ValueError(f"base=None rotates nothing, which only xpos outlives, not {self.kind!r}")
    if self.center != "tile" and not isinstance(self.center, int):
      raise ValueError(f"center={self.center!r} of xpos must be 'tile' or a position")

  def decay(self, head_dim: int) -> Float[np.ndarray, "H"] | None:
    """What `ops.attention` has to know of the scheme; `None` if `rotate` does all of it."""
    if self.kind != "xpos" or self.center != "tile":
      return None
    options = dict(gamma=self.gamma, scale_base=self.scale_base, layout=self.layout)
    return ops.xpos_decay(head_dim, **options)

  def rotate(
    self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], positions: Int[Array, "#B T"]
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Queries and keys with their positions in them, `decay` aside; not for `none` and `alibi`."""
    return self.rotate_queries(q, positions), self.rotate_keys(k, positions)

  def rotate_queries(
    self, q: Float[Array, "B T N H"], positions: Int[Array, "#B T"]
  ) -> Float[Array, "B T N H"]:
    """The queries' part of `rotate`."""
    return self._rotate(q, positions, "query")

  def rotate_keys(
    self, k: Float[Array, "B T K H"], positions: Int[Array, "#B T"]
  ) -> Float[Array, "B T K H"]:
    """The keys' part of `rotate`."""
    return self._rotate(k, positions, "key")

  def _rotate(self, x, positions, role: str):
    rotation = dict(base=self.base, grid=self.grid, layout=self.layout)
    if self.kind == "xpos" and self.center != "tile":
      scale = dict(gamma=self.gamma, scale_base=self.scale_base, center=self.center)
      return ops.apply_xpos(x, positions, role=role, **rotation, **scale)
    if self.kind in ("rope", "xpos") and self.base is not None:
      return ops.apply_rope(x, positions, **rotation)
    return x
