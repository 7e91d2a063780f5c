"""Named shapes, which benchmarks and the parity tests share."""

import dataclasses
from typing import Any

# What the peers can compute too: LlamaForCausalLM, DiffLlamaForCausalLM (pairs of heads and of
# rotated features are halves, the head norm has no scale), and torchscale's RetNet (its block has
# RMS norms and a gated feed-forward). torchscale scales the rows of a head by numbers that
# depend on its form; behind a head norm they cancel, exactly so where its epsilon is zero.
MODELS: dict[str, dict[str, Any]] = {
  "transformer": dict(feed_forward="swiglu", rope_layout="half"),
  "diff_transformer": dict(head_layout="halves", rope_layout="half", head_norm_affine=False),
  "retnet": dict(
    feed_forward="swiglu", norm="rms", decay="pow2", head_norm="rms", head_norm_eps=0.0
  ),
}


@dataclasses.dataclass(frozen=True)
class Size:
  """A size of both models and the batch that it is trained on.

  Attributes:
    num_layers: Layers.
    embed_dim: Width; bodies have 12 of its square per layer, up to rounding.
    num_heads: Heads by model.
    vocab_size: Tokens.
    batch_size: Sequences.
    seq_length: Their length.
  """

  num_layers: int
  embed_dim: int
  num_heads: dict[str, int]
  vocab_size: int
  batch_size: int
  seq_length: int

  def model(self, name: str) -> dict[str, Any]:
    """A config's `model` section."""
    sizes = dict(num_layers=self.num_layers, embed_dim=self.embed_dim)
    return dict(name=name, **sizes, num_heads=self.num_heads[name], **MODELS[name])


SIZES = {
  "tiny": Size(
    2, 48, dict(transformer=3, diff_transformer=2, retnet=2), 97, 2, 24
  ),  # Of tests; no time worth telling.
  "3m": Size(6, 192, dict(transformer=3, diff_transformer=3, retnet=3), 1024, 8, 256),
  "10m": Size(4, 384, dict(transformer=6, diff_transformer=3, retnet=3), 4096, 4, 512),
  "10m_long": Size(4, 384, dict(transformer=6, diff_transformer=3, retnet=3), 4096, 1, 2048),
}


@dataclasses.dataclass(frozen=True)
class Attention:
  """A call of an op on keys and values.

  Attributes:
    batch: Rows.
    length: Tokens of each, of queries as of keys.
    num_heads: Heads.
    head_dim: Of queries and keys; of one map's, where there are two.
    value_head_dim: Of values.
    gated: Whether each token has its own decay, and a gradient of it.
  """

  batch: int
  length: int
  num_heads: int
  head_dim: int
  value_head_dim: int
  gated: bool = False


# RetNet's heads, and the shapes that flash-linear-attention publishes figures of.
RETENTION = {
  "tiny": Attention(2, 70, 2, 64, 128),  # Of tests.
  "tiny_gated": Attention(2, 70, 2, 64, 128, gated=True),
  "retnet_4k": Attention(8, 4096, 8, 256, 512),
  "retnet_4k_gated": Attention(8, 4096, 8, 256, 512, gated=True),
  "retnet_16k": Attention(8, 16384, 8, 256, 512),
  "retnet_64k": Attention(8, 65536, 8, 256, 512),
  "retnet_64k_row": Attention(1, 65536, 8, 256, 512),
  "fla_b8_t2048_h32_d256": Attention(8, 2048, 32, 256, 256),
  "fla_b1_t8192_h96_d128": Attention(1, 8192, 96, 128, 128),
  "fla_b2_t16384_h16_d128": Attention(2, 16384, 16, 128, 128),
  "fla_b4_t4096_h64_d128": Attention(4, 4096, 64, 128, 128),
  "fla_b4_t2048_h16_d128": Attention(4, 2048, 16, 128, 128),
  "fla_b8_t1024_h8_d64": Attention(8, 1024, 8, 64, 64),
}

# Causal differential attention.
DIFF_ATTENTION = {
  "tiny": Attention(1, 70, 2, 32, 64),
  "diff_4k": Attention(4, 4096, 16, 128, 256),
  "diff_8k": Attention(4, 8192, 16, 128, 256),
  "diff_16k": Attention(4, 16384, 16, 128, 256),
  "diff_32k": Attention(4, 32768, 16, 128, 256),
}
