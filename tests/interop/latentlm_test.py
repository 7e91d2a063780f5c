"""Names of LatentLM's release: round trips, what errors tell, and which models it has not."""

import dataclasses

import jax
import numpy as np
import pytest

from latentlab.interop import latentlm as names
from latentlab.layers import Diffusion, DiffusionHeadConfig
from latentlab.models.dit import DiTConfig

HEAD = DiffusionHeadConfig(depth=2, mlp_dim=64, input_bias=True)
DIT = DiTConfig(2, 32, 4, 3, (2, 2), 5, num_kv_heads=2, input_bias=True)


def _random(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def _head(config=HEAD):
  params = _random(names.head_shapes(config, 32, 3))
  return params, names.export_head(config, params)


def _dit(config=DIT):
  params = _random(names.dit_shapes(config))
  return params, names.export_dit(config, params)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_comes_back(bias):
  config = dataclasses.replace(HEAD, input_bias=bias, diffusion=Diffusion("epsilon"), num_draws=2)
  params, state = _head(config)
  assert ("noisy_x_embedder.proj.bias" in state) == bias
  # Among the weights of a whole model.
  state |= {"blocks.0.mlp.fc1.weight": np.zeros((2, 2)), "x_embedder.proj.bias": np.zeros(2)}
  back = names.import_head(state, dict(diffusion=Diffusion("epsilon"), num_draws=2))
  assert (back.config, back.embed_dim, back.dim) == (config, 32, 3)
  jax.tree.map(np.testing.assert_array_equal, back.params, params)


@pytest.mark.parametrize(
  "config",
  [
    DIT,
    dataclasses.replace(DIT, grid=(1, 6), input_bias=False, mlp_ratio=(192 + 32) * 1.5 / 32),
    dataclasses.replace(DIT, embed_dim=64, num_kv_heads=4),
  ],
  ids=["grid", "line", "all heads"],
)
def test_a_dit_comes_back(config):
  params, state = _dit(config)
  back = names.import_dit(state, dict(num_heads=4))
  assert back.config == config
  jax.tree.map(np.testing.assert_array_equal, back.params, params)


def _without(state, name):
  return {n: x for n, x in state.items() if n != name}


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s: _without(s, "final_layer.linear.weight"), "final_layer.linear.weight"),
    (lambda s: _without(s, "noisy_x_embedder.proj.bias"), "proj.bias is missing"),
    (lambda s: s | {"noisy_x_embedder.proj.weight": np.zeros((32, 3, 2, 2))}, "one latent"),
    (lambda s: s | {"final_layer.linear.bias": np.zeros(3)}, "unexpected .*linear.bias"),
    (lambda s: _without(s, "diffusion_blocks.1.mlp.gate.weight"), "missing .*1.mlp.gate"),
    (lambda s: s | {"condition_layer.linear.weight": np.zeros((9, 9))}, "of another shape"),
  ],
)
def test_what_is_no_head(change, message):
  with pytest.raises(ValueError, match=message):
    names.import_head(change(_head()[1]))


@pytest.mark.parametrize(
  "change, fields, message",
  [
    (lambda s: s, {}, "num_heads"),
    (lambda s: s, dict(num_heads=3), "num_heads=3"),
    (lambda s: _without(s, "pos_embed"), dict(num_heads=4), "pos_embed"),
    (lambda s: s | {"pos_embed": s["pos_embed"] + 0.1}, dict(num_heads=4), "fixed ones"),
    (lambda s: s, dict(num_heads=4, grid=(1, 4)), "fixed ones"),
    (lambda s: s | {"x_embedder.proj.weight": np.zeros((32, 3, 2, 2))}, dict(num_heads=4), "patch"),
  ],
)
def test_what_is_no_dit(change, fields, message):
  with pytest.raises(ValueError, match=message):
    names.import_dit(change(_dit()[1]), fields)


def test_models_that_the_release_has_not():
  for change in (dict(norm_gain=True), dict(condition_proj=False), dict(norm_eps=1e-5)):
    config = dataclasses.replace(HEAD, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
      names.export_head(config, _random(names.head_shapes(config, 32, 3)))
  config = dataclasses.replace(DIT, grid=(2, 3))
  with pytest.raises(ValueError, match="square"):
    names.export_dit(config, _random(names.dit_shapes(config)))
