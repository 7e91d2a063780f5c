"""Attention against a loop over queries in float64, and blockwise causal masks by other means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from latentlab import ops
from latentlab.ops import Mask


def _inputs(batch=2, length=7, kv_length=7, heads=4, kv_heads=2, dim=3, value_dim=5, seed=0):
  rng = np.random.default_rng(seed)
  return [
    rng.normal(size=s)
    for s in (
      (batch, length, heads, dim),
      (batch, kv_length, kv_heads, dim),
      (batch, kv_length, kv_heads, value_dim),
    )
  ]


def _naive(q, k, v, visible, bias=0.0):
  """One query at a time, over the keys it sees and no others."""
  groups = q.shape[2] // k.shape[2]
  out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
  visible = np.broadcast_to(visible, (q.shape[0], q.shape[1], k.shape[1]))
  bias = np.broadcast_to(bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
  for b, t, n in np.ndindex(*q.shape[:3]):
    seen = visible[b, t]
    if seen.any():
      scores = k[b, seen, n // groups] @ q[b, t, n] + bias[b, n, t, seen]
      lse[b, t, n] = np.log(np.exp(scores).sum())
      out[b, t, n] = np.exp(scores - lse[b, t, n]) @ v[b, seen, n // groups]
  return out, lse


def _check(args, visible, bias=0.0, **options):
  out, lse = jax.jit(lambda *a: ops.attention(*a, return_lse=True, **options))(
    *(jnp.asarray(x, jnp.float32) for x in args)
  )
  want_out, want_lse = _naive(*args, visible, bias)
  np.testing.assert_allclose(out, want_out, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, atol=1e-5)
  assert lse.dtype == jnp.float32


QUERY, KEY = np.arange(7)[:, None], np.arange(7)


@pytest.mark.parametrize(
  "mask,visible",
  [
    (Mask("full"), QUERY == QUERY + 0 * KEY),
    (Mask("causal"), KEY <= QUERY),
    (Mask("sliding_window", 3), (KEY <= QUERY) & (QUERY - KEY < 3)),
    (Mask("blockwise_causal", 2), (KEY <= QUERY) & (QUERY // 2 - KEY // 2 <= 1)),
  ],
  ids=["full", "causal", "sliding_window", "blockwise_causal"],
)
def test_masks(mask, visible):
  _check(_inputs(), visible, mask=mask)


def test_positions_segments_and_cache_slots():
  args = _inputs(length=3, kv_length=9)
  positions, kv_positions = (
    np.array([[4, 5, 6], [0, 8, 9]]),
    np.random.default_rng(0).permutation(np.arange(18)).reshape(2, 9),
  )
  ids, kv_ids = np.array([[1, 1, 2], [0, 0, 0]]), np.array([[1] * 5 + [2] * 4, [0] * 6 + [3] * 3])
  valid = np.arange(9) < np.array([[8], [4]])
  visible = (
    (kv_positions[:, None] <= positions[..., None])
    & valid[:, None]
    & (kv_ids[:, None] == ids[..., None])
  )
  assert visible.any() and not visible.any(-1).all()
  _check(
    args,
    visible,
    positions=jnp.asarray(positions),
    kv_positions=jnp.asarray(kv_positions),
    segment_ids=jnp.asarray(ids),
    kv_segment_ids=jnp.asarray(kv_ids),
    kv_valid=jnp.asarray(valid),
  )


def test_biases_and_slopes():
  args, slopes = _inputs(), np.asarray(ops.alibi_slopes(4), np.float64)
  key_bias = np.random.default_rng(1).normal(size=(2, 7))
  bias = key_bias[:, None, None] - slopes[:, None, None] * (QUERY - KEY)
  _check(
    args,
    KEY <= QUERY,
    bias,
    key_bias=jnp.asarray(key_bias, jnp.float32),
    slopes=ops.alibi_slopes(4),
  )
  hidden = np.where(np.arange(7) == 2, -np.inf, key_bias)
  _check(
    args,
    (KEY <= QUERY) & (KEY != 2),
    key_bias[:, None, None],
    key_bias=jnp.asarray(hidden, jnp.float32),
  )


@pytest.mark.parametrize(
  "encode",
  [
    lambda x, positions, role: x,
    lambda x, positions, role: ops.apply_rope(x, positions),
    lambda x, positions, role: ops.apply_xpos(x, positions, role=role),
  ],
  ids=["alibi", "rope", "xpos"],
)
def test_lex_10_padding_on_either_side_changes_nothing(encode):
  args = [jnp.asarray(x, jnp.float32) for x in _inputs(dim=4)]

  @jax.jit
  def run(q, k, v, valid):
    positions = jnp.arange(q.shape[1])[None]
    return ops.attention(
      encode(q, positions, "query"),
      encode(k, positions, "key"),
      v,
      slopes=ops.alibi_slopes(4),
      kv_valid=valid,
    )

  padded = [jnp.pad(x, ((0, 0), (3, 2), (0, 0), (0, 0)), constant_values=9.0) for x in args]
  valid = jnp.broadcast_to((jnp.arange(12) >= 3) & (jnp.arange(12) < 10), (2, 12))
  want = run(*args, jnp.ones((2, 7), bool))
  np.testing.assert_allclose(run(*padded, valid)[:, 3:10], want, atol=1e-5)


def test_gradients_match_float64_autodiff_and_survive_blind_rows():
  args = _inputs()
  visible = np.tril(np.ones((7, 7), bool))
  visible[3] = False
  key_bias = np.random.default_rng(1).normal(size=(2, 7))
  weights = np.random.default_rng(2).normal(size=(2, 7, 4, 5))

  def naive(q, k, v, key_bias, slopes):
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, jnp.repeat(k, 2, 2)) + key_bias[:, None, None]
    scores -= slopes[:, None, None] * (QUERY - KEY)
    probs = jax.nn.softmax(jnp.where(visible | (QUERY == 3), scores, -jnp.inf), -1) * (QUERY != 3)
    lse = jax.nn.logsumexp(jnp.where(visible | (QUERY == 3), scores, -jnp.inf), -1).swapaxes(1, 2)
    out = jnp.einsum("BNTS,BSNV->BTNV", probs, jnp.repeat(v, 2, 2))
    return jnp.sum(out * weights) + jnp.sum(jnp.delete(lse, 3, 1))

  def ours(q, k, v, key_bias, slopes):
    out, lse = ops.attention(
      q,
      k,
      v,
      mask=Mask("full"),
      allowed=jnp.asarray(visible)[None],
      key_bias=key_bias,
      slopes=slopes,
      return_lse=True,
    )
    return jnp.sum(out * weights) + jnp.sum(jnp.delete(lse, 3, 1))

  args = [*args, key_bias, np.array([0.5, 0.25, 0.1, 0.0])]
  with jax.enable_x64(True):
    want, grads = jax.jit(jax.value_and_grad(naive, range(5)))(*map(jnp.asarray, args))
  got, got_grads = jax.jit(jax.value_and_grad(ours, range(5)))(
    *(jnp.asarray(x, jnp.float32) for x in args)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for a, b in zip(got_grads, grads, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


BLOCK = 3
LENGTHS = [1, 3, 6, 7, 23]  # A block, two, a token more, and three pairs with a rest.
DECAY = ops.xpos_decay(4, scale_base=4)


def _xpos_scores(q, k, positions=None):
  """Scores of xPos in float64 by complex numbers: rotation and decay of the distance alone."""
  t = np.arange(q.shape[1]) if positions is None else positions
  theta = 10000.0 ** -(np.arange(2) / 2)
  q, k = (x[..., 0::2] + 1j * x[..., 1::2] for x in (q, np.repeat(k, q.shape[2] // k.shape[2], 2)))
  gap = np.maximum(t[:, None] - t, 0)[..., None]  # Hidden pairs must not overflow.
  factor = np.exp(gap * (DECAY[0::2] - 1j * theta)).conj()
  return np.einsum("BTNP,BSNP,TSP->BNTS", q, k.conj(), factor).real


def _attend(scores, v, visible):
  """Softmax over what is visible, in float64."""
  visible = np.broadcast_to(visible, scores[:, 0].shape)[:, None]
  weights = np.where(visible, np.exp(scores), 0)
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  return np.einsum("BNTS,BSNV->BTNV", weights, np.repeat(v, scores.shape[1] // v.shape[2], 2))


@jax.jit
def _rotated(q, k):
  positions = jnp.arange(q.shape[1])[None]
  return [ops.apply_rope(jnp.asarray(x, jnp.float32), positions) for x in (q, k)]


def _seen_in_blocks(length, size=BLOCK):
  t = np.arange(length)
  return (t <= t[:, None]) & (t[:, None] // size - t // size <= 1)


@pytest.mark.parametrize("length", LENGTHS)
def test_lex_05_blocks_in_place_are_the_mask(length):
  """Windows of two blocks, one after another in the batch, against xPos's own formulas."""
  q, k, v = _inputs(2, length, length, 4, 2, 4)
  mask = Mask("blockwise_causal", BLOCK)
  run = jax.jit(lambda *a, **o: ops.attention(*a, mask=mask, decay=DECAY, **o))
  rotated = _rotated(q, k)
  got = run(*rotated, jnp.asarray(v, jnp.float32))
  scores = _xpos_scores(q, k)
  np.testing.assert_allclose(got, _attend(scores, v, _seen_in_blocks(length)), atol=1e-5)
  # Positions that say what places said before: all scores at once.
  positions = jnp.arange(length)[None]
  written_out = run(*rotated, jnp.asarray(v, jnp.float32), positions=positions)
  np.testing.assert_allclose(got, written_out, atol=1e-5)
  causal = _attend(scores, v, np.tri(length, dtype=bool))
  assert np.allclose(got, causal, atol=1e-5) == (length <= 2 * BLOCK)


