"""Noise of latents, what holds them in place, and codes."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latentlab import ops
from latentlab.ops.latents import Noise

_ROWS = 20_000


def _drawn(noise, shape, key, mean=0.0, log_variances=None):
  means = jnp.full(shape, mean)
  draw = jax.jit(lambda key: ops.sample_latents(key, means, noise, log_variances))
  return np.asarray(draw(key), np.float64)


def test_sigma_vae_draws_one_scale_an_example(key):
  z = _drawn(Noise("gaussian_scale", 0.75), (_ROWS, 8, 8), key, mean=3.0) - 3.0
  flat = z.reshape(_ROWS, -1)
  # 64 numbers of one scale tell it to 9 %; over examples the scale is a half-normal.
  scales = np.sqrt(np.square(flat).mean(1))
  np.testing.assert_allclose(scales.mean(), 0.75 * 0.9974, rtol=0.02)  # E|s| = std * 0.9974.
  np.testing.assert_allclose(flat.std(), 0.75 / 0.8, rtol=0.02)
  kurtosis = (flat**4).mean() / np.square((flat**2).mean())
  np.testing.assert_allclose(kurtosis, 9.0, rtol=0.1)  # A product of two Gaussians: 3 * 3.
  # Given its scale, an example's noise is Gaussian, and tokens share it.
  within = (flat**4).mean(1) / np.square((flat**2).mean(1))
  np.testing.assert_allclose(np.median(within), 3.0, rtol=0.08)
  halves = np.log(np.square(z).mean(2))
  assert np.corrcoef(halves[:, 0], halves[:, 7])[0, 1] > 0.8


def test_a_scale_for_each_token(key):
  z = _drawn(Noise("gaussian_scale", 0.5, per="token"), (2_000, 2, 64), key)
  scales = np.log(np.square(z).mean(2))
  assert abs(np.corrcoef(scales.T)[0, 1]) < 0.1
  np.testing.assert_allclose(np.sqrt(np.square(z).mean(2)).mean(), 0.5 * 0.9974, rtol=0.05)


def test_other_noises(key):
  z = _drawn(Noise("fixed", 0.3), (_ROWS, 4), key, mean=-1.0)
  np.testing.assert_allclose([z.mean(), z.std()], [-1, 0.3], atol=0.01)
  np.testing.assert_allclose(((z + 1) ** 4).mean() / 0.3**4, 3.0, rtol=0.1)
  assert (_drawn(Noise("none", 0.0), (5, 4), key, mean=2.0) == 2.0).all()
  log_variances = jnp.log(jnp.square(jnp.array([0.1, 2.0])))
  z = _drawn(
    Noise("learned", 0.0), (_ROWS, 2), key, 0.0, jnp.broadcast_to(log_variances, (_ROWS, 2))
  )
  np.testing.assert_allclose(z.std(0), [0.1, 2.0], rtol=0.03)
  z = _drawn(Noise("fixed", 0.3, on_sphere=True), (7, 5, 4), key, mean=1.0)
  np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 2.0, rtol=1e-6)
  assert z.std() > 0.1


def test_level_of_noise():
  assert float(Noise("gaussian_scale", 0.75).level()) == 0.75
  assert float(Noise("none", 0.0).level()) == 0.0
  stds = jnp.array([[[0.5, 1.5], [3.0, 3.0]]])
  noise, log_variances = Noise("learned", 0.0), 2 * jnp.log(stds)
  np.testing.assert_allclose(noise.level(log_variances), 2.0, rtol=1e-6)
  np.testing.assert_allclose(noise.level(log_variances, jnp.array([[1.0, 0.0]])), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(kind="gauss"), "kind='gauss'"),
    (dict(per="channel"), "per='channel'"),
    (dict(std=0.0), "std=0.0 of 'gaussian_scale' noise must be positive"),
    (dict(kind="fixed", std=float("nan")), "std=nan"),
    (dict(kind="none", std=0.5), "std=0.5 means nothing to 'none'"),
  ],
)
def test_bad_noises(fields, message):
  with pytest.raises(ValueError, match=message):
    Noise(**fields)


def test_log_variances_belong_to_learned_noise(key):
  sample, x = inspect.unwrap(ops.sample_latents), jnp.ones((2, 3))
  for noise, log_variances in ((Noise("learned", 0.0), None), (Noise("fixed", 0.1), x)):
    with pytest.raises(ValueError, match="log_variances"):
      sample(key, x, noise, log_variances)


def test_gaussian_kl_and_its_gradient():
  rng = np.random.default_rng(0)
  means, log_variances = rng.normal(size=(2, 6, 5)).astype(np.float32) * 2
  got = ops.gaussian_kl(jnp.array(means), jnp.array(log_variances))
  mu, variance = means.astype(np.float64), np.exp(log_variances.astype(np.float64))
  np.testing.assert_allclose(got, (mu**2 + variance - 1 - np.log(variance)) / 2, rtol=1e-5)
  total = lambda m, v: ops.gaussian_kl(m, v).sum()
  grads = jax.grad(total, argnums=(0, 1))(jnp.array(means), jnp.array(log_variances))
  for got, want in zip(grads, (mu, (variance - 1) / 2), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  tiny = float(ops.gaussian_kl(jnp.zeros(1), jnp.full(1, 1e-4))[0])
  np.testing.assert_allclose(tiny, 1e-8 / 4, rtol=1e-2)  # What is left where nothing is known.


@pytest.mark.parametrize("beta", [1.0, 1e-2, 1e-4])
def test_a_plain_vaes_variances_are_those_of_the_closed_form(beta, key):
  """sigma_j^2 = beta / (beta + 2 |d Dec / d z_j|^2), exactly, where the decoder is linear.

  It falls with beta: the plain VAE's noise collapses.
  """
  decoder = jax.random.normal(key, (4, 9)) * jnp.array([0.03, 0.3, 1.0, 3.0])[:, None]
  media = jax.random.normal(jax.random.fold_in(key, 1), (32, 9))

  def loss(params):
    means, log_variances = params
    z = means + jnp.zeros((32, 4))
    # The expectation over the noise, written out: a linear decoder scales variances.
    errors = jnp.square(z @ decoder - media).sum(1)
    errors += jnp.sum(jnp.exp(log_variances) * jnp.square(decoder).sum(1), -1)
    return (
      errors + beta * ops.gaussian_kl(z, jnp.broadcast_to(log_variances, z.shape)).sum(1)
    ).mean()

  slopes = np.square(np.asarray(decoder, np.float64)).sum(1)
  want = beta / (beta + 2 * slopes)
  params = jnp.zeros((32, 4)), jnp.zeros(4)
  optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 2_000), b2=0.95)

  @jax.jit
  def train(params):
    def step(carry, _):
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=2_000)[0][0]

  np.testing.assert_allclose(np.exp(train(params)[1]), want, rtol=0.02)
  at_optimum = jax.grad(loss)((params[0], jnp.log(jnp.array(want, jnp.float32))))[1]
  np.testing.assert_allclose(at_optimum, 0, atol=1e-5 * max(beta, 1e-2))


def test_the_drawn_loss_has_the_expected_gradient(key):
  """Draws of `sample_latents` have the variance's gradient that the closed form stands on."""
  slope = jnp.array([0.5, 2.0])

  def loss(log_variances, key):
    wide = jnp.broadcast_to(log_variances, (_ROWS, 2))
    z = ops.sample_latents(key, jnp.zeros((_ROWS, 2)), Noise("learned", 0.0), wide)
    return jnp.square(z * slope).sum(1).mean()

  log_variances = jnp.array([-1.0, 0.3])
  got = jax.jit(jax.grad(loss))(log_variances, key)
  np.testing.assert_allclose(got, np.exp(log_variances) * slope**2, rtol=0.04)


