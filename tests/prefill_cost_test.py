"""YOCO's figures 7 to 10: closed forms of the cache, the paper's own sums, and the command."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import prefill_cost


@pytest.mark.parametrize("size", prefill_cost.SIZES)
@pytest.mark.parametrize("model", prefill_cost.MODELS)
def test_a_cache_is_its_closed_form(model, size):
  for length in (1, 1024, 2**20):
    got = prefill_cost.cache_bytes(prefill_cost.section(model, size), length)
    assert got == prefill_cost.closed_form(model, size, length)


def test_the_papers_own_sums():
  found = prefill_cost.caches()
  papers = {size: ratio for size, (_, ratio) in prefill_cost.SIZES.items() if ratio is not None}
  assert {size: found[size]["ratio_per_token"] for size in papers} == papers
  # Section 5.4: a million tokens of the 3B Transformer, and what a GB holds of 65B.
  assert found["3B"]["transformer"]["cache_bytes_per_token"] == 106_496
  assert found["3B"]["yoco"]["cache_bytes_per_token"] == 4096
  tokens = {model: found["65B"][model]["tokens_per_gib"] for model in prefill_cost.MODELS}
  assert tokens == {"transformer": 1638, "yoco": 128 * 1024}


def test_the_command(tmp_path, capsys):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  values = dict(prefill_lengths=["64"], repeats=1, prefill_output=f"{tmp_path}/out/cost")
  with flagsaver.flagsaver(**values):
    prefill_cost.main()
  result = json.loads((tmp_path / "out/cost.json").read_text())
  assert [row["length"] for row in result["prefill"]] == [64]
  assert all(row["yoco"] > 0 and row["yoco_whole"] > 0 for row in result["prefill"])
  ratios = [row["ratio"] for row in result["memory"]]
  assert ratios == sorted(ratios) and 26 > ratios[-1] > 9
  assert (tmp_path / "out/cost.png").stat().st_size > 1000
  assert "ratio 80 (paper: 80)" in capsys.readouterr().out
  with (
    flagsaver.flagsaver(prefill_lengths=["many"]),
    pytest.raises(ValueError, match="--prefill_lengths=many"),
  ):
    prefill_cost.main()
