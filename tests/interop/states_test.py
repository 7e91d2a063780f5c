"""A state goes through a file: another process would continue as if it had read the prompt."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import interop
from latentlab.models import LanguageModel, build_config, decode_step, prefill, unstack

VOCAB = 23
SIZES = dict(num_layers=2, embed_dim=16, num_heads=2)


def _model(name, **fields):
  model = LanguageModel(build_config(dict(name=name, **SIZES, **fields), VOCAB))
  params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
  return model, nn.unbox(params)


@pytest.mark.parametrize("layers", ["stacked", "unstacked"])
@pytest.mark.parametrize(
  "name, fields",
  [
    ("retnet", dict(normalization="paper")),
    ("retnet", dict(dtype="bfloat16")),
    ("transformer", dict(dtype="bfloat16")),
  ],
  ids=str,
)
def test_retnet_04_a_saved_state_goes_on(tmp_path, name, fields, layers):
  model, params = _model(name, **fields)
  if layers == "unstacked":
    config, params = unstack(model.config, params)
    model = LanguageModel(config)
  tokens = jax.random.randint(jax.random.key(0), (3, 9), 0, VOCAB)
  read = jax.jit(functools.partial(prefill, model, max_length=12))
  logits, cache = read(params, tokens, jnp.array([9, 4, 1]))
  path = tmp_path / "state.safetensors"
  interop.save_state(path, logits, cache, max_length=12)
  got_logits, got_cache = interop.load_state(path, model.config)
  jax.tree.map(np.testing.assert_array_equal, (got_logits, got_cache), (logits, cache))
  step = jax.jit(functools.partial(decode_step, model))
  want, got = (step(params, x.argmax(-1), c) for x, c in ((logits, cache), (got_logits, got_cache)))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_retnet_12_a_retnets_file_does_not_grow(tmp_path):
  sizes = {}
  for name in ("retnet", "transformer"):
    model, params = _model(name)
    for length in (4, 40):
      path = tmp_path / f"{length}.safetensors"
      state = prefill(model, params, jnp.zeros((1, length), jnp.int32))
      interop.save_state(path, *state, max_length=length)
      sizes[name, length] = path.stat().st_size
  assert abs(sizes["retnet", 40] - sizes["retnet", 4]) <= 8  # Of the header's digits.
  # 36 more tokens of 2 layers: keys and values of width 16, and a position.
  assert sizes["transformer", 40] - sizes["transformer", 4] >= 36 * 2 * 4 * (2 * 16 + 1)


def test_a_state_of_another_model_is_refused(tmp_path):
  model, params = _model("retnet")
  path = tmp_path / "state.safetensors"
  state = prefill(model, params, jnp.zeros((1, 3), jnp.int32))
  interop.save_state(path, *state, max_length=3)
  with pytest.raises(ValueError, match="another model: .*state"):
    interop.load_state(path, _model("retnet", value_factor=1.0)[0].config)
  with pytest.raises(ValueError, match="logits is 23, not 5"):
    interop.load_state(path, dataclasses.replace(model.config, vocab_size=5))
  interop.write(tmp_path / "weights.safetensors", {"a": np.ones(3, np.float32)})
  with pytest.raises(ValueError, match="holds no state"):
    interop.load_state(tmp_path / "weights.safetensors", model.config)
  with pytest.raises(ValueError, match="can be read"):
    interop.load_state(tmp_path / "none.safetensors", model.config)
