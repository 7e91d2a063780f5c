import dataclasses
import functools

import jax
import jax.numpy as jnp
import latent_cases as cases
import numpy as np
import pytest
from flax import linen as nn

from latentlab import models
from latentlab.layers.latent_heads import MixtureHeadConfig, RegressionHeadConfig
from latentlab.models.latentlm import (
  Items,
  LatentLM,
  ModalityConfig,
  SpecialTokens,
  class_conditional,
  empty_items,
  num_params,
)

BACKBONES = {
  "transformer": dict(num_kv_heads=1),
  "retnet": {},
  "diff_transformer": {},
  "yoco": dict(num_layers=2),
}


def _model(backbone="transformer", condition="text", stop="token", **fields):
  fields = BACKBONES[backbone] | fields
  config = cases.config(condition, stop, backbone, **fields)
  model = LatentLM(config)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), empty_items(config)))["params"]
  # Zero-initialised maps would hide what depends on them.
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return model, jax.tree.unflatten(tree, leaves)


def _items(model, rows=2, length=9, seed=0):
  rng = np.random.default_rng(seed)
  special = model.config.tokens
  kinds = rng.integers(0, 2, (rows, length))
  kinds[:, 0] = 0
  text = rng.integers(0, special.vocab_size, (rows, length))
  tokens = np.where(kinds > 0, special.latent(0), text).astype(np.int32)
  latents = rng.normal(size=(rows, length, cases.DIM)).astype(np.float32)
  return Items(jnp.asarray(tokens), jnp.asarray(kinds, jnp.int32), {"image": jnp.asarray(latents)})


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, items):
  return model.apply({"params": params}, items, method="hidden")[0]


def _cut(items, *span):
  return jax.tree.map(lambda x: x[:, slice(*span)], items)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_latentlm_08_a_cache_gives_what_one_pass_gives(backbone):
  """Mixed rows, a prompt of several items, then item by item."""
  model, params = _model(backbone)
  items = _items(model)
  want = _hidden(model, params, items)
  cache = models.init_cache(model.config.language, 2, 9)
  apply = functools.partial(model.apply, {"params": params}, method="hidden")
  first, cache = jax.jit(lambda x, c: apply(x, cache=c, fresh=True))(_cut(items, 5), cache)
  np.testing.assert_allclose(first, want[:, :5], atol=1e-5, rtol=1e-4)
  step = jax.jit(lambda x, c: apply(x, cache=c))
  for t in range(5, 9):
    hidden, cache = step(_cut(items, t, t + 1), cache)
    np.testing.assert_allclose(hidden[:, 0], want[:, t], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", ["transformer", "retnet"])
def test_latentlm_09_no_item_sees_those_behind_it(backbone):
  model, params = _model(backbone)
  items = _items(model)
  latents = items.latents["image"].at[:, 6].add(5.0)
  moved = items.replace(latents={"image": latents}, kinds=items.kinds.at[:, 6].set(1))
  items = items.replace(kinds=items.kinds.at[:, 6].set(1))
  a, b = (_hidden(model, params, x) for x in (items, moved))
  np.testing.assert_array_equal(a[:, :6], b[:, :6])
  assert (np.abs(a[:, 6:] - b[:, 6:]).max(-1) > 1e-6).all()


def test_latentlm_09_positions_are_relative():
  """Rotations alone tell positions: the same items further on give the same hidden vectors."""
  model, params = _model()
  items = _items(model, length=6)
  run = lambda shift: model.apply(
    {"params": params}, items, jnp.broadcast_to(jnp.arange(6) + shift, (2, 6)), method="hidden"
  )[0]
  np.testing.assert_allclose(jax.jit(run)(0), jax.jit(run)(113), atol=2e-4)


def test_what_is_no_latent_is_not_read():
  model, params = _model()
  items = _items(model)
  hole = jnp.where(items.kinds[..., None] > 0, items.latents["image"], jnp.nan)
  hidden = _hidden(model, params, items.replace(latents={"image": hole}))
  np.testing.assert_array_equal(hidden, _hidden(model, params, items))
  other = jnp.where(items.kinds > 0, 3, items.tokens)  # Nor what stands in for one.
  np.testing.assert_array_equal(_hidden(model, params, items.replace(tokens=other)), hidden)


def test_a_latent_enters_by_its_linear_map():
  """Of a decoder without layers' effect nothing else is seen: the embedding is `z W`."""
  model, params = _model()
  items = _items(model, rows=1, length=3).replace(kinds=jnp.ones((1, 3), jnp.int32))
  kernel = params["image_input"]["proj"]["kernel"]
  want = items.latents["image"] @ kernel
  seen = {}

  def embed(module, tokens, positions, replaced):
    seen["vectors"] = replaced[1]
    return module

  def interceptor(next_fun, args, kwargs, context):
    if context.method_name == "__call__" and type(context.module).__name__ == "Embedder":
      embed(None, args[0], args[1], args[2])
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(interceptor):
    model.apply({"params": params}, items, method="hidden")
  np.testing.assert_allclose(seen["vectors"], want, rtol=1e-5, atol=1e-6)


def test_latentlm_14_normalisation_round_trip():
  model, params = _model()
  params = params | {"image_normalizer": {"mean": jnp.float32(0.5), "std": jnp.float32(2.0)}}
  z = jax.random.normal(jax.random.key(3), (4, cases.DIM)) * 3
  apply = functools.partial(model.apply, {"params": params}, "image")
  normal = apply(z, method="normalize")
  np.testing.assert_allclose(normal, (z - 0.5) / 2.0, rtol=1e-6)
  np.testing.assert_allclose(apply(normal, method="denormalize"), z, rtol=1e-6, atol=1e-6)


def test_several_modalities_have_their_own_maps_and_heads():
  base = cases.config("text", "token")
  second = ModalityConfig("sound", 3, RegressionHeadConfig(depth=1), stop="classifier")
  language = dataclasses.replace(base.language, vocab_size=SpecialTokens(258, 2).vocab_size)
  config = dataclasses.replace(base, modalities=(*base.modalities, second), language=language)
  model = LatentLM(config)
  items = empty_items(config, 1, 4)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), items))["params"]
  kinds = jnp.array([[0, 1, 2, 2]])

  def loss(latents):
    x = items.replace(kinds=kinds, latents=latents)
    hidden = model.apply({"params": params}, x, method="hidden")[0]
    return jnp.sum(hidden[:, -1] ** 2 * jnp.arange(16))

  latents = {"image": jnp.ones((1, 4, 2)), "sound": jnp.ones((1, 4, 3))}
  grads = jax.jit(jax.grad(loss))(latents)
  assert (np.abs(grads["image"]).max(-1) > 0).tolist() == [[False, True, False, False]]
  assert (np.abs(grads["sound"]).max(-1) > 0).tolist() == [[False, False, True, True]]
  assert {f"{m}_{part}" for part in ("head", "input") for m in latents} <= set(params)


