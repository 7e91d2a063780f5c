"""Diffusion of latents: schedules, parametrisations, solvers and guidance against closed forms."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import ops

MEAN, STD = 0.7, 0.4
"""Of the Gaussian whose best denoiser, and whose probability flow, are known."""


def _best(x, alpha, sigma):
  """The latent expected at `x^t`, of Gaussian data."""
  gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
  return MEAN + gain * (x - alpha * MEAN)


def _output(prediction, x, alpha, sigma):
  """What a perfect network of a parametrisation says, each by its own formula."""
  clean = _best(x, alpha, sigma)
  noise = (x - alpha * clean) / sigma
  formulas = dict(v=alpha * noise - sigma * clean, epsilon=noise, x0=clean, flow=noise - clean)
  return formulas[prediction]


def _run(table, x, best=_best, keys=None):
  """A solver with a perfect denoiser, in float64."""
  with jax.enable_x64(True):
    x = jnp.asarray(x, jnp.float64)
    denoise = lambda x, level, _: best(x, level.alpha, level.sigma)
    return np.asarray(jax.jit(lambda x: ops.run_solver(denoise, x, table, keys))(x))


def test_latentlm_01_schedule_constants():
  schedule = ops.NoiseSchedule("cosine")
  alpha, sigma = schedule.tables
  got = alpha[[0, 998, 999]] ** 2
  np.testing.assert_allclose(got, [0.99995872, 2.42877e-6, 2.42877e-9], rtol=2e-6)
  np.testing.assert_allclose(
    schedule.log_ratios[[0, 500, 999]], [5.0475, -0.01543, -9.9179], rtol=2e-4
  )
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
  alpha, sigma = schedule.at(jnp.array([0, 999]))
  assert alpha.dtype == sigma.dtype == jnp.float32
  np.testing.assert_allclose(alpha[1], math.sqrt(2.4287669e-9), rtol=1e-6)


def test_latentlm_01_grid_integers():
  schedule = ops.NoiseSchedule("cosine")
  grid = lambda *args: ops.sample_grid(schedule, *args).tolist()
  assert grid(5) == [999, 799, 599, 400, 200]
  assert grid(10) == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
  assert grid(20)[7:13] == [649, 599, 549, 500, 450, 400]  # Halves go to the even integer.
  assert grid(20)[0] == 999 and grid(20)[-1] == 50
  assert grid(10, -5.1)[0] == 995  # The clip that suits predictions of noise drops 996 on.
  assert schedule.log_ratios[995] >= -5.1 > schedule.log_ratios[996]


@pytest.mark.parametrize("kind", ops.SCHEDULES)
def test_schedules_are_those_of_plain_loops(kind):
  """Written once more, step by step, in Python's floats."""
  alpha, sigma = ops.NoiseSchedule(kind, 100).tables
  assert (np.diff(alpha) < 0).all() and (np.diff(sigma) > 0).all()
  if kind == "flow":
    np.testing.assert_allclose(sigma, [(i + 1) / 100 for i in range(100)])
    np.testing.assert_allclose(alpha + sigma, 1)
    return

  def signal(u):
    if kind == "cosine":
      return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    if kind == "cauchy":
      return 1 - 1 / (math.exp(3 + math.tan(math.pi * (0.5 - u) * 0.9)) + 1.1)
    snr = -math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(u - 0.5) * 0.98)
    return 1 - 1 / (math.exp(snr) + 1.02)

  def beta(i):
    share, low, high = i / 99, 1e-4, 0.02
    if kind == "linear":
      return low + share * (high - low)
    if kind == "scaled_linear":
      return (low**0.5 + share * (high**0.5 - low**0.5)) ** 2
    if kind == "sigmoid":
      return low + (high - low) / (1 + math.exp(6 - 12 * share))
    return min(1 - signal((i + 1) / 100) / signal(i / 100), 0.999)

  kept, want = 1.0, []
  for i in range(100):
    kept *= 1 - beta(i)
    want.append(kept)
  np.testing.assert_allclose(alpha**2, want, rtol=1e-9)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)


