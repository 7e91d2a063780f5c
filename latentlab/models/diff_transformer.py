"""The Differential Transformer (arXiv 2410.05258) as a preset of the decoder.

With half of a Transformer's heads, each of two maps, a layer's projections are the Transformer's;
it has `4 H` numbers more for lambda and `2 H` for the headwise norm's scale. Body parameters are
`12 L D^2` with the default width of the feed-forward, `8/3 D`.
"""

import functools
from typing import Any

from latentlab.layers import DiffAttentionConfig, FeedForwardConfig
from latentlab.layers.feed_forward import default_width
from latentlab.layers.positions import split_scheme
from latentlab.models.language_model import LanguageModelConfig, stack
from latentlab.models.transformer import inference_mask, mixer_positions

# Tables 7 and 9; the sizes of section 3.2. Heads are those of two maps.
PRESETS = {
  "830m": dict(num_layers=24, embed_dim=1536, num_heads=8),
  "1b4": dict(num_layers=24, embed_dim=2048, num_heads=8),
  "2b8": dict(num_layers=32, embed_dim=2560, num_heads=10),
  "6b8": dict(num_layers=32, embed_dim=4096, num_heads=16),
  "13b1": dict(num_layers=40, embed_dim=5120, num_heads=20),
  "3b": dict(num_layers=28, embed_dim=3072, num_heads=12),
}


def diff_transformer(
  *,
  embed_dim: int,
  num_heads: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  value_factor: int = 2,
  mlp_dim: int | None = None,
  feed_forward: str = "swiglu",
  positions: str = "rope",
  rope_base: float = 10_000.0,
  rope_grid: str = "rope",
  rope_layout: str = "interleaved",
  train_length: int | None = None,
  xpos_scale_base: float | None = None,
  xpos_gamma: float = 0.4,
  xpos_rotation: bool = True,
  xpos_center: int | None = None,
  mask: str = "causal",
  mask_size: int | None = None,
  lambda_mode: str = "reparam",
  lambda_init: float | None = None,
  lambda_std: float = 0.1,
  key_pairing: str = "distinct",
  head_norm: bool = True,
  head_norm_affine: bool = True,
  head_norm_eps: float = 1e-5,
  head_layout: str = "neighbour",
  logit_bits: int | None = None,
  implementation: str | None = None,
  norm_eps: float = 1e-5,
  **options: Any,
) -> LanguageModelConfig:
  """A language model of differential attention.

  Args:
    embed_dim: Width `D`.
    num_heads: Heads of two maps, half of a Transformer's.
    num_kv_heads: Key and value heads; `num_heads` if `None`.
    head_dim: Query and key head size of a map; if `None`, what makes values as wide as `D`.
    value_factor: Value head size over it.
    mlp_dim: Feed-forward width; `8/3 D` rounded up to 32 if `None`, `4 D` without a gate.
    feed_forward: `swiglu`, `geglu`, `gelu` or `relu`.
    positions: `rope`, `xpos`, `alibi`, `sinusoidal`, `learned` or `none`.
    rope_base: Wave length base of `rope` and `xpos`.
    rope_grid: Frequencies of `rope`.
    rope_layout: Which features are a pair.
    train_length: Tokens of a training window; see `transformer`.
    xpos_scale_base: See there.
    xpos_gamma: See there.
    xpos_rotation: See there.
    xpos_center: See there.
    mask: `causal`, `sliding_window` or `blockwise_causal`.
    mask_size: Window or block; as `None`, see `transformer`.
    lambda_mode: `reparam`, `constant` or `token`; see `layers.DiffAttentionConfig`.
    lambda_init: The same for all layers; the schedule over depth if `None`.
    lambda_std: Standard deviation that lambda's vectors begin with.
    key_pairing: `distinct` or `shared`.
    head_norm: Whether the headwise norm is there.
    head_norm_affine: Whether it has a scale.
    head_norm_eps: Its epsilon.
    head_layout: `neighbour` or `halves`.
    logit_bits: Rounds scores, for evaluations.
    implementation: Implementation of the op.
    norm_eps: Epsilon of the other norms.
    **options: Of `language_model.stack`, `vocab_size` and `num_layers` among them.

  Raises:
    ValueError: a name is unknown, a pair means nothing, or sizes do not divide.
  """
  if head_dim is None:
    if embed_dim % (value_factor * num_heads):
      raise ValueError(
        f"{embed_dim=} is no multiple of {value_factor=} times {num_heads=}; give head_dim"
      )
    head_dim = embed_dim // (value_factor * num_heads)
  on_embedding, in_mixer = split_scheme(positions)
  mixer = DiffAttentionConfig(
    num_heads=num_heads,
    head_dim=head_dim,
    num_kv_heads=num_kv_heads,
    value_head_dim=value_factor * head_dim,
    positions=mixer_positions(
      in_mixer,
      train_length,
      rope_base=rope_base,
      rope_grid=rope_grid,
      rope_layout=rope_layout,
      xpos_scale_base=xpos_scale_base,
      xpos_gamma=xpos_gamma,
      xpos_rotation=xpos_rotation,
      xpos_center=xpos_center,
    ),
    mask=inference_mask(mask, mask_size, train_length),
    lambda_mode=lambda_mode,
    lambda_init=lambda_init,
    lambda_std=lambda_std,
    key_pairing=key_pairing,
    head_norm=head_norm,
    head_norm_affine=head_norm_affine,
    head_norm_eps=head_norm_eps,
    head_layout=head_layout,
    logit_bits=logit_bits,
    implementation=implementation,
  )
  if mlp_dim is None:
    mlp_dim = default_width(feed_forward, embed_dim)
  feed_forward = FeedForwardConfig(mlp_dim, feed_forward)
  return stack(
    mixer,
    feed_forward,
    embed_dim=embed_dim,
    positions=on_embedding,
    norm_eps=norm_eps,
    **options,
  )


V2 = dict(value_factor=1, lambda_mode="token", key_pairing="shared", head_norm=False)
"""What the successor has: pairs of query heads over one key and one value each.

Its `num_heads` are a Transformer's, with as many key and value heads; queries are twice as many.
"""

diff_transformer_v2 = functools.partial(diff_transformer, **V2)
"""`diff_transformer` with these as defaults."""