@pytest.mark.parametrize("options", ["valid", "slopes", "key_bias", "documents", "all"])
def test_lex_05_blocks_with_padding_biases_and_documents(options):
  length, mask = 23, Mask("blockwise_causal", BLOCK)
  q, k, v = _inputs(2, length, length, 4, 2, 4)
  given, bias, visible = {}, 0.0, _seen_in_blocks(length)[None]
  t = np.arange(length)
  if options in ("valid", "all"):
    given["kv_valid"] = jnp.asarray(t < np.array([[13], [length]]))
    visible = visible & np.asarray(given["kv_valid"])[:, None]
  if options in ("slopes", "all"):
    given["slopes"] = ops.alibi_slopes(4)
    bias = bias - np.asarray(given["slopes"])[:, None, None] * (t[:, None] - t)
  if options in ("key_bias", "all"):
    given["key_bias"] = jnp.asarray(np.random.default_rng(1).normal(size=(1, length)), jnp.float32)
    bias = bias + np.asarray(given["key_bias"])[:, None, None]
  if options in ("documents", "all"):  # Blocks begin with the document.
    ids = np.array([[1] * 5 + [2] * 14 + [3] * 4, [1] * length])
    inside = np.array([[*range(5), *range(14), *range(4)], range(length)])
    blocks = inside // BLOCK
    near = blocks[:, :, None] - blocks[:, None, :] <= 1
    visible = (t <= t[:, None]) & near & (ids[:, :, None] == ids[:, None, :])
    if "kv_valid" in given:
      visible &= np.asarray(given["kv_valid"])[:, None]
    given["segment_ids"] = jnp.asarray(ids)
  op = jax.jit(lambda *a, **o: ops.attention(*a, mask=mask, decay=DECAY, **o))
  got = op(*_rotated(q, k), jnp.asarray(v, jnp.float32), **given)
  want = _attend(_xpos_scores(q, k) + bias, v, visible)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_lex_05_every_gradient_of_blocks_is_that_of_the_mask():
  length = 23
  q, k, v = _inputs(2, length, length, 4, 2, 4)
  q, k = _rotated(q, k)
  weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, length, 4, 4)), jnp.float32)

  def loss(q, k, v, positions, documents):
    ids = jnp.arange(length)[None].repeat(2, 0) // 8 if documents else None
    inside = None if positions is None else positions % 8 if documents else positions
    options = dict(positions=inside, kv_positions=inside, segment_ids=ids)
    mask = Mask("blockwise_causal", BLOCK)
    out, lse = ops.attention(q, k, v, mask=mask, decay=DECAY, return_lse=True, **options)
    return jnp.sum(out * weights) + jnp.sum(lse * weights[..., 0])

  grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=4)
  for documents in (False, True):
    args = q, k, jnp.asarray(v[..., :4], jnp.float32)
    got, want = (grad(*args, p, documents) for p in (None, jnp.arange(length)[None]))
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=2e-5)
      assert np.abs(b).max() > 0.1


