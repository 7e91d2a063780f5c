"""Splash attention: the suite of all implementations, interpreted, and a real compile."""

import jax
import jax.numpy as jnp
import pytest
from flash_attention_suite import Case, FlashAttentionSuite

from pallas_kernels.flash_attention import flash_attention


class TestSplash(FlashAttentionSuite):
  implementation = "splash"
  kernels = ("splash_mha_fwd", "splash_mha_dkv")
  block = 128
  head_dim, value_dim = 64, 128

  def refusal(self, case: Case) -> str | None:
    if case.lse:
      return "log-sum-exps have no gradient"
    if case.row_offsets or case.traced_offset is not None:
      return "q_offset isn't"
    if case.padded:
      return "no lengths"
    causal, offset = case.option("causal", True), case.option("q_offset", 0)
    window = case.option("window", case.length + offset)
    if causal and offset + case.length - window >= case.keys:
      return "no rows without a key"
    whole = case.length % 128 == case.keys % 128 == 0
    from_the_first = causal and case.keys == case.length and not offset
    return None if from_the_first or (whole and not case.packed) else "padded or packed rows"

  @pytest.mark.parametrize("window", [1, 70])
  def test_windows_of_whole_blocks(self, window):
    self.check(self.case(256, head_dim=128, options=(("window", window),)))


def test_compiles_splash_for_a_tpu_by_itself(tpu_mesh):
  args = [jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)] * 3
  mesh = tpu_mesh("v5e:2x2")
  with jax.set_mesh(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    text = jax.jit(flash_attention, in_shardings=sharding).lower(*args).compile().as_text()
  assert "splash" in text
