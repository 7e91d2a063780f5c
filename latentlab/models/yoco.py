"""YOCO (arXiv 2405.05254): a self-decoder of constant memory, one shared cache, a cross-decoder.

The layers of the first half remember in a state or a window; their output is projected once to the
keys and values that all layers of the second half read. With gated retention and a feed-forward of
`3 D` it has about a Transformer's parameters (appendix E; a window: exactly).
"""

import dataclasses
from typing import Any

from latentlab.layers import (
  AttentionConfig,
  BlockConfig,
  DiffAttentionConfig,
  FeedForwardConfig,
  RetentionConfig,
  SharedKVConfig,
  Stage,
)
from latentlab.layers.positions import split_scheme
from latentlab.models.diff_transformer import V2
from latentlab.models.language_model import LanguageModelConfig, stack
from latentlab.models.transformer import inference_mask, mixer_positions

SELF_ATTENTIONS = ("gated_retention", "sliding_window", "diff_sliding_window")
CROSS_ATTENTIONS = ("attention", "diff_attention", "diff_attention_v2")
LAYOUTS = ("stacked", "unstacked", "interleaved")


def _curve(num_layers: int, embed_dim: int, num_heads: int) -> dict[str, Any]:
  """A size of the scaling curves: retention's heads are 256 wide, the feed-forward `3 D`."""
  return dict(
    num_layers=num_layers,
    embed_dim=embed_dim,
    num_heads=num_heads,
    num_self_heads=embed_dim // 256,
    mlp_dim=3 * embed_dim,
  )


# Section 5.1 with appendix D, and appendix E.
PRESETS = {
  "160m": _curve(12, 768, 12),
  "400m": _curve(24, 1024, 16),
  "830m": _curve(24, 1536, 12),
  "1b4": _curve(24, 2048, 16),
  "2b7": _curve(32, 2560, 20),
  "6b8": _curve(32, 4096, 32),
  "13b": _curve(40, 5120, 40),
  "3b": dict(
    num_layers=26,
    embed_dim=3072,
    num_heads=24,
    num_kv_heads=8,
    num_self_heads=24,
    mlp_dim=8192,
  ),
}


