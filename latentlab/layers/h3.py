"""H3 (https://arxiv.org/abs/2212.14052, section 3): two state spaces between gates.

  K' = shift(K),   O = Q * diagonal(K' V^T)

The shift state space holds the last inputs of a channel, which makes it a convolution with as many
taps; its skip connection is the first of them. The diagonal one takes all products of a head's
key and value features through one filter (S4D, https://arxiv.org/abs/2206.11893), and queries read
the head's matrix of results, as in linear attention.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers.cache import Cache
from latentlab.layers.common import Context, Shared, heads_projection, output_projection
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float


@struct.dataclass
class H3State(Cache):
  """What H3 remembers: constant in the number of tokens.

  Attributes:
    shift: The last keys, oldest first.
    modes: Sums over tokens of products of keys and values, one for each real mode `X`.
  """

  shift: Float[Array, "*layers B W D"]
  modes: Float[Array, "*layers B N X H V"]


@dataclasses.dataclass(frozen=True)
class H3Config:
  """H3 as a token mixer.

  Attributes:
    num_heads: Heads `N`.
    head_dim: Query, key and value head size `H`.
    state_dim: Size of either state space: taps of the shift, real modes of the diagonal.
    min_step: Least step of the diagonal state space at first.
    max_step: Largest one.
    chunk_size: Tokens whose products are computed at once.
    positions: None; the state spaces have filters instead.
  """

  kind: ClassVar[str] = "h3"

  num_heads: int
  head_dim: int = 8
  state_dim: int = 64
  min_step: float = 1e-3
  max_step: float = 1e-1
  chunk_size: int = 128
  positions: PositionConfig = PositionConfig("none")

  def __post_init__(self):
    if self.state_dim < 2 or self.state_dim % 2:
      raise ValueError(
        f"state_dim={self.state_dim} of H3 counts pairs: make it even and at least 2"
      )
    if not 0 < self.min_step <= self.max_step:
      raise ValueError(f"H3's steps need 0 < min_step={self.min_step} <= max_step={self.max_step}")

  @property
  def num_params(self) -> int:
    """Of the module, at the width `num_heads * head_dim`."""
    width = self.num_heads * self.head_dim
    return 4 * width**2 + width * self.state_dim + self.num_heads * (2 * self.state_dim + 2)

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return H3(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> H3State:
    del max_length  # The state grows with nothing.
    width = self.num_heads * self.head_dim
    modes = (batch_size, self.num_heads, self.state_dim, self.head_dim, self.head_dim)
    return H3State(
      shift=jnp.zeros((batch_size, self.state_dim - 1, width), dtype),
      modes=jnp.zeros(modes, jnp.float32),
    )

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward flops of the projections, the shift, and products within and across chunks."""
    chunk = min(self.chunk_size, seq_length)
    width = self.num_heads * self.head_dim
    mixing = 4 * chunk * width
    if seq_length > chunk:
      mixing += 4 * self.state_dim * self.head_dim * width
    return 8 * embed_dim * width + 2 * self.state_dim * width + mixing


class H3(nn.Module):
  """H3.

  Attributes:
    config: What it computes.
    shared: What it shares with the other layers.
  """

  config: H3Config
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: H3State | None = None
  ) -> tuple[Float[Array, "B T D"], H3State | None]:
    c = self.config
    if context.allowed is not None or context.key_bias is not None:
      raise ValueError("H3 has no score matrix: it takes no `allowed` and no `key_bias`")
    documents = dict(lengths=context.lengths, segment_ids=context.segment_ids)
    q, k, v = (
      heads_projection(self.shared, c.num_heads, c.head_dim, name=f"{name}_proj")(x)
      for name in "qkv"
    )
    history = None if cache is None else cache.shift
    flat, history = ops.short_convolution(
      k.reshape(*k.shape[:2], -1), self._shift(), history=history, **documents
    )
    out, modes = ops.state_space_attention(
      q,
      flat.reshape(k.shape),
      v,
      self._modes(),
      self._vector("skip", nn.initializers.normal(1.0), ()),
      initial_state=None if cache is None else cache.modes,
      chunk_size=c.chunk_size,
      **documents,
    )
    out = nn.with_logical_constraint(
      out.astype(self.shared.dtype), ("act_batch", "act_length", "act_heads", None)
    )
    out = output_projection(self.shared)(out)
    return out, None if cache is None else H3State(shift=history, modes=modes)

  def _shift(self):
    """Taps as of a convolution, but for the first, which has the skip connection in it."""
    c = self.config

    def init(key, shape):
      bound, keys = 1 / math.sqrt(shape[0]), jax.random.split(key)
      taps = jax.random.uniform(keys[0], shape, minval=-bound, maxval=bound)
      return taps.at[0].add(jax.random.normal(keys[1], shape[1:]))

    shape = (c.state_dim, c.num_heads * c.head_dim)
    return self.param("shift", nn.with_logical_partitioning(init, (None, "heads")), shape)

  def _modes(self):
    """S4D-Lin: `a_m = -1/2 + i pi m`, steps spread evenly on a logarithmic scale."""
    c = self.config
    num_modes = c.state_dim // 2
    low, high = math.log(c.min_step), math.log(c.max_step)
    step = lambda key, shape: jax.random.uniform(key, shape, minval=low, maxval=high)
    angle = lambda _, shape: jnp.broadcast_to(math.pi * jnp.arange(num_modes), shape)
    weight = nn.initializers.normal(math.sqrt(0.5))  # Of a complex number: variance 1.
    return ops.discretise(
      self._vector("log_step", step, ()),
      jnp.exp(self._vector("log_decay", nn.initializers.constant(math.log(0.5)), (num_modes,))),
      self._vector("angle", angle, (num_modes,)),
      self._vector("real", weight, (num_modes,)),
      self._vector("imag", weight, (num_modes,)),
    )

  def _vector(self, name, init, shape):
    axes = ("heads", *[None] * len(shape))
    return self.param(
      name, nn.with_logical_partitioning(init, axes), (self.config.num_heads, *shape)
    )
