"""Softmax attention that never holds all of its scores: well-kept kernels behind one signature."""

from pallas_kernels.flash_attention.api import IMPLEMENTATIONS, Implementation, flash_attention

__all__ = ["IMPLEMENTATIONS", "Implementation", "flash_attention"]
