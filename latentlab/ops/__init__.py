"""Pure functions of arrays: no parameters, no Flax, no files."""

from latentlab.ops.attention import (
  Mask,
  attention,
  flash_attention,
  segment_bias,
  tree_mask,
  windowed_attention,
)
from latentlab.ops.attention_maps import AttentionMaps, attention_maps
from latentlab.ops.attention_resolution import (
  Distances,
  attention_resolution,
  scores_by_distance,
)
from latentlab.ops.convolution import long_convolution, short_convolution
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
from latentlab.ops.recurrence import WkvState, linear_recurrence, wkv
from latentlab.ops.retention import decay_scale, log_decay_rates, retention, retention_decode
from latentlab.ops.sequence import Gathered, gather_sequence
from latentlab.ops.state_space import Modes, discretise, state_space_attention
from latentlab.ops.torchscale import chunkwise_row_scale, parallel_row_scale

__all__ = [
  "AttentionMaps",
  "Distances",
  "Gathered",
  "Mask",
  "Modes",
  "WkvState",
  "alibi_slopes",
  "apply_rope",
  "apply_xpos",
  "attention",
  "attention_maps",
  "attention_resolution",
  "chunkwise_row_scale",
  "cross_entropy",
  "decay_scale",
  "diff_attention",
  "diff_attention_decode",
  "discretise",
  "document_positions",
  "flash_attention",
  "gather_sequence",
  "linear_recurrence",
  "log_decay_rates",
  "long_convolution",
  "parallel_row_scale",
  "retention",
  "retention_decode",
  "rope_frequencies",
  "scores_by_distance",
  "segment_bias",
  "short_convolution",
  "sinusoidal",
  "state_space_attention",
  "tree_mask",
  "windowed_attention",
  "wkv",
  "xpos_curve",
  "xpos_decay",
]
