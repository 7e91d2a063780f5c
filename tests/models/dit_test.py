"""LatentLM's twin: sizes of the release, one timestep for an image, guidance, a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import ops
from latentlab.layers import Diffusion, SolverSettings
from latentlab.models import dit
from latentlab.train.partition import make_mesh, make_rules

CONFIG = dit.DiTConfig(
  num_layers=1, embed_dim=32, num_heads=4, num_kv_heads=2, dim=3, grid=(2, 3), num_classes=5
)
MODEL = dit.DiT(CONFIG)


def _inputs(rows=3):
  keys = jax.random.split(jax.random.key(0), 2)
  labels = jnp.arange(rows) % CONFIG.num_classes
  return (
    jax.random.normal(keys[0], (rows, CONFIG.num_latents, CONFIG.dim)),
    jax.random.randint(keys[1], (rows,), 0, 1000),
    labels,
  )


@functools.cache
def _shapes():
  return jax.eval_shape(MODEL.init, jax.random.key(1), *_inputs())["params"]


@functools.cache
def _params():
  """Random everywhere, so that no gate is shut."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.15, x.shape), x.dtype), nn.unbox(_shapes())
  )


@functools.cache
def _compiled(method):
  return jax.jit(lambda params, *args: MODEL.apply({"params": params}, *args, method=method))


def _apply(*args, params=None, method="__call__"):
  return _compiled(method)(_params() if params is None else params, *args)


@pytest.mark.parametrize(
  "name, millions",
  [("base", 130), ("medium", 454.3), ("large", 1028), ("xl", 1824), ("3b", 3787)],
)
def test_latentlm_15_twins_have_as_many_parameters(name, millions):
  """The column "DiT twin" of the release's presets, with latents of 16 channels."""
  config = dit.preset(name, dim=16, grid=(16, 16), num_classes=1000)
  assert config.feed_forward.mlp_dim in (2048, 2688, 4096, 5440, 6784)
  # Within a thousandth, or the digits that are told.
  digits = 0.5 if millions == 130 else 0.001 * millions
  assert abs(config.num_params / 1e6 - millions) < digits, config.num_params


