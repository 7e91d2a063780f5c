"""Block sizes of retention's kernels: what is valid, and what is chosen where nobody says."""

import dataclasses

from pallas_kernels.mosaic_gpu import MAX_SMEM_BYTES, WARPGROUP_ROWS, num_cores
from pallas_kernels.mosaic_tpu import LANES, chip, padded_bytes, vmem_limit_bytes

GPU_CHUNK = WARPGROUP_ROWS  # Tokens: the least that fills a matrix instruction, so the least work.

_RIDGE = 266  # Operations to a byte: 798 TFLOP/s over 3.0 TB/s, as measured of an H100.


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What block sizes are chosen from: `q` is `B T N H`, `k` is `B T K H`, `v` is `B T K V`."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  value_dim: int
  itemsize: int

  @property
  def groups(self) -> int:
    """Query heads that share a key head."""
    return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True)
class TpuTile:
  """What one grid step of a TPU kernel takes in.

  Attributes:
    chunk: Tokens, a multiple of 128 if there are more; of 16, the rows of a bfloat16 tile, else.
    heads: Query heads, whose independent products fill the schedule.
  """

  chunk: int
  heads: int

  def check(self, sizes: Sizes) -> None:
    """Raises a `ValueError` where the tile does not fit the sizes."""
    rows = 16 if sizes.length <= self.chunk else LANES
    if self.chunk < 1 or self.chunk % rows:
      raise ValueError(f"{self} needs a chunk that is a multiple of {rows} at {sizes.length=}.")
    if self.heads not in _even_shares(sizes):
      raise ValueError(
        f"{self} needs heads that divide {sizes.heads=}, and divide or hold {sizes.groups=}."
      )
    if self.vmem_bytes(sizes) > vmem_limit_bytes():
      raise ValueError(f"{self} takes {self.vmem_bytes(sizes)} bytes of {vmem_limit_bytes()}.")

  def vmem_bytes(self, sizes: Sizes) -> int:
    """At most, in any of the kernels: operands and results, twice each, and what lies between."""
    head_dim, value_dim = sizes.head_dim, sizes.value_dim
    state = padded_bytes((head_dim, value_dim), "float32")
    token = padded_bytes((self.chunk, head_dim), "float32")
    token += padded_bytes((self.chunk, value_dim), "float32")
    scores = padded_bytes((self.chunk, self.chunk), "float32")
    return self.heads * (5 * state + 2 * 4 * token * sizes.itemsize // 4 + 2 * token + 4 * scores)


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
  """Of the chunkwise TPU kernels.

  A gradient of the decay is least rough where both sweeps of the backward have one chunk.
  """

  fwd: TpuTile
  bwd_dq: TpuTile
  bwd_dkv: TpuTile

  @classmethod
  def for_sizes(cls, sizes: Sizes, chunk_size: int | None = None) -> "TpuBlocks":
    """Few enough tokens that work within a chunk stays small, heads enough to hide latencies.

    Raises:
      NotImplementedError: Not even one head's state fits.
    """
    chunk = _round_chunk(chunk_size or chip().mxu_column_size, sizes.length)

    tiles = [TpuTile(chunk, heads) for heads in _even_shares(sizes, _most_heads(sizes))]
    fitting = [tile for tile in tiles if tile.vmem_bytes(sizes) <= vmem_limit_bytes()]
    if not fitting:
      raise NotImplementedError(f"{tiles[0]} needs {tiles[0].vmem_bytes(sizes)} bytes at once.")
    return cls(*fitting[-1:] * 3)

  def check(self, sizes: Sizes) -> None:
    """Raises a `ValueError` where a tile does not fit the sizes."""
    for tile in (self.fwd, self.bwd_dq, self.bwd_dkv):
      tile.check(sizes)


def decode_heads(sizes: Sizes) -> int:
  """Heads per step of the TPU's decoding."""
  return max(_even_shares(sizes, _most_heads(sizes)))


def _most_heads(sizes: Sizes) -> int:
  """As many as have 2 MiB of states, at most eight: beyond, a step's start and end hardly show."""
  state = padded_bytes((sizes.head_dim, sizes.value_dim), "float32")
  return min(8, max(1, 2**21 // state))


def _round_chunk(chunk: int, length: int) -> int:
  whole = -(-length // 16) * 16
  return whole if chunk >= length else min(whole, -(-chunk // LANES) * LANES)


def _even_shares(sizes: Sizes, most: int | None = None) -> list[int]:
  """How many heads a step may have: each step as many, and whole groups or part of one."""
  counts = range(1, min(most or sizes.heads, sizes.heads) + 1)
  whole = lambda n: n % sizes.groups == 0 or sizes.groups % n == 0
  return [n for n in counts if sizes.heads % n == 0 and whole(n)]


@dataclasses.dataclass(frozen=True)
class GpuTile:
  """What one block of a chunkwise GPU kernel takes in.

  Attributes:
    rows: Of the state, that is columns of queries and keys.
    warpgroups: Each has 64 columns of the state in its registers.
    stages: Chunks in shared memory: the one at work, and those on their way.
  """

  rows: int
  warpgroups: int
  stages: int = 2

  def check(self, rows: int, columns: int) -> None:
    """Raises a `ValueError` where the tile does not fit a state of these sizes."""
    if self.rows not in (64, 128, 192, 256) or rows % self.rows:
      raise ValueError(f"{self} needs 64, 128, 192 or 256 rows that divide {rows=}.")
    # Two leave each thread the 255 registers that a state of 256 rows needs.
    if self.warpgroups not in (1, 2) or columns % (64 * self.warpgroups):
      raise ValueError(f"{self} needs one warpgroup, or two where 128 divides {columns=}.")
    if self.stages < 2:
      raise ValueError(f"{self} needs two stages: one is read while another is written.")
    if self.smem_bytes > MAX_SMEM_BYTES:
      raise ValueError(f"{self} takes {self.smem_bytes} bytes of {MAX_SMEM_BYTES}.")

  @property
  def smem_bytes(self) -> int:
    """Shared memory of a block."""
    square = 64 * 64 * 2
    stage = 2 * 64 * self.rows * 2 + self.warpgroups * square + 64 * 4
    return self.stages * (stage + 16) + self.warpgroups * 4 * square

  @classmethod
  def for_state(cls, heads: int, rows: int, columns: int) -> "GpuTile":
    """For as many states of these sizes."""
    tile_rows = max(x for x in (64, 128, 192, 256) if rows % x == 0)
    blocks = heads * (rows // tile_rows) * (columns // 128)
    # Where two warpgroups a block leave half of the card idle, they are better off apart.
    return cls(tile_rows, 1 if columns % 128 or 2 * blocks <= num_cores() else 2)


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
  """Of the chunkwise GPU kernel.

  Attributes:
    fwd: Of the outputs.
    bwd_dq: Of the queries' gradient.
    bwd_dk: Of the keys'.
    bwd_dv: Of the values'.
    segments: What a sequence is cut into, to run side by side.
  """

  fwd: GpuTile
  bwd_dq: GpuTile
  bwd_dk: GpuTile
  bwd_dv: GpuTile
  segments: int = 1

  @classmethod
  def for_sizes(cls, heads: int, length: int, head_dim: int, value_dim: int) -> "GpuBlocks":
    """What should take the least time; the state lies on its side where `q` or `k` is the result.

    Args:
      heads: Query heads of all rows.
      length: Tokens of a row.
      head_dim: Width of queries and keys.
      value_dim: Width of values.
    """
    segments = _segments(heads, length, head_dim, value_dim)
    upright = GpuTile.for_state(heads * segments, head_dim, value_dim)
    lying = GpuTile.for_state(heads * segments, value_dim, head_dim)
    return cls(upright, lying, lying, upright, segments)

  def check(self, head_dim: int, value_dim: int) -> None:
    """Raises a `ValueError` where a tile does not fit."""
    for tile in (self.fwd, self.bwd_dv):
      tile.check(head_dim, value_dim)
    for tile in (self.bwd_dq, self.bwd_dk):
      tile.check(value_dim, head_dim)
    if self.segments < 1:
      raise ValueError(f"{self} needs at least one segment.")


def _segments(heads: int, length: int, head_dim: int, value_dim: int) -> int:
  """The fewest of the least time, by the busiest core's operations and by all bytes."""
  state, share = head_dim * value_dim, heads / num_cores()

  def time(segments):  # In operations of a core, for each token of the sequence.
    states = heads * segments
    tile = GpuTile.for_state(states, head_dim, value_dim)
    blocks = states * (head_dim // tile.rows) * (value_dim // (64 * tile.warpgroups))
    of_warpgroup = 2 * GPU_CHUNK * tile.rows + 64 * (2 * GPU_CHUNK + 4 * tile.rows)
    operations = -(-blocks // num_cores()) * tile.warpgroups * of_warpgroup / segments
    kernel = max(operations, share * _RIDGE * 2 * (2 * head_dim + 2 * value_dim))
    if segments == 1:
      return kernel
    # Keys are scaled, and read again beside the values; each state is moved four times, in float32.
    cut = max(2 * state, _RIDGE * 2 * (3 * head_dim + value_dim))
    cut *= (segments - 1) / segments  # What leaves the last segment enters none.
    return kernel + share * (cut + _RIDGE * 4 * 4 * state * segments / length)

  return min((2**i for i in range(9) if 2**i * GPU_CHUNK <= max(length, GPU_CHUNK)), key=time)
