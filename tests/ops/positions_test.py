"""Position encodings against complex arithmetic in float64."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops


def _x(length=6, heads=2, dim=8, seed=0):
  return np.random.default_rng(seed).normal(size=(1, length, heads, dim))


def _oracle(x, positions, theta, log_zeta=0.0):
  """Interleaved pairs as complex numbers, times `exp(position * (log_zeta + i theta))`."""
  pairs = x[..., 0::2] + 1j * x[..., 1::2]
  pairs = pairs * np.exp(positions[:, None, None] * (log_zeta + 1j * theta))
  return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def _zeta(dim, gamma=0.4):
  return (np.arange(dim // 2) / (dim / 2) + gamma) / (1 + gamma)


@pytest.mark.parametrize(
  "grid,theta",
  [("rope", 10000.0 ** -(np.arange(4) / 4)), ("linspace", 10000.0 ** -(np.arange(4) / 3))],
)
def test_rope_is_a_complex_rotation_at_any_position(grid, theta):
  positions = np.array([0, 1, -7, 4095, 123_457, 20_000_003])
  got = ops.apply_rope(jnp.asarray(_x(), jnp.float32), jnp.asarray(positions)[None], grid=grid)
  np.testing.assert_allclose(got, _oracle(_x(), positions, theta), atol=2e-6)


@pytest.mark.parametrize("role,sign", [("query", 1), ("key", -1)])
def test_lex_03_xpos_is_a_complex_exponential(role, sign):
  positions, theta = np.array([0, 1, 5, 300, 1000, 2000]), 10000.0 ** -(np.arange(4) / 4)
  x = jnp.asarray(_x(), jnp.float32)
  got = ops.apply_xpos(x, jnp.asarray(positions)[None], role=role, center=700)
  log_zeta = sign * np.log(_zeta(8)) / 512
  center = np.exp(-700 * log_zeta).repeat(2)
  want = _oracle(_x(), positions, theta, log_zeta) * center
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_lex_03_layouts_agree_after_a_permutation():
  x, positions = jnp.asarray(_x(), jnp.float32), jnp.arange(6)[None]
  order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
  for apply in (ops.apply_rope, lambda *a, **o: ops.apply_xpos(*a, role="key", **o)):
    np.testing.assert_array_equal(
      apply(x[..., order], positions, layout="half"), apply(x, positions)[..., order]
    )


def test_lex_01_xpos_limits():
  x, positions = jnp.asarray(_x(), jnp.float32), jnp.arange(6)[None]
  # No decay is RoPE, bit for bit.
  flat = ops.apply_xpos(x, positions, role="query", scale_base=math.inf)
  np.testing.assert_array_equal(flat, ops.apply_rope(x, positions))
  # No rotation is decay alone.
  decay = ops.apply_xpos(x, positions, role="query", base=None, scale_base=4)
  want = _oracle(_x(), np.arange(6), 0.0, np.log(_zeta(8)) / 4)
  np.testing.assert_allclose(decay, want, rtol=1e-5)
  # The same position on both sides is the plain product.
  k = jnp.asarray(_x(seed=1), jnp.float32)
  got = jnp.sum(
    ops.apply_xpos(x, positions, role="query", scale_base=4)
    * ops.apply_xpos(k, positions, role="key", scale_base=4),
    -1,
  )
  np.testing.assert_allclose(got, jnp.sum(x * k, -1), rtol=1e-5, atol=1e-5)


def _scores(encode_q, encode_k, positions, **options):
  q, k = (jnp.asarray(_x(len(positions), seed=s), jnp.float32) for s in (0, 1))
  q, k = encode_q(q, positions[None], **options), encode_k(k, positions[None], **options)
  return np.where(np.tri(len(positions)), np.einsum("BTNH,BSNH->BNTS", q, k), 0)


def _xpos(role):
  return lambda x, positions, **options: ops.apply_xpos(x, positions, role=role, **options)


@pytest.mark.parametrize("shift", [1, 17, 1000, 1_000_000])
def test_rope_scores_depend_on_distance_alone(shift):
  positions = jnp.array([0, 1, 40, 500, 2000, 2048])
  np.testing.assert_allclose(
    _scores(ops.apply_rope, ops.apply_rope, positions + shift),
    _scores(ops.apply_rope, ops.apply_rope, positions),
    atol=1e-5,
  )


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_lex_02_xpos_scores_depend_on_distance_alone(shift):
  positions, encode = jnp.array([0, 1, 40, 500, 1000, 1048]), (_xpos("query"), _xpos("key"))
  want = _scores(*encode, positions)
  np.testing.assert_allclose(_scores(*encode, positions + shift), want, atol=2e-5)
  np.testing.assert_allclose(_scores(*encode, positions, center=524), want, atol=2e-5)


def test_tables_are_float32_under_bfloat16():
  x, positions = jnp.asarray(_x(), jnp.bfloat16), jnp.array([[0, 1, 300, 2047, 4001, 8191]])
  got = ops.apply_rope(x, positions)
  want = ops.apply_rope(x.astype(jnp.float32), positions)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))  # Rounded once, at the end.


def test_lex_04_centers_keep_long_texts_within_range():
  positions = jnp.array([[0, 1, 4096, 8191]])
  x = jnp.ones((1, 4, 1, 8), jnp.float16)
  centered = [ops.apply_xpos(x, positions, role=r, center=4096) for r in ("query", "key")]
  assert all(jnp.isfinite(y).all() for y in centered)
  assert not jnp.isfinite(ops.apply_xpos(x, positions, role="key")).all()
  # Tile by tile there is no end: a query a million tokens in, and the keys of its own tile.
  positions = 2**20 + jnp.arange(4)[None]
  tile = jnp.full((1, 1), 2**20)
  q, k = (jnp.asarray(_x(4, seed=s), jnp.float32) for s in (0, 1))
  far = np.einsum(
    "BTNH,BSNH->BNTS",
    ops.apply_xpos(q, positions, role="query", center=tile),
    ops.apply_xpos(k, positions, role="key", center=tile),
  )
  near = np.einsum(
    "BTNH,BSNH->BNTS",
    ops.apply_xpos(q, jnp.arange(4)[None], role="query"),
    ops.apply_xpos(k, jnp.arange(4)[None], role="key"),
  )
  np.testing.assert_allclose(far, near, atol=1e-5)


def test_lex_03_gradients_are_the_transposed_maps():
  x, grad = (jnp.asarray(_x(seed=s), jnp.float32) for s in (0, 1))
  positions = jnp.array([[3, 0, 9, 100, 1, 2]])
  _, pull = jax.vjp(lambda x: ops.apply_rope(x, positions), x)
  np.testing.assert_allclose(pull(grad)[0], ops.apply_rope(grad, -positions), atol=1e-6)
  _, pull = jax.vjp(lambda x: ops.apply_xpos(x, positions, role="query", scale_base=64), x)
  want = ops.apply_xpos(grad, -positions, role="key", scale_base=64)  # Turned back, scaled alike.
  np.testing.assert_allclose(pull(grad)[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim,rope,xpos", [(64, 849.7, 172.9), (128, 1095.8, 218.6)])
def test_lex_07_expected_score_varies_as_in_figure_1(dim, rope, xpos):
  for scale_base, want in ((math.inf, rope), (512, xpos)):
    rises = np.diff(ops.xpos_curve(2048, dim, scale_base=scale_base))
    assert np.maximum(rises, 0).sum() == pytest.approx(want, rel=1e-3)
  # Figure 1's words: RoPE's curve goes on to oscillate, xPos's is smooth.
  if dim == 64:
    spread = [np.diff(ops.xpos_curve(2048, 64, scale_base=b))[1024:].std() for b in (math.inf, 512)]
    np.testing.assert_allclose(spread, [1.042, 0.052], rtol=1e-2)


def test_lex_07_the_curve_is_the_score_of_equal_vectors():
  """`q = k = (1, 0, 1, 0, ...)`, with the op as a calculator of `sum_i cos(n theta_i) zeta_i^n`."""
  x = jnp.broadcast_to(jnp.tile(jnp.array([1.0, 0.0]), 32), (1, 300, 1, 64))
  q = ops.apply_xpos(x, jnp.arange(300)[None], role="query", scale_base=64)
  want = ops.xpos_curve(300, 64, scale_base=64)
  np.testing.assert_allclose(q[0, :, 0, 0::2].sum(-1), want, atol=1e-4)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_lex_03_decay_is_what_the_scales_leave(layout):
  x, positions = jnp.asarray(_x(), jnp.float32), jnp.array([[0, 1, 5, 30, 100, 200]])
  options = dict(base=None, scale_base=40.0, layout=layout)
  decay = ops.xpos_decay(8, scale_base=40.0, layout=layout)
  scaled = ops.apply_xpos(x, positions, role="query", **options)
  np.testing.assert_allclose(scaled, x * np.exp(positions[..., None, None] * decay), rtol=1e-5)


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_lex_02_relative_to_twelve_digits(shift):
  with jax.enable_x64(True):
    q, k = (jnp.asarray(_x(5, seed=s)) for s in (0, 1))
    positions = jnp.array([[0, 3, 40, 200, 511]])

    def scores(positions, center):
      q_, k_ = (
        ops.apply_xpos(x, positions, role=r, scale_base=64, center=center)
        for x, r in ((q, "query"), (k, "key"))
      )
      return np.where(np.tri(5), np.einsum("BTNH,BSNH->BNTS", q_, k_), 0)

    want = scores(positions, 256)
    np.testing.assert_allclose(scores(positions + shift, 256 + shift), want, atol=1e-12)
    np.testing.assert_allclose(scores(positions, 100), want, atol=1e-12)


def test_lex_04_float16_holds_8192_tokens_about_their_middle():
  """The limits are `17.7 scale_base` tokens in float16, and 141.6 in float32 and bfloat16."""
  positions, x = jnp.arange(8192)[None], jnp.ones((1, 8192, 1, 8), jnp.float16)
  finite = lambda x, **o: bool(jnp.isfinite(ops.apply_xpos(x, positions, base=None, **o)).all())
  assert all(finite(x, role=r, center=4096) for r in ("query", "key"))
  assert not finite(x, role="key", center=0)
  assert finite(x.astype(jnp.bfloat16), role="key", center=0)
  assert all(finite(x, role=r, center=4096, scale_base=464) for r in ("query", "key"))
  assert not finite(x, role="key", center=4096, scale_base=460)


def test_sinusoidal():
  angles = np.array([0, 3, 5000])[:, None] * 10000.0 ** -(np.arange(3) / 3)
  got = ops.sinusoidal(jnp.array([[0, 3, 5000]]), 6)[0]
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got[:, 0::2], np.cos(angles), atol=1e-6)
  np.testing.assert_allclose(got[:, 1::2], np.sin(angles), atol=1e-6)


def test_alibi_slopes():
  np.testing.assert_allclose(ops.alibi_slopes(16), [2 ** (-(h + 1) / 2) for h in range(16)])
  want = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]  # Of 4, then every other of 8.
  np.testing.assert_allclose(ops.alibi_slopes(6), want)
  np.testing.assert_allclose(ops.alibi_slopes(1), [2.0**-8])


@pytest.mark.parametrize(
  "call",
  [
    lambda x, p: ops.apply_rope(x[..., :7], p),
    lambda x, p: inspect.unwrap(ops.rope_frequencies)(8, grid="log"),
    lambda x, p: inspect.unwrap(ops.apply_xpos)(x, p, role="value"),
    lambda x, p: ops.xpos_decay(7),
    lambda x, p: ops.xpos_decay(8, scale_base=0),
  ],
)
def test_rejects(call):  # Unwrapped, to get past the test suite's shape checks.
  with pytest.raises(ValueError, match="="):
    call(jnp.zeros((1, 6, 2, 8)), jnp.arange(6)[None])


def test_document_positions_restart_with_the_segment_id():
  ids = jnp.array([[1, 1, 1, 2, 2, 0], [3, 2, 2, 2, 2, 2]])
  want = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
  np.testing.assert_array_equal(ops.document_positions(ids), want)
