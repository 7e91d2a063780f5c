"""RWKV's time mixing (version 4; https://arxiv.org/abs/2305.13048, section 3.1, eqs. 11 to 17)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers.cache import Cache
from latentlab.layers.common import Context, Projection, Shared
from latentlab.layers.positions import PositionConfig
from latentlab.typing import Array, DTypeLike, Float


@struct.dataclass
class RwkvState(Cache):
  """What time mixing remembers: constant in the number of tokens.

  Attributes:
    last: The layer's last input.
    wkv: The two sums over values.
  """

  last: Float[Array, "*layers B 1 D"]
  wkv: ops.WkvState


@dataclasses.dataclass(frozen=True)
class RwkvConfig:
  """RWKV's time mixing as a token mixer.

  Attributes:
    embed_dim: Width `D` of its input, and of keys, values and receptances.
    num_layers: Layers of the decoder, over which the initial decays and mixes range.
    positions: None; time mixing has a decay instead.
  """

  kind: ClassVar[str] = "rwkv"

  embed_dim: int
  num_layers: int
  positions: PositionConfig = PositionConfig("none")

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    return TimeMix(config=self, shared=shared, name=name)

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> RwkvState:
    del max_length  # The state grows with nothing.
    last = jnp.zeros((batch_size, 1, self.embed_dim), dtype)
    return RwkvState(last=last, wkv=ops.WkvState.empty(batch_size, self.embed_dim))

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Forward matmul flops: four projections; the average of values has none."""
    del seq_length
    return 2 * 4 * embed_dim**2


class TimeMix(nn.Module):
  """RWKV's time mixing.

  Attributes:
    config: What it computes.
    shared: What it shares with the other layers.
  """

  config: RwkvConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: RwkvState | None = None
  ) -> tuple[Float[Array, "B T D"], RwkvState | None]:
    c, shared = self.config, self.shared
    if context.allowed is not None or context.key_bias is not None:
      raise ValueError("RWKV has no score matrix: it takes no `allowed` and no `key_bias`")
    if x.shape[-1] != c.embed_dim:
      raise ValueError(f"RwkvConfig.embed_dim={c.embed_dim} must be the decoder's {x.shape[-1]}")
    documents = dict(lengths=context.lengths, segment_ids=context.segment_ids)

    def mixed(name):
      # `mix x_t + (1 - mix) x_{t-1}` is a convolution of two taps.
      mix = self._vector(f"{name}_mix", "embed", context.layer)
      taps = jnp.stack([mix, 1 - mix]).astype(x.dtype)
      history = None if cache is None else cache.last
      y, last = ops.short_convolution(x, taps, history=history, **documents)
      return self._dense(f"{name}_proj", ("embed", "heads"), shared.init.mixer_in)(y), last

    (r, _), (k, _), (v, last) = (mixed(name) for name in "rkv")
    decay = jnp.exp(self._vector("log_decay", "heads", context.layer))
    bonus = self._vector("bonus", "heads", context.layer)
    state = None if cache is None else cache.wkv
    out, state = ops.wkv(decay, bonus, k, v, initial_state=state, **documents)
    out = nn.with_logical_constraint(nn.sigmoid(r) * out, ("act_batch", "act_length", "act_heads"))
    out = self._dense("out_proj", ("heads", "embed"), shared.init.mixer_out)(out)
    return out, None if cache is None else RwkvState(last=last, wkv=state)

  def _dense(self, name, axes, initializer):
    return Projection((self.config.embed_dim,), axes, initializer, self.shared.dtype, name=name)

  def _vector(self, name, axis, layer):
    """A parameter per channel; what it is at first depends on the channel and on the depth."""
    c = self.config

    def init(key):
      del key
      channel = jnp.arange(c.embed_dim, dtype=jnp.float32)
      return _initial(name, channel, c.embed_dim, layer, c.num_layers)

    return self.param(name, nn.with_logical_partitioning(init, (axis,)))


def _initial(name, channel, channels, layer, num_layers):
  """The original release's initial values; `layer` may be traced."""
  up, down = layer / max(num_layers - 1, 1), 1 - layer / num_layers  # 0 to 1, 1 to almost 0.
  if name == "log_decay":
    return -5 + 8 * (channel / max(channels - 1, 1)) ** (0.7 + 1.3 * up)
  if name == "bonus":
    return jnp.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
  place = channel / channels
  return {"k_mix": place**down, "v_mix": place**down + 0.3 * up, "r_mix": place ** (0.5 * down)}[
    name
  ]
