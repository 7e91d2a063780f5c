r"""Makes a workdir of a model that another library trained, for `evaluate` and `generate`.

  python -m experiments.import_weights --from=torchscale --input=retnet.safetensors \
      --workdir=runs/imported --tokenizer=tokenizer.json \
      --set=feed_forward=swiglu --set=scale_embeddings=true
  python -m experiments.import_weights --from=diffllama --input=diffllama \
      --workdir=runs/imported --tokenizer=diffllama/tokenizer.json \
      --set=head_layout=neighbour --set=rope_layout=interleaved

  python -m experiments.import_weights --from=latentlm --input=latentlm.safetensors \
      --workdir=runs/imported --like=runs/digits
  python -m experiments.import_weights --from=latentlm_tokenizer --input=tokenizer.pt \
      --workdir=runs/imported --like=runs/imagenet

`--set` gives a field of `config.model` that the weights do not tell, over what the library's own
configuration file beside them does (`config.json` of DiffLlama, `params.json` of YOCO). Training
goes on from the workdir with `--config.init_from`. A tokenizer into latents, or a model over
them, takes all that weights do not tell from another run, `--like`: its sizes, its data, the
latents' tokenizer and their moments; and of a tokenizer's run the adversary, which weights lack.
"""

import logging
import pathlib
import typing
from typing import Any

from absl import flags

from experiments.configs import common
from latentlab import app, interop
from latentlab import data as data_lib
from latentlab.models import registry
from latentlab.train import loop

_FROM = flags.DEFINE_enum(
  "from", None, sorted(interop.IMPORTERS | interop.LATENT_IMPORTERS), "Library of the weights."
)
_INPUT = flags.DEFINE_string(
  "input",
  None,
  "Weights: .safetensors, or torch's .pt, .pth, .bin; or a folder with model.safetensors, whole or "
  "in the files of its index.",
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "'bytes', or a tokenizer's json file.")
_SEQ_LENGTH = flags.DEFINE_integer(
  "seq_length", 2048, "Window of evaluations, config.data.seq_length.", lower_bound=1
)
_SET = flags.DEFINE_multi_string("set", [], "<field>=<value> of config.model; may be repeated.")
_LIKE = flags.DEFINE_string(
  "like",
  None,
  "A run of the same model on media, for tokenizers into latents and models over them; its weights "
  "are not used.",
)
_FLAGS = (_FROM, _INPUT, _TOKENIZER, _SEQ_LENGTH, _SET, _LIKE)

logger = logging.getLogger("latentlab.import_weights")


def main() -> None:
  workdir = flags.FLAGS.workdir
  for name, value in (("from", _FROM.value), ("input", _INPUT.value), ("workdir", workdir)):
    if not value:
      raise ValueError(f"--{name} is missing.")
  if _FROM.value in interop.LATENT_IMPORTERS:
    _import_like(workdir)
    return
  if _LIKE.value:
    raise ValueError(
      f"--like={_LIKE.value!r} is for --from={sorted(interop.LATENT_IMPORTERS)}; leave it out."
    )
  tokenizer = data_lib.load_tokenizer(_TOKENIZER.value)
  importer = interop.IMPORTERS[_FROM.value]
  try:
    fields = _told(_INPUT.value) | _fields(_SET.value)
    imported = importer(interop.read(_INPUT.value), fields)
  except ValueError as e:
    raise ValueError(f"--input={_INPUT.value!r} with --set={_SET.value}: {e}") from e
  if tokenizer.vocab_size != imported.vocab_size:
    raise ValueError(
      f"--tokenizer={_TOKENIZER.value!r} has {tokenizer.vocab_size} tokens and the weights have "
      f"{imported.vocab_size}: give the tokenizer that they were trained with."
    )
  section = dict(imported.model)
  c = common.language_model()
  c.model = common.model(section.pop("name"), **section)
  c.data.seq_length = _SEQ_LENGTH.value
  c.data.tokenizer = _TOKENIZER.value
  if _TOKENIZER.value != "bytes":
    c.data.tokenizer = str(pathlib.Path(workdir, "tokenizer.json").absolute())
  loop.save(workdir, c, tokenizer, imported.params)
  logger.info("%d tokens, %s, in %s.", imported.vocab_size, section, workdir)


def _import_like(workdir: str) -> None:
  if not _LIKE.value:
    raise ValueError(f"--from={_FROM.value} needs --like, a run of the same model.")
  if _SET.value:
    raise ValueError(f"--set={_SET.value}: --like={_LIKE.value!r} tells all of a model's fields.")
  like, importer = loop.load(_LIKE.value), interop.LATENT_IMPORTERS[_FROM.value]
  config, kind = like.task.model.config, typing.get_type_hints(importer)["config"]
  if not isinstance(config, kind):
    raise ValueError(
      f"--like={_LIKE.value!r} is a {type(config).__name__}, and --from={_FROM.value} is of a "
      f"{kind.__name__}."
    )
  try:
    params = importer(interop.read(_INPUT.value), config)
  except ValueError as e:
    raise ValueError(f"--input={_INPUT.value!r} with --like={_LIKE.value!r}: {e}") from e
  loop.save(workdir, like.config, like.tokenizer, like.params | params, like.summary)
  logger.info("A model as that of %s, in %s.", _LIKE.value, workdir)


def _told(path: str) -> dict[str, Any]:
  """Fields of a model's section that the library's configuration file beside the weights tells."""
  file = interop.CONFIG_FILES.get(_FROM.value)
  folder = pathlib.Path(path) if pathlib.Path(path).is_dir() else pathlib.Path(path).parent
  if file is None or not (folder / file.name).exists():
    return {}
  logger.info("Reading %s beside the weights.", file.name)
  try:
    return file.fields(interop.read_json(folder / file.name))
  except ValueError as e:
    raise ValueError(f"{file.name} beside the weights: {e}") from e


def _fields(items: list[str]) -> dict[str, Any]:
  """Fields of a model's section, by the types that the models give them."""
  kinds = {}
  for name in registry.MODELS:
    kinds = registry.fields(name) | kinds
  fields = {}
  for item in items:
    name, equals, text = item.partition("=")
    if not equals or name not in kinds:
      raise ValueError(f"--set={item!r} must be <field>=<value> with a field of {sorted(kinds)}.")
    kind = kinds[name][0]
    if kind is bool:
      if text not in ("true", "false"):
        raise ValueError(f"--set={item!r} must be true or false.")
      fields[name] = text == "true"
    elif kind is tuple:
      fields[name] = tuple(float(x) for x in text.split(","))
    else:
      try:
        fields[name] = kind(text)
      except ValueError as e:
        raise ValueError(f"--set={item!r} is no {kind.__name__}.") from e
  return fields


if __name__ == "__main__":
  app.run_tool(main, flag_names=["workdir", *(f.name for f in _FLAGS)])
