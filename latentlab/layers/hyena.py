"""Hyena (https://arxiv.org/abs/2302.10866, section 3): long filters between gates.

Of `order + 1` projections of the input, each through a short filter, the last is gated by one of
the others and convolved with a filter as long as the sequence, `order - 1` times over; the first
is the last gate. At order 2 that is

  y_t = x0_t * (bias u_t + sum_{s<=t} filter_{t-s} u_s),   u = x1 * v.

Filters are a network's function of the distance, times a window that decays at a rate of its own
in every channel (section 3.3). The order counts as the original release does: its convolutions,
the short one included. Decoding keeps the `u` of all tokens: O(N) a token.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers.cache import Cache
from latentlab.layers.common import Context, Projection, Shared
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float, Int


@struct.dataclass
class HyenaState(Cache):
  """What Hyena remembers: all that its long filters have taken in.

  Attributes:
    short: The short filter's last inputs, oldest first.
    inputs: Those of the long filters, one after another along the channels, at slots by age.
    lengths: Tokens held per row.
  """

  short: Float[Array, "*layers B W P"]
  inputs: Float[Array, "*layers B S C"]
  lengths: Int[Array, "*layers B"]

  def grow(self, max_length: int) -> "HyenaState":
    """Adds empty slots up to `max_length`.

    Raises:
      ValueError: the cache is larger already.
    """
    axis = self.inputs.ndim - 2
    extra = max_length - self.inputs.shape[axis]
    if extra < 0:
      raise ValueError(
        f"a cache of {self.inputs.shape[axis]} slots cannot be cut down to {max_length=}"
      )
    widths = [(0, extra if i == axis else 0) for i in range(self.inputs.ndim)]
    return dataclasses.replace(self, inputs=jnp.pad(self.inputs, widths))


@dataclasses.dataclass(frozen=True)
class HyenaConfig:
  """Hyena as a token mixer.

  Attributes:
    embed_dim: Width `D` of its input and of all projections.
    filter_length: Tokens over which the window is defined, those of training; filters go on beyond.
    order: Gates, and one more than there are long filters.
    short_taps: Taps of the short filters.
    filter_dim: Width of the network that makes the filters.
    filter_layers: Its hidden layers behind the first.
    filter_features: Of a distance: itself, and as many cosines as sines.
    filter_frequency: What the network's sines have as a factor at first.
    fast_decay: Part of `filter_length` after which the fastest window has fallen to 1 %.
    slow_decay: The same of the slowest.
    method: `fft`, or `direct`, a sweep for each tap, which is quadratic but causal to the bit.
    positions: None; filters tell distances.
  """

  kind: ClassVar[str] = "hyena"

  embed_dim: int
  filter_length: int
  order: int = 2
  short_taps: int = 3
  filter_dim: int = 64
  filter_layers: int = 2
  filter_features: int = 33
  filter_frequency: float = 10.0
  fast_decay: float = 0.3
  slow_decay: float = 1.5
  method: str = "fft"
  positions: PositionConfig = PositionConfig("none")

  def __post_init__(self):
    if self.order < 2 or self.short_taps < 1 or self.filter_length < 2:
      raise ValueError(
        f"Hyena has order={self.order} >= 2, short_taps={self.short_taps} >= 1 and "
        f"filter_length={self.filter_length} >= 2"
      )
    if self.filter_features < 3 or self.filter_features % 2 == 0:
      raise ValueError(f"filter_features={self.filter_features} of Hyena must be odd, 3 at least")
    if self.method not in ("fft", "direct"):
      raise ValueError(f"unknown method={self.method!r} of Hyena; choose 'fft' or 'direct'")

  @property
  def num_params(self) -> int:
    """Of the module."""
    width, hidden, long = self.embed_dim, self.filter_dim, (self.order - 1) * self.embed_dim
    network = (self.filter_features + 1) * hidden + self.filter_layers * (hidden + 1) * hidden
    network += hidden + hidden * long  # The sines' factors, and the last layer.
    projections = (self.order + 2) * width**2 + (self.order + 1) * width * (self.short_taps + 1)
    return projections + network + long

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return Hyena(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> HyenaState:
    width = self.embed_dim
    return HyenaState(
      short=jnp.zeros((batch_size, self.short_taps - 1, (self.order + 1) * width), dtype),
      inputs=jnp.zeros((batch_size, max_length, (self.order - 1) * width), dtype),
      lengths=jnp.zeros((batch_size,), jnp.int32),
    )

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward flops of projections and filters; of a transform of `n` points, `2.5 n log2(n)`."""
    width, projected = self.embed_dim, (self.order + 1) * self.embed_dim
    short = 2 * self.short_taps * projected
    transforms = 3 * 2 * 2.5 * math.log2(2 * seq_length) * (self.order - 1) * width
    return 2 * embed_dim * (projected + width) + short + transforms