@pytest.mark.parametrize("documents", [False, True])
def test_lex_05_blocks_cost_what_they_see(documents):
  """No square of scores; flops and memory grow as the length does."""

  def compiled(length):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if documents else None
    op = lambda q, k, v, ids: ops.attention(
      q, k, v, mask=Mask("blockwise_causal", 64), segment_ids=ids, decay=ops.xpos_decay(16)
    )
    return jax.jit(op).lower(x, x, x, ids).compile()

  short, long = compiled(1024), compiled(4096)
  assert "4096,4096" not in long.as_text()
  flops = [c.cost_analysis()["flops"] for c in (short, long)]
  assert 3.5 < flops[1] / flops[0] < 4.5
  # Two products of 64 queries and their keys per block, and what the softmax adds.
  keys = 192 if documents else 128
  assert flops[1] < 1.6 * 2 * 2 * 4096 * keys * 2 * 16
  memory = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
  assert memory[1] < 5 * memory[0]


def test_lex_05_blocks_equal_a_list_that_drops_half_before_it_overflows():
  h, length = BLOCK, 23
  q, k, v = (jnp.asarray(x, jnp.float32) for x in _inputs(1, length, length, 2, 2, 4))
  want = jax.jit(lambda *a: ops.attention(*a, mask=Mask("blockwise_causal", h)))(q, k, v)
  step = jax.jit(lambda *a, valid: ops.attention(*a, mask=Mask("full"), kv_valid=valid))
  cache = []
  for t in range(length):
    cache = cache[h if len(cache) == 2 * h else 0 :] + [t]
    slots = np.array(cache + [0] * (2 * h - len(cache)))
    valid = jnp.asarray(np.arange(2 * h)[None] < len(cache))
    out = step(q[:, t : t + 1], k[:, slots], v[:, slots], valid=valid)
    np.testing.assert_allclose(out[:, 0], want[:, t], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [Mask("sliding_window", 5), Mask("blockwise_causal", 4)], ids=str)
