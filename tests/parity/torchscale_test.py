"""Our RetNet, by its exported weights, is torchscale's: both of its forms, and every gradient.

torchscale divides the rows of each head by numbers of its own (multiscale_retention.py). They are
detached, and cancel behind a head norm with an epsilon of zero; so equality is asked there.
"""

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments.benchmarks import peers, specs
from latentlab.models import LanguageModel, build_config, num_params

torch = pytest.importorskip("torch", reason="parity with torchscale needs torch")
pytest.importorskip("torchscale", reason="needs `pip install --no-deps torchscale==0.3.0`")


@pytest.fixture(scope="module")
def case():
  """A model, its parameters, a batch, and the logits and gradients that we compute of it."""
  size = specs.SIZES["tiny"]
  model = LanguageModel(build_config(size.model("retnet"), size.vocab_size))
  init_key, noise_key, tokens_key = jax.random.split(jax.random.key(0), 3)
  shape = (2, size.batch_size, size.seq_length)
  tokens, targets = jax.random.randint(tokens_key, shape, 0, size.vocab_size)
  params = nn.unbox(jax.jit(model.init)(init_key, tokens))["params"]
  # Larger scores than at the start, so that torchscale's clamps are active; scales other than one.
  params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise_key, x.shape), params)

  @jax.jit
  def ours(params):
    logits = model.apply({"params": params}, tokens).logits
    loss = lambda p: model.apply({"params": p}, tokens, targets, method="token_losses").mean()
    return logits, jax.grad(loss)(params)

  return model, params, np.asarray(tokens), np.asarray(targets), *ours(params)


# Chunks divide the 24 tokens: torchscale pads the last one, and normalises zeros with epsilon zero.
@pytest.mark.parametrize("chunk_size", [None, 8, 4])
def test_logits_and_gradients_are_torchscales(case, chunk_size):
  model, params, tokens, targets, logits, grads = case
  retnet = peers.torchscale_retnet(model.config)
  assert num_params(model.config)["total"] == sum(p.numel() for p in retnet.parameters())
  peers.load(retnet, peers.torchscale_weights(params))
  peers.set_chunk_size(retnet, chunk_size)
  want, _ = retnet(torch.tensor(tokens))
  torch.nn.functional.cross_entropy(
    want.flatten(0, 1), torch.tensor(targets, dtype=torch.int64).flatten()
  ).backward()

  np.testing.assert_allclose(logits, want.detach().numpy(), rtol=1e-4, atol=1e-4)
  for name, got in peers.torchscale_weights(grads).items():
    grad = retnet.get_parameter(name).grad.numpy()
    np.testing.assert_allclose(got, grad, rtol=1e-3, atol=1e-4 * np.abs(grad).max(), err_msg=name)
    assert np.abs(grad).max() > 1e-6, name


def test_another_decay_is_refused():
  size = specs.SIZES["tiny"]
  with pytest.raises(ValueError, match="linspace"):
    peers.torchscale_retnet(
      build_config(size.model("retnet") | dict(decay="linspace"), size.vocab_size)
    )
