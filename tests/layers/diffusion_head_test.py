"""Heads that draw latents: what they are at first, what they learn, and how they are guided."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util

from latentlab import ops
from latentlab.layers import (
  Diffusion,
  DiffusionHeadConfig,
  MixtureHeadConfig,
  RegressionHeadConfig,
  Shared,
  SolverSettings,
  diffusion_head,
  initializers,
)
from latentlab.layers.diffusion_head import check_solver, time_features
from latentlab.train.partition import make_mesh, make_rules

WIDTH, DIM = 32, 3
BASE = DiffusionHeadConfig(depth=1)
HEADS = [BASE, RegressionHeadConfig(depth=1), MixtureHeadConfig(num_components=4, depth=1)]
each_head = pytest.mark.parametrize("config", HEADS, ids=lambda c: type(c).__name__)


def _shared(width=WIDTH, dtype=jnp.float32):
  return Shared(width, dtype, initializers.make("linear", num_layers=1, embed_dim=width))


def _inputs(*lead, width=WIDTH, dim=DIM, seed=0):
  keys = jax.random.split(jax.random.key(seed), 2)
  return jax.random.normal(keys[0], (*lead, width)), jax.random.normal(keys[1], (*lead, dim))


@functools.cache
def _init(config, *, random=False, width=WIDTH, dim=DIM):
  """A head and its parameters; `random` ones leave no zeros."""
  head = config.module(_shared(width), dim)
  args = (*_inputs(2, 3, width=width, dim=dim), jax.random.key(0))
  init = functools.partial(head.init, method="losses")
  if random:
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(1), *args))["params"]
    rng = np.random.default_rng(0)
    return head, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)
  return head, nn.unbox(jax.jit(init)(jax.random.key(1), *args))["params"]


# The suite's compiler leaves code as it is, but loops of training run for longer than it compiles.
_OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@functools.cache
def _compiled(head, method, fast=False):
  """One function for all calls, so that calls alike compile once."""
  run = lambda params, *args: head.apply({"params": params}, *args, method=method)
  return jax.jit(run, compiler_options=_OPTIMIZED if fast else None)


def _draw(head, params, hidden, null=None, *, keys=None, progress=None, fast=False, **settings):
  settings = SolverSettings(**dict(num_steps=4) | settings)
  keys = jax.random.split(jax.random.key(7), len(hidden)) if keys is None else keys
  return _compiled(head, "draw", fast)(params, hidden, null, keys, settings, progress)


def _losses(head, params, *args):
  return _compiled(head, "losses")(params, *args)


def test_latentlm_05_a_head_starts_from_zero():
  """Outputs exactly 0, layers the identity, and the loss that of saying nothing."""
  config = dataclasses.replace(BASE, depth=2)
  head, params = _init(config)
  for prediction in ("v", "epsilon"):
    other = dataclasses.replace(config, diffusion=Diffusion(prediction)).module(head.shared, DIM)
    loss = _losses(other, params, *_inputs(64, 64), jax.random.key(2)).mean()
    np.testing.assert_allclose(loss, 1.0, atol=0.02)
  hidden, noisy = _inputs(5)
  t = jnp.arange(5) * 200
  watched = dict(capture_intermediates=True, mutable=["intermediates"])
  out, seen = jax.jit(lambda p: head.apply({"params": p}, noisy, t, hidden, **watched))(params)
  np.testing.assert_array_equal(out, 0)
  u = {
    path[0]: x
    for path, (x,) in traverse_util.flatten_dict(seen["intermediates"]).items()
    if path[-1] == "__call__" and len(path) == 2
  }
  for layer in ("layers_0", "layers_1"):
    np.testing.assert_array_equal(u[layer], u["noisy_proj"])
  assert np.abs(u["noisy_proj"]).max() > 0.1


@each_head
def test_losses_and_draws_keep_the_contract(config):
  head, params = _init(config, random=True)
  hidden, latents = _inputs(2, 3)

  @jax.jit
  def losses_and_grads(params):
    args = (hidden, latents, jax.random.key(0))
    return jax.vjp(lambda p: head.apply({"params": p}, *args, method="losses"), params)

  losses, pull = losses_and_grads(params)
  assert losses.shape == (2, 3) and losses.dtype == jnp.float32
  (grads,) = pull(jnp.ones((2, 3)))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  # One row, of a flat batch.
  flat = jax.eval_shape(
    lambda p: head.apply({"params": p}, hidden[0], latents[0], jax.random.key(0), method="losses"),
    params,
  )
  assert flat.shape == (3,)
  rows, keys = hidden[:, 0], jax.random.split(jax.random.key(1), 2)
  whole = _draw(head, params, rows, keys=keys)
  assert whole.shape == (2, DIM) and whole.dtype == jnp.float32
  # A row's draw is its own, wherever it stands.
  np.testing.assert_allclose(_draw(head, params, rows[1:], keys=keys[1:])[0], whole[1], rtol=1e-5)
  if not isinstance(config, RegressionHeadConfig):
    assert not np.allclose(_draw(head, params, rows, keys=keys[::-1]), whole, rtol=0.01)


@pytest.mark.parametrize(
  "config",
  [*HEADS, DiffusionHeadConfig(norm_gain=True, mlp_dim=96, condition_proj=False, input_bias=True)],
  ids=lambda c: type(c).__name__,
)
def test_parameters_are_counted(config):
  _, params = _init(config, width=48)
  assert sum(x.size for x in jax.tree.leaves(params)) == config.num_params(48, DIM)


@pytest.mark.parametrize(
  "width, ratio, depth, total, share",
  [
    (768, 6, 3, 143e6, 20),
    (1024, 6, 3, 455.4e6, 11),
    (1536, 6, 3, 1.024e9, 11),
    (2048, 6, 3, 1.819e9, 11),
    (2560, 6, 3, 3.680e9, 9),
    (4096, 6, 3, 9.4e9, 9),
    (5120, 6, 3, 18.1e9, 7),
    (768, 4, 6, 212e6, 19),
    (1024, 4, 8, 495e6, 19),
    (1280, 4, 12, 1.007e9, 22),
  ],
)
def test_latentlm_15_heads_share_of_the_presets(width, ratio, depth, total, share):
  """The column "head part" of the release's presets, with latents of 16 channels."""
  got = DiffusionHeadConfig(depth=depth, mlp_ratio=ratio).num_params(width, 16)
  np.testing.assert_allclose(100 * got / total, share, atol=0.75)


