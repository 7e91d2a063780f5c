"""Tasks by name, as `config.task.type` has them."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from latentlab.train import dit_task, latent_task, tokenizer_task, transfusion_task, vq_task
from latentlab.train.task import Task, build_language_model

TASKS = {
  "dit": lambda config, _, summary: dit_task.build(config, summary),
  "language_model": lambda config, vocab_size, _: build_language_model(config, vocab_size),
  "latent_tokenizer": lambda config, _, __: tokenizer_task.build(config),
  "latentlm": lambda config, _, summary: latent_task.build(config, summary),
  "transfusion": lambda config, _, summary: transfusion_task.build(config, summary),
  "vq": lambda config, _, summary: vq_task.build(config, summary),
}


def build_task(
  config: ml_collections.ConfigDict,
  vocab_size: int,
  summary: Mapping[str, Any] | None = None,
) -> Task:
  """Builds the task that `config.task.type` names; a `RunTask`, given the config of a whole run.

  Args:
    config: The experiment.
    vocab_size: Tokens of the data's tokenizer.
    summary: What the data is, as the run's `corpus.json` has it; tasks on latents need it.

  Raises:
    ValueError: the name is unknown, or a field is bad.
  """
  name = config.get("task", {}).get("type", "language_model")
  if name not in TASKS:
    raise ValueError(f"config.task.type={name!r} is not a task; choose from {sorted(TASKS)}.")
  return TASKS[name](config, vocab_size, summary or {})