def test_sphere():
  x = jnp.array([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
  got = ops.to_sphere(x)
  np.testing.assert_allclose(got[0], [1.2, 1.6, 0, 0], rtol=1e-6)
  assert (np.asarray(got[1]) == 0).all()
  np.testing.assert_allclose(ops.to_sphere(x, 1.0)[0], [0.6, 0.8, 0, 0], rtol=1e-6)
  grad = jax.grad(lambda x: (ops.to_sphere(x) * jnp.arange(4.0)).sum())(x)
  assert np.isfinite(grad).all()
  np.testing.assert_allclose((grad[0] * x[0]).sum(), 0, atol=1e-5)  # Along itself nothing changes.


def test_nearest_codes_are_the_nearest(key):
  x, codebook = (
    jax.random.normal(key, (3, 5, 4)),
    jax.random.normal(jax.random.fold_in(key, 1), (9, 4)),
  )
  got = ops.nearest_codes(x, codebook)
  distances = np.square(np.asarray(x, np.float64)[..., None, :] - np.asarray(codebook)).sum(-1)
  np.testing.assert_array_equal(got, distances.argmin(-1))
  assert got.dtype == jnp.int32
  same = jnp.concatenate([codebook, codebook])
  assert (np.asarray(ops.nearest_codes(codebook, same)) == np.arange(9)).all()


def test_straight_through_passes_the_gradient_on():
  x, value = jnp.array([0.3, -2.0]), jnp.array([1.0, -1.0])
  f = lambda x, value: (ops.straight_through(x, value) ** 2).sum()
  np.testing.assert_allclose(f(x, value), 2.0, rtol=1e-6)
  grads = jax.grad(f, argnums=(0, 1))(x, value)
  np.testing.assert_allclose(grads[0], 2 * value, rtol=1e-6)
  assert (np.asarray(grads[1]) == 0).all()


def test_statistics_of_batches_leave_padding_out():
  rng = np.random.default_rng(0)
  x = rng.normal(2.0, 3.0, (6, 4, 2)).astype(np.float32)
  weights = np.array([1, 1, 1, 1, 0, 0], np.float32)
  got = ops.weighted_std(jnp.array(x), jnp.array(weights))
  np.testing.assert_allclose(got, x[:4].std(), rtol=1e-5)
  codes = jnp.array([[0, 0], [1, 2], [5, 5]])
  perplexity, used = ops.code_usage(codes, jnp.array([1.0, 1.0, 0.0]), 8)
  shares = np.array([0.5, 0.25, 0.25])
  np.testing.assert_allclose(perplexity, np.exp(-(shares * np.log(shares)).sum()), rtol=1e-6)
  np.testing.assert_allclose(used, 3 / 8)


def test_items_behind_latents():
  # `t z z t | t t z | t t | padding`
  kinds = jnp.array([[0, 2, 1, 0, 0, 0, 1, 0, 0, 0]])
  ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 0]])
  assert ops.behind_latents(kinds, ids).tolist() == [[i == 3 for i in range(10)]]
