"""What RetNet is compared with (table 5 of https://arxiv.org/abs/2307.08621), on the same decoder.

As there, a baseline is a token mixer in place of attention, before the same feed-forward (section
3.5: RWKV's time mixing alone is used, for instance). Its width makes a body of `12 d^2` a layer.
"""

from typing import Any

from latentlab.layers import (
  FeedForwardConfig,
  H3Config,
  HyenaConfig,
  LinearAttentionConfig,
  PositionConfig,
  RwkvConfig,
)
from latentlab.layers.positions import split_scheme
from latentlab.models.language_model import LanguageModelConfig, stack

# The size of RetNet's table 5; the heads of its baselines are not told, but for H3's of 8.
PRESETS = {"200m": dict(num_layers=16, embed_dim=1024)}
LINEAR_PRESETS = {name: dict(**sizes, num_heads=16) for name, sizes in PRESETS.items()}
H3_PRESETS = {name: dict(**sizes, num_heads=128) for name, sizes in PRESETS.items()}


def linear_transformer(
  *,
  embed_dim: int,
  num_heads: int,
  head_dim: int | None = None,
  mlp_dim: int | None = None,
  feed_forward: str = "gelu",
  positions: str = "sinusoidal",
  rope_base: float = 10_000.0,
  rope_grid: str = "rope",
  rope_layout: str = "interleaved",
  chunk_size: int | None = None,
  implementation: str | None = None,
  **options: Any,
) -> LanguageModelConfig:
  """A Linear Transformer (https://arxiv.org/abs/2006.16236) as a language model.

  Args:
    embed_dim: Width `D`.
    num_heads: Heads.
    head_dim: Head size; `embed_dim / num_heads` if `None`.
    mlp_dim: Feed-forward width; if `None`, what makes a body of `12 d^2` a layer.
    feed_forward: `gelu`, `relu`, `swiglu` or `geglu`.
    positions: `sinusoidal`, `learned`, `none` or `rope`.
    rope_base: Wave length base of the rotation.
    rope_grid: Its frequencies.
    rope_layout: Which features are a pair.
    chunk_size: Chunk length asked of the op.
    implementation: Implementation of the op.
    **options: Of `language_model.stack`, `vocab_size` and `num_layers` among them.

  Raises:
    ValueError: a name is unknown, a pair means nothing, or sizes do not divide.
  """
  if head_dim is None:
    head_dim = _divide(embed_dim, num_heads)
  on_embedding, in_mixer = split_scheme(positions)
  mixer = LinearAttentionConfig(
    num_heads=num_heads,
    head_dim=head_dim,
    positions=PositionConfig(in_mixer, base=rope_base, grid=rope_grid, layout=rope_layout),
    chunk_size=chunk_size,
    implementation=implementation,
  )
  mlp = _feed_forward(4 * embed_dim * num_heads * head_dim, embed_dim, mlp_dim, feed_forward)
  return stack(mixer, mlp, embed_dim=embed_dim, positions=on_embedding, **options)


def rwkv(
  *,
  embed_dim: int,
  num_layers: int,
  mlp_dim: int | None = None,
  feed_forward: str = "gelu",
  positions: str = "none",
  **options: Any,
) -> LanguageModelConfig:
  """RWKV's time mixing (https://arxiv.org/abs/2305.13048) with the others' feed-forward.

  Args:
    embed_dim: Width `D`.
    num_layers: Layers.
    mlp_dim: Feed-forward width; if `None`, what makes a body of `12 d^2` a layer.
    feed_forward: `gelu`, `relu`, `swiglu` or `geglu`.
    positions: `none`, `sinusoidal` or `learned`.
    **options: Of `language_model.stack`, `vocab_size` among them.

  Raises:
    ValueError: a name is unknown, or a pair means nothing.
  """
  on_embedding, in_mixer = split_scheme(positions)
  mixer = RwkvConfig(embed_dim, num_layers, PositionConfig(in_mixer))
  # Three mixes, a decay and a bonus beside the four matrices.
  mlp = _feed_forward(4 * embed_dim**2 + 5 * embed_dim, embed_dim, mlp_dim, feed_forward)
  return stack(
    mixer, mlp, embed_dim=embed_dim, num_layers=num_layers, positions=on_embedding, **options
  )