@pytest.mark.parametrize("start, length", [(0, 3), (2, 9), (17, 21)])
def test_lex_05_windows_over_older_keys_are_the_mask(mask, start, length):
  """Rows of different age, with as many older keys as the mask reaches."""
  reach = mask.reach
  q, k, v = _inputs(2, length, reach + length, 2, 2, 4)
  begins = np.array([[start], [start + 3]])
  positions = begins + np.arange(length)
  kv_positions = begins + np.arange(-reach, length)
  valid = kv_positions >= 0
  args = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
  where = dict(positions=positions, kv_positions=np.where(valid, kv_positions, 7), kv_valid=valid)
  where = jax.tree.map(jnp.asarray, where)
  both = (ops.windowed_attention, ops.attention)
  run = lambda *a: [op(*a, mask=mask, decay=DECAY, **where) for op in both]
  got, want = jax.jit(run)(*args)
  np.testing.assert_allclose(got, want, atol=1e-5)
  gap, old = positions[:, :, None] - kv_positions[:, None], kv_positions[:, None] >= 0
  seen = (
    gap < 5
    if mask.kind == "sliding_window"
    else positions[:, :, None] // 4 - (kv_positions[:, None] // 4) <= 1
  )
  factor = np.exp(np.maximum(gap, 0)[..., None] * DECAY)
  scores = np.einsum("BTNH,BSNH,BTSH->BNTS", q, k, factor)
  np.testing.assert_allclose(got, _attend(scores, v, (gap >= 0) & seen & old), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["in place", "positions", "window"])
def test_lex_02_tiles_equal_one_center(form):
  """300 tokens are 75 units of decay, and two tiles; about one center their scales go to 1e20."""
  length, window = 300, 90 if form == "window" else None
  q, k, v = _inputs(1, length, length, 2, 1, 4)
  positions = jnp.arange(length)[None]
  mask = Mask("causal") if window is None else Mask("sliding_window", window)
  where = dict(positions=positions) if form == "positions" else {}
  got = jax.jit(lambda *a: ops.attention(*a, mask=mask, decay=DECAY, **where))(
    *_rotated(q, k), jnp.asarray(v, jnp.float32)
  )
  with jax.enable_x64(True):
    options = dict(scale_base=4, center=150)

    @jax.jit
    def about_one_center(q, k, v):
      at = jnp.arange(length)[None]
      scaled = [ops.apply_xpos(x, at, role=r, **options) for x, r in ((q, "query"), (k, "key"))]
      return ops.attention(*scaled, v, mask=mask)

    want = about_one_center(q, k, v)
    assert want.dtype == jnp.float64
  np.testing.assert_allclose(got, want, atol=2e-5)
  visible = np.tri(length, dtype=bool) & ~np.tri(length, k=-(window or length), dtype=bool)
  np.testing.assert_allclose(got, _attend(_xpos_scores(q, k), v, visible), atol=2e-5)


