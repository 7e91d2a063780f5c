"""transformers' DiffLlama, imported, gives its logits, every gradient and its greedy tokens.

Both as it is and in the order of our own models' heads and features.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab import interop
from latentlab.interop import diffllama as names
from latentlab.models import LanguageModel, build_config, decode_step, num_params, prefill

torch = pytest.importorskip("torch", reason="parity with DiffLlama needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

VOCAB, LENGTH = 37, 11
LAYOUTS = {
  "as-is": dict(head_layout="halves", rope_layout="half"),
  "ours": dict(head_layout="neighbour", rope_layout="interleaved"),
}
FORMS = {
  "8-heads": dict(),
  "4-kv-heads-tied": dict(num_key_value_heads=4, tie_word_embeddings=True),
  "2-kv-heads": dict(num_key_value_heads=2),
}


def _release(**changes):
  """transformers' own model, with larger scores and less equal lambdas than it starts with."""
  fields = dict(
    vocab_size=VOCAB,
    hidden_size=40,
    intermediate_size=44,
    num_hidden_layers=2,
    num_attention_heads=8,
    head_dim=6,
    rms_norm_eps=1e-3,
    rope_parameters=dict(rope_type="default", rope_theta=1234.0),
    attn_implementation="eager",
  )
  config = transformers.DiffLlamaConfig(**fields | changes)
  torch.manual_seed(0)
  model = transformers.DiffLlamaForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.2 * torch.randn_like(parameter))
  return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """By form: a model, and what a user has of it, which is the folder that transformers writes."""

  @functools.cache
  def make(form):
    model, folder = _release(**FORMS[form]), tmp_path_factory.mktemp("diffllama")
    model.save_pretrained(folder)
    found = interop.read_json(folder / "config.json")
    return model, interop.read(folder), interop.CONFIG_FILES["diffllama"].fields(found)

  return make


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH + 1))


def _import(state, fields):
  imported = interop.IMPORTERS["diffllama"](state, fields)
  params = jax.tree.map(jnp.asarray, imported.params)
  # A scan compiles one layer.
  return LanguageModel(build_config(imported.model | dict(unroll=1), imported.vocab_size)), params


@pytest.mark.parametrize(
  "form, layout",
  [("8-heads", "ours"), ("4-kv-heads-tied", "ours"), ("2-kv-heads", "as-is")],
)
def test_logits_and_every_gradient_are_theirs(saved, tokens, form, layout):
  model, state, fields = saved(form)
  ours, params = _import(state, fields | LAYOUTS[layout])
  assert num_params(ours.config)["total"] == model.num_parameters()
  inputs, targets = tokens[:, :-1], tokens[:, 1:]

  @jax.jit
  def both(params):
    logits = ours.apply({"params": params}, jnp.asarray(inputs)).logits
    losses = lambda p: ours.apply(
      {"params": p}, jnp.asarray(inputs), jnp.asarray(targets), method="token_losses"
    )
    return logits, jax.grad(lambda p: losses(p).mean())(params)

  logits, grads = both(params)
  model.zero_grad()
  want = model(torch.tensor(inputs)).logits
  torch.nn.functional.cross_entropy(
    want.flatten(0, 1), torch.tensor(targets, dtype=torch.int64).flatten()
  ).backward()
  want = want.detach().numpy()
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())

  mixer = ours.config.decoder.stages[0].pattern[0].mixer
  table = names.entries(mixer, tied=ours.config.tie_embeddings)
  found = interop.export_weights(table, grads)
  theirs = dict(model.named_parameters())
  assert found.keys() == theirs.keys()
  theirs = {name: parameter.grad.numpy() for name, parameter in theirs.items()}
  for name, grad in theirs.items():
    assert np.abs(grad).max() > 1e-6, name
    np.testing.assert_allclose(
      found[name], grad, rtol=1e-3, atol=2e-5 * np.abs(grad).max(), err_msg=name
    )
  back = interop.import_weights(table, theirs, interop.parameter_shapes(ours.config))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max())
  jax.tree.map(close, grads, back)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_layout", ["halves", "neighbour"])
@pytest.mark.parametrize("rope_layout", ["half", "interleaved"])
def test_every_layout_goes_back_bit_for_bit(saved, form, head_layout, rope_layout):
  _, state, fields = saved(form)
  ours, params = _import(state, fields | dict(head_layout=head_layout, rope_layout=rope_layout))
  back = interop.EXPORTERS["diffllama"](ours.config, params)
  assert back.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)
  changed = (head_layout, rope_layout) != ("halves", "half")
  q = params["decoder"]["stage_0"]["block_0"]["mixer"]["q_proj"]["kernel"]
  theirs = state["model.layers.0.self_attn.q_proj.weight"]
  assert np.array_equal(np.asarray(q[0]).reshape(theirs.T.shape), theirs.T) != changed


@pytest.mark.parametrize("form, layout", [("4-kv-heads-tied", "as-is"), ("2-kv-heads", "ours")])
def test_greedy_decoding_from_a_cache_is_theirs(saved, tokens, form, layout):
  model, state, fields = saved(form)
  ours, params = _import(state, fields | LAYOUTS[layout])
  prompt, count = tokens[:, :5], 8
  options = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
  want = model.generate(torch.tensor(prompt), max_new_tokens=count, eos_token_id=None, **options)

  logits, cache = jax.jit(lambda p, t: prefill(ours, p, t, max_length=5 + count))(
    params, jnp.asarray(prompt)
  )
  step = jax.jit(lambda p, t, c: decode_step(ours, p, t, c))
  drawn = []
  for theirs in want.logits:
    theirs = theirs.numpy()
    np.testing.assert_allclose(logits, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    drawn.append(np.asarray(logits.argmax(-1)))
    logits, cache = step(params, jnp.asarray(drawn[-1]), cache)
  np.testing.assert_array_equal(np.stack(drawn, 1), want.sequences.numpy()[:, 5:])


def test_an_export_is_what_transformers_loads(tmp_path, tokens):
  """A model of ours, whose head norm's scale goes into the projection behind it."""
  fields = dict(num_layers=2, embed_dim=40, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=32)
  model = LanguageModel(build_config(dict(name="diff_transformer", unroll=1, **fields), VOCAB))
  inputs = jnp.asarray(tokens)
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda x: (x.shape[-1] ** -0.5 * rng.normal(size=x.shape)).astype(np.float32),
    interop.parameter_shapes(model.config),
  )
  interop.write(
    tmp_path / "model.safetensors",
    interop.EXPORTERS["diffllama"](model.config, params),
    dict(format="pt"),
  )
  made = interop.CONFIG_FILES["diffllama"].make(model.config)
  (tmp_path / "config.json").write_text(json.dumps(made))
  theirs, info = transformers.DiffLlamaForCausalLM.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  with torch.no_grad():
    want = theirs(torch.tensor(tokens)).logits.numpy()
  got = jax.jit(model.apply)({"params": params}, inputs).logits
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_shards_are_read(saved, tmp_path):
  model, state, _ = saved("8-heads")
  model.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 2
  found = interop.read(tmp_path)
  assert found.keys() == state.keys()
  for name, x in state.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)