def test_latentlm_10_draws_of_noise_are_averaged():
  """The loss of K draws, and its gradient, are means of those of single draws."""
  head, params = _init(BASE, random=True)
  hidden, latents = _inputs(2, 3)
  t = jax.random.randint(jax.random.key(1), (2, 3, 4), 0, 1000)
  noise = jax.random.normal(jax.random.key(2), (2, 3, 4, DIM))

  @jax.jit
  def value_and_grads(hidden, params, t, noise):
    run = lambda h, p: head.apply({"params": p}, h, latents, t, noise, method="losses_at").mean()
    return jax.value_and_grad(run, argnums=(0, 1))(hidden, params)

  together = value_and_grads(hidden, params, t, noise)
  single = [
    value_and_grads(hidden, params, t[..., i, None], noise[..., i, None, :]) for i in range(4)
  ]
  want = jax.tree.map(lambda *x: np.mean(x, axis=0), *single)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), together, want)


def test_losses_are_weighed():
  """By min-SNR's rule for `v`, of a head that still says 0."""
  head, params = _init(BASE)
  config = dataclasses.replace(BASE, diffusion=Diffusion(min_snr=5.0))
  hidden, latents = _inputs(3)
  t, noise = jnp.array([[10], [400], [990]]), jax.random.normal(jax.random.key(2), (3, 1, DIM))
  weighed = config.module(head.shared, DIM)
  got = _compiled(weighed, "losses_at")(params, hidden, latents, t, noise)
  alpha, sigma = (x[np.asarray(t)] for x in ops.NoiseSchedule().tables)
  ratio = (alpha / sigma) ** 2
  target = alpha * noise[:, 0] - sigma * latents
  want = np.minimum(ratio, 5.0) / (ratio + 1) * np.square(target).mean(-1, keepdims=True)
  np.testing.assert_allclose(got, want[:, 0], rtol=1e-4)