def test_special_tokens_fill_the_vocabulary_once():
  special = SpecialTokens(10, 2, 3)
  found = [special.null]
  for i in range(2):
    found += [special.begin(i), special.end(i), special.latent(i)]
  found += [special.class_token(c) for c in range(3)]
  assert sorted(found) == list(range(10, special.vocab_size))
  with pytest.raises(ValueError, match="label=3 is no class; there are 3"):
    special.class_token(3)


@pytest.mark.parametrize(
  ("preset", "millions"),
  [
    ("base", 143.15),
    ("medium", 455.4),
    ("large", 1024),
    ("xl", 1819),
    ("3b", 3680),
    ("b", 212.2),
    ("l", 495),
    ("h", 1007),
    ("table1", 477),
  ],
)
def test_latentlm_15_parameter_counts(preset, millions):
  """Of the release's models with 16 channels and 1000 classes, and of table 1's."""
  counts = num_params(class_conditional(preset))
  assert counts["total"] / 1e6 == pytest.approx(millions, rel=1.1e-3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(stop="bell"), "unknown stop='bell' of latents"),
    (dict(stop="fixed", num_latents=None), "stop='fixed' needs num_latents"),
    (dict(std=0.0), "must be positive"),
    (dict(dim=0), "must be positive"),
  ],
)
def test_bad_modalities(change, message):
  base = dict(name="image", dim=2, head=MixtureHeadConfig(), num_latents=4)
  with pytest.raises(ValueError, match=message):
    ModalityConfig(**(base | change))


def test_the_vocabulary_must_hold_the_special_tokens():
  config = cases.config()
  with pytest.raises(ValueError, match=r"vocab_size=265 must be 268"):
    dataclasses.replace(config, num_classes=6)
