"""How the TPU kernels go over tiles of queries and of keys, and what those see of each other."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Int

from pallas_kernels import mosaic_tpu, tpu_layout
from pallas_kernels.diff_attention.blocks import TpuTile
from pallas_kernels.diff_attention.reference import Options
from pallas_kernels.mosaic_tpu import PARALLEL, SEQUENTIAL, SUBLANES

LN2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class Call:
  """What is known of a call when it is traced.

  Attributes:
    options: Its options.
    batch: Rows.
    length: Queries.
    kv_length: Keys.
    heads: Query heads.
    kv_heads: Key heads.
    head_dim: `H`.
    value_dim: `V`.
    shared_keys: Whether both maps have the same keys.
    padded: Whether rows have lengths of their own.
    documents: Whether tokens have ids.
  """

  options: Options
  batch: int
  length: int
  kv_length: int
  heads: int
  kv_heads: int
  head_dim: int
  value_dim: int
  shared_keys: bool
  padded: bool
  documents: bool

  @property
  def key_dim(self) -> int:
    """Of a key head, all of its maps side by side."""
    return self.head_dim if self.shared_keys else 2 * self.head_dim


@dataclasses.dataclass(frozen=True)
class Walk:
  """A kernel's way over the pairs of tiles of a call.

  Attributes:
    call: The call.
    tile: Queries and keys of a step.
    by_keys: Whether a tile of keys meets all its queries before the next does, or a tile of queries
      all its keys.
  """

  call: Call
  tile: TpuTile
  by_keys: bool = False

  @property
  def q_tiles(self) -> int:
    return pl.cdiv(self.call.length, self.tile.queries)

  @property
  def kv_tiles(self) -> int:
    return pl.cdiv(self.call.kv_length, self.tile.keys)

  @property
  def limited(self) -> bool:
    """Whether a tile of keys may hold some that are not there."""
    return self.call.padded or self.call.kv_length % self.tile.keys != 0

  def pairs(self) -> list[tuple[int, int, bool, bool]]:
    """Of tiles of queries and keys that may see each other; is each its group's first, its last?

    A tile that sees none has one pair, which writes its zeros.
    """
    outer, inner = (self.q_tiles, self.kv_tiles)[:: -1 if self.by_keys else 1]
    pairs = []
    for x in range(outer):
      order = [(y, x) if self.by_keys else (x, y) for y in range(inner)]
      group = [pair for pair in order if self._may_see(*pair)] or order[:1]
      pairs += [(*pair, pair == group[0], pair == group[-1]) for pair in group]
    return pairs

  def _may_see(self, q_tile: int, kv_tile: int) -> bool:
    options = self.call.options
    if not options.causal or options.q_offset is None:
      return True
    first = options.q_offset + q_tile * self.tile.queries
    some, _ = self._sees(first, kv_tile * self.tile.keys, self.call.kv_length)
    return bool(some)

  def _sees(self, first: Any, kv_first: Any, limit: Any) -> tuple[Any, Any]:
    """Whether queries from position `first` on see some, and all, keys from `kv_first` on."""
    options, tile = self.call.options, self.tile
    last, kv_last = first + tile.queries - 1, kv_first + tile.keys - 1
    some, every = (kv_first < limit, kv_last < limit) if self.limited else (True, True)
    if options.causal:
      some, every = some & (kv_first <= last), every & (kv_last <= first)
      if options.window is not None:
        some = some & (first - kv_last < options.window)
        every = every & (last - kv_first < options.window)
    return some, every

  def tables(self) -> list[Array]:
    """What index maps and kernels read of `pairs`: either tile, and both flags in one."""
    q_tiles, kv_tiles, first, last = np.array(self.pairs(), np.int32).T
    return [jnp.asarray(x) for x in (q_tiles, kv_tiles, first + 2 * last)]

  # Index maps take (row, head, step) and the scalars: `tables`, offsets and limits.

  def queries(self, dim: int) -> pl.BlockSpec:
    """Of `heads_of` the queries and what is laid out as they are."""
    tile = lambda b, s, q_tiles, *_: q_tiles[s]
    return self._tokens(dim, self.tile.queries, 1, tile)

  def all_queries(self, dim: int) -> pl.BlockSpec:
    """The same, all tokens of a head at once."""
    length = self.q_tiles * self.tile.queries
    return self._tokens(dim, length, 1, lambda *_: 0)

  def keys(self, dim: int, *, shared: bool = True) -> pl.BlockSpec:
    """Of `heads_of` keys or values, per key head or (unshared) per query head."""
    group = self.call.heads // self.call.kv_heads if shared else 1
    return self._tokens(dim, self.tile.keys, group, self._kv_tile)

  def _kv_tile(self, b, s, q_tiles, kv_tiles, flags, offsets, limits):
    """Where a row sees less than the tables say, the last tile that it sees: not read again."""
    options, tile = self.call.options, kv_tiles[s]
    if self.by_keys:
      return tile
    if options.causal and options.q_offset is None:
      end = offsets[b] + (q_tiles[s] + 1) * self.tile.queries
      tile = jnp.minimum(tile, jnp.maximum(end - 1, 0) // self.tile.keys)
    if self.call.padded:
      tile = jnp.minimum(tile, jnp.maximum(limits[b] - 1, 0) // self.tile.keys)
    return tile

  def _tokens(self, dim: int, count: int, group: int, tile: Callable[..., Any]) -> pl.BlockSpec:
    place = lambda b, n, s, *tables: (b, tile(b, s, *tables), n // group)
    return tpu_layout.blocks(dim, count, place)

  def rows(self, count: int) -> pl.BlockSpec:
    """Of `B N count T`: numbers of a query, whose tokens fill the lanes."""
    index = lambda b, n, s, q_tiles, *_: (b, n, 0, q_tiles[s])
    return pl.BlockSpec((None, None, count, self.tile.queries), index)

  def ids(self) -> pl.BlockSpec:
    """Of `B 1 T`."""
    index = lambda b, n, s, q_tiles, *_: (b, 0, q_tiles[s])
    return pl.BlockSpec((None, 1, self.tile.queries), index)

  def kv_ids(self) -> pl.BlockSpec:
    """Of `B 1 S`."""
    index = lambda b, n, s, *tables: (b, 0, self._kv_tile(b, s, *tables))
    return pl.BlockSpec((None, 1, self.tile.keys), index)

  def whole(self, *shape: int) -> pl.BlockSpec:
    """Of an array that all steps read."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def refuse_unless_served(q: Array, k: Array, v: Array) -> None:
  """Raises `NotImplementedError` where the kernels have nothing to do, or nothing to do it with."""
  if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(
      f"The matrix unit multiplies bfloat16, or float32 in passes, all of one: {q.dtype=} "
      f"{k.dtype=} {v.dtype=}."
    )
  if 0 in (*q.shape, *v.shape):
    raise NotImplementedError(f"No tile to visit in {q.shape=} {v.shape=}.")