@pytest.mark.parametrize(
  "solver, rate, errors",
  [
    ("ddim", 1, None),
    ("dpm_2m", 2, [3.06e-3, 7.78e-4, 1.95e-4]),
    ("dpm_2m_heun", 2, None),
    ("dpm_3m", 3, None),
  ],
)
def test_latentlm_02_solver_orders(solver, rate, errors):
  """Against the exact probability flow between two levels, with log-ratios evenly spaced."""
  x, found = np.array([-1.0, 2.0]), []
  for steps in (40, 80, 160):
    ratios = np.linspace(-5, 5, steps + 1)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * ratios)), 1 / np.sqrt(1 + np.exp(2 * ratios))
    table = ops.multistep_table(solver, np.zeros(steps), alpha, sigma)
    spread = lambda i, a=alpha, s=sigma: np.sqrt(a[i] ** 2 * STD**2 + s[i] ** 2)
    want = alpha[-1] * MEAN + (x - alpha[0] * MEAN) * spread(-1) / spread(0)
    found.append(np.abs(_run(table, x) - want).max())
  rates = np.log2(np.divide(found[:-1], found[1:]))
  # On this problem, the third order does better than it should.
  assert (rates > rate - 0.08).all() and (rates < rate + (1.1 if rate == 3 else 0.08)).all(), rates
  if errors:
    np.testing.assert_allclose(found, errors, rtol=0.01)


def test_third_order_on_a_denoiser_that_is_not_linear():
  """Two points, `+-1`: the latent expected is a hyperbolic tangent."""
  best, found = lambda x, alpha, sigma: jnp.tanh(alpha * x / sigma**2), []
  for steps in (40, 80, 160, 1280):
    ratios = np.linspace(-3, 2, steps + 1)
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * ratios)), 1 / np.sqrt(1 + np.exp(2 * ratios))
    table = ops.multistep_table("dpm_3m", np.zeros(steps), alpha, sigma)
    found.append(_run(table, np.array([0.4]), best)[0])
  errors = np.abs(np.array(found[:-1]) - found[-1])
  assert (np.log2(errors[:-1] / errors[1:]) > 2.6).all(), errors


def test_latentlm_03_few_steps_disperse_too_little():
  """Standard deviations of samples, exactly: a solver with this denoiser is affine."""
  for steps, want in ((3, 0.205), (5, 0.291), (10, 0.368), (20, 0.395), (50, 0.400)):
    table = ops.solver_table("dpm_2m", ops.NoiseSchedule(), steps)
    low, high = _run(table, [-1.0, 1.0])
    np.testing.assert_allclose((high - low) / 2, want, atol=1e-3)
    np.testing.assert_allclose((high + low) / 2, MEAN, atol=1e-3)


@pytest.mark.parametrize(
  "solver, schedule, steps",
  [
    ("sde_2m", "cosine", 50),
    ("ancestral", "cosine", 400),
    ("ancestral_small", "cosine", 100),
    ("ddim", "linear", 100),
    ("dpm_2m", "laplace", 500),
    ("dpm_2m", "cauchy", 50),
    ("dpm_3m", "cosine", 30),
    ("flow_euler", "flow", 100),
    ("flow_midpoint", "flow", 20),
    ("sde_2m", "flow", 50),
    ("dpm_2m_heun", "flow", 20),
    ("dpm_3m", "flow", 20),
  ],
)
def test_samples_have_the_moments_of_the_data(solver, schedule, steps):
  """From where the data are at the noisiest level, which is noise alone on some schedules only."""
  table = ops.solver_table(solver, ops.NoiseSchedule(schedule), steps)
  keys = jax.random.split(jax.random.key(1), 512)
  alpha, sigma = table.alpha[0], table.sigma[0]
  x = np.random.default_rng(0).normal(size=(512, 16))
  x = alpha * MEAN + np.sqrt(alpha**2 * STD**2 + sigma**2) * x
  got = _run(table, x, keys=keys if table.stochastic else None)
  np.testing.assert_allclose([got.mean(), got.std()], [MEAN, STD], atol=0.02)


