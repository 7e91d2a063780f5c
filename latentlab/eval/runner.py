"""Evaluations by name, as `config.evals` lists them.

An evaluator is a module with a class `Evaluator(task, data, compile, **fields)` whose
`run(params)` yields `(name, value)` pairs. README.md beside this file lists them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from latentlab.data import Data
from latentlab.eval import (
  activations,
  attention_mass,
  attention_resolution,
  captions,
  generation,
  items,
  many_shot,
  needles,
  ngram,
  perplexity,
  reconstruction,
  speech,
)
from latentlab.layers.diffusion_head import check_solver
from latentlab.typing import Params

EVALUATORS = {
  "activations": activations,
  "attention_mass": attention_mass,
  "attention_resolution": attention_resolution,
  "captions": captions,
  "generation": generation,
  "items": items,
  "many_shot": many_shot,
  "needles": needles,
  "ngram": ngram,
  "perplexity": perplexity,
  "reconstruction": reconstruction,
  "speech": speech,
}

_OF_ALL = ("items",)
"""Types whose evaluations are of all modalities, where none is named."""

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Compiles `(params, batch) -> arrays` for a layout; takes this process's rows as NumPy arrays."""


class Evaluator(Protocol):
  """Measures parameters."""

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `(metric, value)`."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """An evaluator and when to run it.

  Attributes:
    name: Its key in `config.evals`.
    evaluator: Runs it.
    every_steps: Its period; the end of training always counts too.
  """

  name: str
  evaluator: Evaluator
  every_steps: int

  def run(self, params: Params) -> dict[str, float]:
    """Metrics by `<name>/<metric>`."""
    return {f"{self.name}/{metric}": value for metric, value in self.evaluator.run(params)}


def build(evals: Mapping[str, Any], task: Any, data: Data, compile: Compile) -> list[Evaluation]:
  """Builds the evaluations of a config.

  Args:
    evals: By name: `type`, a key of `EVALUATORS`; `every_steps`; that evaluator's fields; and
      `modality`, where there are several, for evaluations of one.
    task: What is trained.
    data: Where its splits come from.
    compile: Compiles for the layout of the parameters.

  Returns:
    The evaluations, none of them compiled yet.

  Raises:
    ValueError: a type or field is unknown, or a field's value is bad.
  """
  built = []
  for name, section in evals.items():
    fields = dict(section)
    kind, every_steps = fields.pop("type", None), fields.pop("every_steps", None)
    where, modality = f"config.evals.{name}", fields.pop("modality", None)
    if kind not in EVALUATORS:
      raise ValueError(f"{where}.type={kind!r} is unknown; choose one of {sorted(EVALUATORS)}.")
    if not isinstance(every_steps, int) or every_steps < 1:
      raise ValueError(f"{where}.{every_steps=} must be a positive number of steps.")
    evaluator = EVALUATORS[kind].Evaluator
    known = [
      p.name for p in inspect.signature(evaluator).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    if unknown := sorted(set(fields) - set(known)):
      raise ValueError(
        f"{where} has unknown fields {unknown}; choose among "
        f"{['type', 'every_steps', 'modality', *known]}."
      )
    try:
      of_modality = _of_modality(kind, modality, task, data)
      made = evaluator(*of_modality, compile, **fields)
      if settings := getattr(made, "settings", None):  # What a solver cannot do is found here.
        check_solver(getattr(of_modality[0], "diffusion", None), settings)
      built.append(Evaluation(name, made, every_steps))
    except ValueError as e:
      raise ValueError(f"{where}: {e}") from e
  return built


def _of_modality(kind: str, modality: str | None, task: Any, data: Data) -> tuple[Any, Data]:
  """The task and the data as an evaluation of a modality sees them; of all of them if `None`."""
  if modality is None:
    if (names := list(getattr(data, "parts", {}))) and kind not in _OF_ALL:
      raise ValueError(f"type={kind!r} is of one modality; set modality to one of {names}.")
    return task, data
  if not hasattr(data, "modalities"):
    raise ValueError(f"{modality=} is of models over latents; leave it out.")
  part = data.of(modality)  # Raises where there is none.
  return task.of(modality), part
