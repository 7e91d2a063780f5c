"""Names of LatentLM's release: round trips, what errors tell, and which models it has not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.interop import latentlm as names
from latentlab.layers import Diffusion, DiffusionHeadConfig
from latentlab.layers.latent_heads import MixtureHeadConfig
from latentlab.models.dit import DiTConfig
from latentlab.models.latentlm import RELEASE, Items, LatentLM, LatentLMConfig, ModalityConfig
from latentlab.models.transformer import transformer

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


MODEL = LatentLMConfig(
  transformer(
    vocab_size=9, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=64, **RELEASE
  ),
  (ModalityConfig("image", 3, HEAD, 4, "fixed", 0.5, 2.0),),
  text_vocab_size=0,
  num_classes=5,
)
FIELDS = dict(num_heads=4, num_latents=4, mean=0.5, std=2.0)


def _model(config=MODEL):
  params = _random(names.model_shapes(config))
  params["image_normalizer"] = dict(mean=np.float32(0.5), std=np.float32(2.0))
  return params, names.export_model(config, params)


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_computes_what_it_did(bias):
  """With scales of norms that the export puts into other matrices."""
  modality = dataclasses.replace(
    MODEL.modalities[0], head=dataclasses.replace(HEAD, input_bias=bias)
  )
  config = dataclasses.replace(MODEL, modalities=(modality,))
  params, state = _model(config)
  back = names.import_model(state, FIELDS)
  assert back.config == config
  special, latents = config.tokens, np.ones((2, 4, 3), np.float32).cumsum(1)
  kinds = np.broadcast_to(np.arange(4) > 0, (2, 4)).astype(np.int32)
  tokens = np.full((2, 4), special.latent(0))
  tokens[:, 0] = [special.class_token(2), special.null]
  items = Items(*map(jnp.asarray, (tokens, kinds)), {"image": jnp.asarray(latents)})

  @jax.jit
  def run(params):
    apply = functools.partial(LatentLM(config).apply, {"params": params})
    hidden, _ = apply(items, method="hidden")
    t = jnp.arange(8).reshape(2, 4) * 100
    noise = lambda module, *args: module.heads["image"](*args)
    out = apply(items.latents["image"][:, ::-1], t, hidden, method=noise)
    return out, apply("image", items.latents["image"], method="normalize")

  for got, want in zip(run(back.params), run(params), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
  again = names.export_model(config, back.params)
  jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize(
  "change, fields, message",
  [
    (lambda s: s, {}, "num_latents .its input_size squared"),
    (lambda s: s, FIELDS | dict(num_heads=5), "num_heads=5"),
    (lambda s: _without(s, "y_embedder.embedding_table.weight"), FIELDS, "y_embedder"),
    (lambda s: _without(s, "blocks.1.mlp.fc2.weight"), FIELDS, "missing .*1.mlp.fc2"),
    (lambda s: s | {"blocks.0.norm1.weight": np.ones(32)}, FIELDS, "unexpected .*norm1"),
    (lambda s: s | {"x_embedder.proj.weight": np.zeros((32, 3, 2, 2))}, FIELDS, "one latent"),
    (
      lambda s: _without(s, "x_embedder.proj.weight") | {"x_embedder.weight": np.zeros((32, 3))},
      FIELDS,
      "other is none",
    ),
  ],
)
def test_what_is_no_model(change, fields, message):
  with pytest.raises(ValueError, match=message):
    names.import_model(change(_model()[1]), fields)


def _language(vocab_size, **fields):
  sizes = dict(num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64)
  return transformer(vocab_size=vocab_size, **sizes, **RELEASE | fields)


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
  modality = MODEL.modalities[0]
  for change, message in (
    (dict(num_classes=0, language=_language(4)), "0 classes"),
    (dict(modalities=(dataclasses.replace(modality, stop="token"),)), "'token'"),
    (dict(modalities=(dataclasses.replace(modality, head=MixtureHeadConfig()),)), "MixtureHead"),
    (dict(language=_language(9, rope_grid="rope")), "grid='rope' instead of 'linspace'"),
    (dict(language=_language(9, norm="layer")), "instead of"),
  ):
    config = dataclasses.replace(MODEL, **change)
    with pytest.raises(ValueError, match=message):
      names.export_model(config, {})
  config = dataclasses.replace(DIT, grid=(2, 3))
  with pytest.raises(ValueError, match="square"):
    names.export_dit(config, _random(names.dit_shapes(config)))
