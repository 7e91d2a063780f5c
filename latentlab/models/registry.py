"""Models by name: from a config file's `model` section to a model's configuration."""

import inspect
from collections.abc import Mapping
from typing import Any

from latentlab.models import retnet, transformer
from latentlab.models.language_model import LanguageModelConfig, stack

MODELS = {
  "retnet": (retnet.retnet, retnet.PRESETS),
  "transformer": (transformer.transformer, transformer.PRESETS),
}


def build_config(model: Mapping[str, Any], vocab_size: int) -> LanguageModelConfig:
  """The configuration that a config file's `model` section asks for.

  Args:
    model: `name` (a key of `MODELS`), optionally `preset` (sizes of a paper), and fields of that
      model's function, which override the preset's.
    vocab_size: Tokens, as the tokenizer has them.

  Returns:
    The configuration.

  Raises:
    ValueError: a name, preset or field is unknown; the message lists the choices.
  """
  fields = dict(model)
  name = fields.pop("name", None)
  if name not in MODELS:
    raise ValueError(f"unknown config.model.{name=}; choose one of {sorted(MODELS)}")
  function, presets = MODELS[name]
  preset = fields.pop("preset", None)
  if preset is not None and preset not in presets:
    raise ValueError(f"unknown config.model.{preset=} of {name}; choose one of {sorted(presets)}")
  known = {
    name: p
    for f in (stack, function)  # The function passes on what it does not name.
    for name, p in inspect.signature(f).parameters.items()
    if p.kind is p.KEYWORD_ONLY
  }
  unknown = sorted(set(fields) - set(known))
  if unknown:
    raise ValueError(
      f"config.model has fields that {name} does not: {unknown}; choose among {sorted(known)}"
    )
  fields = {**presets.get(preset, {}), **fields}
  missing = [
    p for p, v in known.items() if v.default is v.empty and p not in fields and p != "vocab_size"
  ]
  if missing:
    raise ValueError(f"config.model lacks {missing}; set them, or config.model.preset")
  return function(**{**fields, "vocab_size": vocab_size})
