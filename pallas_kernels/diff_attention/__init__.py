"""Differential attention (https://arxiv.org/abs/2410.05258): two softmax maps, subtracted."""

from pallas_kernels.diff_attention.api import (
  IMPLEMENTATIONS,
  Implementation,
  diff_attention,
  diff_attention_decode,
)
from pallas_kernels.diff_attention.reference import Options, Visibility

__all__ = [
  "IMPLEMENTATIONS",
  "Implementation",
  "Options",
  "Visibility",
  "diff_attention",
  "diff_attention_decode",
]