def heads_of(x: Array, dim: int, multiple: int) -> Array:
  """`B T N ...` as kernels read it: a head's maps as one of `dim`, in whole tiles of tokens."""
  return tpu_layout.side_by_side(pad_length(x.reshape(*x.shape[:3], dim), multiple))


def pad_length(x: Array, multiple: int, axis: int = 1) -> Array:
  """Zeros up to whole tiles."""
  short = -x.shape[axis] % multiple
  return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)]) if short else x


@dataclasses.dataclass(frozen=True)
class Step:
  """A kernel's place on its walk.

  Attributes:
    walk: The walk.
    q_tile: Tile of queries.
    kv_tile: Tile of keys.
    first: Whether this is the first pair of its group.
    last: Whether it is the last.
    some: Whether any query may see any key.
    every: Whether every query sees every key, ids aside.
    distance: Position of the first query less that of the first key.
    limit: Keys of this tile that are there.
  """

  walk: Walk
  q_tile: Int[Array, ""]
  kv_tile: Int[Array, ""]
  first: Bool[Array, ""]
  last: Bool[Array, ""]
  some: Bool[Array, ""] | bool
  every: Bool[Array, ""] | bool
  distance: Int[Array, ""]
  limit: Int[Array, ""]

  @classmethod
  def at(cls, walk, q_tiles, kv_tiles, flags, offsets, limits) -> "Step":
    """Reads the scalars at the grid's step."""
    b, s = pl.program_id(0), pl.program_id(2)
    q_tile, kv_tile, flag = q_tiles[s], kv_tiles[s], flags[s]
    first, kv_first = offsets[b] + q_tile * walk.tile.queries, kv_tile * walk.tile.keys
    some, every = walk._sees(first, kv_first, limits[b])
    return cls(
      walk,
      *(q_tile, kv_tile, flag % 2 == 1, flag >= 2),
      *(some, every, first - kv_first, limits[b] - kv_first),
    )

  def run(self, visit: Callable[[Callable[..., Any] | None], None], ids: Any, kv_ids: Any) -> None:
    """Visits the pair with what masks its scores, or with `None` where nothing needs to."""
    if ids is not None:
      pl.when(self.some)(lambda: visit(self._mask(ids, kv_ids)))
    elif self.every is True:  # Whatever the step: no second copy of the code.
      visit(None)
    else:
      pl.when(self.every)(lambda: visit(None))
      pl.when(self.some & ~self.every)(lambda: visit(self._mask(None, None)))

  def _mask(self, ids, kv_ids):
    options, walk = self.walk.call.options, self.walk

    def mask(start: int, count: int, *, q_axis: int) -> Bool[Array, "..."]:
      """Which of `count` keys from `start` on the queries see; those lie along `q_axis`."""
      shape = (walk.tile.queries, count)[:: 1 if q_axis == 0 else -1]
      q_index = jax.lax.broadcasted_iota(jnp.int32, shape, q_axis)
      kv_index = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
      seen = None

      def also(condition):
        nonlocal seen
        seen = condition if seen is None else seen & condition

      if options.causal:
        gap = kv_index - q_index
        also(gap <= self.distance - start)
        if options.window is not None:
          also(gap > self.distance - start - options.window)
      if walk.limited:
        also(kv_index < self.limit - start)
      if ids is not None:
        rows = [ids[...], kv_ids[:, start : start + count]]
        rows[q_axis] = column(rows[q_axis])
        also(rows[0] == rows[1])
      return seen

    return mask


