"""Weights of other libraries' models, in and out, and the states of ours.

An importer is `(state, fields) -> Imported`: what a file holds, and fields of `config.model` that
it does not tell; the next one is a line of `IMPORTERS`.
"""

from latentlab.interop import torchscale
from latentlab.interop.files import read, write
from latentlab.interop.states import load_state, save_state
from latentlab.interop.weights import Entry, Imported, StateDict, export_weights, import_weights

IMPORTERS = {"torchscale": torchscale.import_model}
EXPORTERS = {"torchscale": torchscale.export_model}

__all__ = [
  "EXPORTERS",
  "IMPORTERS",
  "Entry",
  "Imported",
  "StateDict",
  "export_weights",
  "import_weights",
  "load_state",
  "read",
  "save_state",
  "torchscale",
  "write",
]