def yoco(
  *,
  num_layers: int,
  embed_dim: int,
  num_heads: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  num_self_layers: int | None = None,
  num_self_heads: int | None = None,
  num_self_kv_heads: int | None = None,
  self_head_dim: int | None = None,
  self_attention: str = "gated_retention",
  cross_attention: str = "attention",
  layout: str = "stacked",
  window: int = 1024,
  tau: float = 16.0,
  chunk_size: int | None = None,
  mlp_dim: int | None = None,
  feed_forward: str = "swiglu",
  lambda_init: float | None = None,
  positions: str = "rope",
  rope_base: float = 10_000.0,
  rope_grid: str = "linspace",
  rope_layout: str = "interleaved",
  kv_norm: bool = True,
  logit_bits: int | None = None,
  implementation: str | None = None,
  scale_embeddings: bool = True,
  norm_eps: float = 1e-5,
  init: str = "yoco",
  **options: Any,
) -> LanguageModelConfig:
  """A YOCO language model.

  Args:
    num_layers: Layers of both halves.
    embed_dim: Width `D`.
    num_heads: Query heads of the cross-decoder; heads of two maps with `diff_attention`.
    num_kv_heads: Heads of the shared keys and values; `num_heads` if `None`.
    head_dim: Their size, of a map; `embed_dim / num_heads` if `None`, half of it with two maps.
    num_self_layers: Layers of the self-decoder, from 0 on; half of `num_layers` if `None`.
    num_self_heads: Heads of the self-decoder; `num_heads` if `None`.
    num_self_kv_heads: Its key and value heads; `num_self_heads` if `None`.
    self_head_dim: Their size; `embed_dim / num_self_heads` if `None`, half of it with two maps.
    self_attention: `gated_retention`, `sliding_window`, or `diff_sliding_window`.
    cross_attention: `attention`, `diff_attention`, or `diff_attention_v2`, whose maps share keys.
    layout: `stacked`; `unstacked`, whose cross-decoder begins with the embeddings; or
      `interleaved`, which has no shared cache: every second layer is full attention of its own
      (table 6).
    window: Of `sliding_window`.
    tau: Temperature of the retention's gates.
    chunk_size: Chunk length asked of retention.
    mlp_dim: Feed-forward width; `3 D` if `None`.
    feed_forward: `swiglu`, `geglu`, `gelu` or `relu`.
    lambda_init: Of differential attention, the same for all layers; by depth if `None`.
    positions: `rope` of both halves, `none`, or the embedding's `sinusoidal` or `learned`.
    rope_base: Wave length base of all rotations.
    rope_grid: `linspace` as the original release, or `rope`.
    rope_layout: Which features are a pair.
    kv_norm: Whether a norm of their own precedes the shared keys and values.
    logit_bits: Rounds the scores of softmax attention, for evaluations.
    implementation: Implementation of the ops of retention and differential attention.
    scale_embeddings: Whether embeddings are multiplied by `sqrt(D)`.
    norm_eps: Epsilon of the norms.
    init: Initialisation scheme; `yoco` is the original release's: gated retention begins as
      RetNet does (`retnet`), all else as torch's linear layers (`linear`).
    **options: Of `language_model.stack`, `vocab_size` among them.

  Raises:
    ValueError: a name is unknown, or sizes do not divide.
  """
  for field, value, choices in (
    ("self_attention", self_attention, SELF_ATTENTIONS),
    ("cross_attention", cross_attention, CROSS_ATTENTIONS),
    ("layout", layout, LAYOUTS),
  ):
    if value not in choices:
      raise ValueError(f"unknown {field}={value!r}; choose one of {choices}")
  if num_self_layers is None:
    num_self_layers = num_layers // 2
  if not 0 <= num_self_layers < num_layers:
    raise ValueError(f"{num_self_layers=} of {num_layers=} leaves no layer to the cross-decoder")
  if layout == "interleaved" and 2 * num_self_layers != num_layers:
    raise ValueError(
      f"layout='interleaved' has as many layers of each kind, not {num_self_layers=}"
    )

  maps = 2 if cross_attention == "diff_attention" else 1
  if head_dim is None:
    head_dim = _head_dim("num_heads", embed_dim, num_heads, maps)
  num_self_heads = num_heads if num_self_heads is None else num_self_heads
  self_maps = 2 if self_attention == "diff_sliding_window" else 1
  if self_head_dim is None:
    self_head_dim = _head_dim("num_self_heads", embed_dim, num_self_heads, self_maps)
  on_embedding, in_mixer = split_scheme(positions)
  rope = mixer_positions(
    in_mixer, None, rope_base=rope_base, rope_grid=rope_grid, rope_layout=rope_layout
  )
  if self_attention == "gated_retention":
    self_mixer = RetentionConfig(
      num_heads=num_self_heads,
      head_dim=self_head_dim,
      value_head_dim=self_head_dim,
      num_kv_heads=num_self_kv_heads,
      positions=rope,
      decay="gated",
      tau=tau,
      head_norm_eps=norm_eps,
      chunk_size=chunk_size,
      implementation=implementation,
    )
  else:
    sizes = dict(num_heads=num_self_heads, head_dim=self_head_dim, positions=rope)
    sizes |= dict(num_kv_heads=num_self_kv_heads, logit_bits=logit_bits)
    sizes |= dict(mask=inference_mask("sliding_window", window, None))
    if self_maps == 1:
      self_mixer = AttentionConfig(**sizes)
    else:
      diff = dict(lambda_init=lambda_init, implementation=implementation)
      self_mixer = DiffAttentionConfig(**sizes, **diff)
  shared = layout != "interleaved"
  sizes = dict(num_heads=num_heads, head_dim=head_dim, num_kv_heads=num_kv_heads, positions=rope)
  sizes |= dict(shared_kv=shared, logit_bits=logit_bits)
  if cross_attention == "attention":
    cross_mixer = AttentionConfig(**sizes)
  elif cross_attention == "diff_attention":
    diff = dict(lambda_init=lambda_init, implementation=implementation)
    cross_mixer = DiffAttentionConfig(**sizes, **diff)
  else:
    second = {k: x for k, x in V2.items() if k != "value_factor"}
    sizes |= dict(value_head_dim=head_dim, implementation=implementation)
    cross_mixer = DiffAttentionConfig(**sizes, **second)

  feed_forward = FeedForwardConfig(3 * embed_dim if mlp_dim is None else mlp_dim, feed_forward)
  base = stack(
    self_mixer,
    feed_forward,
    num_layers=num_layers,
    embed_dim=embed_dim,
    positions=on_embedding,
    scale_embeddings=scale_embeddings,
    norm_eps=norm_eps,
    init="linear" if init == "yoco" else init,
    **options,
  )
  norm = base.decoder.final_norm
  gated = init == "yoco" and self_attention == "gated_retention"
  self_block = BlockConfig(self_mixer, feed_forward, norm, init="retnet" if gated else None)
  cross_block = BlockConfig(cross_mixer, feed_forward, norm)
  if not shared:
    fields = dict(stages=(Stage((self_block, cross_block), num_self_layers),))
  else:
    heads, key_dim, value_dim = cross_mixer.shared_sizes
    stages = [Stage((self_block,), num_self_layers)] if num_self_layers else []
    fields = dict(
      stages=(*stages, Stage((cross_block,), num_layers - num_self_layers)),
      shared_kv=SharedKVConfig(
        num_kv_heads=heads,
        head_dim=head_dim,
        value_head_dim=value_dim,
        keys_per_value=key_dim // head_dim,
        positions=rope,
        norm=norm if kv_norm else "none",
      ),
      num_self_stages=len(stages),
      cross_input="embeddings" if layout == "unstacked" else "hidden",
    )
  return dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, **fields))


def _head_dim(field: str, embed_dim: int, num_heads: int, maps: int) -> int:
  if num_heads < 1 or embed_dim % (maps * num_heads):
    raise ValueError(
      f"embed_dim={embed_dim} is no multiple of {field}={num_heads} times {maps}; give the heads' "
      "size"
    )
  return embed_dim // (maps * num_heads)