def column(row: Array) -> Array:
  """`[1, n]` as `[n, 1]`."""
  return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def maps(x: Array, head_dim: int) -> list[Array]:
  """Those of a head's queries or keys; shared keys serve both."""
  return [x, x] if x.shape[1] == head_dim else [x[:, :head_dim], x[:, head_dim:]]


def run(
  walk: Walk,
  kernel: Callable[..., None],
  name: str,
  inputs: dict[str, tuple[Array, pl.BlockSpec]],
  outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
  scratch: dict[str, Any],
  bounds: dict[str, Array],
  flops: int,
) -> dict[str, Array]:
  """Calls a kernel over a walk, whose references have the operands' names.

  Args:
    walk: Of the kernel.
    kernel: Function of the step, and of references by name.
    name: As the compiled program shows it.
    inputs: Operands and their blocks.
    outputs: Results and their blocks.
    scratch: Memories.
    bounds: `offset` and `limit` per row, and the ids if tokens have any.
    flops: Of a pair of one query and one key.
  """
  call, tile = walk.call, walk.tile
  scalars = [*walk.tables(), bounds["offset"], bounds["limit"]]
  if call.documents:
    ids, kv_ids = bounds["ids"][:, None], bounds["kv_ids"][:, None]
    inputs = inputs | {
      "ids": (pad_length(ids, tile.queries, 2), walk.ids()),
      "kv_ids": (pad_length(kv_ids, tile.keys, 2), walk.kv_ids()),
    }
  names = (*inputs, *outputs, *scratch)
  steps = len(walk.pairs())
  pairs = call.batch * call.heads * steps * tile.queries * tile.keys
  args = [*scalars, *(x for x, _ in inputs.values())]
  out_shape = [x for x, _ in outputs.values()]

  def body(*refs):
    count = len(scalars)
    refs_by_name = dict(zip(names, refs[count:], strict=True))
    kernel(Step.at(walk, *refs[:count]), **refs_by_name)

  out = mosaic_tpu.call(
    body,
    *args,
    name=name,
    out_shape=out_shape,
    grid=(call.batch, call.heads, steps),
    in_specs=[spec for _, spec in inputs.values()],
    out_specs=[spec for _, spec in outputs.values()],
    semantics=(PARALLEL, PARALLEL, SEQUENTIAL),
    cost=mosaic_tpu.cost_estimate(args, out_shape, flops=flops * pairs, transcendentals=2 * pairs),
    scratch_shapes=list(scratch.values()),
    num_scalar_prefetch=len(scalars),
  )
  return dict(zip(outputs, out, strict=True))