@pytest.mark.parametrize(
  "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
def test_lex_04_a_million_tokens_in(dtype):
  """The last queries of a million see their keys as queries at the start do, and far ones not."""
  q, k, v = _inputs(1, 40, 40, 1, 1, 4, 4)
  q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
  far = jnp.concatenate([jnp.array([0, 1, 500_000]), 2**20 + jnp.arange(40)])[None]
  op = jax.jit(
    lambda q, k, v, p, kv: ops.attention(q, k, v, positions=p, kv_positions=kv, decay=DECAY)
  )
  strange = [jnp.concatenate([jnp.full((1, 3, 1, 4), 9, dtype), x], 1) for x in (k, v)]
  got = op(q, *strange, 2**20 + jnp.arange(40)[None], far)
  args = [np.asarray(x, np.float64) for x in (q, k, v)]
  gap = np.arange(40)[:, None] - np.arange(40)
  factor = np.exp(np.maximum(gap, 0)[..., None] * DECAY)
  scores = np.einsum("BTNH,BSNH,TSH->BNTS", args[0], args[1], factor)
  weights = np.where(gap >= 0, np.exp(scores), 0)
  # The far keys' scores are gone, which leaves each a weight of exp(0).
  total = weights.sum(-1, keepdims=True) + 3
  want = np.einsum("BNTS,BSNV->BTNV", weights / total, args[2]) + 27 / total[:, 0, :, None]
  tolerance = {"float32": 1e-5, "bfloat16": 6e-2, "float16": 8e-3}[jnp.dtype(dtype).name]
  np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
  "length, size, dtype", [(65_536, 256, jnp.bfloat16), (2**20, 8, jnp.float32)], ids=str
)
def test_lex_04_blocks_of_a_million_tokens_are_finite(length, size, dtype):
  """With gradients, where a scale about one center is beyond float32, and float64 even."""
  x = jax.random.normal(jax.random.key(0), (3, 1, length, 1, 4), dtype)
  decay = ops.xpos_decay(4, scale_base=size)

  @jax.jit
  def run(x):
    op = lambda *a: ops.attention(*a, mask=Mask("blockwise_causal", size), decay=decay)
    out, pull = jax.vjp(op, *x)
    finite = [jnp.isfinite(y).all() for y in (out, *pull(x[2]))]
    # The last blocks are as they would be at the start.
    tail = ops.attention(*x[:, :, -2 * size :], mask=Mask("causal"), decay=decay)
    return finite, out[:, -size:].astype(jnp.float32), tail[:, size:].astype(jnp.float32)

  finite, last, tail = run(x)
  assert len(finite) == 4 and all(finite)
  np.testing.assert_allclose(last, tail, atol=5e-2)


def test_a_decay_refuses_keys_behind_the_query():
  q, k, v = (jnp.asarray(x, jnp.float32) for x in _inputs(dim=4))
  with pytest.raises(ValueError, match="causal mask"):
    ops.attention(q, k, v, mask=Mask("full"), decay=DECAY)
  where = dict(positions=jnp.zeros((2, 7), int), kv_positions=jnp.zeros((2, 7), int))
  valid = jnp.ones((2, 7), bool)
  with pytest.raises(ValueError, match="reach"):
    ops.windowed_attention(q, k, v, mask=Mask("causal"), kv_valid=valid, **where)


def test_bfloat16_keeps_float32_statistics():
  args = _inputs(length=64, kv_length=64, dim=16)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in args)
  out, lse = jax.jit(functools.partial(ops.attention, return_lse=True))(q, k, v)
  want, want_lse = _naive(*(np.asarray(x, np.float64) for x in (q, k, v)), np.tri(64, dtype=bool))
  assert out.dtype == jnp.bfloat16
  assert np.linalg.norm(np.asarray(out, np.float64) - want) <= 5e-3 * np.linalg.norm(want)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-4)


def test_tree_mask():
  parents = np.array([[-1, 0, 1, 1, 0, 4, 2], [6, 0, 1, 2, 3, 4, 6]])  # The second root comes last.
  want = np.zeros((2, 7, 7), bool)
  for b in range(2):
    for t in range(7):
      node = t
      while node != -1 and not want[b, t, node]:
        want[b, t, node] = True
        node = parents[b, node]
  tree_mask = jax.jit(ops.tree_mask)
  np.testing.assert_array_equal(tree_mask(parents), want)
  np.testing.assert_array_equal(tree_mask(np.array([[0]])), [[[True]]])


