"""RetNet (arXiv 2307.08621) as a preset of the decoder.

Body parameters are `12 L d^2` as a Transformer's: retention has `8 d^2` (queries and keys `d^2`
each; values, gate and output `2 d^2` each), the feed-forward `4 d^2` at width `2 d` (section 3.1).
"""

import functools
from typing import Any

from latentlab.layers import FeedForwardConfig, PositionConfig, RetentionConfig
from latentlab.layers.positions import split_scheme
from latentlab.models.language_model import LanguageModelConfig, stack

# Heads are 256 wide in every size (table 2 and section 3.1); 13b is of the cost runs only.
PRESETS = {
  "200m": dict(num_layers=16, embed_dim=1024, num_heads=4),
  "1b3": dict(num_layers=24, embed_dim=2048, num_heads=8),
  "2b7": dict(num_layers=32, embed_dim=2560, num_heads=10),
  "6b7": dict(num_layers=32, embed_dim=4096, num_heads=16),
  "13b": dict(num_layers=40, embed_dim=5120, num_heads=20),
}


def retnet(
  *,
  embed_dim: int,
  num_heads: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  value_factor: float | None = None,
  mlp_dim: int | None = None,
  feed_forward: str = "gelu",
  float32_activation: bool = False,
  norm: str = "layer",
  positions: str = "rope",
  rope_base: float = 10_000.0,
  rope_grid: str = "linspace",
  rope_layout: str = "interleaved",
  decay: str = "linspace",
  decay_value: float | None = None,
  decay_values: tuple[float, ...] | None = None,
  gate: bool = True,
  head_norm: str = "group",
  head_norm_eps: float = 1e-6,
  head_norm_affine: bool = False,
  normalization: str = "none",
  chunk_size: int | None = None,
  implementation: str | None = None,
  init: str = "retnet",
  scale_embeddings: bool = False,
  **options: Any,
) -> LanguageModelConfig:
  """A RetNet language model.

  Args:
    embed_dim: Width `D`.
    num_heads: Retention heads.
    num_kv_heads: Key and value heads; `num_heads` if `None`.
    head_dim: Query and key head size; `embed_dim / num_heads` if `None`.
    value_factor: Value head size over query head size; 2 if `None` (section 3.1).
    mlp_dim: Feed-forward width; if `None`, what makes a body of `12 d^2` a layer (`2 D` with a gate
      and twice as wide values).
    feed_forward: `gelu`, `relu`, `swiglu` or `geglu`.
    float32_activation: Whether its activation is in float32 whatever `dtype` is, as in the release.
    norm: `layer` as the paper, or `rms` as the original release.
    positions: `rope`, `sinusoidal`, `learned` or `none`.
    rope_base: Wave length base of the rotation.
    rope_grid: `linspace` as the original release, or `rope`.
    rope_layout: Which features are a pair.
    decay: `linspace` as the paper's experiments, `pow2` (equation 8), `one`, `const`, `custom`, or
      `gated` by each token (YOCO's gRetNet).
    decay_value: The decay of `const`.
    decay_values: Those of `custom`, one a head.
    gate: Whether a swish gate multiplies the output.
    head_norm: `group` as the paper, `rms` as the original release, or `none`.
    head_norm_eps: Its epsilon.
    head_norm_affine: Whether it has a scale.
    normalization: Row scale before it: `none`, `decay`, `paper` or `torchscale`.
    chunk_size: Chunk length asked of the op.
    implementation: Implementation of the op.
    init: Initialisation scheme; `deepnorm` goes with `residual="deepnorm"`.
    scale_embeddings: Whether embeddings are multiplied by `sqrt(D)`.
    **options: Of `language_model.stack`, `vocab_size` and `num_layers` among them.

  Raises:
    ValueError: a name is unknown, a pair means nothing, or sizes do not divide.
  """
  if head_dim is None:
    if embed_dim % num_heads:
      raise ValueError(f"{embed_dim=} is no multiple of {num_heads=}; give head_dim")
    head_dim = embed_dim // num_heads
  value_head_dim = round((2 if value_factor is None else value_factor) * head_dim)
  if mlp_dim is None:
    wide = 3 if gate else 2
    mixer_params = embed_dim * (
      num_heads * (head_dim + (wide - 1) * value_head_dim)
      + (num_kv_heads or num_heads) * (head_dim + value_head_dim)
    )
    matrices = 3 if feed_forward.endswith("glu") else 2
    mlp_dim = (12 * embed_dim**2 - mixer_params) // (matrices * embed_dim)
    if mlp_dim < 1:
      raise ValueError(f"{value_factor=} leaves no room for a feed-forward; give mlp_dim")
  on_embedding, in_mixer = split_scheme(positions)
  mixer = RetentionConfig(
    num_heads=num_heads,
    head_dim=head_dim,
    value_head_dim=value_head_dim,
    num_kv_heads=num_kv_heads,
    positions=PositionConfig(in_mixer, base=rope_base, grid=rope_grid, layout=rope_layout),
    decay=decay,
    decay_value=decay_value,
    decay_values=decay_values if decay_values is None else tuple(decay_values),
    gate=gate,
    head_norm=head_norm,
    head_norm_eps=head_norm_eps,
    head_norm_affine=head_norm_affine,
    normalization=normalization,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  return stack(
    mixer,
    FeedForwardConfig(mlp_dim, feed_forward, float32_activation),
    embed_dim=embed_dim,
    norm=norm,
    positions=on_embedding,
    init=init,
    scale_embeddings=scale_embeddings,
    **options,
  )


TORCHSCALE = dict(
  feed_forward="swiglu",
  float32_activation=True,
  norm="rms",
  decay="pow2",
  head_norm="rms",
  scale_embeddings=True,
)
"""What the language models of the original release, torchscale, have."""

torchscale_retnet = functools.partial(retnet, **TORCHSCALE)
"""`retnet` with that release's choices as defaults."""

TORCHSCALE_PRESETS = {
  name: dict(
    num_layers=num_layers,
    embed_dim=embed_dim,
    num_heads=embed_dim // 256,
    value_factor=width / embed_dim,
    mlp_dim=width,
  )
  # One width for all values and for the feed-forward, about 27/16 of the model's.
  for name, num_layers, embed_dim, width in (
    ("base", 6, 512, 864),
    ("medium", 16, 1024, 1728),
    ("xl", 24, 2048, 3456),
    ("3b", 32, 2560, 4280),
    ("7b", 32, 4096, 6912),
    ("13b", 40, 5120, 8560),
    ("65b", 64, 8192, 13824),
  )
}
