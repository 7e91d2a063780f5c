"""Our Transformer, by its exported weights, is transformers' Llama: logits and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.benchmarks import peers, specs
from latentlab.models import LanguageModel, build_config, num_params

torch = pytest.importorskip("torch", reason="parity with Llama needs torch and transformers")
pytest.importorskip("transformers", reason="parity with Llama needs transformers")


@pytest.mark.parametrize("num_kv_heads", [3, 1])
def test_logits_and_gradients_are_llamas(key, num_kv_heads):
  size = specs.SIZES["tiny"]
  fields = size.model("transformer") | dict(num_kv_heads=num_kv_heads, init="fan_in")
  model = LanguageModel(build_config(fields, size.vocab_size))
  init_key, noise_key, tokens_key = jax.random.split(key, 3)
  shape = (2, size.batch_size, size.seq_length)
  tokens, targets = jax.random.randint(tokens_key, shape, 0, size.vocab_size)
  params = nn.unbox(jax.jit(model.init)(init_key, tokens))["params"]
  # Scales of norms start at one, where a scale that is applied to the wrong axis would not show.
  params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(noise_key, x.shape), params)

  @jax.jit
  def ours(params):
    logits = model.apply({"params": params}, tokens).logits
    loss = lambda p: model.apply({"params": p}, tokens, targets, method="token_losses").mean()
    return logits, jax.grad(loss)(params)

  logits, grads = ours(params)
  llama = peers.llama(model.config)
  assert num_params(model.config)["total"] == llama.num_parameters()
  peers.load(llama, peers.llama_weights(params))
  want = llama(torch.tensor(np.asarray(tokens))).logits
  torch.nn.functional.cross_entropy(
    want.flatten(0, 1), torch.tensor(np.asarray(targets), dtype=torch.int64).flatten()
  ).backward()

  np.testing.assert_allclose(logits, want.detach().numpy(), rtol=1e-4, atol=1e-4)
  for name, got in peers.llama_weights(grads).items():
    grad = llama.get_parameter(name).grad.numpy()
    np.testing.assert_allclose(got, grad, rtol=1e-3, atol=1e-4 * np.abs(grad).max(), err_msg=name)
    assert np.abs(grad).max() > 1e-6, name


def test_an_export_of_another_model_is_refused(key):
  size = specs.SIZES["tiny"]
  fields = size.model("transformer") | dict(rope_layout="interleaved")
  with pytest.raises(ValueError, match="interleaved"):
    peers.llama(build_config(fields, size.vocab_size))
  fields = size.model("transformer")
  llama = peers.llama(build_config(fields, size.vocab_size))
  params = LanguageModel(build_config(fields | dict(num_layers=1), size.vocab_size)).init(
    key, jnp.zeros((1, 2), jnp.int32)
  )
  with pytest.raises(ValueError, match="layers.1"):
    peers.load(llama, peers.llama_weights(nn.unbox(params)["params"]))
