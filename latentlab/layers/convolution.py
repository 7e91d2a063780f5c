"""Convolutions of media tokenizers: causal ones over time with a state, residual ones over images.

A causal layer is handed its state, the inputs that its filters still reach, and hands on the next
one, so that a signal may be cut anywhere. What lies before a signal is zeros, in every layer.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.nn.initializers import Initializer

from latentlab import ops
from latentlab.layers.cache import Cache
from latentlab.typing import Array, Bool, DTypeLike, Float

KINDS = ("conv", "transposed", "block")

# As of a linear layer, without its dependence on how far the signal is from zero.
_KERNEL = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@struct.dataclass
class ConvState(Cache):
  """What a causal layer keeps of its inputs.

  Attributes:
    history: The last inputs, oldest first, that outputs to come depend on. Where a stride did not
      divide what was put in, those that wait for more are among them.
  """

  history: Float[Array, "B W C"]

  def reset(self, rows: Bool[Array, " B"]) -> "ConvState":
    """Zeros, as before a signal, where `rows` is true."""
    return ConvState(jnp.where(rows[:, None, None], 0, self.history))


@dataclasses.dataclass(frozen=True)
class CausalLayer:
  """One layer of a causal stack.

  Attributes:
    name: Of its parameters.
    kind: `conv`, a convolution; `transposed`, its transpose, which makes `stride` outputs of an
      input; `block`, a residual ConvNeXt block.
    in_features: Channels of its input.
    features: Channels of its output.
    kernel_size: Taps.
    stride: Inputs an output, or outputs an input.
  """

  name: str
  kind: str
  in_features: int
  features: int
  kernel_size: int
  stride: int = 1

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"unknown kind={self.kind!r} of a causal layer; choose one of {KINDS}")
    if self.kernel_size < self.stride:
      raise ValueError(
        f"kernel_size={self.kernel_size} of {self.name!r} leaves inputs out at stride={self.stride}"
      )
    if self.kind == "block" and (self.features != self.in_features or self.stride != 1):
      raise ValueError(f"a block keeps its input's channels and length, got {self}")

  @property
  def reach(self) -> int:
    """Inputs before a chunk that its outputs depend on."""
    if self.kind == "transposed":
      return -(-self.kernel_size // self.stride) - 1
    return self.kernel_size - self.stride

  def init_state(self, batch_size: int, dtype: DTypeLike) -> ConvState:
    """The state before a signal."""
    return ConvState(jnp.zeros((batch_size, self.reach, self.in_features), dtype))

  def flops(self, num_inputs: int) -> float:
    """Matmul flops of a forward pass over so many inputs."""
    if self.kind == "block":
      return num_inputs * self.features * (16 * self.features + 2 * self.kernel_size)
    each = 2 * self.kernel_size * self.in_features * self.features
    return each * (num_inputs / self.stride if self.kind == "conv" else num_inputs)


@dataclasses.dataclass(frozen=True)
class ConvShared:
  """What all layers of a causal stack have in common.

  Attributes:
    dtype: Of activations; parameters are float32.
    init_std: Standard deviation of kernels; by their fan-in if 0.
    layer_scale: What the branches of blocks are multiplied by at first.
    norm_eps: Of the blocks' norms.
  """

  dtype: DTypeLike = jnp.float32
  init_std: float = 0.01
  layer_scale: float = 1e-6
  norm_eps: float = 1e-5

  @property
  def kernel_init(self) -> Initializer:
    return nn.initializers.normal(self.init_std) if self.init_std else _KERNEL


class CausalStack(nn.Module):
  """Causal layers, one after another.

  Attributes:
    layers: What it runs.
    shared: What they have in common.
  """

  layers: tuple[CausalLayer, ...]
  shared: ConvShared

  def setup(self):
    for layer in self.layers:
      setattr(self, layer.name, _MODULES[layer.kind](layer, self.shared))

  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B S D"]:
    """A whole signal's outputs."""
    return self.step(x, init_states(self.layers, x.shape[0], self.shared.dtype))[0]

  def step(
    self, x: Float[Array, "B T C"], states: tuple[ConvState, ...]
  ) -> tuple[Float[Array, "B S D"], tuple[ConvState, ...]]:
    """The outputs that a chunk completes, after those that `states` have seen."""
    x = x.astype(self.shared.dtype)
    after = []
    for layer, state in zip(self.layers, states, strict=True):
      x, state = getattr(self, layer.name)(x, state)
      after.append(state)
    return x.astype(jnp.float32), tuple(after)


def init_states(
  layers: tuple[CausalLayer, ...], batch_size: int, dtype: DTypeLike
) -> tuple[ConvState, ...]:
  """The states of layers before a signal."""
  return tuple(layer.init_state(batch_size, dtype) for layer in layers)


