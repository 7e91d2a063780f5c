"""The product path without a kernel, in the suite of all implementations; memory and work."""

import functools

import diff_attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.diff_attention import IMPLEMENTATIONS, diff_attention, xla


class TestXla(diff_attention_suite.DiffAttentionSuite):
  implementation = "xla"

  @pytest.fixture(autouse=True)
  def _blocks_of_sixteen(self, monkeypatch):
    blockwise = functools.partial(xla.blockwise, block_size=self.block)
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", blockwise)

  @pytest.mark.parametrize("block_size", [1, 7, 64])
  def test_block_size_changes_nothing(self, block_size, monkeypatch):
    """With more blocks than there are branches, too."""
    blockwise = functools.partial(xla.blockwise, block_size=block_size)
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", blockwise)
    self.check(self.case(37, lam="token", lse=True, packed=True))


def _step(implementation, length, **options):
  """Compiles outputs and gradients of one head."""
  shapes = (1, length, 1, 2, 8), (1, length, 1, 2, 8), (1, length, 1, 16), ()
  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  op = functools.partial(diff_attention, implementation=implementation, **options)
  step = jax.value_and_grad(lambda *a: jnp.sum(op(*a)), range(4))
  return jax.jit(step).lower(*args).compile()


def test_memory_is_linear_in_the_length():
  bytes_of = lambda *a: _step(*a).memory_analysis().temp_size_in_bytes
  assert bytes_of("xla", 2048) < 2.2 * bytes_of("xla", 1024)
  assert bytes_of("naive", 2048) > 3 * bytes_of("naive", 1024)


@pytest.mark.parametrize("options", [dict(), dict(window=64)], ids=str)
def test_hidden_blocks_cost_nothing(options):
  """Of all branches' products: a conditional's flops are counted once for each branch."""
  flops = lambda **o: _step("xla", 1024, **o).cost_analysis()["flops"]
  assert flops(**options) < (0.25 if options else 0.6) * flops(causal=False) * 16


@pytest.mark.parametrize("length", [577, 700])
def test_packed_rows_of_many_ragged_blocks(length):
  """The last of more blocks than are written out hangs over the end."""
  rng = np.random.default_rng(length)
  draw = lambda *shape: jnp.asarray(rng.normal(size=(1, length, 1, *shape)), jnp.float32)
  args, ids = (draw(2, 4), draw(2, 4), draw(6)), jnp.arange(length)[None] // 100

  def run(implementation):
    def loss(*args):
      options = dict(segment_ids=ids, implementation=implementation)
      out = diff_attention(*args, jnp.float32(0.3), **options)
      return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args))

  for got, want in zip(run("xla"), run("naive"), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
