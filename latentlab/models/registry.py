"""Models by name: from a config file's `model` section to a model's configuration."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from latentlab.models import baselines, diff_transformer, retnet, transformer, yoco
from latentlab.models.language_model import LanguageModelConfig, stack

MODELS = {
  "diff_transformer": (diff_transformer.diff_transformer, diff_transformer.PRESETS),
  "diff_transformer_v2": (diff_transformer.diff_transformer_v2, {}),
  "h3": (baselines.h3, baselines.H3_PRESETS),
  "hyena": (baselines.hyena, baselines.PRESETS),
  "linear_transformer": (baselines.linear_transformer, baselines.LINEAR_PRESETS),
  "retnet": (retnet.retnet, retnet.PRESETS),
  "rwkv": (baselines.rwkv, baselines.PRESETS),
  "torchscale_retnet": (retnet.torchscale_retnet, retnet.TORCHSCALE_PRESETS),
  "transformer": (transformer.transformer, transformer.PRESETS),
  "yoco": (yoco.yoco, yoco.PRESETS),
}


def fields(name: str) -> dict[str, tuple[type, Any]]:
  """Type and default of each field that a model's section may have, `vocab_size` aside.

  A default of `None` means that the field must be given, or that the model works it out.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in MODELS:
    raise ValueError(f"unknown config.model.{name=}; choose one of {sorted(MODELS)}")
  # The model passes on to `stack` what it does not name.
  return keyword_fields(stack, MODELS[name][0])


def keyword_fields(*functions: Callable[..., Any]) -> dict[str, tuple[type, Any]]:
  """Type and default of each keyword of functions that make configurations; the last one wins."""
  found = {}
  for function in functions:
    for field, parameter in inspect.signature(function).parameters.items():
      if parameter.kind is not parameter.KEYWORD_ONLY or field == "vocab_size":
        continue
      default = None if parameter.default is parameter.empty else parameter.default
      kinds = [t for t in (int, float, bool, str, tuple) if _admits(parameter.annotation, t)]
      found[field] = (kinds[0] if kinds else str, default)
  if "dtype" in found:
    found["dtype"] = (str, jnp.dtype(found["dtype"][1]).name)
  return found


def build_config(model: Mapping[str, Any], vocab_size: int) -> LanguageModelConfig:
  """The configuration that a config file's `model` section asks for.

  Args:
    model: `name` (a key of `MODELS`), optionally `preset` (sizes of a paper), and fields of that
      model, which override the preset's where they are not `None`.
    vocab_size: Tokens, as the tokenizer has them.

  Returns:
    The configuration.

  Raises:
    ValueError: a name, preset or field is unknown; the message lists the choices.
  """
  given = {field: value for field, value in model.items() if value is not None}
  name, preset = given.pop("name", None), given.pop("preset", None)
  known = fields(name)
  function, presets = MODELS[name]
  if preset is not None and preset not in presets:
    raise ValueError(f"unknown config.model.{preset=} of {name}; choose one of {sorted(presets)}")
  if unknown := sorted(set(given) - set(known)):
    raise ValueError(
      f"config.model has fields that {name} does not: {unknown}; choose among {sorted(known)}"
    )
  given = {**presets.get(preset, {}), **given}
  sizes = [f for f in ("num_layers", "embed_dim", "num_heads") if f in known]
  if missing := [f for f in sizes if f not in given]:
    raise ValueError(f"config.model lacks {missing}; set them, or config.model.preset")
  return function(vocab_size=vocab_size, **given)


def _admits(annotation: Any, kind: type) -> bool:
  options = (annotation, *typing.get_args(annotation))
  return kind in options or kind in map(typing.get_origin, options)