def test_rectified_flow_is_eulers_and_the_midpoint_rule():
  """Of the velocity `noise - latent`, written as such; and the first is DDIM's on that path."""
  schedule, x = ops.NoiseSchedule("flow"), np.array([-1.0, 2.0])
  velocity = lambda x, u: (x - _best(x, 1 - u, u)) / u
  times = [(t + 1) / 1000 for t in ops.sample_grid(schedule, 6)] + [0.0]
  euler = midpoint = x
  for here, there in zip(times, times[1:], strict=False):
    euler = euler + (there - here) * velocity(euler, here)
    half = midpoint + (there - here) / 2 * velocity(midpoint, here)
    midpoint = midpoint + (there - here) * velocity(half, (here + there) / 2)
  tables = [ops.solver_table(s, schedule, 6) for s in ("flow_euler", "ddim", "flow_midpoint")]
  assert [table.num_evaluations for table in tables] == [6, 6, 12]
  for table, want in zip(tables, (euler, euler, midpoint), strict=True):
    np.testing.assert_allclose(_run(table, x), want, rtol=1e-12)
  np.testing.assert_allclose(tables[2].t[:2], [999, 1000 * (1 + times[1]) / 2 - 1])


def _trajectory(prediction, guidance, solver="dpm_2m"):
  """Samples of a network that speaks in one parametrisation, guided in its own space."""
  table = ops.solver_table(solver, ops.NoiseSchedule(), 10)

  def denoise(x, level, _):
    a, s = level.alpha, level.sigma
    output = _output(prediction, x, a, s)
    if guidance is not None:
      clean = jnp.tanh(x - 0.3)  # Another condition's.
      noise = (x - a * clean) / s
      null = dict(v=a * noise - s * clean, epsilon=noise, x0=clean, flow=noise - clean)[prediction]
      output = ops.guide(output, null, guidance)
    return ops.predicted_clean(prediction, output, x, a, s)

  with jax.enable_x64(True):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    return np.asarray(jax.jit(lambda x: ops.run_solver(denoise, x, table))(x))


@pytest.mark.parametrize("guidance", [None, 1.0, 2.5, 0.0])
def test_latentlm_04_parametrisations_agree(guidance):
  want = _trajectory("v", guidance)
  for prediction in ("epsilon", "x0", "flow"):
    np.testing.assert_allclose(_trajectory(prediction, guidance), want, rtol=1e-10, atol=1e-10)
  if guidance == 1.0:
    np.testing.assert_allclose(want, _trajectory("v", None), rtol=1e-10)


@pytest.mark.parametrize("prediction", ops.PREDICTIONS)
def test_predictions_invert_their_targets(prediction):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(rng.normal(size=(5, 3))) for _ in range(2))
    for alpha, sigma in ((0.8, 0.6), (0.3, 0.7)):  # On a circle, and on a straight path.
      a, s = jnp.full(5, alpha), jnp.full(5, sigma)
      noisy = ops.add_noise(clean, noise, a, s)
      target = ops.prediction_target(prediction, clean, noise, a, s)
      level = (noisy, jnp.float64(alpha), jnp.float64(sigma))
      np.testing.assert_allclose(ops.predicted_clean(prediction, target, *level), clean, rtol=1e-9)
      np.testing.assert_allclose(ops.predicted_noise(prediction, target, *level), noise, rtol=1e-9)
      # Weights make errors of all outputs those of the latent, times min(SNR, 5).
      wrong = ops.predicted_clean(prediction, target + 0.1, *level) - clean
      weight = ops.min_snr_weight(prediction, a, s)[0]
      np.testing.assert_allclose(
        weight * 0.01, min((alpha / sigma) ** 2, 5.0) * wrong[0, 0] ** 2, rtol=1e-9
      )


