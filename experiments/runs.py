"""What config files of tables share whose runs are a model under a recipe, `<model>_<recipe>`."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections


def folder(paper: str, runs: str, size: str) -> pathlib.Path:
  """Where `experiments.tables` keeps the runs of tables that share them, `<run>/seed<k>`.

  Args:
    paper: Folder of the config files.
    runs: RUNS of them.
    size: Their scale, and `_smoke` behind it.
  """
  return pathlib.Path("runs") / f"{paper}_{runs}_{size}"


def row(
  models: Mapping[str, tuple], model: str, recipe: str, expected: Mapping[str, float | None]
) -> dict[str, Any]:
  """A row of a table.

  Args:
    models: What models are, in words, as the first of each entry.
    model: Which of them.
    recipe: Under which it is trained.
    expected: The paper's figures.
  """
  return dict(about=models[model][0], run=f"{model}_{recipe}", expected=expected)


def evaluate_text(c: ml_collections.ConfigDict, scale: str) -> None:
  """Loss, split by recall, at the end of a small run and on the way of others."""
  small = scale == "small"
  options = dict(type="perplexity", split="validation", max_batches=64 if small else 16)
  options["every_steps"] = c.train_steps if small else 1_000
  c.evals = dict(validation=options | dict(recall_order=2))
  # A pair of bytes says little; four are as long as a token of the papers.
  c.evals.validation_4 = options | dict(recall_order=4)
