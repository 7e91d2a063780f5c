"""Cross entropy in chunks and whole, sharded and not, against autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from latentlab import ops


def _inputs(batch=2, length=6, dim=8, vocab=24):
  rng = np.random.default_rng(0)
  return (
    rng.normal(size=(batch, length, dim)),
    rng.normal(size=(dim, vocab)),
    jnp.asarray(rng.integers(0, vocab, (batch, length))),
    rng.normal(size=(batch, length)),
  )


def _want(hidden, kernel, targets, weights):
  def loss(hidden, kernel):
    logs = jax.nn.log_softmax(hidden @ kernel)
    nll = -jnp.take_along_axis(logs, targets[..., None], -1)[..., 0]
    return jnp.sum(nll * weights), nll

  with jax.enable_x64(True):
    args = (jnp.asarray(hidden, jnp.float64), jnp.asarray(kernel, jnp.float64))
    (_, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)
  return nll, *grads


def _ours(targets, weights, **options):
  def loss(hidden, kernel):
    nll = ops.cross_entropy(hidden, kernel, targets, **options)
    return jnp.sum(nll * weights), nll

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 8, 100])
def test_values_and_gradients(chunk_size):
  hidden, kernel, targets, weights = _inputs()
  hidden *= 30  # Logits of hundreds: unshifted exponentials overflow.
  (_, nll), grads = _ours(targets, weights, chunk_size=chunk_size)(
    jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
  )
  assert nll.dtype == jnp.float32
  for a, b in zip((nll, *grads), _want(hidden, kernel, targets, weights), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_bfloat16_hidden_with_a_float32_kernel(chunk_size):
  hidden, kernel, targets, weights = _inputs(dim=32)
  hidden, kernel = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(kernel, jnp.float32)
  (_, nll), grads = _ours(targets, weights, chunk_size=chunk_size)(hidden, kernel)
  assert (nll.dtype, *(g.dtype for g in grads)) == (jnp.float32, jnp.bfloat16, jnp.float32)
  want = _want(hidden, kernel.astype(jnp.bfloat16), targets, weights)
  for a, b in zip((nll, *grads), want, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b)
    assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)
  np.testing.assert_allclose(nll, want[0], rtol=1e-5)  # Logits accumulate in float32.


def test_chunks_never_hold_all_logits():
  hidden, kernel, targets, weights = _inputs(2, 64, 8, 4096)
  args = jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
  whole, chunked = (
    _ours(targets, weights, chunk_size=c).lower(*args).compile().as_text() for c in (None, 100)
  )
  assert "f32[2,64,4096]" in whole or "f32[128,4096]" in whole
  assert "[2,64,4096]" not in chunked and "[128,4096]" not in chunked


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_within_shard_map(chunk_size):
  hidden, kernel, targets, weights = _inputs()
  mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

  def loss(hidden, kernel, targets, weights):
    nll = ops.cross_entropy(hidden, kernel, targets, chunk_size=chunk_size)
    return jax.lax.psum(jnp.sum(nll * weights), "data")

  mapped = jax.shard_map(
    loss, mesh=mesh, in_specs=(P("data"), P(), P("data"), P("data")), out_specs=P()
  )
  grads = jax.jit(jax.grad(mapped, (0, 1)))(
    *(jnp.asarray(x, jnp.float32) for x in (hidden, kernel)),
    targets,
    jnp.asarray(weights, jnp.float32),
  )
  for a, b in zip(grads, _want(hidden, kernel, targets, weights)[1:], strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_sharded_vocabulary_stays_sharded():
  hidden, kernel, targets, weights = _inputs(2, 8, 8, 4096)
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
  specs = P("data"), P(None, "tensor")
  args = [
    jax.device_put(jnp.asarray(x, jnp.float32), jax.NamedSharding(mesh, s))
    for x, s in zip((hidden, kernel), specs, strict=True)
  ]
  with jax.set_mesh(mesh):
    compiled = _ours(targets, weights).lower(*args).compile()
    (_, nll), grads = compiled(*args)
  for a, b in zip((nll, *grads), _want(hidden, kernel, targets, weights), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  text = compiled.as_text()
  assert "4096]" not in text.split("ENTRY")[1]  # Neither logits nor kernel are ever whole.
  assert grads[1].sharding.spec == P(None, "tensor")


def test_rejects_a_chunk_of_nothing():
  with pytest.raises(ValueError, match="chunk_size=0"):
    ops.cross_entropy(jnp.zeros((1, 1, 2)), jnp.zeros((2, 3)), jnp.zeros((1, 1), int), chunk_size=0)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_bfloat16_gradients_stay_good_for_confident_models(scale):
  """Logits rounded to bfloat16 would be off by whole nats; their log-probabilities are not."""
  keys = jax.random.split(jax.random.key(0), 2)
  hidden = (scale * jax.random.normal(keys[0], (2, 8, 16))).astype(jnp.bfloat16)
  kernel = jax.random.normal(keys[1], (16, 64)).astype(jnp.bfloat16)
  targets = jnp.argmax(hidden @ kernel, axis=-1)

  def naive(hidden, kernel):
    log_probs = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1).sum()

  def ours(hidden, kernel):
    return ops.cross_entropy(hidden, kernel, targets).sum()

  want = jax.grad(naive, (0, 1))(hidden.astype(jnp.float32), kernel.astype(jnp.float32))
  got = jax.jit(jax.grad(ours, (0, 1)))(hidden, kernel)
  for g, w in zip(got, want, strict=True):
    norm = np.linalg.norm(w)
    assert np.linalg.norm(g.astype(jnp.float32) - w) <= 0.02 * norm
