"""The json files of a run's workdir: what it was started with, and what it was trained on."""

import json
import logging
import pathlib
from typing import Any

import ml_collections

logger = logging.getLogger(__name__)

CONFIG, CORPUS, TOKENIZER = "config.json", "corpus.json", "tokenizer.json"


def read_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
  """The config that a workdir's run was started with."""
  path = pathlib.Path(workdir) / CONFIG
  if not path.exists():
    raise ValueError(f"{str(workdir)!r} holds no {CONFIG}: train there first.")
  return ml_collections.ConfigDict(_with_tuples(read_json(path)))


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The fields of a json file.

  Raises:
    ValueError: it holds none.
  """
  try:
    value = json.loads(path.read_text("utf-8"))
  except ValueError as e:
    raise ValueError(f"{str(path)!r} is not json ({e}); restore it, or give --config.") from e
  if not isinstance(value, dict):
    raise ValueError(f"{str(path)!r} holds no fields; restore it, or give --config.")
  return value


def saved(path: pathlib.Path) -> dict[str, Any] | None:
  """What an earlier run left; nothing, with a warning, where it is damaged."""
  if not path.exists():
    return None
  try:
    return read_json(path)
  except ValueError as e:
    logger.warning("%s Nothing is compared with it.", e)
    return None


def _with_tuples(x: Any) -> Any:
  """JSON has lists where configs have tuples."""
  if isinstance(x, dict):
    return {k: _with_tuples(v) for k, v in x.items()}
  return tuple(_with_tuples(v) for v in x) if isinstance(x, list) else x
