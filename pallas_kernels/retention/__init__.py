"""Retention (https://arxiv.org/abs/2307.08621) over a sequence, and one token of it."""

from pallas_kernels.retention.api import (
  DECODE_IMPLEMENTATIONS,
  IMPLEMENTATIONS,
  DecodeImplementation,
  Implementation,
  retention,
  retention_decode,
)

__all__ = [
  "DECODE_IMPLEMENTATIONS",
  "IMPLEMENTATIONS",
  "DecodeImplementation",
  "Implementation",
  "retention",
  "retention_decode",
]
