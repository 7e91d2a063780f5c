"""DiT (https://arxiv.org/abs/2212.09748), LatentLM's twin: it denoises all latents at once.

The baseline of https://arxiv.org/abs/2412.08635: the same latents, schedule, solvers and guidance,
but full attention over all of them, one timestep for the whole image, and the class beside the
timestep in every layer's modulation. Details are those of LatentLM's release.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from latentlab import ops
from latentlab.layers import Attention, AttentionConfig, Context, PositionConfig, Shared
from latentlab.layers import initializers as initializers_lib
from latentlab.layers.decoder import REMAT_POLICIES
from latentlab.layers.diffusion_head import (
  TIME_FEATURES,
  Diffusion,
  FinalLayer,
  LatentProjection,
  TimeEmbedding,
  modulation,
  solve,
  solver_times,
)
from latentlab.layers.feed_forward import FeedForward, FeedForwardConfig, ratio_width
from latentlab.layers.latent_heads import SolverSettings, rms
from latentlab.typing import Array, DTypeLike, Float, Int, Key, Params
from pallas_kernels.common import target_platform

PRESETS = {
  "base": dict(num_layers=12, embed_dim=768, num_heads=12),
  "medium": dict(num_layers=24, embed_dim=1024, num_heads=16),
  "large": dict(num_layers=24, embed_dim=1536, num_heads=12),
  "xl": dict(num_layers=24, embed_dim=2048, num_heads=16),
  "3b": dict(num_layers=32, embed_dim=2560, num_heads=20),
  "7b": dict(num_layers=32, embed_dim=4096, num_heads=32),
  "13b": dict(num_layers=40, embed_dim=5120, num_heads=40),
}
"""Sizes of the release; each has as many parameters as LatentLM's preset of the same name."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """A diffusion transformer over a grid of latents.

  Attributes:
    num_layers: Blocks.
    embed_dim: Width `D`.
    num_heads: Query heads.
    dim: Channels `Z` of a latent.
    grid: Rows and columns of latents; `(1, n)` for a sequence, whose positions are then 1-D.
    num_classes: Classes; a further one stands for none.
    num_kv_heads: Key and value heads; as many as query heads if `None`.
    mlp_ratio: Width of feed-forward layers, by `ratio_width`.
    class_dropout: Share of images whose class is left out in training.
    diffusion: What it predicts, at which noise.
    input_bias: Whether the map from latents has a bias, as the release's does on images.
    dtype: Of activations; parameters are float32.
    init: A name of `initializers.SCHEMES`; the release's is `linear`.
    remat: What the backward pass keeps of a block, a name of `decoder.REMAT_POLICIES`.
    unroll: Blocks unrolled in one step of the scan; all on a CPU and one elsewhere if `None`.
  """

  num_layers: int
  embed_dim: int
  num_heads: int
  dim: int
  grid: tuple[int, int]
  num_classes: int
  num_kv_heads: int | None = None
  mlp_ratio: float = 4.0
  class_dropout: float = 0.1
  diffusion: Diffusion = Diffusion()
  input_bias: bool = False
  dtype: DTypeLike = jnp.float32
  init: str = "linear"
  remat: str = "none"
  unroll: int | None = None

  def __post_init__(self):
    for name in ("num_layers", "num_heads", "dim", "num_classes"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} of a DiT must be positive")
    features = 2 if self.grid[0] == 1 else 4
    if self.embed_dim % self.num_heads or self.embed_dim % features:
      raise ValueError(
        f"embed_dim={self.embed_dim} must be a multiple of num_heads={self.num_heads}, and of "
        f"{features} for the sines and cosines of positions on a grid {self.grid}"
      )
    if min(self.grid) < 1:
      raise ValueError(f"grid={self.grid} of latents must have rows and columns")
    if not 0 <= self.class_dropout < 1:
      raise ValueError(f"class_dropout={self.class_dropout} is not in [0, 1)")
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"unknown remat={self.remat!r}; choose one of {sorted(REMAT_POLICIES)}")
    _ = self.attention  # Raises where heads do not divide.

  @property
  def num_latents(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def attention(self) -> AttentionConfig:
    return AttentionConfig(
      num_heads=self.num_heads,
      head_dim=self.embed_dim // self.num_heads,
      num_kv_heads=self.num_kv_heads,
      positions=PositionConfig("none"),
      mask=ops.Mask("full"),
    )

  @property
  def feed_forward(self) -> FeedForwardConfig:
    return FeedForwardConfig(ratio_width(self.embed_dim, self.mlp_ratio), "swiglu")

  @property
  def shared(self) -> Shared:
    sizes = dict(num_layers=self.num_layers, embed_dim=self.embed_dim)
    return Shared(self.embed_dim, self.dtype, initializers_lib.make(self.init, **sizes))

  @property
  def num_params(self) -> int:
    h, kv = self.embed_dim, self.attention.kv_heads * self.attention.head_dim
    block = 2 * h**2 + 2 * h * kv + 3 * h * self.feed_forward.mlp_dim + 6 * h**2
    ends = 2 * h * self.dim + 2 * h**2 + h * self.input_bias
    embeddings = TIME_FEATURES * h + h**2 + (self.num_classes + 1) * h
    return self.num_layers * block + ends + embeddings

  @property
  def flops_per_latent(self) -> float:
    """Forward matmul flops of one evaluation, modulations left out: they are made once an image."""
    h, kv = self.embed_dim, self.attention.kv_heads * self.attention.head_dim
    block = 2 * h**2 + 2 * h * kv + 3 * h * self.feed_forward.mlp_dim
    # Scores and what they weigh, over all latents.
    block += 2 * h * self.num_latents
    return 2 * (self.num_layers * block + 2 * h * self.dim)


def preset(name: str, **fields: object) -> DiTConfig:
  """A config of the release's sizes; `fields` beside them.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in PRESETS:
    raise ValueError(f"unknown preset {name=}; choose one of {sorted(PRESETS)}")
  return DiTConfig(**PRESETS[name] | fields)


