"""Token embeddings with the position schemes that add to them, and the vocabulary head."""

import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer

from latentlab import ops
from latentlab.layers.positions import EMBEDDING_SCHEMES
from latentlab.typing import Array, Bool, DTypeLike, Float, Int


class Embedder(nn.Module):
  """Token embeddings.

  Attributes:
    vocab_size: Tokens.
    embed_dim: Width `D`.
    initializer: Initialiser of the table.
    dtype: Dtype of the result.
    scale: Whether embeddings are multiplied by `sqrt(D)`.
    positions: `none`, `sinusoidal` or `learned`, added after the scale.
    max_length: Positions that `learned` has vectors for.
  """

  vocab_size: int
  embed_dim: int
  initializer: Initializer
  dtype: DTypeLike
  scale: bool = False
  positions: str = "none"
  max_length: int = 2048

  def setup(self):
    if self.positions not in EMBEDDING_SCHEMES:
      raise ValueError(f"unknown scheme {self.positions!r}; choose one of {EMBEDDING_SCHEMES}")
    table = nn.with_logical_partitioning(self.initializer, ("vocab", "embed"))
    self.embedding = self.param("embedding", table, (self.vocab_size, self.embed_dim))
    if self.positions == "learned":
      table = nn.with_logical_partitioning(self.initializer, ("positions", "embed"))
      self.position_embedding = self.param(
        "position_embedding", table, (self.max_length, self.embed_dim)
      )

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "#B T"],
    replaced: tuple[Bool[Array, "B T"], Float[Array, "B T D"]] | None = None,
  ) -> Float[Array, "B T D"]:
    """Vectors of tokens; where `replaced[0]`, of something else that is no token (a latent)."""
    # The width is gathered before the lookup, not the looked-up batch after it.
    table = nn.with_logical_constraint(self.embedding, ("vocab", None))
    x = jnp.take(table, tokens, axis=0)
    if self.scale:
      x = x * self.embed_dim**0.5
    if replaced is not None:
      x = jnp.where(replaced[0][..., None], replaced[1].astype(x.dtype), x)
    if self.positions == "sinusoidal":
      x = x + ops.sinusoidal(positions, self.embed_dim)
    elif self.positions == "learned":
      # "fill" turns a position without a vector into NaN; a clipped one would pass unnoticed.
      x = x + jnp.take(self.position_embedding, positions, axis=0, mode="fill")
    return nn.with_logical_constraint(
      x.astype(self.dtype), ("act_batch", "act_length", "act_embed")
    )


class VocabHead(nn.Module):
  """The kernel `D -> vocab`; what it is multiplied with is the caller's affair.

  Attributes:
    vocab_size: Tokens.
    embed_dim: Width `D`.
    initializer: Initialiser.
  """

  vocab_size: int
  embed_dim: int
  initializer: Initializer

  @nn.compact
  def __call__(self) -> Float[Array, "D vocab"]:
    init = nn.with_logical_partitioning(self.initializer, ("embed", "vocab"))
    return self.param("kernel", init, (self.embed_dim, self.vocab_size))
