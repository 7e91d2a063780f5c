"""Fused sequence operations, one package each: usable alone, importing only jax and jaxtyping.

Each name is an op's; its package of the same name has the rest, by `from pallas_kernels.<op> import
...`.
"""

from pallas_kernels.diff_attention import diff_attention, diff_attention_decode
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.retention import retention, retention_decode

__all__ = [
  "diff_attention",
  "diff_attention_decode",
  "flash_attention",
  "retention",
  "retention_decode",
]