def test_conditions_are_made_once_for_all_draws():
  """Of the products with the condition's kernel, none has a row for each draw."""
  head, params = _init(dataclasses.replace(BASE, num_draws=8))
  args, seen = (*_inputs(2, 3), jax.random.key(0)), []

  def watch(next_call, args, kwargs, context):
    if context.module.name == "condition_proj" and context.method_name == "__call__":
      seen.append(args[0].shape)
    return next_call(*args, **kwargs)

  with nn.intercept_methods(watch):
    jax.eval_shape(lambda p: head.apply({"params": p}, *args, method="losses"), params)
  assert seen == [(2, 3, WIDTH)]


@each_head
def test_latentlm_04_guidance(config):
  """1 is the conditional draw, 0 the unconditional one, and conditions are not what is mixed."""
  head, params = _init(config, random=True)
  (hidden, _), (null, _) = _inputs(3), _inputs(3, seed=1)
  draw = functools.partial(_draw, head, params)
  plain, other = draw(hidden), draw(null)
  assert not np.allclose(plain, other, atol=0.01)
  if not isinstance(config, MixtureHeadConfig):  # Which then weighs candidates, and all alike.
    np.testing.assert_allclose(draw(hidden, null, guidance=1.0), plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(draw(hidden, null, guidance=0.0), other, rtol=1e-5, atol=1e-6)
  guided = draw(hidden, null, guidance=2.0)
  assert not np.allclose(guided, draw(null + 2.0 * (hidden - null)), atol=0.01)
  # Linear in progress: each row has a scale of its own.
  ramp = draw(hidden, null, guidance=3.0, guidance_kind="linear", progress=jnp.array([0, 0.5, 1]))
  np.testing.assert_allclose(ramp[1], guided[1], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(ramp[2], draw(hidden, null, guidance=3.0)[2], rtol=1e-4, atol=1e-5)


def test_guidance_within_an_interval_and_the_noise_at_first():
  head, params = _init(BASE, random=True)
  (hidden, _), (null, _) = _inputs(3), _inputs(3, seed=1)
  draw = functools.partial(_draw, head, params, hidden, null, guidance=3.0)
  # No level of four steps lies so low: guidance never is on.
  np.testing.assert_allclose(
    draw(guidance_interval=(0.0, 0.01)), _draw(head, params, hidden), rtol=1e-4, atol=1e-5
  )
  some = draw(guidance_interval=(0.5, 1.0))
  assert not np.allclose(some, draw(), atol=1e-3)
  # A head that says v = 0 shrinks what it starts from, and nothing else.
  zero = jax.tree.map(jnp.zeros_like, params)
  cold, warm = (_draw(head, zero, hidden, temperature=t) for t in (0.5, 1.0))
  np.testing.assert_allclose(2 * cold, warm, rtol=1e-5)


def test_the_draw_is_a_plain_loop_of_the_solver():
  """DPM-Solver++(2M) as the sheet of formulas has it, over calls of the head one by one."""
  head, params = _init(BASE, random=True)
  hidden, _ = _inputs(2)
  keys = jax.random.split(jax.random.key(3), 2)
  starts = [jax.random.split(key)[0] for key in keys]
  x = np.stack([np.asarray(jax.random.normal(key, (DIM,)), np.float64) for key in starts])
  call = jax.jit(lambda x, t: head.apply({"params": params}, x, t, hidden))
  schedule = ops.NoiseSchedule()
  alpha, sigma = schedule.tables
  grid, old, last_h = [999, 749, 500, 250], None, None
  for t, following in zip(grid, [*grid[1:], None], strict=True):
    v = np.asarray(call(jnp.asarray(x, jnp.float32), jnp.full((2,), t)), np.float64)
    clean = alpha[t] * x - sigma[t] * v
    if following is None:
      x = clean
      break
    h = schedule.log_ratios[following] - schedule.log_ratios[t]
    d = clean if old is None else clean + h / (2 * last_h) * (clean - old)
    x = sigma[following] / sigma[t] * x + alpha[following] * (1 - np.exp(-h)) * d
    old, last_h = clean, h
  np.testing.assert_allclose(_draw(head, params, hidden, keys=keys), x, rtol=1e-4, atol=1e-5)


def test_recomputing_changes_no_gradient():
  head, params = _init(BASE, random=True)
  again = dataclasses.replace(BASE, remat="full").module(_shared(), DIM)
  args = (*_inputs(2, 3), jax.random.key(0))
  grads = [
    jax.jit(jax.grad(lambda p, h=h: h.apply({"params": p}, *args, method="losses").mean()))(params)
    for h in (head, again)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *grads)


def test_half_precision_keeps_timesteps_and_latents():
  head, params = _init(BASE, random=True)
  rounded = BASE.module(_shared(dtype=jnp.bfloat16), DIM)
  hidden, latents = _inputs(4, 8)
  args = (hidden, latents, jax.random.key(0))
  exact, close = (_losses(h, params, *args) for h in (head, rounded))
  assert close.dtype == jnp.float32
  np.testing.assert_allclose(close, exact, rtol=0.1)
  assert _draw(rounded, params, hidden[0].astype(jnp.bfloat16)).dtype == jnp.float32
  # Timesteps that bfloat16 cannot tell apart are, in features of both.
  features = time_features(jnp.array([997, 998]))
  assert np.abs(features[0] - features[1]).max() > 0.1
  with pytest.raises(ValueError, match="bfloat16"):
    time_features(jnp.array([998.0], jnp.bfloat16))


def test_latentlm_17_a_mesh_changes_nothing():
  axes = dict(data=2, tensor=2, seq=2)
  head, params = _init(BASE, random=True)
  hidden, latents = _inputs(4, 6)
  keys = jax.random.split(jax.random.key(0), 4)

  def both(params, hidden, latents):
    loss = lambda p, h: head.apply({"params": p}, h, latents, keys[0], method="losses").mean()
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)
    settings = SolverSettings(num_steps=3, solver="sde_2m", guidance=2.0)
    args = (hidden[:, 0], hidden[:, 1], keys, settings)
    return value, grads, head.apply({"params": params}, *args, method="draw")

  want = jax.jit(both)(params, hidden, latents)
  mesh = make_mesh(axes)
  with jax.set_mesh(mesh), nn.logical_axis_rules(make_rules()):
    init = functools.partial(head.init, method="losses")
    boxed = jax.eval_shape(init, keys[0], hidden, latents, keys[0])["params"]
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed))
    place = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    sharded = jax.tree.map(place, params, specs)
    got = jax.jit(both)(sharded, hidden, latents)
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), jax.device_get(got), want
  )


