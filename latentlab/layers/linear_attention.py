"""Linear attention (https://arxiv.org/abs/2006.16236, section 3.2; equations 5, 7 and 18 to 20).

  o_t = phi(q_t) S_t / (phi(q_t) . z_t)
  S_t = sum_{m<=t} phi(k_m)^T v_m
  z_t = sum_{m<=t} phi(k_m)

with `phi(x) = elu(x) + 1`. Both sums are retention without decay, `z` that of ones, and so are
their parallel, chunkwise and recurrent forms.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers.cache import RetentionState
from latentlab.layers.common import Context, Shared, heads_projection, mesh_spec, output_projection
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
  """Linear attention as a token mixer.

  Attributes:
    num_heads: Heads `N`.
    head_dim: Query, key and value head size `H`.
    positions: Rotation of `phi(q)` and `phi(k)` in the numerator alone, or none; the denominator
      stays positive (RoFormer, https://arxiv.org/abs/2104.09864, equation 19).
    eps: Added to the denominator.
    chunk_size: Chunk length asked of the op; its own choice if `None`.
    implementation: Implementation of the op; the platform's default if `None`.
  """

  kind: ClassVar[str] = "linear_attention"

  num_heads: int
  head_dim: int
  positions: PositionConfig = PositionConfig("none")
  eps: float = 1e-6
  chunk_size: int | None = None
  implementation: str | None = None

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return LinearAttention(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> RetentionState:
    del max_length, dtype  # The state grows with nothing, and is float32.
    rows = (batch_size, self.num_heads, self.head_dim)
    return RetentionState(
      state=jnp.zeros((*rows, self.head_dim), jnp.float32), z=jnp.zeros(rows, jnp.float32)
    )

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward matmul flops of the chunkwise form, as retention's; `z` has one value column."""
    chunk = min(self.chunk_size or 64, seq_length)
    projections = 2 * embed_dim * self.num_heads * 4 * self.head_dim
    columns = (self.head_dim, 1)
    mixing = sum(2 * chunk * (self.head_dim + v) + 4 * self.head_dim * v for v in columns)
    return projections + self.num_heads * mixing


class LinearAttention(nn.Module):
  """Linear attention.

  Attributes:
    config: What it computes.
    shared: What it shares with the other layers.
  """

  config: LinearAttentionConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: RetentionState | None = None
  ) -> tuple[Float[Array, "B T D"], RetentionState | None]:
    c = self.config
    if context.allowed is not None or context.key_bias is not None:
      raise ValueError("linear attention has no score matrix: it takes no `allowed`, no `key_bias`")
    q, k, v = (
      heads_projection(self.shared, c.num_heads, c.head_dim, name=f"{name}_proj")(x)
      for name in "qkv"
    )
    # Sums of positive features have no norm behind them that would hide a rounding: float32.
    q, k = (nn.elu(a.astype(jnp.float32)) + 1 for a in (q, k))
    turned = c.positions.rotate(q, k, context.positions)

    state, z = (None, None) if cache is None else (cache.state, cache.z[..., None])
    out, state = self._sum(*turned, v.astype(jnp.float32), context, state)
    norm, z = self._sum(q, k, jnp.ones_like(k[..., :1]), context, z)
    out = nn.with_logical_constraint(
      (out / (norm + c.eps)).astype(self.shared.dtype),
      ("act_batch", "act_length", "act_heads", None),
    )
    out = output_projection(self.shared)(out)
    return out, None if cache is None else RetentionState(state=state, z=z[..., 0])

  def _sum(self, q, k, v, context, state):
    c = self.config
    spec = mesh_spec("act_batch", "act_length", "act_heads", None)
    keep = jnp.zeros((c.num_heads,), jnp.float32)
    if q.shape[1] == 1 and state is not None and context.lengths is None:
      out, state = ops.retention_decode(q[:, 0], k[:, 0], v[:, 0], keep, state, spec=spec)
      return out[:, None], state
    return ops.retention(
      q,
      k,
      v,
      keep,
      initial_state=state,
      lengths=context.lengths,
      segment_ids=context.segment_ids,
      chunk_size=c.chunk_size,
      implementation=c.implementation,
      spec=spec,
    )
