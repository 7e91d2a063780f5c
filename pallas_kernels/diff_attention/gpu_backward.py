"""The backward kernels on Hopper: one for the queries' gradient, one for the keys' and values'.

With the row terms made before (`row_terms`), both maps have one form: of a tile `G = dO V^T`, which
they share, `dS_m = P_m (a_m G - b_m)` with `a = (1, -lam)`. Both kernels form `P` and `G` anew: a
single one would add the queries' gradient up in memory, 64 KiB of it for a tile of 64 x 64 at
`H = 128`, which takes longer than forming `P` and `G` twice, and adds in no fixed order.
"""

import functools
import types

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Float

from pallas_kernels import mosaic_gpu
from pallas_kernels.diff_attention import gpu_tiles as tiles
from pallas_kernels.diff_attention.blocks import GpuBlocks
from pallas_kernels.diff_attention.reference import Options, Visibility
from pallas_kernels.mosaic_gpu import LOG2E, WARPGROUP_ROWS, plgpu

_ROWS = WARPGROUP_ROWS
_ROW_TERMS = 5  # Of a query: two log-sum-exps, two b_m, lam.


def row_terms(
  lse: Float[Array, "B N 2 padded"],
  d_lse: Float[Array, "B T N 2"],
  lam: Float[Array, "B T N"],
  deltas: Float[Array, "B T N 2"],
) -> Float[Array, "B N 5 padded"]:
  """What the kernels need of each query.

  Args:
    lse: Of both maps, as the forward leaves them.
    d_lse: Their gradient.
    lam: Per token.
    deltas: `sum_j P_mj G_j` of each map.
  """
  weights = jnp.stack([jnp.ones_like(lam), -lam], axis=-1)
  b = tiles.per_token(weights * deltas - d_lse)
  # A query that sees no key, or is none, has scores above which its weights vanish.
  past = jnp.arange(lse.shape[-1]) >= lam.shape[1]
  lse = jnp.where((lse == -jnp.inf) | past, jnp.inf, lse * LOG2E)
  return jnp.concatenate([lse, b, tiles.per_token(lam)[:, :, None]], axis=2)


