"""The training benchmark: peers start from our weights, and lose what ours loses."""

import pytest

pytest.importorskip("torch", reason="the peers are in torch")
pytest.importorskip("transformers", reason="two peers are models of transformers")

from experiments.benchmarks import specs, train  # noqa: E402 (after the skips)


@pytest.mark.slow
def test_diff_llama_trains_as_our_differential_transformer(monkeypatch, core):
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # Of tests: more devices than rows of the batch.
  case = train.run_case("diff_transformer", specs.SIZES["tiny"], [core], rounds=1, steps=1)
  assert case["match"]["logits_max_difference"] < 1e-4
  assert case["ours"]["num_params"] == case["peer"]["num_params"]
  assert case["ratio"]["of_modes"].keys() == set(train.ATTENTIONS)
