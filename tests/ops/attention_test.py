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
def test_padding_on_either_side_changes_nothing(encode):
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


def _xpos(q, k, q_positions, k_positions):
  return (
    ops.apply_xpos(q, q_positions, role="query", scale_base=4),
    ops.apply_xpos(k, k_positions, role="key", scale_base=4),
  )


@pytest.mark.parametrize("length", [1, 3, 6, 7, 23])
def test_blockwise_causal_equals_windows_with_their_own_positions(length):
  """xPos section 4: queries of block b over the two blocks up to theirs, positions from zero."""
  h = 3
  args = [jnp.asarray(x, jnp.float32) for x in _inputs(2, length, length, 2, 2, 4)]

  @functools.partial(jax.jit, static_argnums=3)
  def masked(q, k, v, mask):
    p = jnp.arange(length)[None]
    return ops.attention(*_xpos(q, k, p, p), v, mask=mask)

  @jax.jit
  def windowed(q, k, v):
    blocks, local = -(-length // h), jnp.arange(2 * h)[None]
    pad = lambda x, left: jnp.pad(x, ((0, 0), (left, blocks * h - length), (0, 0), (0, 0)))
    outs = []
    for b in range(blocks):
      k_b, v_b = (pad(x, h)[:, b * h : (b + 2) * h] for x in (k, v))
      q_b, k_b = _xpos(pad(q, 0)[:, b * h : (b + 1) * h], k_b, local[:, h:], local)
      valid = jnp.broadcast_to(local + (b - 1) * h >= 0, (2, 2 * h))
      outs.append(ops.attention(q_b, k_b, v_b, positions=local[:, h:], kv_valid=valid))
    return jnp.concatenate(outs, 1)[:, :length]

  got = masked(*args, Mask("blockwise_causal", h))
  np.testing.assert_allclose(got, windowed(*args), atol=1e-5)
  causal = np.allclose(got, masked(*args, Mask("causal")), atol=1e-5)
  assert causal == (length <= 2 * h)


def test_blockwise_causal_equals_a_cache_that_drops_half_before_it_overflows():
  h, length = 3, 23
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


def test_bfloat16_keeps_float32_statistics():
  args = _inputs(length=64, kv_length=64, dim=16)
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in args)
  out, lse = ops.attention(q, k, v, return_lse=True)
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
  np.testing.assert_array_equal(ops.tree_mask(jnp.asarray(parents)), want)
  np.testing.assert_array_equal(ops.tree_mask(jnp.array([[0]])), [[[True]]])


def test_segment_bias():
  got = ops.segment_bias(jnp.array([[1.0, 2.0]]), jnp.array([[0, 1, 1], [1, -1, 2]]))
  np.testing.assert_array_equal(got, [[1, 2, 2], [2, 0, 0]])


@pytest.mark.parametrize(
  "arguments", [("sliding_window",), ("blockwise_causal", 0), ("causal", 4), ("banded",)]
)
def test_masks_validate_themselves(arguments):
  with pytest.raises(ValueError, match="kind=|size="):
    Mask(*arguments)


@pytest.mark.parametrize("bias", [-1e30, float(np.finfo(np.float32).min)])
def test_hidden_keys_get_nothing_however_low_the_visible_ones_are(bias):
  q = k = jax.random.normal(jax.random.key(0), (1, 3, 1, 4))
  v = jax.random.normal(jax.random.key(1), (1, 3, 1, 4))
  out, lse = ops.attention(q, k, v, key_bias=jnp.full((1, 3), bias), return_lse=True)
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
@pytest.mark.parametrize(
  "spec", [P("data", None, "tensor"), P("data", "seq", "tensor"), P(None, ("data", "seq"))], ids=str
)
def test_sharded_equals_unsharded(mesh, spec, kv_heads):
  args = [jnp.asarray(x, jnp.float32) for x in _inputs(2, 16, 16, 4, kv_heads)]
  options = dict(segment_ids=jnp.arange(16)[None].repeat(2, 0) // 6, window=5)
  options["q_offset"] = jnp.array([0, 2])
  want = _flash_and_grads(None, **options)(*args)
  with jax.set_mesh(mesh):
    got = _flash_and_grads(spec, **options)(*args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


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
  args = [jnp.asarray(x, jnp.float32) for x in _inputs(2, 70, 70)]
  ids = jnp.arange(70)[None].repeat(2, 0) // 30
  for mask in (Mask("causal"), Mask("sliding_window", 9), Mask("full")):
    op = functools.partial(ops.attention, mask=mask, segment_ids=ids, return_lse=True)
    flash = op(*args)
    written_out = op(*args, positions=jnp.arange(70)[None])
    for a, b in zip(flash, written_out, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
    text = jax.jit(op).lower(*args).as_text()
    assert "70x70xf32" not in text  # No square of scores.
