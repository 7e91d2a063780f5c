"""DiffLlama's names without transformers: layouts there and back, and what errors tell."""

import jax
import numpy as np
import pytest

from latentlab import interop
from latentlab.models import build_config

VOCAB = 11
SECTION = dict(
  name="diff_transformer",
  num_layers=3,
  embed_dim=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=10,
  head_norm_affine=False,
)
CONFIG = dict(
  model_type="diffllama",
  hidden_act="silu",
  num_attention_heads=8,
  num_key_value_heads=4,
  rms_norm_eps=1e-5,
  rope_theta=10_000.0,
  rope_scaling=None,
)
TOLD = dict(feed_forward="swiglu", rope_base=10_000.0, norm_eps=1e-5)
load, file = interop.IMPORTERS["diffllama"], interop.CONFIG_FILES["diffllama"]


def _export(**changes):
  config = build_config(SECTION | changes, VOCAB)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), interop.parameter_shapes(config)
  )
  return config, params, interop.EXPORTERS["diffllama"](config, params)


@pytest.mark.parametrize("changes", [{}, dict(tie_embeddings=True), dict(num_kv_heads=1)], ids=str)
def test_diff_06_our_layout_goes_there_and_back(changes):
  config, params, state = _export(**changes)
  told = file.fields(file.make(config)) | dict(head_layout="neighbour", rope_layout="interleaved")
  back = load(state, told)
  jax.tree.map(np.testing.assert_array_equal, back.params, params)
  assert file.make(build_config(back.model, back.vocab_size)) == file.make(config)


def test_rows_are_where_their_pairs_are():
  """Row by row, by what transformers' module reads from each."""
  _, params, state = _export()
  mixer = params["decoder"]["stage_0"]["block_0"]["mixer"]
  q, v = (mixer[f"{name}_proj"]["kernel"][1] for name in "qv")
  their_q, their_v = (state[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qv")
  for head, m, feature in ((0, 1, 3), (3, 0, 5), (2, 1, 4)):
    # The second of pair j lies j + H/2; the second map's heads behind all of the first's.
    row = (m * 4 + head) * 6 + feature // 2 + 3 * (feature % 2)
    np.testing.assert_array_equal(their_q[row], q[:, head, m, feature])
  for head, feature in ((0, 7), (1, 2), (1, 11)):
    row = (feature // 6 * 2 + head) * 6 + feature % 6
    np.testing.assert_array_equal(their_v[row], v[:, head, feature])


def test_a_head_norms_scale_goes_into_the_projection_behind_it():
  _, params, state = _export(head_norm_affine=True)
  mixer = params["decoder"]["stage_0"]["block_0"]["mixer"]
  out = mixer["out_proj"]["kernel"] * mixer["head_norm"]["scale"][:, None, :, None]
  got = state["model.layers.2.self_attn.o_proj.weight"]
  np.testing.assert_array_equal(got, out[2].reshape(-1, 12).T)
  assert not any("norm_scale" in name for name in state)


def test_errors_list_all_that_is_wrong():
  _, _, state = _export()
  with pytest.raises(ValueError, match="rope_base .*rope_theta.*norm_eps .*rms_norm_eps"):
    load(state, dict(feed_forward="swiglu"))
  changed = dict(state)
  del changed["model.layers.1.mlp.up_proj.weight"]
  changed["model.layers.0.self_attn.q_proj.bias"] = np.ones(48)
  changed["model.layers.2.self_attn.k_proj.weight"] = np.ones((24, 11))
  with pytest.raises(ValueError, match=r"missing \['model.layers.1.mlp.up_proj.weight'\]") as error:
    load(changed, TOLD)
  for part in (
    "unexpected ['model.layers.0.self_attn.q_proj.bias']",
    "model.layers.2.self_attn.k_proj.weight is (24, 11), the model has (24, 12)",
  ):
    assert part in str(error.value)
  with pytest.raises(ValueError, match=r"unexpected \['lm_head.weight'\]"):
    load(state, TOLD | dict(tie_embeddings=True))
  with pytest.raises(ValueError, match=r"missing \['lm_head.weight'\]"):
    without = {name: x for name, x in state.items() if name != "lm_head.weight"}
    load(without, TOLD | dict(tie_embeddings=False))
  with pytest.raises(ValueError, match="missing .*layers.3"):
    load(state, TOLD | dict(num_layers=4))
  with pytest.raises(ValueError, match="45 rows, not those of pairs"):
    load(state | {"model.layers.0.self_attn.q_proj.weight": np.ones((45, 12))}, TOLD)
  with pytest.raises(ValueError, match="are missing among"):
    load({"a": np.ones(3)}, TOLD)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(model_type="llama"), "model_type='llama'"),
    (dict(hidden_act="relu"), "hidden_act='relu'"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type='linear'"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1.0)), "rope_type='llama3'"),
    (dict(num_attention_heads=7), "num_attention_heads=7"),
    (dict(num_key_value_heads=1), "num_key_value_heads=1"),
  ],
  ids=str,
)
def test_configurations_that_are_not_ours(changes, message):
  with pytest.raises(ValueError, match=message):
    file.fields(CONFIG | changes)


def test_both_forms_of_a_configuration_are_read():
  """Of release 4, and of release 5."""
  new = {k: x for k, x in CONFIG.items() if not k.startswith("rope")}
  new["rope_parameters"] = dict(rope_type="default", rope_theta=10_000.0)
  assert file.fields(CONFIG) == file.fields(new)
  assert file.fields(new) == TOLD | dict(num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(scale_embeddings=True), "scale_embeddings=True instead of False"),
    (dict(rope_grid="linspace"), r"mixer.positions.grid='linspace' instead of 'rope'"),
    (dict(lambda_init=0.8), "lambda_init=0.8 instead of None"),
    (dict(head_norm_eps=1e-3), "norm_eps"),
    (dict(mask="sliding_window", mask_size=4), "mask.kind='sliding_window' instead of 'causal'"),
    (dict(feed_forward="gelu"), "feed_forward.kind='gelu'"),
    (dict(norm="layer"), "norm='layer' instead of 'rms'"),
    (dict(key_pairing="shared"), "key_pairing='shared'"),
    (dict(name="transformer", head_norm_affine=None), "attention"),
  ],
  ids=str,
)
def test_other_models_are_not_exported(changes, message):
  with pytest.raises(ValueError, match=message):
    _export(**changes)
