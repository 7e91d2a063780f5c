"""Causal layers against sums written out, and cut anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.layers.convolution import (
  CausalLayer,
  CausalStack,
  ConvShared,
  ConvState,
  init_states,
)

_SHARED = ConvShared(init_std=0.0, layer_scale=0.5)


def _stack(*layers):
  return CausalStack(layers, _SHARED)


def _input(length, channels, batch_size=2, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.array(rng.normal(size=(batch_size, length, channels)), jnp.float32)


@pytest.mark.parametrize("kernel_size, stride", [(7, 1), (4, 2), (5, 2), (3, 3)])
def test_a_causal_convolution_is_its_sum(kernel_size, stride, key):
  model = _stack(CausalLayer("conv", "conv", 3, 4, kernel_size, stride))
  x = _input(4 * stride, 3)
  variables = model.init(key, x)
  kernel, bias = (variables["params"]["conv"]["conv"][n] for n in ("kernel", "bias"))
  got = jax.jit(model.apply)(variables, x)
  padded = np.concatenate([np.zeros((2, kernel_size - stride, 3)), x], axis=1)
  want = [
    np.einsum("bkc,kcd->bd", padded[:, t * stride : t * stride + kernel_size], kernel)
    for t in range(4)
  ]
  np.testing.assert_allclose(got, np.stack(want, 1) + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel_size, stride", [(4, 2), (5, 2), (3, 3), (16, 8)])
def test_a_transposed_convolution_is_its_sum(kernel_size, stride, key):
  model = _stack(CausalLayer("up", "transposed", 3, 4, kernel_size, stride))
  x = _input(5, 3)
  variables = model.init(key, x)
  kernel, bias = (variables["params"]["up"]["conv"][n] for n in ("kernel", "bias"))
  want = np.zeros((2, 5 * stride + kernel_size, 4))
  for t in range(5):
    for j in range(kernel_size):  # Linen's kernel is turned around.
      want[:, t * stride + j] += np.asarray(x)[:, t] @ np.asarray(kernel)[kernel_size - 1 - j]
  got = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(got, want[:, : 5 * stride] + bias, rtol=1e-4, atol=1e-5)


_LAYERS = (
  CausalLayer("stem", "conv", 1, 4, 7),
  CausalLayer("block_0", "block", 4, 4, 7),
  CausalLayer("down", "conv", 4, 6, 6, 3),
  CausalLayer("block_1", "block", 6, 6, 5),
  CausalLayer("up", "transposed", 6, 4, 4, 2),
  CausalLayer("head", "conv", 4, 2, 7),
)


@pytest.mark.parametrize("chunks", [(6, 18), (1, 1, 9, 13)], ids=str)
def test_chunks_of_any_size_give_what_the_whole_gives(chunks, key):
  model, x = _stack(*_LAYERS), _input(24, 1)
  variables = model.init(key, x)
  whole = jax.jit(model.apply)(variables, x)
  assert whole.shape == (2, 16, 2)
  states, parts, begin = init_states(_LAYERS, 2, jnp.float32), [], 0
  step = jax.jit(lambda x, s: model.apply(variables, x, s, method="step"))
  for size in chunks:
    y, states = step(x[:, begin : begin + size], states)
    parts.append(y)
    begin += size
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)
  # What has been put out already does not wait for what is to come.
  if chunks[0] == 6:
    assert parts[0].shape[1] == 4


def test_gradients_pass_through_states(key):
  """Of the whole's outputs, by parameters and inputs, where the signal is cut in two."""
  model, x = _stack(*_LAYERS), _input(24, 1)
  variables = model.init(key, x)
  target = _input(16, 2, seed=1)

  def whole(variables, x):
    return (model.apply(variables, x) * target).sum()

  def in_two(variables, x):
    states = init_states(_LAYERS, 2, jnp.float32)
    first, states = model.apply(variables, x[:, :9], states, method="step")
    last, _ = model.apply(variables, x[:, 9:], states, method="step")
    return (jnp.concatenate([first, last], axis=1) * target).sum()

  grads = (jax.jit(jax.grad(f, argnums=(0, 1)))(variables, x) for f in (whole, in_two))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)


def test_nothing_looks_ahead(key):
  model, x = _stack(*_LAYERS), _input(24, 1)
  variables = model.init(key, x)
  # Outputs 10 and 11 are made with input 17 at the latest.
  sees = jax.jit(jax.grad(lambda x: jnp.square(model.apply(variables, x)[:, :12]).sum()))(x)
  assert (np.asarray(sees[:, 18:]) == 0).all() and (np.asarray(sees[:, 17]) != 0).any()


def test_a_state_is_reset_in_some_rows():
  state = ConvState(jnp.ones((3, 2, 4)))
  after = state.reset(jnp.array([True, False, True]))
  np.testing.assert_array_equal(after.history[:, 0, 0], [0, 1, 0])
  np.testing.assert_array_equal(after.fork(jnp.array([1, 1])).history[:, 0, 0], [1, 1])


@pytest.mark.parametrize(
  "fields, message",
  [
    (("x", "pool", 1, 1, 2), "kind='pool'"),
    (("x", "conv", 1, 1, 2, 3), "kernel_size=2 of 'x'"),
    (("x", "block", 1, 2, 3), "keeps its input's channels"),
  ],
)
def test_bad_layers(fields, message):
  with pytest.raises(ValueError, match=message):
    CausalLayer(*fields)
