"""The CPU benchmark of the ops: each peer computes what ours does, and a mismatch is not timed."""

import pytest
from absl import app

pytest.importorskip("torch", reason="the peers are in torch")
pytest.importorskip("torchscale", reason="pip install --no-deps torchscale==0.3.0")

from experiments.benchmarks import ops_cpu, specs  # noqa: E402 (after the skips)


@pytest.mark.slow
@pytest.mark.parametrize("name", ops_cpu.CASES)
def test_peers_compute_the_same(name, core):
  values = 16 if name.startswith("retention") else 8
  shape = specs.Attention(1, 192, 2, 8, values)  # In chunks of 32 or 64.
  report = ops_cpu.run_case(name, [core], 1, shape)
  assert report["ratio"] > 0 and min(report["best_ms"]["ours"].values()) > 0


def test_shapes_are_read_or_named():
  assert ops_cpu.parse_shape("8x2048x4x32x64") == specs.Attention(8, 2048, 4, 32, 64)
  for text in ("8x2048", "axbxcxdxe", "1x1x1x1x0"):
    with pytest.raises(app.UsageError, match=f"--ops_shapes={text}"):
      ops_cpu.parse_shape(text)
  with pytest.raises(ValueError, match="divides a length of 50"):
    ops_cpu.run_case("retention/chunkwise", [0], 1, specs.Attention(1, 50, 2, 8, 8))


def test_a_mismatch_is_an_error():
  with pytest.raises(RuntimeError, match="nothing is timed"):
    ops_cpu._match("case", "peer", None, [ops_cpu.np.ones(3)], [ops_cpu.np.zeros(3)])