def test_parameters_are_counted():
  for config in (CONFIG, dit.DiTConfig(1, 16, 2, 3, (1, 4), 2, input_bias=True, mlp_ratio=6)):
    inputs = (jnp.zeros((1, config.num_latents, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(dit.DiT(config).init, jax.random.key(0), *inputs)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == config.num_params


def test_it_starts_from_zero():
  params = nn.unbox(jax.jit(MODEL.init)(jax.random.key(1), *_inputs()))["params"]
  np.testing.assert_array_equal(_apply(*_inputs(), params=params), 0)
  latents, _, labels = _inputs(2000)
  loss = _apply(latents, labels, jax.random.key(0), params=params, method="losses")
  assert loss.shape == (2000,)
  np.testing.assert_allclose(loss.mean(), 1.0, atol=0.02)


def test_every_latent_sees_all_and_its_place():
  latents, t, labels = _inputs()
  out = _apply(latents, t, labels)
  moved = _apply(latents.at[:, -1].add(1.0), t, labels)
  assert np.abs(moved - out)[:, 0].min() > 1e-6  # No mask.
  # Were it not for positions, a permutation of latents would permute outputs.
  assert not np.allclose(_apply(latents[:, ::-1], t, labels)[:, ::-1], out, atol=1e-3)
  # An image's outputs are its own.
  np.testing.assert_allclose(_apply(*(x[1:] for x in _inputs())), out[1:], rtol=1e-5, atol=1e-6)


def test_positions_are_sines_and_cosines_of_column_and_row():
  got = dit.grid_positions((2, 3), 8)
  for i, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
    want = [f(x * w) for x in (column, row) for f in (np.sin, np.cos) for w in (1, 0.01)]
    np.testing.assert_allclose(got[i], want)
  line = dit.grid_positions((1, 4), 4)
  np.testing.assert_allclose(line[3], [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)])


def test_losses_have_one_timestep_an_image_and_leave_classes_out():
  latents, t, labels = _inputs()
  noise = jax.random.normal(jax.random.key(5), latents.shape)
  got = _apply(latents, labels, t, noise, method="losses_at")
  alpha, sigma = (np.asarray(x)[:, None, None] for x in ops.NoiseSchedule().at(t))
  noisy = alpha * latents + sigma * noise
  error = _apply(jnp.asarray(noisy), t, labels) - (alpha * noise - sigma * latents)
  np.testing.assert_allclose(got, np.square(error).mean((1, 2)), rtol=1e-5)
  # What dropout leaves out is the class, and every number that is none is that null class.
  none = _apply(latents, t, 0 * labels - 1)
  np.testing.assert_array_equal(none, _apply(latents, t, 0 * labels + 5))
  always = dit.DiT(dataclasses.replace(CONFIG, class_dropout=0.999))
  run = lambda labels: jax.jit(
    lambda p: always.apply({"params": p}, latents, labels, jax.random.key(2), method="losses")
  )(_params())
  np.testing.assert_array_equal(run(labels), run(0 * labels - 1))


def test_draws_are_the_plain_loop_of_ddim_under_guidance():
  _, _, labels = _inputs()
  keys = jax.random.split(jax.random.key(4), 3)
  settings = SolverSettings(solver="ddim", num_steps=3, guidance=1.7)
  got = dit.generate(CONFIG, _params(), labels, key=keys, settings=settings)
  shape = (CONFIG.num_latents, CONFIG.dim)
  x = np.stack([jax.random.normal(jax.random.split(key)[0], shape) for key in keys])
  alpha, sigma = ops.NoiseSchedule().tables
  call = jax.jit(lambda x, t, y: MODEL.apply({"params": _params()}, x, t, y))
  grid = [999, 666, 333]
  for t, following in zip(grid, [*grid[1:], None], strict=True):
    v, null = (
      call(jnp.asarray(x, jnp.float32), jnp.full(3, t), y) for y in (labels, 0 * labels - 1)
    )
    v = np.asarray(null + 1.7 * (v - null), np.float64)
    clean, noise = alpha[t] * x - sigma[t] * v, sigma[t] * x + alpha[t] * v
    x = clean if following is None else alpha[following] * clean + sigma[following] * noise
  np.testing.assert_allclose(got, x, rtol=2e-4, atol=2e-5)
  # Of one row by itself, and without guidance.
  alone = dit.generate(CONFIG, _params(), labels[1:2], key=keys[1:2], settings=settings)
  np.testing.assert_allclose(alone[0], got[1], rtol=1e-4, atol=1e-5)
  draw = lambda scale, **kwargs: dit.generate(
    CONFIG, _params(), labels, key=keys, settings=settings.replace(guidance=scale), **kwargs
  )
  np.testing.assert_allclose(draw(1.0, guided=True), draw(1.0), rtol=1e-4, atol=1e-5)
  none = dit.generate(
    CONFIG, _params(), 0 * labels - 1, key=keys, settings=settings.replace(guidance=1.0)
  )
  np.testing.assert_allclose(draw(0.0), none, rtol=1e-4, atol=1e-5)
  assert not np.allclose(draw(1.0), none, atol=1e-2)


def test_latentlm_17_a_mesh_changes_nothing():
  axes = dict(fsdp=2, tensor=2)
  latents, _, labels = _inputs(4)

  def both(params, latents, labels):
    loss = lambda p: MODEL.apply({"params": p}, latents, labels, jax.random.key(0), method="losses")
    value, grads = jax.value_and_grad(lambda p: loss(p).mean())(params)
    args = (labels, jax.random.split(jax.random.key(1), 4), SolverSettings(num_steps=2))
    return value, grads, MODEL.apply({"params": params}, *args, guided=False, method="draw")

  want = jax.jit(both)(_params(), latents, labels)
  mesh = make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
  with jax.set_mesh(mesh), nn.logical_axis_rules(make_rules()):
    specs = nn.logical_to_mesh(nn.get_partition_spec(_shapes()))
    place = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    sharded = jax.tree.map(place, _params(), specs)
    got = jax.jit(both)(sharded, latents, labels)
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=2e-5), jax.device_get(got), want
  )


def test_loops_and_recomputing_change_no_gradient():
  """Two blocks side by side, and in a loop that computes them anew in its backward pass."""
  args = (*_inputs()[::2], jax.random.key(0))
  twice = jax.tree.map(lambda x: jnp.concatenate([x, 0.5 * x]), _params()["blocks"])
  params, grads = _params() | dict(blocks=twice), []
  for options in (dict(), dict(remat="full", unroll=1)):
    model = dit.DiT(dataclasses.replace(CONFIG, num_layers=2, **options))
    loss = lambda p, m=model: m.apply({"params": p}, *args, method="losses").mean()
    grads.append(jax.jit(jax.grad(loss))(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *grads)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: dit.preset("huge", dim=1, grid=(1, 1), num_classes=1), "'huge'"),
    (lambda: dataclasses.replace(CONFIG, embed_dim=30), "embed_dim=30"),
    (lambda: dataclasses.replace(CONFIG, num_layers=0), "num_layers=0"),
    (lambda: dataclasses.replace(CONFIG, num_kv_heads=3), "num_kv_heads=3"),
    (lambda: dataclasses.replace(CONFIG, grid=(0, 3)), "grid"),
    (lambda: dataclasses.replace(CONFIG, class_dropout=1.0), "class_dropout=1.0"),
    (lambda: dataclasses.replace(CONFIG, remat="some"), "'some'"),
    (lambda: dataclasses.replace(CONFIG, diffusion=Diffusion("epsilon", "flow")), "flow"),
    (lambda: _apply(jnp.zeros((1, 5, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)), "6 latents"),
    (
      lambda: dit.generate(
        CONFIG,
        _params(),
        jnp.zeros(1, jnp.int32),
        key=jax.random.key(0),
        settings=SolverSettings(guidance=2.0, guidance_kind="linear"),
      ),
      "progress",
    ),
  ],
)
def test_bad_settings_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
