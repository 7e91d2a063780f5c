"""xPos's tables: every length scores the same tokens, and tables share their runs."""

import importlib

import numpy as np
import pytest

from experiments.configs.xpos import common
from latentlab import data as data_lib
from latentlab.train.tasks import build_task

TABLES = ("table2_length", "table3_resolution", "table4_rotation", "table5_blocks")


def _config(row, *more):
  return common.get_config(",".join((f"row={row}", *more)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Text whose every token tells its place: bytes count on, and documents differ in length."""
  path = tmp_path_factory.mktemp("text")
  for i in range(24):
    text = "".join(chr(32 + (7 * i + j) % 90) for j in range(300 + 170 * (i % 5)))
    (path / f"{i}.txt").write_text(text)
  config = dict(path=str(path), include=("*.txt",), seq_length=32, validation_fraction=0.5)
  return data_lib.build(config | dict(cache_dir=str(path / "cache")), batch_size=2)


def test_lex_09_every_length_scores_the_same_tokens(data):
  config = _config("xpos", "scale=small", "smoke")
  assert config.data.seq_length == 32
  texts = {}
  for name, section in config.evals.items():
    if not name.startswith("x"):
      continue
    length = section.seq_length
    batches = list(
      data.eval_batches("validation", 3, length, document_length=section.document_length)
    )
    rows = np.concatenate([b["weights"] for b in batches])
    inputs = np.concatenate([b["inputs"] for b in batches])
    targets = np.concatenate([b["targets"] for b in batches])
    ids = np.concatenate([b["segment_ids"] for b in batches])
    real = rows.any(1)
    assert rows.shape[1] == length and rows[real].all()  # All tokens of every segment.
    assert (inputs[real, 1:] == targets[real, :-1]).all()
    assert (ids[real] == ids[real, :1]).all()  # A segment is of one document.
    pieces = targets[real].reshape(-1, section.document_length)
    texts[name] = (int(rows.sum()), pieces.tolist())
  assert len(texts) == 12 and len({count for count, _ in texts.values()}) == 1
  assert all(text == texts["x1"] for text in texts.values())
  # Pieces begin where documents do, or where the piece before them ends.
  (_, pieces), text = texts["x1"], data.splits["validation"].tokens.tolist()
  for piece in pieces:
    places = [i for i in range(len(text)) if text[i : i + len(piece)] == piece]
    assert len(places) >= 1


def test_tables_share_their_runs():
  tables = [importlib.import_module(f"experiments.configs.xpos.{t}") for t in TABLES]
  assert {t.RUNS for t in tables} == {"xpos"}
  for row in common.VARIANTS:
    configs = [t.get_config(f"row={row},scale=small,seed=1").to_json() for t in tables]
    assert len(set(configs)) == 1
  trained = {row["run"] for t in tables for row in t.ROWS.values()}
  assert trained == set(common.VARIANTS)


@pytest.mark.parametrize("scale, length, base", [("paper", 1024, 512), ("small", 64, 32)])
def test_blocks_and_decay_follow_the_trained_length(scale, length, base):
  for row, scale_base in (("xpos", base), ("xpos_512", 512), ("decay", base)):
    config = _config(row, f"scale={scale}")
    assert config.data.seq_length == length
    task = build_task(config, 258)
    mixer = task.model.config.decoder.stages[0].pattern[0].mixer
    assert mixer.positions.scale_base == scale_base and mixer.mask.kind == "causal"
    assert (mixer.positions.base is None) == (row == "decay")
    evaluated = task.variant(config.evals.x4_blocks.model.to_dict())
    mask = evaluated.config.decoder.stages[0].pattern[0].mixer.mask
    assert (mask.kind, mask.size) == ("blockwise_causal", length // 2)


def test_figures_of_the_paper_stand_in_their_columns():
  table = importlib.import_module("experiments.configs.xpos.table5_blocks")
  expected = {name: list(row["expected"].values())[:2] for name, row in table.ROWS.items()}
  assert expected["rope"] == [73.6, 294.45] and expected["rope_blocks"] == [25.57, 25.65]
  assert expected["alibi_blocks"] == [24.6, 25.37] and expected["xpos"] == [22.56, 28.43]
  assert expected["rope_window"] == expected["sinusoidal_blocks"] == [None, None]
  table = importlib.import_module("experiments.configs.xpos.table2_length")
  assert list(table.ROWS["lex"]["expected"].values()) == [34.3, 27.55, 23.31, 21.6, 20.73, None]
  assert table.ROWS["rope"]["metrics"]["4096"] == "x4/perplexity"
  assert table.ROWS["lex"]["metrics"]["4096"] == "x4_blocks/perplexity"