def h3(
  *,
  embed_dim: int,
  num_heads: int,
  state_dim: int = 64,
  min_step: float = 1e-3,
  max_step: float = 1e-1,
  chunk_size: int = 128,
  mlp_dim: int | None = None,
  feed_forward: str = "gelu",
  positions: str = "none",
  **options: Any,
) -> LanguageModelConfig:
  """H3 (https://arxiv.org/abs/2212.14052) as a language model.

  Args:
    embed_dim: Width `D`.
    num_heads: Heads; RetNet compares with heads of 8.
    state_dim: Size of either state space.
    min_step: Least step of the diagonal one at first.
    max_step: Largest one.
    chunk_size: Tokens whose products are computed at once.
    mlp_dim: Feed-forward width; if `None`, what makes a body of `12 d^2` a layer.
    feed_forward: `gelu`, `relu`, `swiglu` or `geglu`.
    positions: `none`, `sinusoidal` or `learned`.
    **options: Of `language_model.stack`, `vocab_size` and `num_layers` among them.

  Raises:
    ValueError: a name is unknown, a pair means nothing, or sizes do not divide.
  """
  on_embedding, in_mixer = split_scheme(positions)
  mixer = H3Config(
    num_heads=num_heads,
    head_dim=_divide(embed_dim, num_heads),
    state_dim=state_dim,
    min_step=min_step,
    max_step=max_step,
    chunk_size=chunk_size,
    positions=PositionConfig(in_mixer),
  )
  mlp = _feed_forward(mixer.num_params, embed_dim, mlp_dim, feed_forward)
  return stack(mixer, mlp, embed_dim=embed_dim, positions=on_embedding, **options)


def hyena(
  *,
  embed_dim: int,
  train_length: int | None = None,
  order: int = 2,
  short_taps: int = 3,
  filter_dim: int = 64,
  filter_layers: int = 2,
  filter_features: int = 33,
  filter_frequency: float = 10.0,
  method: str = "fft",
  mlp_dim: int | None = None,
  feed_forward: str = "gelu",
  positions: str = "none",
  **options: Any,
) -> LanguageModelConfig:
  """Hyena (https://arxiv.org/abs/2302.10866) as a language model.

  Args:
    embed_dim: Width `D`.
    train_length: Tokens of a window in training, over which the filters' windows are defined.
    order: Gates, and one more than there are long filters.
    short_taps: Taps of the short filters.
    filter_dim: Width of the network that makes the long filters.
    filter_layers: Its hidden layers behind the first.
    filter_features: What it knows of a distance.
    filter_frequency: What its sines have as a factor at first.
    method: `fft` or `direct`.
    mlp_dim: Feed-forward width; if `None`, what makes a body of `12 d^2` a layer.
    feed_forward: `gelu`, `relu`, `swiglu` or `geglu`.
    positions: `none`, `sinusoidal` or `learned`.
    **options: Of `language_model.stack`, `vocab_size` and `num_layers` among them.

  Raises:
    ValueError: a name is unknown, a pair means nothing, or `train_length` is missing.
  """
  if train_length is None:
    raise ValueError("hyena's filters need config.model.train_length, training's data.seq_length")
  on_embedding, in_mixer = split_scheme(positions)
  mixer = HyenaConfig(
    embed_dim=embed_dim,
    filter_length=train_length,
    order=order,
    short_taps=short_taps,
    filter_dim=filter_dim,
    filter_layers=filter_layers,
    filter_features=filter_features,
    filter_frequency=filter_frequency,
    method=method,
    positions=PositionConfig(in_mixer),
  )
  mlp = _feed_forward(mixer.num_params, embed_dim, mlp_dim, feed_forward)
  return stack(mixer, mlp, embed_dim=embed_dim, positions=on_embedding, **options)


def _divide(embed_dim: int, num_heads: int) -> int:
  if embed_dim % num_heads:
    raise ValueError(f"{embed_dim=} is no multiple of {num_heads=}; give head_dim")
  return embed_dim // num_heads


def _feed_forward(
  mixer_params: int, embed_dim: int, mlp_dim: int | None, kind: str
) -> FeedForwardConfig:
  """A feed-forward of the width asked for, or of that which leaves `12 d^2` parameters in all."""
  if mlp_dim is None:
    matrices = 3 if kind.endswith("glu") else 2
    mlp_dim = round((12 * embed_dim**2 - mixer_params) / (matrices * embed_dim))
    if mlp_dim < 1:
      raise ValueError(
        f"a mixer of {mixer_params} parameters leaves no room in 12 d^2 at {embed_dim=}; "
        "give mlp_dim"
      )
  return FeedForwardConfig(mlp_dim, kind)
