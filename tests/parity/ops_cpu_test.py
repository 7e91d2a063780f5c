"""The CPU benchmark of the ops: each peer computes what ours does, and a mismatch is not timed."""

import pytest

pytest.importorskip("torch", reason="the peers are in torch")
pytest.importorskip("torchscale", reason="pip install --no-deps torchscale==0.3.0")

from experiments.benchmarks import ops_cpu, specs  # noqa: E402 (after the skips)


@pytest.mark.slow
@pytest.mark.parametrize("name", ops_cpu.CASES)
def test_peers_compute_the_same(name, core):
  values = 16 if name.startswith("retention") else 8
  shape = specs.Attention(1, 96, 2, 8, values)  # Three chunks of 32, which no other size divides.
  report = ops_cpu.run_case(name, [core], 1, shape)
  assert report["ratio"] > 0 and min(report["best_ms"]["ours"].values()) > 0


def test_a_mismatch_is_an_error():
  with pytest.raises(RuntimeError, match="nothing is timed"):
    ops_cpu._match("case", "peer", None, [ops_cpu.np.ones(3)], [ops_cpu.np.zeros(3)])
