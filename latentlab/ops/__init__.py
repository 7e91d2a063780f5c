"""Pure functions of arrays: no parameters, no Flax, no files."""

from latentlab.ops.attention import (
  Mask,
  attention,
  flash_attention,
  segment_bias,
  tree_mask,
  windowed_attention,
)
from latentlab.ops.attention_resolution import (
  Distances,
  attention_resolution,
  scores_by_distance,
)
from latentlab.ops.diff_attention import diff_attention, diff_attention_decode
from latentlab.ops.losses import cross_entropy
from latentlab.ops.positions import (
  alibi_slopes,
  apply_rope,
  apply_xpos,
  document_positions,
  rope_frequencies,
  sinusoidal,
  xpos_curve,
  xpos_decay,
)
from latentlab.ops.retention import decay_scale, log_decay_rates, retention, retention_decode

__all__ = [
  "Distances",
  "Mask",
  "alibi_slopes",
  "apply_rope",
  "apply_xpos",
  "attention",
  "attention_resolution",
  "cross_entropy",
  "decay_scale",
  "diff_attention",
  "diff_attention_decode",
  "document_positions",
  "flash_attention",
  "log_decay_rates",
  "retention",
  "retention_decode",
  "rope_frequencies",
  "scores_by_distance",
  "segment_bias",
  "sinusoidal",
  "tree_mask",
  "windowed_attention",
  "xpos_curve",
  "xpos_decay",
]