class CausalConv(nn.Module):
  """A convolution whose last tap meets the newest input.

  Attributes:
    layer: Its sizes.
    shared: What it shares with the other layers.
  """

  layer: CausalLayer
  shared: ConvShared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T C"], state: ConvState
  ) -> tuple[Float[Array, "B S D"], ConvState]:
    c = self.layer
    inputs = jnp.concatenate([state.history.astype(x.dtype), x], axis=1)
    num_outputs = max(0, (inputs.shape[1] - c.kernel_size) // c.stride + 1)
    conv = nn.Conv(
      c.features,
      (c.kernel_size,),
      (c.stride,),
      padding="VALID",
      dtype=self.shared.dtype,
      kernel_init=self.shared.kernel_init,
      name="conv",
    )
    if num_outputs:
      y = conv(inputs)
    else:  # All of the chunk waits for more.
      y = jnp.zeros((x.shape[0], 0, c.features), self.shared.dtype)
    return y, ConvState(inputs[:, num_outputs * c.stride :])


class CausalTransposedConv(nn.Module):
  """A transposed convolution, trimmed on the right: an input makes no output before its time.

  Attributes:
    layer: Its sizes.
    shared: What it shares with the other layers.
  """

  layer: CausalLayer
  shared: ConvShared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T C"], state: ConvState
  ) -> tuple[Float[Array, "B S D"], ConvState]:
    c = self.layer
    inputs = jnp.concatenate([state.history.astype(x.dtype), x], axis=1)
    y = nn.ConvTranspose(
      c.features,
      (c.kernel_size,),
      (c.stride,),
      padding="VALID",
      dtype=self.shared.dtype,
      kernel_init=self.shared.kernel_init,
      name="conv",
    )(inputs)
    begin = c.reach * c.stride
    return y[:, begin : begin + x.shape[1] * c.stride], ConvState(inputs[:, x.shape[1] :])


class ConvNeXtBlock(nn.Module):
  """`x + a conv(norm(x))`, then `x + b mlp(norm(x))`: one filter a channel, then the channels.

  Attributes:
    layer: Its sizes.
    shared: What it shares with the other layers.
  """

  layer: CausalLayer
  shared: ConvShared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T C"], state: ConvState
  ) -> tuple[Float[Array, "B T C"], ConvState]:
    c, shared = self.layer, self.shared
    shape = (c.kernel_size, c.features)
    kernel = self.param("mixer_kernel", _filter_init(shared), shape)
    bias = self.param("mixer_bias", nn.initializers.zeros_init(), shape[1:])
    y = self._norm("mixer_norm")(x)
    y, history = ops.short_convolution(y, kernel, history=state.history)
    x = x + self._scale("mixer_scale") * (y + bias.astype(y.dtype))
    y = self._norm("feed_forward_norm")(x)
    y = nn.gelu(self._dense(4 * c.features, ("embed", "mlp"), "in_proj")(y), approximate=False)
    y = self._dense(c.features, ("mlp", "embed"), "out_proj")(y)
    return x + self._scale("feed_forward_scale") * y, ConvState(history)

  def _norm(self, name: str) -> nn.Module:
    return nn.RMSNorm(epsilon=self.shared.norm_eps, dtype=self.shared.dtype, name=name)

  def _scale(self, name: str) -> Float[Array, " C"]:
    init = nn.initializers.constant(self.shared.layer_scale)
    return self.param(name, init, (self.layer.features,)).astype(self.shared.dtype)

  def _dense(self, features: int, axes: tuple[str, str], name: str) -> nn.Module:
    init = nn.with_logical_partitioning(self.shared.kernel_init, axes)
    return nn.Dense(features, dtype=self.shared.dtype, kernel_init=init, name=name)


_MODULES = {"conv": CausalConv, "transposed": CausalTransposedConv, "block": ConvNeXtBlock}


def _filter_init(shared: ConvShared) -> Initializer:
  """Of filters of one channel each, whose fan-in is their taps."""
  if shared.init_std:
    return nn.initializers.normal(shared.init_std)
  return lambda key, shape, dtype=jnp.float32: (
    jax.random.normal(key, shape, dtype) / math.sqrt(shape[0])
  )


class ResidualBlock2D(nn.Module):
  """`x + conv(silu(norm(conv(silu(norm(x))))))` over an image.

  Attributes:
    features: Channels of the output; another number than the input's makes the shortcut a matrix.
    dtype: Of activations.
  """

  features: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
    y = x
    for i in range(2):
      y = nn.silu(group_norm(y.shape[-1], self.dtype, f"norm_{i}")(y))
      y = nn.Conv(self.features, (3, 3), dtype=self.dtype, name=f"conv_{i}")(y)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="shortcut")(x)
    return x + y


def group_norm(features: int, dtype: DTypeLike, name: str) -> nn.Module:
  """A group norm of 32 groups, or of as many as divide the channels."""
  return nn.GroupNorm(num_groups=math.gcd(32, features), epsilon=1e-6, dtype=dtype, name=name)