MODES, WEIGHTS, SPREAD = np.array([[1.0, 1.0], [-1.0, -1.0]]), np.array([0.5, 0.7, 0.3]), 0.2
"""Of three conditional mixtures, each of two Gaussians: the share of the first differs."""


def _mixtures(key, rows):
  which, first, noise = jax.random.split(key, 3)
  condition = jax.random.randint(which, (rows,), 0, 3)
  upper = jax.random.uniform(first, (rows,)) < jnp.asarray(WEIGHTS)[condition]
  mean = jnp.where(upper[:, None], jnp.asarray(MODES[0]), jnp.asarray(MODES[1]))
  return condition, mean + SPREAD * jax.random.normal(noise, (rows, 2))


@functools.cache
def _trained(config, steps, rows, width=32):
  """A head that has learnt the mixtures, with a vector for each condition; one compiled loop."""
  head, params = _init(config, width=width, dim=2)
  table = jax.random.normal(jax.random.key(3), (3, width))
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

  def step(carry, key):
    params, state = carry
    data, noise = jax.random.split(key)
    condition, latents = _mixtures(data, rows)

    def loss(params):
      args = (table[condition], latents, noise)
      return head.apply({"params": params}, *args, method="losses").mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), value

  train = lambda params, keys: jax.lax.scan(step, (params, optimizer.init(params)), keys)
  train = jax.jit(train, compiler_options=_OPTIMIZED)
  (params, _), losses = train(params, jax.random.split(jax.random.key(4), steps))
  return head, params, table, losses


