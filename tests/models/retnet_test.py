"""RetNet's presets, its options beside the paper's, and what they make of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from latentlab import ops
from latentlab.layers import Context, FeedForward, FeedForwardConfig, Shared, initializers
from latentlab.models import LanguageModel, build_config, num_params
from latentlab.models.retnet import TORCHSCALE_PRESETS


def _bodies(name, preset, **transformer):
  config = build_config(dict(name=name, preset=preset), 1000)
  decoder = config.decoder
  sizes = dict(num_layers=decoder.num_layers, embed_dim=decoder.embed_dim)
  other = dict(name="transformer", num_heads=decoder.embed_dim // 64, **sizes, **transformer)
  return config, num_params(config)["body"], num_params(build_config(other, 1000))["body"]


@pytest.mark.parametrize(
  "preset, layers, embed_dim, values, heads",
  [
    ("base", 6, 512, 864, 2),
    ("medium", 16, 1024, 1728, 4),
    ("xl", 24, 2048, 3456, 8),
    ("3b", 32, 2560, 4280, 10),
    ("7b", 32, 4096, 6912, 16),
    ("13b", 40, 5120, 8560, 20),
    ("65b", 64, 8192, 13824, 32),
  ],
)
def test_retnet_10_the_releases_sizes_are_a_gated_transformers(
  preset, layers, embed_dim, values, heads
):
  config, ours, transformers = _bodies("torchscale_retnet", preset, feed_forward="swiglu")
  block = config.decoder.stages[0].pattern[0]
  assert (block.mixer.num_heads, block.mixer.head_dim) == (heads, 256)
  assert block.mixer.num_heads * block.mixer.value_head_dim == block.feed_forward.mlp_dim == values
  assert ours == layers * (2 * embed_dim**2 + 6 * embed_dim * values)
  # The release's own widths: the largest is 1.01 % over a Transformer whose width is 8/3 d.
  assert abs(ours / transformers - 1) < (0.0102 if preset == "65b" else 0.01)
  assert config.scale_embeddings and block.norm == "rms" and block.mixer.head_norm == "rms"
  assert block.feed_forward.float32_activation and len(TORCHSCALE_PRESETS) == 7


def test_retnet_10_gammas_of_both_formulas():
  for preset, heads in (("1b3", 8), ("6b7", 16)):
    mixer = build_config(dict(name="retnet", preset=preset), 10).decoder.stages[0].pattern[0].mixer
    gamma = np.exp(np.asarray(mixer.log_decay, np.float64))
    np.testing.assert_allclose(gamma[[0, -1]], [31 / 32, 511 / 512], rtol=1e-6)
    ratios = (1 - gamma[1:]) / (1 - gamma[:-1])
    np.testing.assert_allclose(ratios, (1 / 16) ** (1 / (heads - 1)), rtol=1e-4)
  mixer = build_config(dict(name="torchscale_retnet", preset="65b"), 10)
  log_decay = np.asarray(mixer.decoder.stages[0].pattern[0].mixer.log_decay, np.float64)
  np.testing.assert_allclose(-np.expm1(log_decay), 2.0 ** -(5.0 + np.arange(32)), rtol=1e-6)


def test_retnet_06_scores_do_not_see_a_shift():
  """Of the release's grid, whose last feature hardly turns."""
  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 6, 2, 16)) / 4, jnp.float32) for _ in range(2))
  positions = jnp.array([[0, 1, 40, 500, 1500, 2047]])

  def scores(positions):
    turned = (ops.apply_rope(x, positions, grid="linspace") for x in (q, k))
    return np.einsum("BTNH,BSNH->BNTS", *turned)

  np.testing.assert_allclose(scores(positions + 1000), scores(positions), atol=1e-5)
  assert np.abs(scores(2 * positions) - scores(positions)).max() > 0.1


