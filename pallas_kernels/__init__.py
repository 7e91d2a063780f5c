"""Fused sequence operations, one package each: usable alone, importing only jax and jaxtyping."""

from pallas_kernels.diff_attention import diff_attention, diff_attention_decode

__all__ = ["diff_attention", "diff_attention_decode"]