def test_segment_bias():
  got = jax.jit(ops.segment_bias)(np.array([[1.0, 2.0]]), np.array([[0, 1, 1], [1, -1, 2]]))
  np.testing.assert_array_equal(got, [[1, 2, 2], [2, 0, 0]])


@pytest.mark.parametrize(
  "arguments", [("sliding_window",), ("blockwise_causal", 0), ("causal", 4), ("banded",)]
)
def test_masks_validate_themselves(arguments):
  with pytest.raises(ValueError, match="kind=|size="):
    Mask(*arguments)


def test_hidden_keys_get_nothing_however_low_the_visible_ones_are():
  q, k, v = (np.float32(x) for x in _inputs(1, 3, 3, 1, 1, 4, 4))
  op = jax.jit(lambda *a, key_bias: ops.attention(*a, key_bias=key_bias, return_lse=True))
  for bias in (-1e30, np.finfo(np.float32).min):
    out, lse = op(q, k, v, key_bias=np.full((1, 3), bias, np.float32))
    np.testing.assert_allclose(out[0, 0], v[0, 0], rtol=1e-6)
    assert np.isfinite(lse).all()


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh(
    (2, 2, 2), ("data", "tensor", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 3
  )


def _flash_and_grads(spec, **options):
  def loss(*args):
    out = ops.flash_attention(*args, spec=spec, **options)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("kv_heads", [4, 1])  # Shared by fewer devices than there are.
def test_sharded_equals_unsharded(mesh, kv_heads):
  args = [np.float32(x) for x in _inputs(2, 16, 16, 4, kv_heads)]
  segment_ids, q_offset = np.arange(16)[None].repeat(2, 0) // 6, np.array([0, 2])
  options = dict(segment_ids=jnp.asarray(segment_ids), q_offset=jnp.asarray(q_offset), window=5)
  want = _flash_and_grads(None, **options)(*args)
  specs = P("data", None, "tensor"), P("data", "seq", "tensor"), P(None, ("data", "seq"))
  for spec in specs:
    with jax.set_mesh(mesh):
      got = _flash_and_grads(spec, **options)(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(spec))


def test_lex_05_blocks_sharded_equal_unsharded(mesh):
  """With xPos's decay too; a sharded length is gathered, since blocks lie behind rows."""
  args = [np.float32(x) for x in _inputs(2, 16, 16, 4, 2, 4)]

  def run(spec):
    def loss(*args):
      mask = Mask("blockwise_causal", BLOCK)
      out = ops.attention(*args, mask=mask, decay=DECAY, spec=spec)
      return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)

  want = run(None)
  for spec in (P("data", None, "tensor"), P("data", "seq", "tensor")):
    with jax.set_mesh(mesh):
      got = run(spec)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(spec))


def test_batch_and_heads_are_not_gathered(mesh):
  args = [jnp.asarray(x, jnp.float32) for x in _inputs(2, 16, 16, 4, 4)]
  spec = P("data", None, "tensor")
  with jax.set_mesh(mesh):
    args = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in args]
    compiled = _flash_and_grads(spec).lower(*args).compile()
    (_, out), _ = compiled(*args)
  assert out.sharding.spec == spec
  assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
  assert "all-reduce" in compiled.as_text()  # Of the loss: the text does name collectives.


def test_attention_in_place_is_flash_attention():
  """Positions that are places and positions that say so give the same, by two computations."""
  args = [np.float32(x) for x in _inputs(2, 70, 70)]
  ids = jnp.asarray(np.arange(70)[None].repeat(2, 0) // 30)
  for mask in (Mask("causal"), Mask("sliding_window", 9), Mask("full")):
    op = jax.jit(functools.partial(ops.attention, mask=mask, segment_ids=ids, return_lse=True))
    flash = op.lower(*args)
    positions = dict(positions=np.arange(70)[None])
    written_out = op.lower(*args, **positions)
    for a, b in zip(flash.compile()(*args), written_out.compile()(*args, **positions), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
    # No square of scores, where the other has one.
    assert "70x70xf32" not in flash.as_text() and "70x70xf32" in written_out.as_text()
