"""The Transformer as a preset of the decoder: what every paper's model is compared with.

Body parameters are `12 L d^2` with the default widths: `4 d^2` of attention, `8 d^2` of feed-forward.
"""

import jax.numpy as jnp

from latentlab import ops
from latentlab.layers import (
  AttentionConfig, BlockConfig, DecoderConfig, FeedForwardConfig, PositionConfig, Stage,
)
from latentlab.models.language_model import LanguageModelConfig
from latentlab.typing import DTypeLike

# RetNet's table 2 sizes, and LeX's (24 layers, width 1024), with heads of the papers' widths.
PRESETS = {
  "200m": dict(num_layers=16, embed_dim=1024, num_heads=16),
  "lex": dict(num_layers=24, embed_dim=1024, num_heads=16),
  "1b3": dict(num_layers=24, embed_dim=2048, num_heads=16),
  "2b7": dict(num_layers=32, embed_dim=2560, num_heads=20),
  "6b7": dict(num_layers=32, embed_dim=4096, num_heads=32),
  "13b": dict(num_layers=40, embed_dim=5120, num_heads=40),
}


def transformer(
  *,
  vocab_size: int,
  num_layers: int,
  embed_dim: int,
  num_heads: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  mlp_dim: int | None = None,
  feed_forward: str = "gelu",
  norm: str = "rms",
  positions: str = "rope",
  rope_base: float = 10_000.0,
  rope_grid: str = "rope",
  rope_layout: str = "interleaved",
  xpos_scale_base: float = 512.0,
  xpos_gamma: float = 0.4,
  mask: str = "causal",
  mask_size: int | None = None,
  max_length: int = 2048,
  scale_embeddings: bool = False,
  tie_embeddings: bool = False,
  loss_chunk_size: int | None = None,
  dtype: DTypeLike = jnp.float32,
  init: str = "normal",
  norm_eps: float = 1e-6,
  dropout_rate: float = 0.0,
  remat: str = "none",
  unroll: int | None = None,
) -> LanguageModelConfig:
  """A Transformer language model.

  Args:
    vocab_size: Tokens.
    num_layers: Layers `L`.
    embed_dim: Width `D`.
    num_heads: Query heads.
    num_kv_heads: Key/value heads; `num_heads` if `None`.
    head_dim: Head size; `embed_dim / num_heads` if `None`.
    mlp_dim: Feed-forward width; `4 D` if `None`, `8/3 D` rounded up to 32 if it is gated.
    feed_forward: `gelu`, `relu`, `swiglu` or `geglu`.
    norm: `rms` or `layer`.
    positions: `rope`, `xpos`, `alibi`, `sinusoidal`, `learned` or `none`.
    rope_base: Wave length base of `rope` and `xpos`.
    rope_grid: Frequencies of `rope`.
    rope_layout: Which features are a pair.
    xpos_scale_base: Half the training length.
    xpos_gamma: Offset of xPos's decay.
    mask: `causal`, `sliding_window` or `blockwise_causal`.
    mask_size: Window or block of the mask.
    max_length: Positions of `learned`.
    scale_embeddings: Multiply embeddings by `sqrt(D)`.
    tie_embeddings: Head is the embedding's transpose.
    loss_chunk_size: Vocabulary entries per chunk of the loss.
    dtype: Dtype of activations.
    init: Initialisation scheme.
    norm_eps: Epsilon of the norms.
    dropout_rate: Dropout of each branch.
    remat: What the backward pass keeps.
    unroll: Layers unrolled in one step of the scan.

  Returns:
    Its configuration.

  Raises:
    ValueError: a name is unknown, or sizes do not divide.
  """
  if head_dim is None:
    if embed_dim % num_heads:
      raise ValueError(f"{embed_dim=} is no multiple of {num_heads=}; give head_dim")
    head_dim = embed_dim // num_heads
  on_embedding = positions in ("sinusoidal", "learned")
  mixer = AttentionConfig(
    num_heads=num_heads, head_dim=head_dim, num_kv_heads=num_kv_heads,
    positions=PositionConfig(
      "none" if on_embedding else positions, base=rope_base, grid=rope_grid, layout=rope_layout,
      gamma=xpos_gamma, scale_base=xpos_scale_base,
    ),
    mask=ops.Mask(mask, mask_size),
  )
  if mlp_dim is None:
    mlp_dim = -(-8 * embed_dim // 96) * 32 if feed_forward.endswith("glu") else 4 * embed_dim
  block = BlockConfig(mixer, FeedForwardConfig(mlp_dim, feed_forward), norm)
  return LanguageModelConfig(
    decoder=DecoderConfig(
      embed_dim, (Stage((block,), num_layers),), norm, jnp.dtype(dtype), init, norm_eps,
      dropout_rate, remat, unroll,
    ),
    vocab_size=vocab_size,
    positions=positions if on_embedding else "none",
    max_length=max_length,
    scale_embeddings=scale_embeddings,
    tie_embeddings=tie_embeddings,
    loss_chunk_size=loss_chunk_size,
  )
