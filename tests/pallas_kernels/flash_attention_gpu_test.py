"""cuDNN's attention, on a GPU: the suite of all implementations."""

import pytest
from flash_attention_suite import Case, FlashAttentionSuite


@pytest.mark.gpu_only
class TestCudnn(FlashAttentionSuite):
  implementation = "cudnn"
  kernels = ("dot_product_attention_fwd", "dot_product_attention_bwd")
  block = 64
  head_dim = value_dim = 64
  dtype = "bfloat16"
  tolerance = {"bfloat16": 1e-2}

  def refusal(self, case: Case) -> str | None:
    if case.lse:
      return "log-sum-exps have no gradient"
    if case.packed:
      return "packed documents"
    anywhere = case.row_offsets or case.traced_offset is not None or case.option("q_offset", 0)
    if case.option("causal", True) and (anywhere or case.keys != case.length):
      return "queries as many as keys"
    return None