def backward_dq(
  options: Options,
  blocks: GpuBlocks,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  d_out: Float[Array, "B T N V"],
  terms: Float[Array, "B N 5 padded"],
  visibility: Visibility,
) -> Float[Array, "B T N 2 H"]:
  """`dQ_m = scale dS_m K_m`: a block's two warpgroups hold 64 queries each, and both maps of them.

  Args:
    options: Of the call.
    blocks: Tile sizes.
    q: See `api.diff_attention`.
    k: See there; zero where padded.
    v: See there; zero where padded.
    d_out: Gradient of the difference.
    terms: See `row_terms`.
    visibility: Of the call.
  """
  (batch, length, heads, _, dim), (kv_length, kv_heads, value_dim) = q.shape, v.shape[1:]
  shared_k, group, dtype = k.ndim == 4, heads // kv_heads, v.dtype
  tile, stages = blocks.dq_keys, blocks.dq_stages
  queries = tiles.ceil_div(length, 2 * _ROWS)
  documents = visibility.segment_ids is not None
  operands = dict(
    q=tiles.flat(q),
    k=tiles.flat(k),
    v=tiles.flat(v),
    d_out=tiles.flat(d_out),
    terms=terms,
    tiles=tiles.key_tiles(options, visibility, (batch, length, kv_length), 2 * _ROWS, tile),
    **tiles.mask_operands(visibility),
  )
  given = {name: x for name, x in operands.items() if x is not None}

  def kernel(
    *refs,
    q_s,
    d_out_s,
    terms_s,
    k_s,
    v_s,
    ids_s,
    d_scores_s,
    rows_ready,
    k_ready,
    v_ready,
    free,
  ):
    refs = dict(zip((*given, "d_q"), refs, strict=True))
    refs = types.SimpleNamespace(**dict.fromkeys(operands) | refs)
    row, head = lax.axis_index("row"), lax.axis_index("head")
    block = queries - 1 - lax.axis_index("block")  # The longest first.
    w = lax.axis_index("warpgroup")
    kv_head, query = lax.div(head, jnp.int32(group)), (2 * block + w) * _ROWS
    bounds = tuple(refs.tiles[row, block, jnp.int32(x)] for x in range(4))
    first, *_, end = bounds
    hide = tiles.hiding(options, refs, row, kv_length)

    def slot(step):
      return lax.rem(step - first, jnp.int32(stages))

    def fetch_keys(m, step):
      keys, at = pl.ds(step * tile, tile), slot(step)
      columns = pl.ds((kv_head if shared_k else 2 * kv_head + m) * dim, dim)
      plgpu.copy_gmem_to_smem(refs.k.at[row, keys, columns], k_s.at[m, at], k_ready.at[m, at])
      if documents:
        plgpu.copy_gmem_to_smem(refs.kv_ids.at[row, keys], ids_s.at[m, at], k_ready.at[m, at])

    def fetch_values(step):
      keys, at = pl.ds(step * tile, tile), slot(step)
      columns = pl.ds(kv_head * value_dim, value_dim)
      plgpu.copy_gmem_to_smem(refs.v.at[row, keys, columns], v_s.at[at], v_ready.at[at])

    fetches = [functools.partial(fetch_keys, 0), functools.partial(fetch_keys, 1), fetch_values]

    def release(x, step):
      """The second warpgroup trails the first, and refills what both have read."""
      pl.when(w == 0)(lambda: plgpu.barrier_arrive(free.at[x, slot(step)]))

      @pl.when(w == 1)
      def _():
        plgpu.barrier_wait(free.at[x, slot(step)])
        pl.when(step + stages < end)(lambda: fetches[x](step + stages))

    at_rows = pl.ds(query, _ROWS)
    for m in range(2):
      columns = pl.ds((2 * head + m) * dim, dim)
      plgpu.copy_gmem_to_smem(refs.q.at[row, at_rows, columns], q_s.at[w, m], rows_ready.at[w])
    columns = pl.ds(head * value_dim, value_dim)
    plgpu.copy_gmem_to_smem(refs.d_out.at[row, at_rows, columns], d_out_s.at[w], rows_ready.at[w])
    for step in (first + i for i in range(stages)):

      @pl.when((w == 1) & (step < end))
      def _(step=step):
        for fetch in (fetches[2], fetches[0], fetches[1]):
          fetch(step)

    source = refs.terms.at[row, head, pl.ds(0, _ROW_TERMS), at_rows]
    plgpu.copy_gmem_to_smem(source, terms_s.at[w], rows_ready.at[w])
    ids = tiles.load_vector(refs.ids.at[row, at_rows], 0) if documents else None
    plgpu.barrier_wait(rows_ready.at[w])

    def step(masked, step, accs):
      mine, at = w + tiles.opaque_zero(step), slot(step)
      if stages == 1:
        at += tiles.opaque_zero(step)
      plgpu.barrier_wait(v_ready.at[at])
      g = mosaic_gpu.matmul(d_out_s.at[mine], v_s.at[at].transpose((1, 0)))
      release(2, step)
      accs = list(accs)
      for m in range(2):
        plgpu.barrier_wait(k_ready.at[m, at])
        scores = mosaic_gpu.matmul(q_s.at[mine, m], k_s.at[m, at].transpose((1, 0)))
        if masked:
          pair = (ids, tiles.load_vector(ids_s.at[m, at], 1)) if documents else None
          scores = hide(scores, query, step * tile, pair)
        lse, b, lam = (tiles.load_vector(terms_s.at[mine, x], 0) for x in (m, 2 + m, 4))
        lse = tiles.spread(lse, scores.shape)
        weights = jnp.exp2(scores * (options.scale * LOG2E) - lse)
        d_scores_s[mine] = _d_scores(weights, g, m, b, lam, axis=0).astype(dtype)
        plgpu.commit_smem()
        accs[m] = mosaic_gpu.mma(accs[m], d_scores_s.at[mine], k_s.at[m, at])
        release(m, step)
      return tuple(accs)

    d_qs = tiles.sweep(
      step,
      (tiles.constant(0, (_ROWS, dim)),) * 2,
      bounds,
      head=options.window is not None,
      tail=options.causal or visibility.lengths is not None or kv_length % tile != 0,
      documents=documents,
    )
    for m, d_q in enumerate(d_qs):
      q_s[w, m] = (d_q * options.scale).astype(dtype)
      plgpu.commit_smem()
      columns = pl.ds((2 * head + m) * dim, dim)
      plgpu.copy_smem_to_gmem(q_s.at[w, m], refs.d_q.at[row, at_rows, columns])
    plgpu.wait_smem_to_gmem(0)

  smem, barrier = tiles.smem(dim), plgpu.Barrier
  pairs = length * kv_length // (2 if options.causal else 1)
  (d_q,) = mosaic_gpu.call(
    kernel,
    *given.values(),
    name="diff_attention_bwd_dq",
    out_shape=[jax.ShapeDtypeStruct(operands["q"].shape, dtype)],
    grid=dict(row=batch, head=heads, block=queries),
    num_warpgroups=2,
    scratch=dict(
      q_s=smem((2, 2, _ROWS, dim), dtype),
      d_out_s=smem((2, _ROWS, value_dim), dtype),
      terms_s=plgpu.SMEM((2, _ROW_TERMS, _ROWS), jnp.float32),
      k_s=smem((2, stages, tile, dim), dtype),
      v_s=smem((stages, tile, value_dim), dtype),
      ids_s=plgpu.SMEM((2, stages, tile), jnp.int32),
      d_scores_s=smem((2, _ROWS, tile), dtype),
      rows_ready=barrier(num_barriers=2, num_arrivals=4),
      k_ready=barrier(num_barriers=(2, stages), num_arrivals=2 if documents else 1),
      v_ready=barrier(num_barriers=stages),
      free=barrier(num_barriers=(3, stages)),
    ),
    flops=batch * heads * pairs * (8 * dim + 2 * value_dim),
    transcendentals=batch * heads * pairs * 2,
    approx_math=True,
  )
  return d_q[:, :length].reshape(q.shape)