@pytest.mark.slow
def test_deepnorm_divides_some_weights_and_multiplies_the_residual():
  """alpha = (2 L)^(1/4) before the norm; beta = (8 L)^(-1/4) on values, outputs and mlps."""
  sizes = dict(name="retnet", num_layers=3, embed_dim=64, num_heads=2, feed_forward="swiglu")

  def params(**fields):
    model = LanguageModel(build_config(sizes | fields, 10))
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]

  # Of one key, initialisers differ by their factors alone.
  plain = traverse_util.flatten_dict(params(init="retnet"), sep="/")
  divided = traverse_util.flatten_dict(params(init="deepnorm"), sep="/")
  for name, x in plain.items():
    small = ("v_proj", "out_proj", "feed_forward/gate_proj")  # fc1 is the one that is activated.
    factor = 24**-0.25 if any(part in name for part in small) else 1
    np.testing.assert_allclose(divided[name], factor * x, rtol=1e-5, err_msg=name)

  config = build_config(sizes | dict(residual="deepnorm", norm="layer"), 10).decoder
  assert config.residual_scale == pytest.approx(6**0.25)
  model = LanguageModel(build_config(sizes | dict(residual="deepnorm"), 10))
  deep = params(residual="deepnorm")
  assert "final_norm" not in deep["decoder"]
  # Without branches a block is a norm of alpha x, which norms of norms leave alone.
  still = jax.tree.map_with_path(
    lambda path, x: 0 * x if "out_proj" in jax.tree_util.keystr(path) else x, deep
  )
  tokens = jnp.arange(5)[None]
  hidden, _ = model.apply({"params": still}, tokens, method="hidden")
  x = deep["embedder"]["embedding"][tokens]
  want = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  np.testing.assert_allclose(hidden, want, rtol=1e-2, atol=1e-2)


def test_deepnorm_weighs_the_stream_by_alpha():
  """One layer by hand."""
  fields = dict(num_layers=1, embed_dim=16, num_heads=2, norm="rms", residual="deepnorm")
  model = LanguageModel(build_config(dict(name="retnet", **fields), 10))
  tokens = jnp.arange(6)[None]
  params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"]
  block = jax.tree.map(lambda x: x[0], params["decoder"]["stage_0"]["block_0"])
  shared = Shared(16, jnp.float32, model.config.decoder.initializers)
  config = model.config.decoder.stages[0].pattern[0]

  norm = lambda x: x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
  x = params["embedder"]["embedding"][tokens]
  mixer = config.mixer.module(shared, name="mixer")
  y, _ = mixer.apply({"params": block["mixer"]}, x, Context(jnp.arange(6)[None]))
  x = norm(2**0.25 * x + y)
  y = FeedForward(config.feed_forward, shared).apply({"params": block["feed_forward"]}, x)
  want = norm(2**0.25 * x + y)
  hidden, _ = model.apply({"params": params}, tokens, method="hidden")
  np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-5)


def test_an_activation_in_float32_is_rounded_once():
  shared = Shared(8, jnp.bfloat16, initializers.make("fan_in", num_layers=1, embed_dim=8))
  module = FeedForward(FeedForwardConfig(12, "swiglu", float32_activation=True), shared)
  x = jax.random.normal(jax.random.key(0), (2, 3, 8), jnp.bfloat16)
  params = nn.unbox(module.init(jax.random.key(1), x))["params"]
  kernel = {k: p["kernel"].astype(jnp.bfloat16) for k, p in params.items()}
  flat = x.reshape(-1, 8)
  active = (flat @ kernel["gate_proj"]).astype(jnp.float32)
  active = (active / (1 + jnp.exp(-active))).astype(jnp.bfloat16)
  want = (active * (flat @ kernel["in_proj"])) @ kernel["out_proj"]
  got = module.apply({"params": params}, x).reshape(-1, 8)
  np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=1e-2, atol=1e-3)


def test_retnet_03_a_custom_decay_reaches_the_model_from_a_config():
  section = dict(name="retnet", num_layers=1, embed_dim=16, num_heads=2)
  config = build_config(section | dict(decay="custom", decay_values=(0.25, 1.0)), 10)
  log_decay = config.decoder.stages[0].pattern[0].mixer.log_decay
  np.testing.assert_allclose(np.exp(log_decay), [0.25, 1.0], rtol=1e-6)
  np.testing.assert_array_equal(ops.log_decay_rates(1, "custom", value=(0.0,)), [-np.inf])
