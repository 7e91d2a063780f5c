"""The Transformer as a preset of the decoder: what every paper's model is compared with.

Body parameters are `12 L d^2` with the default widths: `4 d^2` of attention, `8 d^2` of the
feed-forward.
"""

from typing import Any

from latentlab import ops
from latentlab.layers import AttentionConfig, FeedForwardConfig, PositionConfig
from latentlab.layers.feed_forward import default_width
from latentlab.layers.positions import split_scheme
from latentlab.models.language_model import LanguageModelConfig, stack

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
  embed_dim: int,
  num_heads: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  mlp_dim: int | None = None,
  feed_forward: str = "gelu",
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
  logit_bits: int | None = None,
  head_norm: bool = False,
  head_norm_affine: bool = True,
  head_norm_eps: float = 1e-5,
  **options: Any,
) -> LanguageModelConfig:
  """A Transformer language model.

  Args:
    embed_dim: Width `D`.
    num_heads: Query heads.
    num_kv_heads: Key/value heads; `num_heads` if `None`.
    head_dim: Head size; `embed_dim / num_heads` if `None`.
    mlp_dim: Feed-forward width; `4 D` if `None`, `8/3 D` rounded up to 32 if it is gated.
    feed_forward: `gelu`, `relu`, `swiglu` or `geglu`.
    positions: `rope`, `xpos`, `alibi`, `sinusoidal`, `learned` or `none`.
    rope_base: Wave length base of `rope` and `xpos`.
    rope_grid: Frequencies of `rope`.
    rope_layout: Which features are a pair.
    train_length: Tokens of a training window, `config.data.seq_length` in an experiment; what
      `xpos_scale_base` and `mask_size` follow where they are `None`.
    xpos_scale_base: Tokens per unit of xPos's decay; half of `train_length` if `None`.
    xpos_gamma: Offset of xPos's decay.
    xpos_rotation: Whether xPos rotates; table 4 of its paper has the decay alone.
    xpos_center: Fixed position of scale one, which bounds the length; `None` has no bound.
    mask: `causal`, `sliding_window` or `blockwise_causal`; parameters do not depend on it, so that
      a model trained as `causal` may be evaluated and sampled with another.
    mask_size: Window or block of the mask; as `None`, the window is `train_length` and the block
      half of it, as the xPos paper has them (section 3.3).
    logit_bits: Rounds scores to so many bits, for evaluations; see `ops.attention_maps`.
    head_norm: Whether an RMS norm of each head follows attention.
    head_norm_affine: Whether it has a scale.
    head_norm_eps: Its epsilon.
    **options: Of `language_model.stack`, `vocab_size` and `num_layers` among them.

  Raises:
    ValueError: a name is unknown, or sizes do not divide.
  """
  if head_dim is None:
    if embed_dim % num_heads:
      raise ValueError(f"{embed_dim=} is no multiple of {num_heads=}; give head_dim")
    head_dim = embed_dim // num_heads
  on_embedding, in_mixer = split_scheme(positions)
  mixer = AttentionConfig(
    num_heads=num_heads,
    head_dim=head_dim,
    num_kv_heads=num_kv_heads,
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
    logit_bits=logit_bits,
    head_norm=head_norm,
    head_norm_affine=head_norm_affine,
    head_norm_eps=head_norm_eps,
  )
  if mlp_dim is None:
    mlp_dim = default_width(feed_forward, embed_dim)
  feed_forward = FeedForwardConfig(mlp_dim, feed_forward)
  return stack(mixer, feed_forward, embed_dim=embed_dim, positions=on_embedding, **options)


def mixer_positions(
  kind: str,
  train_length: int | None,
  *,
  rope_base: float = 10_000.0,
  rope_grid: str = "rope",
  rope_layout: str = "interleaved",
  xpos_scale_base: float | None = None,
  xpos_gamma: float = 0.4,
  xpos_rotation: bool = True,
  xpos_center: int | None = None,
) -> PositionConfig:
  """The position scheme of a mixer, by fields of a preset (see `transformer`).

  Raises:
    ValueError: a name is unknown, or xPos has no scale base.
  """
  if train_length is not None and xpos_scale_base is None:
    xpos_scale_base = train_length / 2
  if kind == "xpos" and xpos_scale_base is None:
    raise ValueError("positions='xpos' needs train_length, or an xpos_scale_base of half of it")
  return PositionConfig(
    kind,
    base=rope_base if xpos_rotation or kind != "xpos" else None,
    grid=rope_grid,
    layout=rope_layout,
    gamma=xpos_gamma,
    scale_base=PositionConfig.scale_base if xpos_scale_base is None else xpos_scale_base,
    center="tile" if xpos_center is None else xpos_center,
  )


def inference_mask(kind: str, size: int | None, train_length: int | None) -> ops.Mask:
  """A language model's mask, by fields of a preset (see `transformer`).

  Raises:
    ValueError: it shows what has to be predicted, is unknown, or lacks a size.
  """
  if kind == "full":
    raise ValueError(
      "mask='full' shows a language model the tokens that it has to predict; choose "
      "'causal', 'sliding_window' or 'blockwise_causal'"
    )
  if train_length is not None and size is None:
    size = dict(sliding_window=train_length, blockwise_causal=-(-train_length // 2)).get(kind)
  return ops.Mask(kind, size)
