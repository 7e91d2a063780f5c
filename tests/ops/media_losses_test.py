"""Perceptual, spectral and hinge losses against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops
from latentlab.eval import metrics


def test_perceptual_distance_is_that_of_directions():
  rng = np.random.default_rng(0)
  layers = [rng.normal(size=(2, 2, 5, 4, 3)), rng.normal(size=(2, 2, 7, 6))]
  a, b = ([jnp.array(x[i], jnp.float32) for x in layers] for i in range(2))
  want = 0.0
  for x in layers:
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    square = np.square(unit[0] - unit[1]).sum(-1)
    want = want + square.reshape(2, -1).mean(1)
  np.testing.assert_allclose(ops.perceptual_distance(a, b), want, rtol=1e-5)
  assert (np.asarray(ops.perceptual_distance(a, a)) == 0).all()
  scaled = ops.perceptual_distance([3 * x for x in a], b)
  np.testing.assert_allclose(scaled, want, rtol=1e-5)
  zeros = [jnp.zeros_like(x) for x in a]
  grads = jax.grad(lambda x: ops.perceptual_distance(x, b).sum())(zeros)
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("length, window", [(1000, 128), (150, 256)])
def test_magnitudes_are_those_of_the_metrics(length, window):
  """The same frames as `metrics.log_mel`, which are scipy's."""
  rng = np.random.default_rng(0)
  sound = rng.normal(size=length)
  bank = metrics.mel_filterbank(window // 16, window, 8000)
  got = ops.magnitudes(jnp.array(sound[None], jnp.float32), window, window // 4)[0] @ bank
  options = dict(num_mels=window // 16, window=window, hop=window // 4)
  want = metrics.log_mel(sound, 8000, **options)
  np.testing.assert_allclose(np.log10(np.maximum(got, 1e-5)), want, atol=1e-4)


def test_spectral_distance_is_the_mean_over_resolutions():
  rng = np.random.default_rng(1)
  a, b = jnp.array(rng.normal(size=(2, 3, 500)) * 0.1, jnp.float32)
  banks = [metrics.mel_filterbank(w // 16, w, 8000) for w in (64, 256)]
  want = 0.0
  for w in (64, 256):
    options = dict(num_mels=w // 16, window=w, hop=w // 4)
    logs = [np.stack([metrics.log_mel(s, 8000, **options) for s in np.asarray(x)]) for x in (a, b)]
    want = want + np.abs(logs[0] - logs[1]).mean((1, 2)) / 2
    want = want + np.abs(10 ** logs[0] - 10 ** logs[1]).mean((1, 2)) / 2
  got = jax.jit(lambda a, b: ops.spectral_distance(a, b, banks))(a, b)
  np.testing.assert_allclose(got, want, rtol=1e-3)
  silence = jnp.zeros((1, 500))
  grad = jax.jit(jax.grad(lambda x: ops.spectral_distance(x, a[:1], banks).sum()))(silence)
  assert np.isfinite(grad).all()


def test_hinge_losses():
  real = [jnp.array([[0.5, 2.0]]), jnp.array([[-1.0]])]
  fake = [jnp.array([[-3.0, 0.0]]), jnp.array([[0.5]])]
  # Maps weigh alike, whatever their sizes: ((.5 + 0)/2 + 2)/2 + ((0 + 1)/2 + 1.5)/2.
  np.testing.assert_allclose(ops.hinge_real_fake(real, fake), [(0.25 + 2) / 2 + (0.5 + 1.5) / 2])
  np.testing.assert_allclose(ops.hinge_fooled(fake), [-(-1.5 + 0.5) / 2])
