"""Retention (https://arxiv.org/abs/2307.08621) over a sequence, and one token of it."""

from pallas_kernels.retention.api import IMPLEMENTATIONS, Implementation, retention, retention_step

__all__ = ["IMPLEMENTATIONS", "Implementation", "retention", "retention_step"]
