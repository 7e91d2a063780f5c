"""The image tokenizer of LatentLM's release: a BEiT-3 encoder and a ViT decoder, with biases.

https://arxiv.org/abs/2412.08635; microsoft/unilm, `LatentLM/tokenizer_models`. Both see all patches
and one more place, whose output is dropped. BEiT-3 (https://arxiv.org/abs/2208.10442) norms once
more inside of each branch, before its last matrix (Sub-LayerNorm, https://arxiv.org/abs/2210.06423).
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers import initializers
from latentlab.models.tokenizer_bodies import PatchBody, Patches
from latentlab.typing import Array, DTypeLike, Float
from pallas_kernels.common import target_platform

ENCODERS = ("beit3", "vit")


@dataclasses.dataclass(frozen=True)
class BeitBody(PatchBody):
  """Patches through BEiT-3, or through a ViT, and latents through a ViT.

  Attributes:
    encoder_kind: `beit3` or `vit`.
    layers: Layers of the encoder and of the decoder.
    embed_dim: Width.
    num_heads: Heads.
    mlp_dim: Of the feed-forwards.
    init: Scheme of initialisation.
    dtype: Of activations.
  """

  encoder_kind: str
  layers: tuple[int, int]
  embed_dim: int
  num_heads: int
  mlp_dim: int
  init: str = "normal"
  dtype: DTypeLike = jnp.float32

  def __post_init__(self):
    if self.encoder_kind not in ENCODERS:
      raise ValueError(f"unknown encoder_kind={self.encoder_kind!r}; choose one of {ENCODERS}")
    if min(*self.layers, self.num_heads, self.mlp_dim) < 1:
      raise ValueError(
        f"layers={self.layers}, num_heads={self.num_heads} and mlp_dim={self.mlp_dim} must be "
        "positive"
      )
    if self.embed_dim % self.num_heads:
      raise ValueError(f"embed_dim={self.embed_dim} is no multiple of num_heads={self.num_heads}")

  def initializers(self, layers: int) -> initializers.Initializers:
    """Those of a stack of so many layers."""
    return initializers.make(self.init, num_layers=layers, embed_dim=self.embed_dim)

  def encoder(self, features: int) -> nn.Module:
    return BeitEncoder(self, features)

  def decoder(self, dim: int) -> nn.Module:
    del dim
    return VitDecoder(self)

  def flops(self, dim: int) -> float:
    width, places = self.embed_dim, self.num_latents + 1
    layer = 8 * width**2 + 4 * width * self.mlp_dim + 4 * width * places
    ends = 2 * width * (2 * self.patches.features + 2 * dim + width)
    return places * sum(self.layers) * layer + self.num_latents * ends


def beit_body(
  *,
  image_size: int,
  channels: int = 3,
  patch_size: int = 16,
  encoder_kind: str = "beit3",
  num_layers: int = 12,
  embed_dim: int = 768,
  num_heads: int = 12,
  mlp_dim: int | None = None,
  decoder_layers: int | None = None,
  init: str = "normal",
  dtype: DTypeLike = jnp.float32,
) -> BeitBody:
  """The release's body.

  Args:
    image_size: Height and width.
    channels: Of a pixel.
    patch_size: Pixels of height and width that become one latent.
    encoder_kind: `beit3`, or `vit` as the decoder is.
    num_layers: Layers of the encoder.
    embed_dim: Width.
    num_heads: Heads.
    mlp_dim: Of the feed-forwards; four times the width if `None`.
    decoder_layers: Layers of the decoder; as many as the encoder's if `None`.
    init: Scheme of initialisation.
    dtype: Of activations.
  """
  return BeitBody(
    Patches((image_size, image_size, channels), patch_size),
    encoder_kind,
    (num_layers, decoder_layers or num_layers),
    embed_dim,
    num_heads,
    mlp_dim or 4 * embed_dim,
    init,
    dtype,
  )


class BeitEncoder(nn.Module):
  """Patches, behind a class token, through the layers and a linear head.

  Attributes:
    body: Sizes.
    features: Of its output.
  """

  body: BeitBody
  features: int

  @nn.compact
  def __call__(self, media: Float[Array, "B height width C"]) -> Float[Array, "B N D"]:
    c = self.body
    x = _dense(c, c.embed_dim, (None, "embed"), "patch_embed")(c.patches.split(media))
    x = Layers(c, c.layers[0], c.encoder_kind == "beit3", name="layers")(x)
    return _dense(c, self.features, ("embed", None), "head")(x).astype(jnp.float32)


class VitDecoder(nn.Module):
  """Latents, behind a class token, through the layers and a head of two layers.

  Attributes:
    body: Sizes.
  """

  body: BeitBody

  @nn.compact
  def __call__(self, latents: Float[Array, "B N Z"]) -> Float[Array, "B height width C"]:
    c = self.body
    x = _dense(c, c.embed_dim, (None, "embed"), "latent_embed")(latents)
    x = Layers(c, c.layers[1], False, name="layers")(x)
    x = nn.tanh(_dense(c, c.embed_dim, ("embed", "mlp"), "head_in")(x))
    x = _dense(c, c.patches.features, ("mlp", None), "head_out")(x)
    return c.patches.join(x.astype(jnp.float32))


class Layers(nn.Module):
  """A class token in front, places added, the layers, a norm, and the class token off again.

  Attributes:
    body: Sizes.
    num_layers: How many.
    sub_norm: Whether they are BEiT-3's.
  """

  body: BeitBody
  num_layers: int
  sub_norm: bool

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    c, init = self.body, self.body.initializers(self.num_layers).embedding
    made = lambda name, *shape: self.param(
      name, nn.with_logical_partitioning(init, ("positions", "embed")), (*shape, c.embed_dim)
    ).astype(c.dtype)
    token = jnp.broadcast_to(made("class_token", 1), (len(x), 1, c.embed_dim))
    x = jnp.concatenate([token, x], axis=1) + made("position_embedding", x.shape[1] + 1)
    unrolled = self.num_layers if target_platform() == "cpu" else 1
    x, _ = nn.scan(
      BeitBlock,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.num_layers,
      unroll=unrolled,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, self.num_layers, self.sub_norm, name="block")(x, None)
    return _norm(c, self.sub_norm, "norm")(x)[:, 1:]


class BeitBlock(nn.Module):
  """Attention among all, then a feed-forward; the body of a scan.

  Attributes:
    body: Sizes.
    num_layers: How many blocks there are.
    sub_norm: Whether it is BEiT-3's: a norm before the last matrix of each branch, a bias of keys.
  """

  body: BeitBody
  num_layers: int
  sub_norm: bool

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"], _: None) -> tuple[Float[Array, "B N D"], None]:
    c, init, width = self.body, self.body.initializers(self.num_layers), self.body.embed_dim
    norm = lambda name, x: _norm(c, self.sub_norm, name)(x)
    inner = lambda name, x: norm(name, x) if self.sub_norm else x

    def dense(name, role, features, axes, x, bias=True):
      return _dense(c, features, axes, name, getattr(init, role), bias)(x)

    def heads(name, role, x, bias=True):
      x = dense(name, role, width, ("embed", "heads"), x, bias)
      return x.reshape(*x.shape[:2], c.num_heads, -1)

    y = norm("attention_norm", x)
    q = heads("q_proj", "mixer_in", y) * (width // c.num_heads) ** -0.5
    k = heads("k_proj", "mixer_in", y, self.sub_norm)
    y = ops.attention(q, k, heads("v_proj", "mixer_value", y), mask=ops.Mask("full"))
    y = inner("attention_sub_norm", y.reshape(x.shape))
    x = x + dense("out_proj", "mixer_out", width, ("heads", "embed"), y)
    y = dense("mlp_in", "mlp_in", c.mlp_dim, ("embed", "mlp"), norm("mlp_norm", x))
    y = inner("mlp_sub_norm", nn.gelu(y, approximate=False))
    return x + dense("mlp_out", "mlp_out", width, ("mlp", "embed"), y), None


def _norm(c: BeitBody, sub_norm: bool, name: str) -> nn.Module:
  # torchscale's epsilon, and the ViT's.
  return nn.LayerNorm(1e-5 if sub_norm else 1e-6, dtype=c.dtype, name=name)


def _dense(
  c: BeitBody,
  features: int,
  axes: tuple[str | None, ...],
  name: str,
  init: nn.initializers.Initializer | None = None,
  bias: bool = True,
) -> nn.Module:
  init = nn.with_logical_partitioning(init or c.initializers(sum(c.layers)).mixer_in, axes)
  return nn.Dense(features, use_bias=bias, dtype=c.dtype, kernel_init=init, name=name)
