"""The Differential Transformer's configs: sizes that the paper tells, and what its runs follow."""

import pytest

from experiments.configs.diff_transformer import (
  common,
  figure3_scaling,
  figure5_needles,
  table6_ablations,
  table7_throughput,
)
from latentlab.models import build_config, num_params


def _params(row, scale="paper"):
  config = common.get_config(f"row={row},scale={scale}")
  return num_params(build_config(config.model.to_dict(), config.data.vocab_size or 258))


def test_parameters_are_the_papers():
  """Quoted sizes have one embedding; those of 3B without shared heads are 3.17B."""
  for recipe, size in (("830m", 0.834), ("ablation", 1.413), ("2b8", 2.773), ("13b1", 13.10)):
    counts = _params(f"diff_{recipe}")
    total = (counts["body"] + counts["embedding"]) / 1e9
    assert total == pytest.approx(size, rel=0.003), recipe
  assert _params("diff_3b")["body"] / 1e9 == pytest.approx(3.171, rel=0.001)


@pytest.mark.parametrize("scale, tolerance", [("paper", 0.001), ("small", 0.012)])
def test_rows_of_the_ablation_have_equal_sizes(scale, tolerance):
  sizes = {row["run"]: _params(row["run"], scale) for row in table6_ablations.ROWS.values()}
  base = sizes["transformer_ablation"]["body"]
  for run, counts in sizes.items():
    assert counts["body"] == pytest.approx(base, rel=tolerance), run
  layers = common.get_config(f"row=diff_ablation,scale={scale}").model.num_layers
  head = 128 if scale == "paper" else 8
  assert sizes["diff_ablation"]["body"] == base + 4 * head * layers


def test_recipes_have_the_papers_tokens():
  tokens = {}
  for run, (_, recipe) in common.runs().items():
    if recipe in common.PAPER:
      config = common.get_config(f"row={run}")
      tokens[recipe] = config.train_steps * config.batch_size * config.data.seq_length
  billions = {recipe: round(x / 1e9, 1) for recipe, x in tokens.items()}
  for recipe, want in {"3b": 350, "3b_1t": 1000, "64k": 1.5, "math": 20, "reasoning": 2}.items():
    assert billions[recipe] == want
  assert {billions[r] for r in ("ablation", "830m", "13b1")} == {10.5}


def test_further_training_begins_where_a_run_ends():
  for run, before in (("diff_64k", "diff_3b"), ("diff_reasoning", "diff_math")):
    config = common.get_config(f"row={run},seed=3")
    assert config.init_from == f"runs/diff_transformer_runs_paper/{before}/seed3"
  assert common.get_config("row=diff_64k").model.rope_base == 640_000
  assert common.get_config("row=diff_64k,smoke").init_from == ""
  with pytest.raises(ValueError, match="row='diff_3b' has no scale='small'"):
    common.get_config("row=diff_3b,scale=small")


def test_figures_are_in_their_places():
  row = figure5_needles.ROWS["transformer"]["expected"]
  assert row["8K"] == 0.95 and row["64K"] == 0.52 and row["64K, depth 0 %"] == 0.04
  assert row["64K, depth 100 %"] == 1 and row["40K, depth 25 %"] == 0.12
  # Averages over depths, as the paper prints them: within a rounding.
  for figures in (r["expected"] for r in figure5_needles.ROWS.values()):
    for k in common.NEEDLE_LENGTHS:
      depths = [figures[f"{k}K, depth {d} %"] for d in (0, 25, 50, 75, 100)]
      assert sum(depths) / 5 == pytest.approx(figures[f"{k}K"], abs=0.006)
  valid = table6_ablations.ROWS["diff"]["expected"]["valid"]
  assert figure3_scaling.ROWS["diff_1b4"]["expected"][common.COLUMN] == valid


def test_speed_has_the_papers_lengths():
  for row, length in (("diff_3b_4k", 4096), ("transformer_13b1_2k", 2048)):
    config = table7_throughput.get_config(f"row={row}")
    assert config.data.seq_length == length and config.train_steps == 20 and not config.evals
  assert config.expected["perf/tokens_per_sec"] == 998
