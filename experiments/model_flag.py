"""`--model`: fields of `config.model` that differ where a trained model is used.

Parameters depend on neither masks nor positions' sizes, so that a model trained on short texts can
read long ones through blocks or a window (`--model=mask=blockwise_causal`).
"""

from typing import Any

import ml_collections
from absl import flags

from latentlab.models import registry
from latentlab.train import loop

MODEL = flags.DEFINE_string(
  "model",
  "",
  "Fields of config.model that differ here, for the same parameters: "
  "mask=blockwise_causal,mask_size=64, say. A mask without a size has that of training's windows.",
)


def fields(config: ml_collections.ConfigDict | None, workdir: str) -> dict[str, Any]:
  """What the flag says, typed as the run's model has it.

  Raises:
    ValueError: a field is unknown, or its value is of another type.
  """
  if not MODEL.value:
    return {}
  known = registry.fields((config or loop.read_config(workdir)).model.name)
  found = {}
  for item in MODEL.value.split(","):
    name, equals, text = item.partition("=")
    if name not in known or not equals:
      raise ValueError(
        f"--model={MODEL.value}: {item!r} is no <field>=<value>; fields are {sorted(known)}."
      )
    kind = known[name][0]
    try:
      found[name] = dict(true=True, false=False)[text] if kind is bool else kind(text)
    except (KeyError, ValueError) as e:
      raise ValueError(f"--model={MODEL.value}: {name}={text!r} is no {kind.__name__}.") from e
  return found
