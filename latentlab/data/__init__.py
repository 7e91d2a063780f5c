"""Data: corpora, tokenizers, synthetic tasks, images and sounds, and batches served by Grain."""

from collections.abc import Mapping
from typing import Any

from latentlab.data import batches, media, prepare
from latentlab.data.batches import Batch, Data
from latentlab.data.media import MediaConfig, MediaData, MediaRows
from latentlab.data.packing import pack
from latentlab.data.prepare import DataConfig
from latentlab.data.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from latentlab.data.tokenizers import load as load_tokenizer

__all__ = [
  "BPETokenizer",
  "Batch",
  "ByteTokenizer",
  "CharTokenizer",
  "Data",
  "DataConfig",
  "MediaConfig",
  "MediaData",
  "MediaRows",
  "Tokenizer",
  "build",
  "load_tokenizer",
  "pack",
]


def build(
  data_config: Mapping[str, Any] | DataConfig | MediaConfig,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Data:
  """Makes or finds what `config.data` describes and checks that it can be trained on.

  Args:
    data_config: The fields of `DataConfig`, or of `MediaConfig` where its source is one of media.
    batch_size: Rows of a global batch.
    process_index: This process.
    process_count: All processes.

  Raises:
    ValueError: the data, or their fit with the fields, are bad.
  """
  config = data_config if isinstance(data_config, Mapping) else vars(data_config)
  source = config.get("source", DataConfig.source)
  if source not in (known := (*prepare.SOURCES, *media.SOURCES)):
    raise ValueError(f"data.source={source!r} is unknown; choose from {known}.")
  made_of = media if source in media.SOURCES else batches
  return made_of.build(data_config, batch_size, process_index, process_count)