def backward_dkv(
  options: Options,
  blocks: GpuBlocks,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  d_out: Float[Array, "B T N V"],
  terms: Float[Array, "B N 5 padded"],
  visibility: Visibility,
) -> tuple[Float[Array, "B S K ..."], Float[Array, "B S K V"]]:
  """`dV = (P_1 - lam P_2)^T dO` in one warpgroup, `dK_m = scale dS_m^T Q_m` in the other.

  Both hold the same 64 keys, tiles lie keys by queries, and the query heads that share a key head
  follow one another. The first forms the weights and hands them over, rounded; the second forms `G`
  and puts `dS` in their place. Each does half of the products.

  Args:
    options: Of the call.
    blocks: Tile sizes.
    q: See `api.diff_attention`.
    k: See there; zero where padded.
    v: See there; zero where padded.
    d_out: Gradient of the difference.
    terms: See `row_terms`.
    visibility: Of the call.
  """
  (batch, length, heads, _, dim), (kv_length, kv_heads, value_dim) = q.shape, v.shape[1:]
  maps, group, dtype = 1 if k.ndim == 4 else 2, heads // kv_heads, v.dtype
  tile, stages = blocks.dkv_queries, blocks.dkv_stages
  documents = visibility.segment_ids is not None
  operands = dict(
    q=tiles.flat(q),
    k=tiles.flat(k),
    v=tiles.flat(v),
    d_out=tiles.flat(d_out),
    terms=terms,
    tiles=tiles.query_tiles(options, visibility, (batch, length, kv_length), _ROWS, tile),
    **tiles.mask_operands(visibility),
  )
  given = {name: x for name, x in operands.items() if x is not None}

  def kernel(
    *refs,
    k_s,
    v_s,
    q_s,
    d_out_s,
    terms_s,
    ids_s,
    maps_s,
    keys_ready,
    q_ready,
    d_out_ready,
    free,
    map_ready,
    map_free,
  ):
    refs = dict(zip((*given, "d_k", "d_v"), refs, strict=True))
    refs = types.SimpleNamespace(**dict.fromkeys(operands) | refs)
    row, kv_head, block = (lax.axis_index(x) for x in ("row", "head", "block"))
    w = lax.axis_index("warpgroup")
    key = block * _ROWS
    at_keys = pl.ds(key, _ROWS)
    bounds = tuple(refs.tiles[row, block, jnp.int32(x)] for x in range(4))
    first, *_, end = bounds
    hide = tiles.hiding(options, refs, row, kv_length)
    count = end - first  # Of tiles, for each of the query heads.

    def slot(step):
      return lax.rem(step, jnp.int32(stages))

    def fetch(step):
      """Step by step through the tiles of one head, then of the next."""
      head, index = (lax.div(step, count), lax.rem(step, count)) if group > 1 else (0, step)
      head += kv_head * group
      at_rows, at = pl.ds((first + index) * tile, tile), slot(step)
      for m in range(2):
        columns = pl.ds((2 * head + m) * dim, dim)
        plgpu.copy_gmem_to_smem(refs.q.at[row, at_rows, columns], q_s.at[at, m], q_ready.at[at])
      source = refs.terms.at[row, head, pl.ds(0, _ROW_TERMS), at_rows]
      plgpu.copy_gmem_to_smem(source, terms_s.at[at], q_ready.at[at])
      if documents:
        plgpu.copy_gmem_to_smem(refs.ids.at[row, at_rows], ids_s.at[at], q_ready.at[at])
      source = refs.d_out.at[row, at_rows, pl.ds(head * value_dim, value_dim)]
      plgpu.copy_gmem_to_smem(source, d_out_s.at[at], d_out_ready.at[at])

    def term(x, at):
      return tiles.load_vector(terms_s.at[at, x], 1)

    @pl.when(w == 1)
    def _():
      for m in range(maps):
        columns = pl.ds((maps * kv_head + m) * dim, dim)
        plgpu.copy_gmem_to_smem(refs.k.at[row, at_keys, columns], k_s.at[m], keys_ready)
      columns = pl.ds(kv_head * value_dim, value_dim)
      plgpu.copy_gmem_to_smem(refs.v.at[row, at_keys, columns], v_s.at[0], keys_ready)
      for step in range(stages):
        pl.when(step < count * group)(lambda step=step: fetch(jnp.int32(step)))

    plgpu.barrier_wait(keys_ready)

    @pl.when(w == 0)
    def _values():
      kv_ids = tiles.load_vector(refs.kv_ids.at[row, at_keys], 0) if documents else None

      def add(head, masked, index, d_v):
        at, zero = slot(head * count + index - first), tiles.opaque_zero(index)
        plgpu.barrier_wait(q_ready.at[at])

        def weights(m):
          scores = mosaic_gpu.matmul(k_s.at[m % maps + zero], q_s.at[at, m].transpose((1, 0)))
          if masked:
            pair = (tiles.load_vector(ids_s.at[at], 1), kv_ids) if documents else None
            scores = hide(scores, index * tile, key, pair, query_axis=1)
          lse = tiles.spread(term(m, at), scores.shape, 1)
          weights = jnp.exp2(scores * (options.scale * LOG2E) - lse)
          plgpu.barrier_wait(map_free.at[m])
          maps_s[m] = weights.astype(dtype)
          plgpu.barrier_arrive(map_ready.at[m])
          return weights

        one, two = weights(0), weights(1)
        difference = one - two * tiles.spread(term(4, at), two.shape, 1)
        maps_s[2] = difference.astype(dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(d_out_ready.at[at])
        d_v = mosaic_gpu.mma(d_v, maps_s.at[2 + zero], d_out_s.at[at])
        plgpu.barrier_arrive(free.at[at])
        return d_v

      def of_head(head, d_v):
        return tiles.sweep(
          functools.partial(add, head),
          d_v,
          bounds,
          head=options.causal,
          tail=(
            options.window is not None or visibility.lengths is not None or kv_length % _ROWS != 0
          ),
          documents=documents,
        )

      d_v = tiles.constant(0, (_ROWS, value_dim))
      d_v = lax.fori_loop(0, group, of_head, d_v) if group > 1 else of_head(0, d_v)
      for m in range(2):
        plgpu.barrier_wait(map_free.at[m])  # The values are no longer read.
      v_s[0] = d_v.astype(dtype)
      plgpu.commit_smem()
      columns = pl.ds(kv_head * value_dim, value_dim)
      plgpu.copy_smem_to_gmem(v_s.at[0], refs.d_v.at[row, at_keys, columns])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(w == 1)
    def _keys():
      def add(step, accs):
        at, zero = slot(step), tiles.opaque_zero(first + step)
        plgpu.barrier_wait(d_out_ready.at[at])
        g = mosaic_gpu.matmul(v_s.at[zero], d_out_s.at[at].transpose((1, 0)))
        plgpu.barrier_wait(q_ready.at[at])
        accs = list(accs)
        for m in range(2):
          plgpu.barrier_wait(map_ready.at[m])
          weights = plgpu.load(maps_s.at[m], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
          maps_s[m] = _d_scores(weights, g, m, term(2 + m, at), term(4, at), axis=1).astype(dtype)
          plgpu.commit_smem()
          accs[m % maps] = mosaic_gpu.mma(accs[m % maps], maps_s.at[m + zero], q_s.at[at, m])
          plgpu.barrier_arrive(map_free.at[m])
        plgpu.barrier_wait(free.at[at])
        pl.when(step + stages < count * group)(lambda: fetch(step + stages))
        return tuple(accs)

      for m in range(2):
        plgpu.barrier_arrive(map_free.at[m])
      zeros = (tiles.constant(0, (_ROWS, dim)),) * maps
      for m, d_k in enumerate(lax.fori_loop(0, count * group, add, zeros)):
        k_s[m] = (d_k * options.scale).astype(dtype)
        plgpu.commit_smem()
        columns = pl.ds((maps * kv_head + m) * dim, dim)
        plgpu.copy_smem_to_gmem(k_s.at[m], refs.d_k.at[row, at_keys, columns])
      plgpu.wait_smem_to_gmem(0)

  smem, barrier = tiles.smem(dim), plgpu.Barrier
  pairs = length * kv_length // (2 if options.causal else 1)
  d_k, d_v = mosaic_gpu.call(
    kernel,
    *given.values(),
    name="diff_attention_bwd_dkv",
    out_shape=[jax.ShapeDtypeStruct(operands[x].shape, dtype) for x in ("k", "v")],
    grid=dict(row=batch, head=kv_heads, block=tiles.ceil_div(kv_length, _ROWS)),
    num_warpgroups=2,
    scratch=dict(
      k_s=smem((maps, _ROWS, dim), dtype),
      v_s=smem((1, _ROWS, value_dim), dtype),
      q_s=smem((stages, 2, tile, dim), dtype),
      d_out_s=smem((stages, tile, value_dim), dtype),
      terms_s=plgpu.SMEM((stages, _ROW_TERMS, tile), jnp.float32),
      ids_s=plgpu.SMEM((stages, tile), jnp.int32),
      maps_s=smem((3, _ROWS, tile), dtype),  # The third is their difference.
      keys_ready=barrier(num_arrivals=maps + 1),
      q_ready=barrier(num_barriers=stages, num_arrivals=4 if documents else 3),
      d_out_ready=barrier(num_barriers=stages),
      free=barrier(num_barriers=stages),
      map_ready=barrier(num_barriers=2),
      map_free=barrier(num_barriers=2),
    ),
    flops=batch * heads * pairs * (8 * dim + 4 * value_dim),
    transcendentals=batch * heads * pairs * 2,
    approx_math=True,
  )
  return d_k[:, :kv_length].reshape(k.shape), d_v[:, :kv_length].reshape(v.shape)


def _d_scores(weights, g, m, b, lam, *, axis):
  """`dS_m` of a tile, the queries along `axis`."""
  if m == 1:
    g = g * tiles.spread(-lam, g.shape, axis)
  return weights * (g - tiles.spread(b, g.shape, axis))
