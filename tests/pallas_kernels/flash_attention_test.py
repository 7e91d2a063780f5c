"""Each implementation of softmax attention against all scores at once, in float64."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import flash_attention, reference
from pallas_kernels.visibility import Visibility

NAMES = ("out", "dq", "dk", "dv")


def _inputs(batch, length, kv_length, heads, kv_heads, head_dim, value_dim, dtype=jnp.float32):
  rng = np.random.default_rng(length + kv_length)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return (
    draw(batch, length, heads, head_dim),
    draw(batch, kv_length, kv_heads, head_dim),
    draw(batch, kv_length, kv_heads, value_dim),
  )


def _outputs_and_grads(op, args):
  @jax.jit
  def run(*args):
    out, vjp = jax.vjp(op, *args)
    leaves, tree = jax.tree.flatten(out)
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    return *leaves, *vjp(jax.tree.unflatten(tree, weights))

  return run(*args)


def _assert_matches(implementation, args, tolerance=1e-5, **options):
  got = _outputs_and_grads(
    functools.partial(flash_attention, implementation=implementation, **options), args
  )
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
    op = functools.partial(flash_attention, implementation="naive", **options)
    want = _outputs_and_grads(op, wide)
  for i, (a, b) in enumerate(zip(got, want, strict=True)):
    a, b = np.asarray(a, np.float64), np.asarray(b)
    assert (np.isfinite(a) == np.isfinite(b)).all(), i
    a, b = (np.where(np.isfinite(b), x, 0) for x in (a, b))
    # A gradient may be zero, and then only its rounding is left.
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), b.size**0.5), i


def _explicit(q, k, v, seen):
  """The equation over every row, in numpy."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[3]))
  group = q.shape[2] // k.shape[2]
  for b, t, n in np.ndindex(*q.shape[:3]):
    keys = np.flatnonzero(seen[b, t])
    if keys.size:
      weights = np.exp(k[b, keys, n // group] @ q[b, t, n])
      out[b, t, n] = weights / weights.sum() @ v[b, keys, n // group]
  return out


def test_naive_is_the_equation():
  args = _inputs(2, 5, 7, 4, 2, 3, 6)
  ids, kv_ids = np.array([[1, 1, 2, 2, 2], [1, 2, 2, 3, 3]]), np.array([[1] * 3 + [2] * 4] * 2)
  lengths = np.array([6, 3])
  t, s = np.arange(5)[:, None] + 2, np.arange(7)
  seen = (
    (s <= t) & (t - s < 4) & (ids[:, :, None] == kv_ids[:, None]) & (s < lengths[:, None, None])
  )
  options = dict(window=4, q_offset=2, lengths=jnp.asarray(lengths))
  options |= dict(segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(kv_ids))
  out = flash_attention(*args, implementation="naive", **options)
  np.testing.assert_allclose(out, _explicit(*args, seen), atol=1e-5)


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(causal=False),
    dict(window=70),
    dict(window=1),
    dict(scale=0.3),
    dict(return_lse=True),
    dict(q_offset=jnp.int32(3)),
    dict(q_offset=jnp.array([5, 0])),
    dict(lengths=jnp.array([90, 0]), return_lse=True),
    dict(segment_ids=jnp.arange(150)[None].repeat(2, 0) // 40),
    dict(segment_ids=jnp.arange(150)[None].repeat(2, 0) // 40, lengths=jnp.array([150, 77])),
  ],
  ids=lambda o: "-".join(o) or "causal",
)
def test_blocks_match(options):
  _assert_matches("xla", _inputs(2, 150, 150, 4, 2, 8, 12), **options)


@pytest.mark.parametrize(
  "length, kv_length, offset", [(1, 1, 0), (70, 200, 130), (640, 640, 0), (5, 90, 85)]
)
def test_any_length(length, kv_length, offset):
  _assert_matches("xla", _inputs(1, length, kv_length, 2, 2, 4, 4), q_offset=offset)


def test_many_blocks_share_code():
  """More blocks than are written out, and more than have keys of their own."""
  args = _inputs(1, 100, 100, 2, 1, 4, 4)
  want = _outputs_and_grads(lambda *a: flash_attention(*a, window=9, implementation="naive"), args)
  for block_size in (11, 2):

    def op(*a, block_size=block_size):
      options = reference.Options(window=9)
      return reference.blockwise(options, *a, Visibility(), block_size=block_size)[0]

    for got, expected in zip(_outputs_and_grads(op, args), want, strict=True):
      np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize("length", [577, 700])
def test_packed_rows_of_many_ragged_blocks(length):
  """The last of more blocks than are written out hangs over the end."""
  ids = jnp.arange(length)[None] // 100
  _assert_matches("xla", _inputs(1, length, length, 1, 1, 4, 4), segment_ids=ids)


def test_scores_may_be_extreme():
  q, k, v = _inputs(1, 80, 80, 2, 2, 8, 8)
  q, k = jnp.round(q), jnp.round(k)  # Integers, whose scores float32 holds exactly.
  # The log-sum-exps that the backward starts from are rounded at 1e5.
  _assert_matches("xla", (1e4 * q, k, v), tolerance=1e-2)


def test_padding_may_hold_anything():
  q, k, v = _inputs(2, 80, 80, 2, 2, 8, 8)
  lengths = jnp.array([80, 33])
  hidden = (jnp.arange(80) >= lengths[:, None])[..., None, None]
  clean = _outputs_and_grads(functools.partial(flash_attention, lengths=lengths), (q, k, v))
  k, v = (jnp.where(hidden, jnp.nan, x) for x in (k, v))
  poisoned = _outputs_and_grads(functools.partial(flash_attention, lengths=lengths), (q, k, v))
  for name, a, b in zip(NAMES, poisoned, clean, strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_bfloat16():
  _assert_matches("xla", _inputs(1, 130, 130, 2, 1, 16, 16, jnp.bfloat16), tolerance=1e-2)


def test_holds_no_square():
  """The largest temporary of forward and backward is a block's rows of scores."""
  args = [jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)] * 3
  grad = jax.grad(lambda *a: flash_attention(*a, implementation="xla").sum(), argnums=(0, 1, 2))
  stats = jax.jit(grad).lower(*args).compile().memory_analysis()
  assert stats.temp_size_in_bytes < 2048 * 2048 * 4 / 4


@pytest.mark.parametrize(
  "shape, options",
  [
    ((1, 200, 200, 2, 1, 64, 64), dict(scale=0.5)),
    ((1, 256, 256, 1, 1, 128, 128), dict(window=70)),
    ((1, 128, 256, 1, 1, 64, 128), dict(causal=False)),
    ((2, 160, 160, 1, 1, 64, 64), dict(segment_ids=jnp.arange(160)[None].repeat(2, 0) // 50)),
  ],
  ids=("padded", "window", "full", "packed"),
)
def test_splash(shape, options):
  _assert_matches("splash", _inputs(*shape), **options)


def test_compiles_splash_for_a_tpu_by_itself(tpu_mesh):
  args = [jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)] * 3
  mesh = tpu_mesh("v5e:2x2")
  with jax.set_mesh(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    text = jax.jit(flash_attention, in_shardings=sharding).lower(*args).compile().as_text()
  assert "splash" in text


@pytest.mark.parametrize(
  "name, options, reason",
  [
    ("splash", dict(return_lse=True), "no gradient"),
    ("splash", dict(lengths=jnp.array([3])), "lengths"),
    ("splash", dict(q_offset=jnp.int32(1)), "q_offset"),
    ("splash", dict(q_offset=-1), "without a key"),
    ("splash", dict(q_offset=3, window=3), "without a key"),
    ("cudnn", dict(), "the target is a cpu"),
  ],
)
def test_refusals_say_why(name, options, reason):
  args = _inputs(1, 4, 4, 1, 1, 8, 8)
  with pytest.raises(ExceptionGroup) as error:
    flash_attention(*args, implementation=name, **options)
  assert reason in str(error.value.exceptions[0])


@pytest.mark.gpu_only
@pytest.mark.parametrize(
  "options",
  [dict(), dict(causal=False), dict(window=70), dict(lengths=jnp.array([128, 50]))],
  ids=str,
)
def test_cudnn(options):
  args = _inputs(2, 128, 128, 4, 2, 64, 64, jnp.bfloat16)
  _assert_matches("cudnn", args, tolerance=1e-2, **options)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(k=jnp.ones((1, 4, 3, 8))), "divide N"),
    (dict(v=jnp.ones((1, 5, 1, 8))), "v has shape"),
    (dict(lengths=jnp.ones((2,), jnp.int32)), "lengths has shape"),
    (dict(kv_segment_ids=jnp.ones((1, 4), jnp.int32)), "without segment_ids"),
    (dict(lengths=jnp.ones((1,))), "integer"),
    (dict(q=jnp.ones((1, 0, 2, 8))), "at least one"),
    (dict(window=0), "window=0"),
    (dict(window=2, causal=False), "causal=False"),
    (dict(implementation="fast"), "fast"),
  ],
)
def test_bad_arguments(change, message):
  q, k, v = _inputs(1, 4, 4, 2, 1, 8, 8)
  arguments = dict(q=q, k=k, v=v) | change
  with pytest.raises(ValueError, match=message):
    inspect.unwrap(flash_attention)(**arguments)  # Past the shape checks of the tests.
