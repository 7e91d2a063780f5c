"""Position schemes as configuration: what a mixer does to queries, keys and scores.

Schemes that act on embeddings (`sinusoidal`, `learned`) live in `layers.embedding`.
"""

import dataclasses

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
    base: Wave length base of the rotation.
    grid: `rope` (end point excluded) or `linspace` (included, as RetNet's release has it).
    layout: Which features form a pair: `interleaved` (2i, 2i+1) or `half` (i, i + H/2).
    gamma: xPos: offset of the decay's exponent base.
    scale_base: xPos: tokens over which the base is applied once; half the training length.
    center: xPos: position at which queries and keys are not scaled. It must not move while rotated
      keys are cached.
  """

  kind: str = "rope"
  base: float = 10_000.0
  grid: str = "rope"
  layout: str = "interleaved"
  gamma: float = 0.4
  scale_base: float = 512.0
  center: int = 0

  def __post_init__(self):
    if self.kind not in MIXER_SCHEMES:
      raise ValueError(f"unknown position scheme {self.kind!r}; choose one of {MIXER_SCHEMES}")
    if self.grid not in GRIDS or self.layout not in LAYOUTS:
      raise ValueError(f"{self.grid=} must be one of {GRIDS}, and {self.layout=} of {LAYOUTS}")

  def rotate(
    self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], positions: Int[Array, "#B T"]
  ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Queries and keys with their positions in them; unchanged by `none` and `alibi`."""
    if self.kind == "rope":
      options = dict(base=self.base, grid=self.grid, layout=self.layout)
      return tuple(ops.apply_rope(x, positions, **options) for x in (q, k))
    if self.kind == "xpos":
      options = dict(
        base=self.base,
        layout=self.layout,
        gamma=self.gamma,
        scale_base=self.scale_base,
        center=self.center,
      )
      return (
        ops.apply_xpos(q, positions, role="query", **options),
        ops.apply_xpos(k, positions, role="key", **options),
      )
    return q, k
