"""MAR's head: its two losses, and the variance that it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import ops
from latentlab.layers import MarHeadConfig, Shared, SolverSettings, initializers

WIDTH, DIM = 24, 3
CONFIG = MarHeadConfig(depth=1, width=16, num_draws=4)
HEAD = CONFIG.module(
  Shared(WIDTH, jnp.float32, initializers.make("linear", num_layers=1, embed_dim=WIDTH)), DIM
)
ALPHA, SIGMA = ops.NoiseSchedule().tables


def _inputs(*lead, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  return jax.random.normal(keys[0], (*lead, WIDTH)), jax.random.normal(keys[1], (*lead, DIM))


@functools.cache
def _params(random=True):
  init = functools.partial(HEAD.init, method="losses")
  args = (jax.random.key(0), *_inputs(2), jax.random.key(1))
  if not random:
    return nn.unbox(jax.jit(init)(*args))["params"]
  rng, shapes = np.random.default_rng(0), nn.unbox(jax.eval_shape(init, *args))["params"]
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


@functools.cache
def _compiled(method):
  return jax.jit(lambda params, *args: HEAD.apply({"params": params}, *args, method=method))


def _apply(*args, params=None, method="__call__"):
  return _compiled(method)(_params() if params is None else params, *args)


def test_parameters_are_counted():
  assert sum(x.size for x in jax.tree.leaves(_params())) == CONFIG.num_params(WIDTH, DIM)


def test_it_starts_from_zero_and_between_the_variances():
  hidden, latents = _inputs(50)
  noise, share = _apply(latents, jnp.full(50, 500), hidden, params=_params(random=False))
  np.testing.assert_array_equal(noise, 0)
  np.testing.assert_array_equal(share, 0.5)
  t = jax.random.randint(jax.random.key(2), (50, 4), 0, 1000)
  noise = jax.random.normal(jax.random.key(3), (50, 4, DIM))
  errors, _ = _apply(hidden, latents, t, noise, params=_params(random=False), method="losses_at")
  np.testing.assert_allclose(errors, np.square(noise).mean((1, 2)), rtol=1e-5)


def _posterior(t, noisy, clean):
  """Mean and variance of `x^{t-1}` given `x^t` and the latent, by DDPM's equations 6 and 7."""
  kept, before = ALPHA[t] ** 2, ALPHA[t - 1] ** 2 if t else 1.0
  beta = 1 - kept / before
  mean = np.sqrt(before) * beta / (1 - kept) * clean
  mean = mean + np.sqrt(1 - beta) * (1 - before) / (1 - kept) * noisy
  return mean, beta * (1 - before) / (1 - kept), beta


def test_losses_are_those_of_the_two_papers():
  """KL between Gaussians, of means and variances and not of what cancels between them."""
  hidden, latents = _inputs(4)
  times = np.array([0, 1, 500, 999])
  noise = np.random.default_rng(0).normal(size=(4, 1, DIM)).astype(np.float32)
  args = (hidden, latents, jnp.asarray(times)[:, None], jnp.asarray(noise))
  errors, bound = _apply(*args, method="losses_at")
  noisy = jnp.asarray(ALPHA[times, None] * latents + SIGMA[times, None] * noise[:, 0])
  said, share = (
    np.asarray(x, np.float64) for x in _apply(noisy.astype(jnp.float32), jnp.asarray(times), hidden)
  )
  np.testing.assert_allclose(errors, np.square(said - noise[:, 0]).mean(-1), rtol=1e-4)
  clean = np.asarray(latents, np.float64)
  noisy = ALPHA[times, None] * clean + SIGMA[times, None] * noise[:, 0]
  for i, t in enumerate(times):
    mean, variance, beta = _posterior(t, noisy[i], clean[i])
    predicted = (noisy[i] - SIGMA[t] * said[i]) / ALPHA[t]
    model_mean = _posterior(t, noisy[i], predicted)[0]
    floor = _posterior(1, 0.0, 0.0)[1] if t == 0 else variance
    model = np.exp(share[i] * np.log(beta) + (1 - share[i]) * np.log(floor))
    if t == 0:
      want = 0.5 * (np.log(2 * np.pi * model) + (clean[i] - model_mean) ** 2 / model)
    else:
      want = np.log(np.sqrt(model / variance)) - 0.5
      want = want + (variance + (mean - model_mean) ** 2) / (2 * model)
    np.testing.assert_allclose(bound[i], want.mean() / np.log(2), rtol=2e-3, err_msg=str(t))


