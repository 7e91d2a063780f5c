"""Named shapes, which benchmarks and the parity tests share."""

import dataclasses
from typing import Any

# What the peers can compute too: LlamaForCausalLM, and torchscale's RetNet (its block
# has RMS norms and a gated feed-forward). torchscale scales the rows of a head by numbers that
# depend on its form; behind a head norm they cancel, exactly so where its epsilon is zero.
MODELS: dict[str, dict[str, Any]] = {
  "transformer": dict(feed_forward="swiglu", rope_layout="half"),
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
  "tiny": Size(2, 48, dict(transformer=3, retnet=2), 97, 2, 24),  # Of tests; no time worth telling.
  "3m": Size(6, 192, dict(transformer=3, retnet=3), 1024, 8, 256),
  "10m": Size(4, 384, dict(transformer=6, retnet=3), 4096, 4, 512),
}