class DiT(nn.Module):
  """The model.

  Attributes:
    config: What it is made of.
  """

  config: DiTConfig

  def setup(self):
    c, s = self.config, self.config.shared
    self.latent_proj = LatentProjection(s, c.input_bias)
    self.time = TimeEmbedding(s)
    table = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
    self.classes = self.param("classes", table, (c.num_classes + 1, c.embed_dim))
    block = Block
    unroll = c.unroll or (c.num_layers if target_platform() == "cpu" else 1)
    unroll = min(unroll, c.num_layers)
    if c.remat != "none":
      looped = unroll < c.num_layers
      block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=not looped)
    self.blocks = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=c.num_layers,
      unroll=unroll,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, s)
    self.final = FinalLayer(s, c.dim)

  def __call__(
    self,
    noisy: Float[Array, "B T Z"],
    t: Float[Array, " B"] | Int[Array, " B"],
    labels: Int[Array, " B"],
  ) -> Float[Array, "B T Z"]:
    """The prediction at `x^t`, float32; one timestep for each image.

    Args:
      noisy: Latents in raster order.
      t: Timesteps.
      labels: Classes; the null class for any other number, such as -1.
    """
    return self.predict(noisy, self.condition(labels) + self.time(t))

  def condition(self, labels: Int[Array, " B"]) -> Float[Array, "B D"]:
    """Embeddings of classes."""
    c = self.config
    known = (labels >= 0) & (labels < c.num_classes)
    table = nn.with_logical_constraint(self.classes, ("vocab", None))
    return jnp.take(table, jnp.where(known, labels, c.num_classes), axis=0).astype(c.dtype)

  def predict(
    self, noisy: Float[Array, "B T Z"], condition: Float[Array, "B D"]
  ) -> Float[Array, "B T Z"]:
    """The prediction, given the sum of class and time embeddings."""
    c = self.config
    if noisy.shape[1] != c.num_latents:
      raise ValueError(f"{noisy.shape=} has not the {c.num_latents} latents of grid={c.grid}")
    x = self.latent_proj(noisy) + jnp.asarray(grid_positions(c.grid, c.embed_dim), c.dtype)
    x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
    activated = nn.silu(condition)[:, None]
    places = Context(jnp.arange(c.num_latents, dtype=jnp.int32)[None], in_place=True)
    x, _ = self.blocks(x, activated, places)
    return self.final(x, activated).astype(jnp.float32)

  def losses(
    self, latents: Float[Array, "B T Z"], labels: Int[Array, " B"], key: Key[Array, ""]
  ) -> Float[Array, " B"]:
    """Squared errors of each image at one timestep, with its class or, now and then, without."""
    c = self.config
    t_key, noise_key, drop_key = jax.random.split(key, 3)
    t = c.diffusion.timesteps(t_key, latents.shape[:1])
    noise = jax.random.normal(noise_key, latents.shape)
    dropped = jax.random.bernoulli(drop_key, c.class_dropout, labels.shape)
    return self.losses_at(latents, jnp.where(dropped, -1, labels), t, noise)

  def losses_at(
    self,
    latents: Float[Array, "B T Z"],
    labels: Int[Array, " B"],
    t: Int[Array, " B"],
    noise: Float[Array, "B T Z"],
  ) -> Float[Array, " B"]:
    """As `losses`, at timesteps and noises of the caller's; no class is left out."""
    each = jnp.broadcast_to(t[:, None], latents.shape[:2])
    noisy, target, weights = self.config.diffusion.noisy(latents.astype(jnp.float32), noise, each)
    errors = jnp.square(self(noisy, t, labels) - target).mean(-1)
    return (errors if weights is None else errors * weights).mean(-1)

  def draw(
    self,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    settings: SolverSettings,
    *,
    guided: bool,
  ) -> Float[Array, "B T Z"]:
    """Latents of images, float32; a row depends on no other row.

    Args:
      labels: Classes; -1 for none.
      keys: One for each row.
      settings: The solver, and the guidance.
      guided: Whether guidance is on, which runs every image twice.

    Raises:
      ValueError: guidance is linear in the share of latents drawn, which are drawn at once here.
    """
    c = self.config
    scale = settings.scale(None) if guided else None
    condition = self.condition(jnp.concatenate([labels, 0 * labels - 1]) if guided else labels)
    model, variables = self.unbind()
    network = lambda x, time: model.apply(variables, x, condition + time, method="predict")
    times = self.time(solver_times(c.diffusion, settings))
    return solve(c.diffusion, network, times, (c.num_latents, c.dim), keys, settings, scale)