def _statistics(samples):
  """Share of the first mode, the modes' distance from +-1, and the spread about them."""
  upper = samples.sum(-1) > 0
  parts = [samples[upper] - MODES[0], samples[~upper] - MODES[1]]
  means = [np.abs(part.mean(0)).max() for part in parts]
  spread = np.concatenate([part - part.mean(0) for part in parts]).std()
  return upper.mean(), max(means), spread


@pytest.mark.slow
def test_latentlm_06_a_head_learns_conditional_mixtures():
  """Shares and modes are recovered, and few steps of the solver disperse too little."""
  config = DiffusionHeadConfig(depth=3, num_draws=4)
  head, params, table, _ = _trained(config, 500, 128)
  hidden = jnp.repeat(table, 500, axis=0)
  spreads = {}
  for steps in (10, 20, 50):
    samples = np.asarray(_draw(head, params, hidden, num_steps=steps, fast=True))
    samples = samples.reshape(3, -1, 2)
    found = [_statistics(rows) for rows in samples]
    spreads[steps] = np.mean([spread for _, _, spread in found])
    if steps == 50:
      np.testing.assert_allclose([share for share, _, _ in found], WEIGHTS, atol=0.06)
      assert max(mean for _, mean, _ in found) < 0.06
  assert spreads[10] < spreads[20] < spreads[50], spreads
  np.testing.assert_allclose(list(spreads.values()), [0.144, 0.18, 0.195], atol=0.025)


def test_latentlm_07_a_regression_gives_the_mean():
  """Which lies between the modes, where there are no data."""
  head, params, table, losses = _trained(RegressionHeadConfig(depth=1), 300, 128)
  got = _draw(head, params, table)
  np.testing.assert_allclose(got, (2 * WEIGHTS - 1)[:, None] * np.ones(2), atol=0.08)
  # What is left is the data's variance about that mean, which no training takes away.
  variance = SPREAD**2 + np.mean(1 - (2 * WEIGHTS - 1) ** 2)
  np.testing.assert_allclose(losses[-100:].mean(), variance, atol=0.05)


def test_a_mixture_head_learns_conditional_mixtures():
  head, params, table, losses = _trained(MixtureHeadConfig(num_components=4, depth=1), 300, 128)
  samples = np.asarray(_draw(head, params, jnp.repeat(table, 1000, axis=0))).reshape(3, -1, 2)
  for rows, weight in zip(samples, WEIGHTS, strict=True):
    share, mean, spread = _statistics(rows)
    np.testing.assert_allclose([share, mean, spread], [weight, 0, SPREAD], atol=0.05)
  # Per channel, the entropy of the mode's choice halved, and that of a Gaussian.
  entropy = np.mean(-(WEIGHTS * np.log(WEIGHTS) + (1 - WEIGHTS) * np.log(1 - WEIGHTS))) / 2
  entropy += 0.5 * np.log(2 * np.pi * np.e * SPREAD**2)
  np.testing.assert_allclose(losses[-100:].mean(), entropy, atol=0.05)