class Hyena(nn.Module):
  """Hyena.

  Attributes:
    config: What it computes.
    shared: What it shares with the other layers.
  """

  config: HyenaConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: HyenaState | None = None
  ) -> tuple[Float[Array, "B T D"], HyenaState | None]:
    c, shared = self.config, self.shared
    if context.allowed is not None or context.key_bias is not None:
      raise ValueError("Hyena has no score matrix: it takes no `allowed` and no `key_bias`")
    if x.shape[-1] != c.embed_dim:
      raise ValueError(f"HyenaConfig.embed_dim={c.embed_dim} must be the decoder's {x.shape[-1]}")
    projected = (c.order + 1) * c.embed_dim
    dense = Projection(
      (projected,), ("embed", "heads"), shared.init.mixer_in, shared.dtype, name="in_proj"
    )
    z, short = ops.short_convolution(
      dense(x),
      self._param("short_filter", _uniform, (c.short_taps, projected)),
      history=None if cache is None else cache.short,
      lengths=context.lengths,
      segment_ids=context.segment_ids,
    )
    z += self._param("short_bias", nn.initializers.zeros, (projected,)).astype(z.dtype)
    *gates, v = jnp.split(z, c.order + 1, axis=-1)

    num_long = c.order - 1
    size = x.shape[1] if cache is None else cache.inputs.shape[1]
    filters = jnp.split(self._filters(size), num_long, axis=-1)
    biases = self._param("bias", nn.initializers.normal(1.0), (num_long * c.embed_dim,))
    biases = jnp.split(biases.astype(z.dtype), num_long)
    kept = [None] * num_long if cache is None else jnp.split(cache.inputs, num_long, axis=-1)
    for i, gate in enumerate(reversed(gates[1:])):
      u = gate * v
      v, kept[i] = self._long(u, filters[i], context, cache, kept[i])
      v = v + biases[i] * u
    out = nn.with_logical_constraint(gates[0] * v, ("act_batch", "act_length", "act_heads"))
    dense = Projection(
      (c.embed_dim,), ("heads", "embed"), shared.init.mixer_out, shared.dtype, name="out_proj"
    )
    if cache is not None:
      added = x.shape[1] if context.lengths is None else context.lengths
      cache = HyenaState(short, jnp.concatenate(kept, axis=-1), cache.lengths + added)
      # Shapes cannot say that a row is full, and a token dropped in silence would go unnoticed.
      out = jnp.where((cache.lengths > size)[:, None, None], jnp.nan, out)
    return dense(out), cache

  def _long(self, u, taps, context, cache, inputs):
    """A long filter over this pass, or over it and what the cache holds; and the latter."""
    if cache is None:
      if self.config.method == "direct":
        return ops.short_convolution(u, taps, segment_ids=context.segment_ids)[0], None
      return ops.long_convolution(u, taps, segment_ids=context.segment_ids), None
    (batch_size, length), size = u.shape[:2], inputs.shape[1]
    slots = cache.lengths[:, None] + jnp.arange(length)
    written = slots
    if context.valid is not None:  # A padded token goes past the end, where mode="drop" loses it.
      written = jnp.where(context.valid, slots, size)
    rows = jnp.arange(batch_size)[:, None]
    inputs = inputs.at[rows, written].set(u.astype(inputs.dtype), mode="drop")
    if length == 1:
      age = slots - jnp.arange(size)
      seen = jnp.where((age >= 0)[..., None], taps[jnp.maximum(age, 0)], 0)
      v = jnp.einsum("BSC,BSC->BC", seen, inputs, preferred_element_type=jnp.float32)
      return v[:, None].astype(u.dtype), inputs
    if self.config.method == "direct":
      v, _ = ops.short_convolution(inputs, taps)
    else:
      v = ops.long_convolution(inputs, taps)
    return v[rows, jnp.minimum(slots, size - 1)], inputs

  def _filters(self, length: int) -> Float[Array, "T C"]:
    """The taps of all long filters, in float32."""
    c = self.config
    distance = jnp.arange(length, dtype=jnp.float32)[:, None]
    bands = (c.filter_features - 1) // 2
    # Frequencies count whole turns over `filter_length`, the lowest next to none.
    angle = 2 * math.pi / c.filter_length * distance * np.linspace(1e-4, bands - 1, bands)
    part = distance / (c.filter_length - 1)
    h = jnp.concatenate([part, jnp.cos(angle), -jnp.sin(angle)], axis=-1).astype(jnp.float32)
    frequency = self._param(
      "filter_frequency", nn.initializers.constant(c.filter_frequency), (c.filter_dim,), axis=None
    )
    for i in range(1 + c.filter_layers):
      kernel = self._param(f"filter_{i}", _uniform, (h.shape[-1], c.filter_dim), axis=None)
      bias = self._param(f"filter_bias_{i}", nn.initializers.zeros, (c.filter_dim,), axis=None)
      h = jnp.sin(frequency * (h @ kernel + bias))
    channels = (c.order - 1) * c.embed_dim
    h = h @ self._param("filter_out", _uniform, (c.filter_dim, channels))
    slow, fast = (math.log(100) / decay for decay in (c.slow_decay, c.fast_decay))
    return h * jnp.exp(-part * np.linspace(slow, fast, channels, dtype=np.float32))

  def _param(self, name, init, shape, axis="heads"):
    axes = (*[None] * (len(shape) - 1), axis)
    return self.param(name, nn.with_logical_partitioning(init, axes), shape)


# U(+-1/sqrt(n)) with n rows: of a linear layer and of a filter alike.
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
