"""YOCO's configs: sizes that the paper tells, rows of equal text, and runs that follow others."""

import pytest

from experiments.configs.yoco import common, extension, table4_needles
from latentlab.models import build_config, num_params


def _body(row, scale="paper"):
  config = common.get_config(f"row={row},scale={scale}")
  return num_params(build_config(config.model.to_dict(), config.data.vocab_size or 258))["body"]


def test_parameters_are_the_papers():
  assert round(_body("yoco_gret_3b") / 1e9, 2) == 2.83
  # Appendix E: a window is as large as a Transformer, gated retention 4 % larger at scale.
  transformer, swa, gret = (_body(f"{m}_13b") for m in common.COMPARED)
  assert swa / transformer == pytest.approx(1, abs=0.01)
  assert gret / transformer == pytest.approx(1.04, abs=0.01)
  for model in ("retnet", "gretnet", "h3"):
    assert _body(f"{model}_160m") == pytest.approx(_body("transformer_160m"), rel=0.001)


def test_layouts_share_layers_as_they_say():
  stages = {}
  for model, layers in (("yoco_3_1", 9), ("yoco_1_3", 3), ("yoco_0_1", 0), ("yoco_gret", 6)):
    config = common.get_config(f"row={model}_160m")
    decoder = build_config(config.model.to_dict(), 258).decoder
    stages[model] = [stage.repeats for stage in decoder.stages]
    assert config.model.num_self_layers == layers and sum(stages[model]) == 12
  assert stages["yoco_0_1"] == [12] and stages["yoco_3_1"] == [9, 3]


def test_extended_models_score_the_text_of_short_ones():
  short = common.get_config("row=yoco_swa_160m,scale=small,seed=2")
  longer = common.get_config("row=yoco_swa_longer,scale=small,seed=2")
  tokens = {
    name: e.max_batches * c.batch_size * (e.get("seq_length") or c.data.seq_length)
    for name, e, c in (
      ("short", short.evals.long, short),
      ("base", short.evals.long_base, short),
      ("longer", longer.evals.validation, longer),
    )
  }
  assert len(set(tokens.values())) == 1, tokens
  assert short.evals.long_base.model.rope_base == longer.model.rope_base == common.LONG_BASE
  assert longer.init_from == "runs/yoco_runs_small/yoco_swa_160m/seed2"
  assert extension.RUNS == common.RUNS == "runs"
  assert common.get_config("row=yoco_swa_longer,scale=small,smoke").init_from == ""


def test_the_million_is_reached_in_stages():
  lengths, bases, before = [], [], None
  for recipe in ("3b", "3b_64k", "3b_256k", "3b_1m"):
    config = common.get_config(f"row=yoco_gret_{recipe}")
    assert config.init_from.endswith(f"yoco_gret_{before}/seed0") if before else not before
    assert config.batch_size * config.data.seq_length == 2**22
    lengths, bases = [*lengths, config.data.seq_length], [*bases, config.model.rope_base]
    before = recipe
  assert lengths == [4096, 2**16, 2**18, 2**20] and bases == [1e4, 640e3, 5e6, 80e6]
  assert {config.evals[f"needle_{k}k"].seq_length for k in common.NEEDLE_LENGTHS} == {
    128 * 1024 * i for i in range(1, 9)
  }
  assert table4_needles.ROWS["yoco_3b_1m"]["expected"]["128K, N=8"] == 0.56


def test_a_run_without_a_scale_is_named():
  with pytest.raises(ValueError, match="row='yoco_gret_3b' has no scale='small'"):
    common.get_config("row=yoco_gret_3b,scale=small")
