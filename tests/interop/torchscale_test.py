"""Names of torchscale's RetNet: there and back, and what an error tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import interop
from latentlab.models import LanguageModel, build_config

VOCAB = 11
TOLD = dict(feed_forward="swiglu", scale_embeddings=True)
SECTION = dict(
  name="retnet",
  num_layers=3,
  embed_dim=16,
  num_heads=2,
  value_factor=1.5,
  mlp_dim=20,
  norm="rms",
  decay="pow2",
  head_norm="rms",
  **TOLD,
)


def _export(**changes):
  model = LanguageModel(build_config(SECTION | changes, VOCAB))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  return model, nn.unbox(params), interop.EXPORTERS["torchscale"](model.config, params)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(tie_embeddings=True),
    dict(residual="deepnorm"),
    dict(decay="custom", decay_values=(0.5, 1.0)),
  ],
  ids=str,
)
def test_an_export_comes_back(changes, tmp_path):
  model, params, state = _export(**changes)
  interop.write(tmp_path / "a.safetensors", state)
  fields = TOLD | {k: x for k, x in changes.items() if k == "residual"}
  imported = interop.IMPORTERS["torchscale"](interop.read(tmp_path / "a.safetensors"), fields)
  assert imported.vocab_size == VOCAB
  config = build_config(imported.model, VOCAB)
  jax.tree.map(np.testing.assert_array_equal, imported.params, params)
  tokens = jnp.arange(8)[None] % VOCAB
  got, want = (
    LanguageModel(c).apply({"params": params}, tokens).logits for c in (config, model.config)
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_errors_list_all_that_is_wrong():
  _, _, state = _export()
  load = interop.IMPORTERS["torchscale"]
  with pytest.raises(ValueError, match="feed_forward .*swish"):
    load(state, dict(scale_embeddings=True))
  changed = dict(state)
  del changed["layers.1.ffn.fc2.weight"]
  changed["layers.0.ffn.subln.weight"] = np.ones(20)
  changed["layers.2.retention.g_proj.weight"] = np.ones((24, 15))
  with pytest.raises(ValueError, match=r"missing \['layers.1.ffn.fc2.weight'\]") as error:
    load(changed, TOLD)
  for part in ("unexpected ['layers.0.ffn.subln.weight']", "(24, 15), the model has (24, 16)"):
    assert part in str(error.value)
  with pytest.raises(ValueError, match="residual=deepnorm"):
    load({k: x for k, x in state.items() if k != "layer_norm.weight"}, TOLD)
  turned = state | {"retnet_rel_pos.angle": state["retnet_rel_pos.angle"] * 1.1}
  with pytest.raises(ValueError, match="rotations are not known"):
    load(turned, TOLD)
  with pytest.raises(ValueError, match="are missing among"):
    load({"a": np.ones(3)}, TOLD)


def test_other_models_are_not_exported():
  for changes, name in (
    (dict(gate=False), "gate"),
    (dict(decay="linspace"), "decay"),
    (dict(num_kv_heads=1), "num_kv_heads"),
    (dict(norm="layer"), "norm"),
  ):
    with pytest.raises(ValueError, match=name):
      _export(**changes)


def test_files_that_are_none(tmp_path):
  (tmp_path / "a.safetensors").write_bytes(b"no such thing")
  (tmp_path / "a.ckpt").write_bytes(b"")
  for name, message in (
    ("a.safetensors", "no safetensors file"),
    ("a.ckpt", "ends in none of"),
    ("b.pt", "is no file"),
  ):
    with pytest.raises(ValueError, match=message):
      interop.read(tmp_path / name)