def test_mixtures_likelihood_is_scipys():
  stats = pytest.importorskip("scipy.stats")
  head, params = _init(MixtureHeadConfig(num_components=4, depth=1), random=True)
  hidden, latents = _inputs(5)
  log_weights, means, stds = head.apply({"params": params}, hidden)
  densities = stats.norm.pdf(latents[:, None], means, stds).prod(-1)
  want = -np.log((np.exp(log_weights) * densities).sum(-1)) / DIM
  np.testing.assert_allclose(
    _losses(head, params, hidden, latents, jax.random.key(0)), want, rtol=1e-4
  )


def test_guided_mixtures_have_the_guided_density():
  """Of single Gaussians, `p(z | c)^s p(z)^(1 - s)` is a Gaussian."""
  head, params = _init(
    MixtureHeadConfig(num_components=1, depth=1, num_candidates=200), random=True, dim=1
  )
  hidden, _ = _inputs(2, dim=1, seed=1)
  _, means, stds = (x[..., 0, :] for x in head.apply({"params": params}, hidden * 0.3))
  scale = 3.0
  precision = scale / stds[0] ** 2 - (scale - 1) / stds[1] ** 2
  mean = (scale * means[0] / stds[0] ** 2 - (scale - 1) * means[1] / stds[1] ** 2) / precision
  conditional, null = (jnp.broadcast_to(h, (2000, WIDTH)) for h in hidden * 0.3)
  got = np.asarray(_draw(head, params, conditional, null, guidance=scale))
  assert abs(mean[0] - means[0, 0]) > 0.2  # Guidance has something to do.
  np.testing.assert_allclose(got.mean(), mean[0], atol=0.1 * float(precision[0] ** -0.5))
  np.testing.assert_allclose(got.std(), precision[0] ** -0.5, rtol=0.1)


@pytest.mark.parametrize(
  "prediction, schedule, lambda_min, warns",
  [
    ("epsilon", "cosine", None, True),
    ("epsilon", "linear", None, False),
    ("epsilon", "cosine", -3.0, False),
    ("v", "cosine", None, False),
  ],
)
def test_a_solver_that_starts_from_errors_is_warned_of(
  prediction, schedule, lambda_min, warns, caplog
):
  diffusion_head._warn_of_first_step.cache_clear()  # It tells once.
  settings = SolverSettings(num_steps=20, lambda_min=lambda_min)
  check_solver(Diffusion(prediction, schedule), settings)
  assert ("lambda_min=-3" in caplog.text) == warns


def test_a_solver_fits_levels_or_nothing():
  check_solver(None, SolverSettings(num_steps=10_000))
  with pytest.raises(ValueError, match="num_steps=20"):
    check_solver(Diffusion(num_timesteps=10), SolverSettings(num_steps=20))


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: Diffusion("noise"), "'noise'"),
    (lambda: Diffusion("epsilon", "flow"), "predict 'flow'"),
    (lambda: Diffusion(t_sampler="beta"), "'beta'"),
    (lambda: Diffusion(min_snr=0.0), "min_snr"),
    (lambda: Diffusion(t_std=0.0), "t_std"),
    (lambda: Diffusion(schedule="cubic").levels, "'cubic'"),
    (lambda: DiffusionHeadConfig(depth=0), "depth=0"),
    (lambda: DiffusionHeadConfig(num_draws=0), "num_draws=0"),
    (lambda: DiffusionHeadConfig(mlp_dim=0), "mlp_dim=0"),
    (lambda: DiffusionHeadConfig(remat="some"), "'some'"),
    (lambda: RegressionHeadConfig(depth=0), "depth=0"),
    (lambda: MixtureHeadConfig(num_components=0), "num_components=0"),
    (lambda: SolverSettings(solver="euler"), "'euler'"),
    (lambda: SolverSettings(num_steps=0), "num_steps=0"),
    (lambda: SolverSettings(guidance_kind="cubic"), "'cubic'"),
    (lambda: SolverSettings(guidance_interval=(0.5, 0.2)), "guidance_interval"),
    (lambda: SolverSettings(guidance_kind="linear").scale(None), "progress"),
  ],
)
def test_bad_settings_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
