"""The inference benchmark: peers read and decode what ours does, and a mismatch is not timed."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the peers are in torch")
pytest.importorskip("transformers", reason="one peer is transformers' Llama")
pytest.importorskip("torchscale", reason="pip install --no-deps torchscale==0.3.0")

from experiments.benchmarks import inference, specs  # noqa: E402 (after the skips)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "diff_transformer", "retnet"])
def test_peers_go_on_with_the_same_tokens(model, core):
  cases = inference.run_cases(model, specs.SIZES["tiny"], 2, [64, 96], [core], 1, 3)
  assert list(cases) == [64, 96]
  names = {"logits_max_difference", "greedy_tokens_max_difference"}
  if model == "retnet":  # Which reads these prompts into a state of its own too.
    names.add("logits_token_by_token_max_difference")
  for case in cases.values():
    assert case["match"].keys() == names and max(case["match"].values()) < 1e-3
    assert min(case["ratio"].values()) > 0
  held = [case["ours"]["cache_bytes"] for case in cases.values()]
  assert held[0] == held[1] if model == "retnet" else held[0] < held[1]


class _Worker:
  """Answers as told."""

  def __init__(self, **answers):
    self._answers = answers

  def call(self, method, *args):
    return self._answers[method]


@pytest.mark.parametrize(
  "peer, message",
  [
    (dict(logits=np.ones((1, 3)), lag=0.0), "logits differ by 1.0"),
    (dict(logits=np.zeros((1, 3)), lag=float("nan")), "greedy_tokens differ by nan"),
  ],
)
def test_a_mismatch_is_an_error(peer, message):
  ours = _Worker(logits=np.zeros((1, 3)), decode=np.zeros((1, 4), np.int32))
  with pytest.raises(RuntimeError, match=f"{message}; nothing is timed"):
    inference._match(ours, _Worker(**peer), 4, reads=False)