def test_the_bound_teaches_the_variance_alone():
  hidden, latents = _inputs(3)
  t, noise = jnp.array([[1], [300], [900]]), jnp.ones((3, 1, DIM))
  args = (hidden, latents, t, noise)
  loss = lambda p: HEAD.apply({"params": p}, *args, method="losses_at")[1].mean()
  grad = jax.jit(jax.grad(loss))(_params())["out_proj"]["proj"]["kernel"]
  np.testing.assert_array_equal(grad[:, :DIM], 0)
  assert (np.abs(grad[:, DIM:]).max(0) > 0).all()


def _draw(hidden, null=None, *, keys, progress=None, **settings):
  settings = SolverSettings(**dict(solver="ancestral", num_steps=3) | settings)
  return _apply(hidden, null, keys, settings, progress, method="draw")


def test_draws_are_the_plain_loop_of_ancestral_steps():
  (hidden, _), (null, _) = _inputs(2), _inputs(2, seed=1)
  keys = jax.random.split(jax.random.key(3), 2)
  got = _draw(hidden, null, keys=keys, guidance=1.5, temperature=0.7)
  pairs = [jax.random.split(key) for key in keys]
  normal = lambda key: np.asarray(jax.random.normal(key, (DIM,)), np.float64)
  x = np.stack([normal(start) for start, _ in pairs])
  call = jax.jit(lambda x, t, h: HEAD.apply({"params": _params()}, x, t, h))
  grid = [999, 666, 333]
  for i, (t, following) in enumerate(zip(grid, [*grid[1:], None], strict=True)):
    outputs = [call(jnp.asarray(x, jnp.float32), jnp.full(2, t), h) for h in (hidden, null)]
    (noise, share), (other, _) = ([np.asarray(y, np.float64) for y in o] for o in outputs)
    noise = other + 1.5 * (noise - other)
    clean = (x - SIGMA[t] * noise) / ALPHA[t]
    if following is None:
      x = clean
      break
    before = ALPHA[following] ** 2
    kept, beta = ALPHA[t] ** 2, 1 - ALPHA[t] ** 2 / before
    small = beta * (1 - before) / (1 - kept)
    mean = np.sqrt(before) * beta / (1 - kept) * clean
    mean = mean + np.sqrt(1 - beta) * (1 - before) / (1 - kept) * x
    std = np.exp(0.5 * (share * np.log(beta) + (1 - share) * np.log(small)))
    fresh = np.stack([normal(jax.random.fold_in(step, i)) for _, step in pairs])
    x = mean + 0.7 * std * fresh
  np.testing.assert_allclose(got, x, rtol=2e-3, atol=2e-3 * np.abs(x).max())


def test_rows_are_their_own():
  hidden, _ = _inputs(3)
  keys = jax.random.split(jax.random.key(3), 3)
  whole, part = _draw(hidden, keys=keys), _draw(hidden[1:], keys=keys[1:])
  np.testing.assert_allclose(part, whole[1:], rtol=1e-3, atol=1e-4)
  assert whole.dtype == jnp.float32


def test_other_solvers_use_the_noise_alone():
  (hidden, _), (null, _) = _inputs(2), _inputs(2, seed=1)
  keys = jax.random.split(jax.random.key(3), 2)
  progress = jnp.array([0.0, 1.0])
  options = dict(guidance=3.0, guidance_kind="linear", progress=progress, lambda_min=-5.0)
  got = _draw(hidden, null, keys=keys, solver="ddim", num_steps=2, **options)
  starts = [jax.random.split(key)[0] for key in keys]
  x = np.stack([np.asarray(jax.random.normal(key, (DIM,)), np.float64) for key in starts])
  call = jax.jit(lambda x, t, h: HEAD.apply({"params": _params()}, x, t, h)[0])
  first, second = ops.sample_grid(ops.NoiseSchedule(), 2, -5.0)
  for t, alpha, sigma in ((first, ALPHA[second], SIGMA[second]), (second, 1.0, 0.0)):
    at = (jnp.asarray(x, jnp.float32), jnp.full(2, t))
    noise, other = (np.asarray(call(*at, h), np.float64) for h in (hidden, null))
    noise = other + (1 + 2 * np.asarray(progress))[:, None] * (noise - other)
    x = alpha * (x - SIGMA[t] * noise) / ALPHA[t] + sigma * noise
  np.testing.assert_allclose(got, x, rtol=2e-3, atol=2e-3 * np.abs(x).max())


@pytest.mark.parametrize(
  "fields, message",
  [(dict(depth=0), "depth=0"), (dict(width=0), "width=0"), (dict(schedule="flow"), "'flow'")],
)
def test_bad_settings_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    MarHeadConfig(**fields)
