"""Weights of other libraries' models, in and out, and the states of ours.

An importer is `(state, fields) -> Imported`: what a file holds, and fields of `config.model` that
it does not tell, some of which the library's own configuration file may (`CONFIG_FILES`). The next
library is a line of each table. Importers of tokenizers into latents, and of models over them, are
`(state, config) -> params`: such weights take the place of those of a run that has the media.
"""

from latentlab.interop import (
  diff_transformer,
  diffllama,
  latentlm,
  latentlm_tokenizer,
  torchscale,
  yoco,
)
from latentlab.interop.files import read, read_json, write
from latentlab.interop.states import load_state, save_state
from latentlab.interop.weights import (
  ConfigFile,
  Entry,
  Imported,
  StateDict,
  export_weights,
  import_weights,
  parameter_shapes,
)

IMPORTERS = {
  "diffllama": diffllama.import_model,
  "torchscale": torchscale.import_model,
  "yoco": yoco.import_model,
}
LATENT_IMPORTERS = {
  "latentlm": latentlm.import_like,
  "latentlm_tokenizer": latentlm_tokenizer.import_like,
}
EXPORTERS = {
  "diffllama": diffllama.export_model,
  "latentlm": latentlm.export_model,
  "latentlm_tokenizer": latentlm_tokenizer.export_model,
  "torchscale": torchscale.export_model,
  "yoco": yoco.export_model,
}
CONFIG_FILES = {
  "diffllama": ConfigFile("config.json", diffllama.config_fields, diffllama.make_config),
  "yoco": ConfigFile("params.json", yoco.config_fields, yoco.make_config),
}

__all__ = [
  "CONFIG_FILES",
  "EXPORTERS",
  "IMPORTERS",
  "LATENT_IMPORTERS",
  "ConfigFile",
  "Entry",
  "Imported",
  "StateDict",
  "diff_transformer",
  "diffllama",
  "export_weights",
  "import_weights",
  "latentlm",
  "latentlm_tokenizer",
  "load_state",
  "parameter_shapes",
  "read",
  "read_json",
  "save_state",
  "torchscale",
  "write",
  "yoco",
]
