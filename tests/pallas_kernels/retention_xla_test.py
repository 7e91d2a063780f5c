"""The suites for retention's forms in jax.numpy."""

import pytest
from retention_suite import DecodeSuite, RetentionSuite

from pallas_kernels.retention import reference


class TestChunkwise(RetentionSuite):
  implementation = "xla"

  @pytest.mark.parametrize("length,chunk", [(2, 16), (15, 16), (13, 1), (65, 64), (12, None)])
  def test_retnet_01_any_chunk_size(self, length, chunk):
    self.chunk = chunk
    self.check(self.case(length))


class TestChunksAtOnce(TestChunkwise):
  """The schedule of accelerators."""

  @pytest.fixture(autouse=True)
  def on_an_accelerator(self, monkeypatch):
    monkeypatch.setattr(reference, "target_platform", lambda: "gpu")


class TestParallel(RetentionSuite):
  implementation = "parallel"


class TestRecurrent(RetentionSuite):
  implementation = "recurrent"


class TestDecode(DecodeSuite):
  implementation = "xla"
