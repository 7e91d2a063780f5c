"""Tokenizers: shapes, bottlenecks, sizes of the papers', and sounds in chunks of any size."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.models import latent_tokenizer
from latentlab.models.latent_tokenizer import BOTTLENECKS, LatentTokenizer

_VIT = dict(
  name="vit_tokenizer",
  image_size=8,
  channels=1,
  patch_size=2,
  num_layers=1,
  embed_dim=16,
  num_heads=2,
  dim=3,
)
_BEIT = _VIT | dict(name="beit_tokenizer")
_CONV = dict(
  name="conv_tokenizer",
  image_size=8,
  channels=3,
  width=8,
  multipliers=(1, 2),
  strides=(2,),
  depth=1,
  dim=3,
)
_SPEECH = dict(
  name="speech_tokenizer",
  num_samples=60,
  width=4,
  strides=(2, 5),
  depths=(1, 0, 1),
  dim=3,
  init_std=0.0,
  layer_scale=0.3,
)


def _made(fields, **more):
  return _cached(tuple((fields | more).items()))


@functools.cache
def _cached(fields):
  model = LatentTokenizer(latent_tokenizer.build_config(dict(fields)))
  media = jax.random.uniform(jax.random.key(3), (3, *model.config.media_shape), minval=-1.0)
  return model, jax.jit(model.init)(jax.random.key(4), media), media


@pytest.mark.slow
@pytest.mark.parametrize("fields", [_VIT, _BEIT, _CONV, _SPEECH], ids=lambda f: f["name"])
def test_bodies(fields, key):
  model, variables, media = _made(fields)
  c = model.config
  out = jax.jit(model.apply)(variables, media, key)
  assert out.reconstruction.shape == media.shape
  assert out.means.shape == out.latents.shape == (3, c.num_latents, 3)
  assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}
  assert (np.asarray(out.means) != np.asarray(out.latents)).all()
  encode = lambda x: model.apply(variables, x, method="encode")
  np.testing.assert_allclose(jax.jit(encode)(media), out.means, rtol=1e-5, atol=1e-6)
  decoded = jax.jit(lambda z: model.apply(variables, z, method="decode"))(out.latents)
  np.testing.assert_allclose(decoded, out.reconstruction, rtol=1e-5, atol=1e-6)
  without = jax.jit(lambda x: model.apply(variables, x))(media)
  np.testing.assert_array_equal(without.latents, without.means)
  sizes = latent_tokenizer.num_params(c)
  assert sizes["total"] == sum(x.size for x in jax.tree.leaves(variables))


@pytest.mark.parametrize("fields", [_VIT, _BEIT, _CONV], ids=lambda f: f["name"])
def test_latents_are_in_raster_order(fields):
  """What moves in the upper right corner, moves latents there the most, and the other way round."""
  model, variables, media = _made(fields)
  encode = jax.jit(lambda x: model.apply(variables, x, method="encode"))
  z = encode(media)
  moved = np.abs(encode(media.at[:, 0, 7].add(0.1)) - z).sum((0, 2)).reshape(4, 4)
  corners = moved[:2, :2], moved[:2, 2:], moved[2:, :2], moved[2:, 2:]
  assert np.argmax([x.sum() for x in corners]) == 1
  decode = jax.jit(lambda z: model.apply(variables, z, method="decode"))
  moved = np.abs(decode(z.at[:, 3].add(0.1)) - decode(z)).sum((0, 3))
  corners = moved[:4, :4], moved[:4, 4:], moved[4:, :4], moved[4:, 4:]
  assert np.argmax([x.sum() for x in corners]) == 1


def test_flops_are_those_that_the_compiler_counts(key):
  for fields in (
    _VIT | dict(embed_dim=64, num_heads=1),
    _CONV | dict(width=32),
    _SPEECH | dict(width=32),
  ):
    config = latent_tokenizer.build_config(fields | dict(bottleneck="mean"))
    model = LatentTokenizer(config)
    media = jax.ShapeDtypeStruct((1, *config.media_shape), jnp.float32)
    variables = jax.eval_shape(model.init, key, media)
    counted = jax.jit(model.apply).lower(variables, media).cost_analysis()["flops"]
    assert 0.75 < config.flops() / counted < 1.25, fields["name"]


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", sorted({*BOTTLENECKS} - {"sigma_gaussian", "mean"}))
def test_bottlenecks(bottleneck, key):
  more = dict(bottleneck=bottleneck, codebook_size=11 if bottleneck == "vq" else 0)
  model, variables, media = _made(_VIT, **more)
  c = model.config
  out = jax.jit(model.apply)(variables, media, key)
  again = jax.jit(model.apply)(variables, media, jax.random.fold_in(key, 7))
  noisy = bottleneck in ("sigma_gaussian", "sigma_fixed", "plain")
  assert (np.asarray(out.latents) != np.asarray(again.latents)).any() == noisy
  assert (out.log_variances is not None) == (bottleneck == "plain")
  assert c.encoder_features == (6 if bottleneck == "plain" else 3)
  if bottleneck == "spherical":
    np.testing.assert_allclose(np.linalg.norm(out.means, axis=-1), 3**0.5, rtol=1e-5)
  if bottleneck != "vq":
    return
  codes = jax.jit(lambda x: model.apply(variables, x, method="codes"))(media)
  np.testing.assert_array_equal(codes, out.codes)
  assert codes.shape == (3, 16) and len(np.unique(codes)) > 1
  decoded = jax.jit(lambda c: model.apply(variables, c, method="decode_codes"))(codes)
  np.testing.assert_allclose(decoded, out.reconstruction, rtol=1e-4, atol=1e-5)
  codebook = np.asarray(variables["params"]["codebook"].unbox())
  unit = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
  np.testing.assert_allclose(out.latents, unit[np.asarray(codes)], rtol=1e-5, atol=1e-6)


def test_gradients_of_a_vq_go_straight_through(key):
  """The encoder has the gradient of the latents; the codebook has none from the reconstruction."""
  model, variables, media = _made(_VIT, bottleneck="vq", codebook_size=11, unit_codes=False)
  loss = lambda v: jnp.square(model.apply(v, media).reconstruction - media).sum()
  grads = jax.jit(jax.grad(loss))(variables)["params"]
  assert (np.asarray(grads["codebook"].unbox()) == 0).all()
  out = jax.jit(model.apply)(variables, media)
  decode = lambda z: jnp.square(model.apply(variables, z, method="decode") - media).sum()
  at_latents = jax.jit(jax.grad(decode))(out.latents)
  encode = lambda v: (model.apply(v, media, method="encode") * at_latents).sum()
  want = jax.jit(jax.grad(encode))(variables)["params"]["encoder"]
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  jax.tree.map(close, grads["encoder"], want)


@pytest.mark.parametrize("chunks", [(1, 5), (2, 1, 3)], ids=str)
def test_latentlm_16_streaming_is_the_whole(chunks):
  model, variables, media = _made(_SPEECH)
  apply = lambda *args, **options: model.apply(variables, *args, **options)
  out = jax.jit(apply)(media)
  means, whole = out.means, out.reconstruction
  cache, parts, begin = model.config.init_decode_cache(3), [], 0
  step = jax.jit(lambda z, cache: apply(z, cache, method="decode_step"))
  for size in chunks:
    part, cache = step(means[:, begin : begin + size], cache)
    assert part.shape == (3, size * 10, 1)  # Nothing is held back.
    parts.append(part)
    begin += size
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)

  cache, parts = model.config.init_encode_cache(3), []
  step = jax.jit(lambda x, cache: apply(x, cache, method="encode_step"))
  for begin, end in ((0, 3), (3, 31), (31, 60)):  # Of samples, no whole latents.
    part, cache = step(media[:, begin:end], cache)
    parts.append(part)
  assert [p.shape[1] for p in parts] == [0, 3, 3]
  np.testing.assert_allclose(np.concatenate(parts, 1), means, rtol=1e-5, atol=1e-6)


def test_a_segment_begins_anew_where_the_cache_was_reset(key):
  model, variables, media = _made(_SPEECH)
  apply = lambda *args, **options: model.apply(variables, *args, **options)
  z = jax.random.normal(key, (3, 4, 3))
  step = jax.jit(lambda z, cache: apply(z, cache, method="decode_step"))
  first, cache = step(z, model.config.init_decode_cache(3))
  second, _ = step(z, cache.reset(jnp.array([True, False, True])))
  np.testing.assert_allclose(second[::2], first[::2], rtol=1e-5, atol=1e-6)
  assert np.abs(second[1] - first[1]).max() > 1e-3
  third, _ = step(z, cache.fork(jnp.array([1, 1, 1])))
  assert np.abs(third[1] - second[1]).max() < 1e-5

  encode = jax.jit(lambda x, cache: apply(x, cache, method="encode_step"))
  _, cache = encode(media[:, :13], model.config.init_encode_cache(3))
  with pytest.raises(ValueError, match="part of a latent"):
    cache.reset(jnp.ones(3, bool))
  _, cache = encode(media[:, 13:20], cache)
  again, _ = encode(media, cache.reset(jnp.ones(3, bool)))
  whole = jax.jit(lambda x: apply(x, method="encode"))(media)
  np.testing.assert_allclose(again, whole, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_of_activations_alone(key):
  for fields in (_VIT, _CONV, _SPEECH):
    config = latent_tokenizer.build_config(fields | dict(dtype="bfloat16"))
    model, media = LatentTokenizer(config), jnp.zeros((1, *config.media_shape))
    variables = jax.eval_shape(model.init, key, media)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(model.apply)(variables, media)
    kinds = {str(x.aval.dtype) for x in jaxpr.jaxpr.outvars}
    assert kinds == {"float32"} and "bf16[" in str(jaxpr)


@pytest.mark.parametrize(
  "name, preset, want, tolerance",
  [
    ("vit_tokenizer", "imagenet", 172e6, 0.01),
    ("speech_tokenizer", "vibevoice", 2 * 340e6, 0.02),
    ("speech_tokenizer", "stride_1600", 120e6, 0.03),
    ("speech_tokenizer", "stride_3200", 120e6, 0.03),
    ("speech_tokenizer", "stride_6400", 120e6, 0.03),
  ],
)
def test_sizes_of_the_papers(name, preset, want, tolerance):
  """The image tokenizer has no biases inside its blocks and no class token: 172.1M all the same."""
  config = latent_tokenizer.build_config(dict(name=name, preset=preset))
  sizes = latent_tokenizer.num_params(config)
  np.testing.assert_allclose(sizes["total"], want, rtol=tolerance)
  np.testing.assert_allclose(sizes["encoder"], sizes["decoder"], rtol=0.01)


def test_strides_of_the_papers():
  for preset, hop, dim in (("stride_1600", 1600, 32), ("stride_3200", 3200, 64)):
    c = latent_tokenizer.build_config(dict(name="speech_tokenizer", preset=preset))
    assert (c.body.hop, c.dim) == (hop, dim)
  c = latent_tokenizer.build_config(dict(name="speech_tokenizer", preset="stride_6400"))
  assert (c.body.hop, c.dim) == (6400, 128)
  c = latent_tokenizer.build_config(dict(name="speech_tokenizer", preset="vibevoice"))
  assert (c.body.hop, c.dim, c.noise.std, c.body.widths[-1]) == (3200, 64, 0.5, 2048)
  c = latent_tokenizer.build_config(dict(name="vit_tokenizer", preset="imagenet"))
  assert (c.num_latents, c.dim, c.noise.std, c.media_shape) == (256, 16, 0.75, (256, 256, 3))


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(name="vit"), "name='vit'"),
    (_VIT | dict(preset="imagenet22k"), "preset='imagenet22k'"),
    (_VIT | dict(widht=3), r"\['widht'\]"),
    (_VIT | dict(image_size=None), "lacks 'image_size'"),
    (_VIT | dict(patch_size=3), "patch_size=3 must divide"),
    (_VIT | dict(num_heads=3), "num_heads=3"),
    (_VIT | dict(dim=0), "dim=0"),
    (_VIT | dict(bottleneck="gauss"), "bottleneck='gauss'"),
    (_VIT | dict(bottleneck="vq"), "codebook_size=0 must be positive"),
    (_VIT | dict(codebook_size=4), "codebook_size=4"),
    (_VIT | dict(bottleneck="plain", std=0.5), "std=0.5 means nothing to bottleneck='plain'"),
    (_VIT | dict(std=-1.0), "std=-1.0"),
    (_VIT | dict(bottleneck="sigma_fixed", scale_per="token"), "scale_per='token'"),
    (_CONV | dict(strides=(3,)), "must divide image_size"),
    (_CONV | dict(strides=(2, 2)), "one more than strides"),
    (_SPEECH | dict(num_samples=61), "61 samples are no multiple of 10"),
    (_SPEECH | dict(depths=(1, 1)), "one more than strides"),
  ],
)
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    latent_tokenizer.build_config(fields)


def test_media_that_do_not_fit():
  for fields, shape, message in (
    (_VIT, (2, 8, 8, 3), "do not fit a tokenizer of"),
    (_SPEECH, (2, 61, 1), "61 samples"),
    (_SPEECH, (2, 60, 2), "no sounds of 1 channels"),
  ):
    model, variables, _ = _made(fields)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
  model, variables, media = _made(_VIT)
  for method in ("codes", "decode_codes"):
    argument = media if method == "codes" else jnp.zeros((2, 16), jnp.int32)
    with pytest.raises(ValueError, match=f"{method} needs bottleneck='vq'"):
      model.apply(variables, argument, method=method)
  with pytest.raises(ValueError, match="init_decode_cache is of tokenizers of sounds"):
    inspect.unwrap(type(model.config).init_decode_cache)(model.config, 1)


def test_names_of_parameters():
  """Checkpoints, and patterns of what is trained, go by these."""
  params = jax.eval_shape(lambda: _made(_VIT)[1])["params"]
  assert set(params["encoder"]) == {"patch_embed", "position_embedding", "transformer", "head"}
  want = {"latent_embed", "position_embedding", "transformer", "head_in", "head_out"}
  assert set(params["decoder"]) == want
