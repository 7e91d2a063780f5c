"""Names of YOCO's release: what errors tell, and which models it has not."""

import jax
import numpy as np
import pytest

from latentlab import interop
from latentlab.models import build_config

VOCAB = 11
SECTION = dict(name="yoco", num_layers=4, embed_dim=12, num_heads=2, num_self_heads=3, mlp_dim=10)
TOLD = dict(num_heads=2, rope_base=10_000.0)
PARAMS = dict(dim=12, n_layers=4, hidden_dim=10, n_self_heads=3, n_attn_heads=2, n_attn_kv_heads=2)
load, file = interop.IMPORTERS["yoco"], interop.CONFIG_FILES["yoco"]


def _export(**changes):
  config = build_config(SECTION | changes, VOCAB)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), interop.parameter_shapes(config)
  )
  return config, params, interop.EXPORTERS["yoco"](config, params)


@pytest.mark.parametrize(
  "changes, told",
  [
    ({}, {}),
    (dict(tie_embeddings=True, num_kv_heads=1), {}),
    (
      dict(self_attention="sliding_window", window=5),
      dict(num_self_heads=3, window=5),
    ),
  ],
  ids=str,
)
def test_an_export_comes_back(changes, told):
  """By its own `params.json`, and by what a user says."""
  config, params, state = _export(**changes)
  for fields in (file.fields(file.make(config)), TOLD | told):
    back = load({f"model.{name}": x for name, x in state.items()}, fields)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert build_config(back.model, back.vocab_size) == build_config(
      SECTION | dict(num_kv_heads=2) | changes, VOCAB
    )


def test_errors_list_all_that_is_wrong():
  _, _, state = _export()
  with pytest.raises(ValueError, match="num_heads .*n_attn_heads.*rope_base .*rope_theta"):
    load(state, {})
  changed = dict(state)
  del changed["cross_decoder.layers.1.mixer.q_proj.weight"]
  changed["self_decoder.layers.0.mixer.subln.weight"] = np.ones(4)
  changed["self_decoder.layers.1.ffn.fc2.weight"] = np.ones((12, 9))
  with pytest.raises(ValueError, match=r"missing \['cross_decoder.layers.1.mixer.q_p") as error:
    load(changed, TOLD)
  for part in (
    "unexpected ['self_decoder.layers.0.mixer.subln.weight']",
    "self_decoder.layers.1.ffn.fc2.weight is (12, 9), the model has (12, 10)",
  ):
    assert part in str(error.value)
  fewer = {name: x for name, x in state.items() if not name.startswith("cross_decoder.layers.1.")}
  with pytest.raises(ValueError, match="'self_decoder.layers.': 2, 'cross_decoder.layers.': 1"):
    load(fewer, TOLD)
  for count in (0, 5, 24):
    with pytest.raises(ValueError, match=f"num_heads={count} does not divide"):
      load(state, TOLD | dict(num_heads=count))
  with pytest.raises(ValueError, match="are missing among"):
    load({"a": np.ones(3)}, TOLD)
  _, _, state = _export(self_attention="sliding_window", window=5)
  with pytest.raises(ValueError, match="num_self_heads .*window .*sliding_window"):
    load(state, TOLD)


def test_parameters_of_the_release_that_are_none():
  assert file.fields(PARAMS)["self_attention"] == "gated_retention"
  assert file.fields(PARAMS)["norm_eps"] == 1e-5
  assert "num_kv_heads" not in file.fields(PARAMS | dict(n_attn_kv_heads=None))
  with pytest.raises(ValueError, match=r"\['n_attn_heads'\] are missing"):
    file.fields({name: x for name, x in PARAMS.items() if name != "n_attn_heads"})
  for window in (True, 0, "1024"):
    with pytest.raises(ValueError, match="sliding_window="):
      file.fields(PARAMS | dict(sliding_window=window))


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(tau=8.0), "tau=8.0 instead of 16.0"),
    (dict(num_self_layers=1), "repeats=1 instead of 2"),
    (dict(layout="unstacked"), "cross_input='embeddings' instead of 'hidden'"),
    (dict(layout="interleaved"), "unlike layers"),
    (dict(cross_attention="diff_attention", head_dim=4), "diff_attention"),
    (dict(kv_norm=False), "shared_kv.norm='none' instead of 'rms'"),
    (dict(rope_grid="rope"), "grid='rope' instead of 'linspace'"),
    (dict(self_head_dim=6), "head_dim=6 instead of 4"),
    (dict(scale_embeddings=False), "scale_embeddings=False instead of True"),
    (dict(name="transformer", num_self_heads=None), "attention"),
  ],
  ids=str,
)
def test_other_models_are_not_exported(changes, message):
  with pytest.raises(ValueError, match=message):
    _export(**changes)
