"""Block sizes of the kernels, by chip."""

import dataclasses

from pallas_kernels.mosaic_tpu import LANES, padded_bytes, vmem_limit_bytes


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
  """Tiles of the Mosaic GPU kernels, whose warpgroups each hold 64 rows.

  Attributes:
    fwd_keys: Keys of a tile of the forward.
    fwd_stages: Tiles of keys and values in flight there.
    dq_keys: Keys of a tile of the queries' gradient.
    dq_stages: Tiles in flight there.
    dkv_queries: Queries of a tile of the keys' and values' gradient.
    dkv_stages: Tiles in flight there.
  """

  fwd_keys: int = 64
  fwd_stages: int = 2
  dq_keys: int = 64
  dq_stages: int = 1
  dkv_queries: int = 64
  dkv_stages: int = 2

  def __post_init__(self):
    for name in ("fwd_keys", "dq_keys", "dkv_queries"):
      if getattr(self, name) not in (64, 128):
        raise ValueError(f"{name}={getattr(self, name)} must be 64 or 128.")
    for name in ("fwd_stages", "dq_stages", "dkv_stages"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

  @classmethod
  def for_shapes(cls, head_dim: int, value_dim: int) -> "GpuBlocks":
    """For a head and value size; README.md has the registers and shared memory behind it."""
    return cls(
      fwd_keys=64 if head_dim + value_dim > 192 else 128,
      dq_stages=1 if head_dim + value_dim > 256 else 2,
    )


@dataclasses.dataclass(frozen=True)
class TpuTile:
  """What one grid step of a TPU kernel takes in, of one head.

  Attributes:
    queries: Tokens, a multiple of 128; or of 16, the rows of a bfloat16 tile, if that is all.
    keys: The same.
    compute: Keys whose scores are held at once, which divides `keys`.
  """

  queries: int
  keys: int
  compute: int

  def __post_init__(self):
    if self.queries < 1 or self.keys < 1 or self.keys % max(1, self.compute):
      raise ValueError(f"{self} needs compute that divides keys.")

  def check(self, length: int, kv_length: int) -> None:
    """Raises a `ValueError` where the tile is none of the chip's."""
    for name, size, whole in (("queries", self.queries, length), ("keys", self.keys, kv_length)):
      rows = 16 if whole <= size else LANES
      if size % rows:
        raise ValueError(f"{self} needs {name} that are a multiple of {rows} of {whole}.")
    if self.compute != self.keys and self.compute % LANES:
      raise ValueError(f"{self} needs compute that is a multiple of {LANES}, or all of keys.")


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
  """Of the TPU kernels.

  Attributes:
    fwd: Of the forward.
    bwd: Of the backward in one kernel, which holds a head's gradient of all queries; `None` for
      two kernels.
    bwd_dq: Of the queries' gradient on its own.
    bwd_dkv: Of the keys' and values' gradient on its own.
  """

  fwd: TpuTile
  bwd: TpuTile | None
  bwd_dq: TpuTile
  bwd_dkv: TpuTile

  @classmethod
  def for_sizes(cls, length: int, kv_length: int, head_dim: int, value_dim: int) -> "TpuBlocks":
    """Large tiles, since each is read once per pair; README.md has the measurements."""

    def tile(most: int, compute: int) -> TpuTile:
      keys = _tokens(kv_length, most)
      return TpuTile(_tokens(length, most), keys, compute if keys % compute == 0 else keys)

    fwd, bwd = tile(1024, 512), tile(1024, 512)
    # The sums in float32 and, twice, what is written of them; the rest takes about as much.
    resident = padded_bytes((length, 2 * head_dim), "float32") * 2
    fits = resident <= vmem_limit_bytes() // 2
    return cls(fwd=fwd, bwd=bwd if fits else None, bwd_dq=bwd, bwd_dkv=bwd)

  def check(self, length: int, kv_length: int) -> None:
    """Raises a `ValueError` where a tile is none of the chip's."""
    for tile in (self.fwd, self.bwd, self.bwd_dq, self.bwd_dkv):
      if tile is not None:
        tile.check(length, kv_length)


def _tokens(length: int, most: int) -> int:
  """As few whole tiles of at most `most` tokens as take in all, and those as small as may be."""
  if length <= most:
    return -(-length // 16) * 16
  tiles = -(-length // most)
  return -(-length // (tiles * LANES)) * LANES