def test_rows_of_a_stochastic_sampler_stand_alone():
  table = ops.solver_table("sde_2m", ops.NoiseSchedule(), 6)
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(jax.random.key(1), (5, 3))
  denoise = lambda x, level, _: _best(x, level.alpha, level.sigma)
  run = lambda x, keys: ops.run_solver(denoise, x, table, keys)
  whole, part = run(x, keys), run(x[3:], keys[3:])
  np.testing.assert_array_equal(whole[3:], part)
  assert not np.allclose(whole, run(x, keys[::-1]))
  with pytest.raises(ValueError, match="needs keys"):
    ops.run_solver(denoise, x, table)
  with pytest.raises(ValueError, match="too coarse"):
    ops.run_solver(denoise, x.astype(jnp.bfloat16), table, keys)


def test_timesteps():
  draw = functools.partial(ops.sample_timesteps, jax.random.key(0), (40_000,), 1000)
  uniform = np.asarray(draw())
  assert uniform.min() == 0 and uniform.max() == 999
  np.testing.assert_allclose(np.bincount(uniform // 100) / 40_000, 0.1, atol=0.01)
  middle = np.asarray(draw("logit_normal", mean=-1.0, std=0.5))
  assert 0 <= middle.min() and middle.max() <= 999
  u = (middle + 0.5) / 1000
  logits = np.log(u / (1 - u))
  np.testing.assert_allclose([logits.mean(), logits.std()], [-1, 0.5], atol=0.02)
  # A standard deviation that throws half of them past the end leaves them within the table.
  assert np.asarray(draw("logit_normal", mean=30.0)).max() == 999


def test_guidance_scales():
  progress = jnp.array([0.0, 0.5, 1.0])
  np.testing.assert_allclose(ops.guidance_scale(3.0, "linear", progress), [1, 2, 3])
  assert ops.guidance_scale(3.0) == 3
  c, u = jnp.ones((3, 2)), jnp.zeros((3, 2))
  np.testing.assert_allclose(ops.guide(c, u, progress), [[0, 0], [0.5, 0.5], [1, 1]])
  np.testing.assert_array_equal(ops.guide(c, u, 0.0), u)


def _unchecked_at(t):
  return inspect.unwrap(ops.NoiseSchedule.at)(ops.NoiseSchedule(), t)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: ops.NoiseSchedule("cubic"), "'cubic'"),
    (lambda: ops.NoiseSchedule(num_timesteps=1), "at least 2"),
    (lambda: _unchecked_at(jnp.array([999.0], jnp.bfloat16)), "int32"),
    (lambda: _unchecked_at(jnp.array([999.0])), "int32"),
    (lambda: ops.check_timesteps(jnp.array([999.0], jnp.bfloat16)), "float32"),
    (lambda: ops.sample_grid(ops.NoiseSchedule(), 1000), "999"),
    (lambda: ops.sample_grid(ops.NoiseSchedule(), 0), "num_steps=0"),
    (lambda: ops.sample_grid(ops.NoiseSchedule(), 5, 20.0), "leaves no timestep"),
    (lambda: ops.solver_table("flow_euler", ops.NoiseSchedule(), 5), "'flow'"),
    (lambda: ops.solver_table("ancestral", ops.NoiseSchedule("flow"), 5), "ancestral"),
    (lambda: ops.solver_table("euler", ops.NoiseSchedule(), 5), "unknown solver"),
    (
      lambda: ops.multistep_table("ddim", np.zeros(1), np.array([0.9, 0.1]), np.array([0.1, 0.9])),
      "cleaner",
    ),
    (lambda: ops.sample_timesteps(jax.random.key(0), (1,), 10, "normal"), "'normal'"),
    (lambda: ops.guidance_scale(2.0, "linear"), "progress"),
    (lambda: ops.guidance_scale(2.0, "cubic"), "'cubic'"),
    (
      lambda: ops.predicted_clean("u", *[jnp.ones((1, 1))] * 2, jnp.float32(1), jnp.float32(1)),
      "'u'",
    ),
    (lambda: ops.min_snr_weight("v", jnp.ones(1), jnp.ones(1), 0.0), "limit"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
