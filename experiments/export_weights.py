r"""Writes a run's parameters by another library's names, for that library to load.

  python -m experiments.export_weights --to=diffllama --workdir=runs/a --output=exported

`--output` is a .safetensors file, or a folder: that gets `model.safetensors` and, where the library
has one, its configuration file. Nothing is overwritten.
"""

import json
import logging
import pathlib
import typing

from absl import flags

from latentlab import app, interop
from latentlab.train import loop

_TO = flags.DEFINE_enum("to", None, sorted(interop.EXPORTERS), "Library that shall read it.")
_OUTPUT = flags.DEFINE_string("output", None, "A .safetensors file, or a folder.")
_STEP = flags.DEFINE_string("step", "latest", "A step, 'latest' or 'best'.")
_FLAGS = (_TO, _OUTPUT, _STEP)

logger = logging.getLogger("latentlab.export_weights")


def main() -> None:
  workdir = flags.FLAGS.workdir
  for name, value in (("to", _TO.value), ("workdir", workdir), ("output", _OUTPUT.value)):
    if not value:
      raise ValueError(f"--{name} is missing.")
  weights = pathlib.Path(_OUTPUT.value)
  config_file = None
  if weights.suffix != ".safetensors":
    weights = weights / "model.safetensors"
    config_file = interop.CONFIG_FILES.get(_TO.value)
  files = [weights, *([weights.parent / config_file.name] if config_file else [])]
  for file in files:
    if file.exists():
      raise ValueError(f"--output={_OUTPUT.value!r}: {str(file)!r} exists; give another place.")
  run = loop.load(workdir, step=_STEP.value)
  config, exporter = run.task.model.config, interop.EXPORTERS[_TO.value]
  kind = typing.get_type_hints(exporter)["config"]
  if not isinstance(config, kind):
    raise ValueError(
      f"--to={_TO.value} is of a {kind.__name__}, and --workdir={workdir!r} holds a "
      f"{type(config).__name__}."
    )
  try:
    state = exporter(config, run.params)
    made = config_file.make(config) if config_file else None
  except ValueError as e:
    raise ValueError(f"--workdir={workdir!r} with --to={_TO.value}: {e}") from e
  weights.parent.mkdir(parents=True, exist_ok=True)
  interop.write(weights, state, {"format": "pt"})
  if made is not None:
    files[1].write_text(json.dumps(made, indent=2) + "\n")
  logger.info("Step %d of %s in %s.", run.step, workdir, ", ".join(map(str, files)))


if __name__ == "__main__":
  app.run_tool(main, flag_names=["workdir", *(f.name for f in _FLAGS)])
