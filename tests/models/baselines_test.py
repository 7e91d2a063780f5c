"""Table 5's baselines as language models: equal sizes, generation, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab.models import (
  LanguageModel,
  build_config,
  decode_step,
  flops_per_token,
  num_params,
  prefill,
)

SIZES = dict(num_layers=2, embed_dim=32)
MODELS = {
  "linear_transformer": dict(name="linear_transformer", num_heads=2),
  "rwkv": dict(name="rwkv"),
  "h3": dict(name="h3", num_heads=4, state_dim=8),
  "hyena": dict(name="hyena", train_length=16, filter_dim=8, filter_features=5),
}
ALL = pytest.mark.parametrize("name", MODELS)


@pytest.mark.slow
@ALL
@pytest.mark.usefixtures("empty_jit_cache")
def test_prefill_and_decode_equal_one_pass(key, name):
  """Ragged prompts, stacked layers, room that grows behind the prompt; one program decodes."""
  model = LanguageModel(build_config(MODELS[name] | SIZES | dict(unroll=1), vocab_size=23))
  tokens = jax.random.randint(key, (3, 9), 0, 23)
  params = nn.unbox(jax.jit(model.init)(jax.random.key(1), tokens))["params"]
  want = jax.jit(lambda p, t: model.apply({"params": p}, t).logits)(params, tokens)
  lengths = jnp.array([5, 2, 4])
  run = jax.jit(functools.partial(prefill, model, max_length=12))
  logits, cache = run(params, tokens[:, :5], lengths)
  step, rows = jax.jit(functools.partial(decode_step, model)), jnp.arange(3)
  for t in range(4):
    np.testing.assert_allclose(logits, want[rows, lengths + t - 1], rtol=1e-4, atol=1e-4)
    logits, cache = step(params, tokens[rows, lengths + t], cache)
  assert step._cache_size() == 1
  np.testing.assert_array_equal(cache.lengths, lengths + 4)


@ALL
def test_the_papers_size_is_the_transformers(name):
  """Table 5's setting, without the small networks of small widths."""
  fields = dict(name=name, preset="200m") | (dict(train_length=2048) if name == "hyena" else {})
  config = build_config(fields, vocab_size=1000)
  transformer = num_params(build_config(dict(name="transformer", preset="200m"), vocab_size=1000))
  assert abs(num_params(config)["body"] / transformer["body"] - 1) < 0.001
  # Each is linear in the length but for Hyena's transforms.
  ratio = flops_per_token(config, 8192) / flops_per_token(config, 4096)
  assert 1 <= ratio < (1.001 if name == "hyena" else 1 + 1e-9)


@ALL
@pytest.mark.parametrize("feed_forward", ["gelu", "swiglu"])
def test_small_sizes_are_equal_to_a_percent(name, feed_forward):
  fields = MODELS[name] | SIZES | dict(embed_dim=64, feed_forward=feed_forward)
  body = num_params(build_config(fields, vocab_size=23))["body"]
  assert abs(body / (12 * 2 * 64**2) - 1) < 0.01


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(name="hyena"), "train_length"),
    (dict(name="rwkv", positions="alibi"), "'rwkv' with positions 'alibi'"),
    (dict(name="rwkv", num_heads=2), "num_heads"),
    (dict(name="h3", num_heads=3), "num_heads=3"),
    (dict(name="h3", num_heads=4, state_dim=512), "leaves no room"),
    (dict(name="linear_transformer"), r"lacks \['num_heads'\]"),
  ],
  ids=str,
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    build_config(fields | SIZES, vocab_size=23)
