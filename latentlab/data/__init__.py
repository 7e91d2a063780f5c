"""Data: corpora, tokenizers, token files, synthetic tasks, and batches served by Grain."""

from latentlab.data.batches import Batch, Data, build
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
  "Tokenizer",
  "build",
  "load_tokenizer",
  "pack",
]