class Block(nn.Module):
  """Attention, then a feed-forward, each modulated and gated; the identity at first.

  Attributes:
    config: The model.
    shared: What it shares with the other blocks.
  """

  config: DiTConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], condition: Float[Array, "B 1 D"], places: Context
  ) -> tuple[Float[Array, "B T D"], None]:
    c, s = self.config, self.shared
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = jnp.moveaxis(
      modulation(6, s)(condition), -2, 0
    )
    y, _ = Attention(c.attention, s, name="attention")(rms(x) * (1 + scale_a) + shift_a, places)
    x = x + gate_a * y
    y = FeedForward(c.feed_forward, s, name="feed_forward")(rms(x) * (1 + scale_f) + shift_f)
    x = x + gate_f * y
    return nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed")), None


def grid_positions(grid: tuple[int, int], embed_dim: int) -> Float[np.ndarray, "latents D"]:
  """Fixed embeddings of a grid's places in raster order, in float64.

  Sines, then cosines, of the column in the first half of the features and of the row in the second;
  of the column in all of them where there is one row.
  """
  rows, columns = grid

  def encode(places, features):
    angles = places[:, None] * 10_000.0 ** -(np.arange(features // 2) / (features // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  column, row = np.tile(np.arange(columns), rows), np.repeat(np.arange(rows), columns)
  if rows == 1:
    return encode(column, embed_dim)
  return np.concatenate([encode(column, embed_dim // 2), encode(row, embed_dim // 2)], axis=1)


@functools.partial(jax.jit, static_argnames=("config", "guided"))
def _draw(config, params, labels, keys, settings, *, guided):
  return DiT(config).apply({"params": params}, labels, keys, settings, guided=guided, method="draw")


def generate(
  config: DiTConfig,
  params: Params,
  labels: Int[Array, " B"],
  *,
  key: Key[Array, ""] | Key[Array, " B"],
  settings: SolverSettings | None = None,
  guided: bool | None = None,
) -> Float[Array, "B T Z"]:
  """Draws images' latents in one compiled program.

  Args:
    config: The model.
    params: Its parameters.
    labels: Classes; -1 for none.
    key: A key that rows are counted into, or one for each row.
    settings: How latents are drawn; those of `SolverSettings()` if `None`.
    guided: Whether guidance runs its second half; if `None`, where `settings.guidance` is not 1.
  """
  settings = SolverSettings() if settings is None else settings
  if guided is None:
    guided = not isinstance(settings.guidance, (int, float)) or settings.guidance != 1
  if key.ndim == 0:
    key = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(labels)))
  return _draw(config, params, labels, key, settings, guided=guided)
