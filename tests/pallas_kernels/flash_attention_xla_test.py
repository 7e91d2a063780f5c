"""The product path without a kernel, in the suite of all implementations; blocks and memory."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flash_attention_suite import FlashAttentionSuite

from pallas_kernels.flash_attention import IMPLEMENTATIONS, flash_attention, reference


class TestXla(FlashAttentionSuite):
  implementation = "xla"

  @pytest.fixture(autouse=True)
  def _blocks_of_sixteen(self, monkeypatch):
    self._use(monkeypatch, self.block)

  def _use(self, monkeypatch, block_size):
    blockwise = functools.partial(reference.blockwise, block_size=block_size)
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", blockwise)

  @pytest.mark.parametrize("block_size", [2, 11, 64])
  def test_block_size_changes_nothing(self, block_size, monkeypatch):
    """With more blocks than are written out, and more than have keys of their own, too."""
    self._use(monkeypatch, block_size)
    self.check(self.case(100, lse=True, kv_heads=1, options=(("window", 9),)))

  @pytest.mark.parametrize("length", [577, 700])
  @pytest.mark.parametrize("packed", [False, True])
  def test_many_ragged_blocks(self, length, packed, monkeypatch):
    """The last of more blocks than are written out hangs over the end."""
    self._use(monkeypatch, reference.BLOCK_SIZE)
    self.check(self.case(length, heads=1, kv_heads=1, packed=packed))


def test_holds_no_square():
  """The largest temporary of forward and backward is a block's rows of scores."""
  args = [jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)] * 3
  grad = jax.grad(lambda *a: flash_attention(*a, implementation="xla").sum(), argnums=(0, 1, 2))
  stats = jax.jit(grad).lower(*args).compile().memory_analysis()
  assert stats.temp_size_in_bytes < 2048 * 2048 * 4 / 4
