"""The forward kernel on Hopper: a warpgroup for each map, on the same 64 queries.

Both maps weigh the same values, which are staged once. Each warpgroup fetches its own keys, the
second the values too: without a third one that only fetches, each thread may have 255 registers
whether or not the assembler honours a request to move registers between warpgroups.
"""

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


def forward(
  options: Options,
  blocks: GpuBlocks,
  q: Float[Array, "B T N 2 H"],
  k: Float[Array, "B S K 2 H"] | Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  lam: Float[Array, "B T N"],
  gain: Float[Array, "V"] | None,
  visibility: Visibility,
  *,
  save: bool,
  name: str = "diff_attention_fwd",
  clean: bool = False,
) -> dict[str, Array]:
  """Outputs `out`; to `save` also `lse`, `out2` of map 2, and `difference` before any norm.

  The latter two in float32: the backward subtracts what they make from terms that, for a query of
  few keys, cancel it.

  Args:
    options: Of the call.
    blocks: Tile sizes.
    q: See `api.diff_attention`.
    k: See there.
    v: See there; zero where padded, or else `clean`.
    lam: Per token.
    gain: Of the norm, `post_scale` included; given with `options.eps`.
    visibility: Of the call.
    save: What the backward needs.
    name: Of the kernel.
    clean: Put zeros over padded values in the tile that holds the first: a weight of zero does not
      hide a NaN.
  """
  (batch, length, heads, _, dim), (kv_length, kv_heads, value_dim) = q.shape, v.shape[1:]
  shared_k, group, dtype = k.ndim == 4, heads // kv_heads, v.dtype
  tile, stages = blocks.fwd_keys, blocks.fwd_stages
  queries = tiles.ceil_div(length, _ROWS)
  documents = visibility.segment_ids is not None
  normalise = options.eps is not None

  operands = dict(
    q=tiles.flat(q),
    k=tiles.flat(k),
    v=tiles.flat(v),
    lam=tiles.per_token(lam),
    gain=gain,
    tiles=tiles.key_tiles(options, visibility, (batch, length, kv_length), _ROWS, tile),
    **tiles.mask_operands(visibility),
  )
  given = {name: x for name, x in operands.items() if x is not None}
  shape = (*operands["q"].shape[:2], heads * value_dim)
  out_shape = dict(out=jax.ShapeDtypeStruct(shape, dtype))
  if save or options.return_lse:
    lse_shape = (batch, heads, 2, tiles.padded(length))
    out_shape["lse"] = jax.ShapeDtypeStruct(lse_shape, jnp.float32)
  if save:
    out_shape |= dict.fromkeys(("out2", "difference"), jax.ShapeDtypeStruct(shape, jnp.float32))

  def kernel(
    *refs, staged, lse_s, q_ready, k_ready, v_ready, v_free, cleaned, finished, handed_over
  ):
    refs = dict(zip((*given, *out_shape), refs, strict=True))
    refs = types.SimpleNamespace(**dict.fromkeys((*operands, "lse", "out2", "difference")) | refs)
    (q_s, k_s, v_s, weights_s, *ids_s), (out2_s, out_s, difference_s) = staged
    row, head = lax.axis_index("row"), lax.axis_index("head")
    block = queries - 1 - lax.axis_index("block")  # The longest first.
    m = lax.axis_index("warpgroup")
    kv_head, query = lax.div(head, jnp.int32(group)), block * _ROWS
    bounds = tuple(refs.tiles[row, block, jnp.int32(x)] for x in range(4))
    first, *_, end = bounds
    hide = tiles.hiding(options, refs, row, kv_length)

    def slot(step):
      return lax.rem(step - first, jnp.int32(stages))

    def fetch_keys(step):
      keys, at = pl.ds(step * tile, tile), slot(step)
      columns = pl.ds((kv_head if shared_k else 2 * kv_head + m) * dim, dim)
      plgpu.copy_gmem_to_smem(refs.k.at[row, keys, columns], k_s.at[m, at], k_ready.at[m, at])
      if documents:
        plgpu.copy_gmem_to_smem(refs.kv_ids.at[row, keys], ids_s[0].at[m, at], k_ready.at[m, at])

    def fetch_values(step):
      source = refs.v.at[row, pl.ds(step * tile, tile), pl.ds(kv_head * value_dim, value_dim)]
      plgpu.copy_gmem_to_smem(source, v_s.at[slot(step)], v_ready.at[slot(step)])

    def clean_values(step):
      shape = (tile, 64)
      keys = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
      for part in range(value_dim // 64):

        @pl.when(m == part % 2)
        def _(part=part):
          values_s = v_s.at[slot(step), :, part * 64 : (part + 1) * 64]
          values = plgpu.load(values_s, layout=plgpu.Layout.WGMMA)
          valid = keys < refs.limits[row] - step * tile
          values_s[...] = jnp.where(valid, values, jnp.zeros_like(values))
          plgpu.commit_smem()

      plgpu.barrier_arrive(cleaned)
      plgpu.barrier_wait(cleaned)

    source = refs.q.at[row, pl.ds(query, _ROWS), pl.ds((2 * head + m) * dim, dim)]
    plgpu.copy_gmem_to_smem(source, q_s.at[m], q_ready.at[m])
    for step in (first + i for i in range(stages)):

      @pl.when(step < end)
      def _(step=step):
        fetch_keys(step)
        pl.when(m == 1)(lambda: fetch_values(step))

    ids = tiles.load_vector(refs.ids.at[row, pl.ds(query, _ROWS)], 0) if documents else None
    plgpu.barrier_wait(q_ready.at[m])

    def attend(masked, step, carry):
      acc, top, total = carry
      at, mine = slot(step), m + tiles.opaque_zero(step)
      plgpu.barrier_wait(k_ready.at[m, at])
      scores = mosaic_gpu.matmul(q_s.at[mine], k_s.at[m, at].transpose((1, 0)))
      if masked:
        pair = (ids, tiles.load_vector(ids_s[0].at[m, at], 1)) if documents else None
        scores = hide(scores, query, step * tile, pair)
      pl.when(step + stages < end)(lambda: fetch_keys(step + stages))

      before, top = top, jnp.maximum(top, scores.max(axis=1) * scale)
      base = jnp.where(top == -jnp.inf, 0, top)  # Of a row that has seen no key yet.
      weights = jnp.exp2(scores * scale - tiles.spread(base, scores.shape))
      decay = jnp.exp2(before - base)
      total = total * decay + weights.sum(axis=1)
      acc *= tiles.spread(decay, acc.shape)
      weights_s[mine] = weights.astype(dtype)
      plgpu.commit_smem()
      plgpu.barrier_wait(v_ready.at[at])
      if masked and clean:
        pl.when((step + 1) * tile > refs.limits[row])(lambda: clean_values(step))
      acc = mosaic_gpu.mma(acc, weights_s.at[mine], v_s.at[at])
      # The second warpgroup trails the first, and refills what both have read.
      pl.when(m == 0)(lambda: plgpu.barrier_arrive(v_free.at[at]))

      @pl.when(m == 1)
      def _():
        plgpu.barrier_wait(v_free.at[at])
        pl.when(step + stages < end)(lambda: fetch_values(step + stages))

      return acc, top, total

    scale = options.scale * LOG2E
    zeros = tiles.constant(0, (_ROWS, value_dim)), tiles.constant(0, (_ROWS,))
    carry = zeros[0], tiles.constant(-jnp.inf, (_ROWS,)), zeros[1]
    acc, top, total = tiles.sweep(
      attend,
      carry,
      bounds,
      head=options.window is not None,
      tail=options.causal or visibility.lengths is not None or kv_length % tile != 0,
      documents=documents,
    )

    seen = total > 0
    acc *= tiles.spread(jnp.where(seen, 1 / total, 0), acc.shape)
    if refs.lse is not None:
      lse_s[m] = jnp.where(seen, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(lse_s.at[m], refs.lse.at[row, head, m, pl.ds(query, _ROWS)])

    target = row, pl.ds(query, _ROWS), pl.ds(head * value_dim, value_dim)

    @pl.when(m == 1)
    def _():
      plgpu.barrier_wait(finished)  # The first warpgroup no longer reads what is overlaid.
      out2_s[...] = acc
      plgpu.barrier_arrive(handed_over)
      if save:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out2_s, refs.out2.at[target])

    @pl.when(m == 0)
    def _():
      plgpu.barrier_arrive(finished)
      lam = tiles.load_vector(refs.lam.at[row, head, pl.ds(query, _ROWS)], 0)
      plgpu.barrier_wait(handed_over)
      out2 = plgpu.load(out2_s, layout=plgpu.Layout.WGMMA)
      out = acc - out2 * tiles.spread(lam, acc.shape)
      if save:
        difference_s[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(difference_s, refs.difference.at[target])
      if normalise:
        square = (out * out).sum(axis=1) / value_dim
        out *= tiles.spread(lax.rsqrt(square + options.eps), out.shape)
        out *= tiles.spread(tiles.load_vector(refs.gain, 1), out.shape, 1)
      out_s[...] = out.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(out_s, refs.out.at[target])

    plgpu.wait_smem_to_gmem(0)

  smem = tiles.smem(dim)
  loop = [
    smem((2, _ROWS, dim), dtype),
    smem((2, stages, tile, dim), dtype),
    smem((stages, tile, value_dim), dtype),
    smem((2, _ROWS, tile), dtype),
  ]
  if documents:
    loop.append(plgpu.SMEM((2, stages, tile), jnp.int32))
  end = [smem((_ROWS, value_dim), x) for x in (jnp.float32, dtype, jnp.float32)]
  barrier = plgpu.Barrier
  pairs = length * kv_length // (2 if options.causal else 1)
  outs = mosaic_gpu.call(
    kernel,
    *given.values(),
    name=name,
    out_shape=list(out_shape.values()),
    grid=dict(row=batch, head=heads, block=queries),
    num_warpgroups=2,
    scratch=dict(
      staged=plgpu.RefUnion(loop, end),
      lse_s=plgpu.SMEM((2, _ROWS), jnp.float32),
      q_ready=barrier(num_barriers=2),
      k_ready=barrier(num_barriers=(2, stages), num_arrivals=2 if documents else 1),
      v_ready=barrier(num_barriers=stages),
      v_free=barrier(num_barriers=stages),
      cleaned=barrier(num_arrivals=2),
      finished=barrier(),
      handed_over=barrier(),
    ),
    flops=batch * heads * pairs * 4 * (dim + value_dim),
    transcendentals=batch * heads * pairs * 2,
    approx_math=True,
  )
  return dict(zip(out_shape, outs, strict=True))
