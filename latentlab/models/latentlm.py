"""LatentLM: one causal decoder over tokens and latent vectors (https://arxiv.org/abs/2412.08635).

A sequence is made of items. A token is embedded by lookup and predicted by a softmax; a latent of
some modality is embedded by a linear map and drawn by that modality's head, conditioned on the
hidden vector of the item before it (section 3). The decoder is any of the library's: heads and
modalities stand beside it.

Vocabulary: the text tokenizer's tokens, then one that stands for a left-out prompt (guidance's null
condition), three for each modality (it opens a run of latents, closes one, and stands in for each
of its latents), and one for each class.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers import DecoderCache, Shared
from latentlab.layers.common import Projection
from latentlab.layers.diffusion_head import DiffusionHeadConfig, LatentProjection
from latentlab.layers.latent_heads import (
  MixtureHeadConfig,
  RegressionHeadConfig,
  SolverSettings,
)
from latentlab.layers.mar_head import MarHeadConfig
from latentlab.models.language_model import LanguageModel, LanguageModelConfig
from latentlab.models.transformer import transformer
from latentlab.typing import Array, Float, Int, Key

HeadConfig = DiffusionHeadConfig | MarHeadConfig | RegressionHeadConfig | MixtureHeadConfig

STOPS = ("fixed", "token", "classifier")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Where tokens that are no text lie in the vocabulary.

  Attributes:
    text_vocab_size: Tokens of the text's tokenizer, which come first.
    num_modalities: Kinds of latents.
    num_classes: Classes that a sequence may begin with.
  """

  text_vocab_size: int
  num_modalities: int = 1
  num_classes: int = 0

  @property
  def vocab_size(self) -> int:
    return self.text_vocab_size + 1 + 3 * self.num_modalities + self.num_classes

  @property
  def null(self) -> int:
    """Stands for each token of a prompt that guidance leaves out."""
    return self.text_vocab_size

  def begin(self, modality: int) -> int:
    """The paper's `<BOD>`: what follows is a latent."""
    return self.text_vocab_size + 1 + 3 * modality

  def end(self, modality: int) -> int:
    """`<EOD>`: the run of latents is over."""
    return self.begin(modality) + 1

  def latent(self, modality: int) -> int:
    """Stands in for a latent among tokens, and says "another one" as a prediction."""
    return self.begin(modality) + 2

  def class_token(self, label: int | np.ndarray) -> int | np.ndarray:
    if np.any(np.asarray(label) >= self.num_classes) or np.any(np.asarray(label) < 0):
      raise ValueError(f"{label=} is no class; there are {self.num_classes}")
    return self.text_vocab_size + 1 + 3 * self.num_modalities + label


@dataclasses.dataclass(frozen=True)
class ModalityConfig:
  """One kind of latents.

  Attributes:
    name: Its name, as batches and parameters have it.
    dim: Channels `Z`.
    head: What draws them.
    num_latents: Length of a run, where all are alike; `None` if not.
    stop: What ends a run: its length (`fixed`), the softmax's choice between "another one" and the
      closing token (`token`), or a classifier of the hidden vector (`classifier`).
    mean: Mean of all latents, which is taken off them before the model sees any (section 9).
    std: Standard deviation of all latents, which they are then divided by.
  """

  name: str
  dim: int
  head: HeadConfig
  num_latents: int | None = None
  stop: str = "token"
  mean: float = 0.0
  std: float = 1.0

  def __post_init__(self):
    if self.stop not in STOPS:
      raise ValueError(f"unknown stop={self.stop!r} of latents; choose one of {STOPS}")
    if self.stop == "fixed" and not self.num_latents:
      raise ValueError("stop='fixed' needs num_latents, and this modality's runs differ in length")
    if self.dim < 1 or not self.std > 0:
      raise ValueError(f"dim={self.dim} and std={self.std} of latents must be positive")

  @property
  def input_bias(self) -> bool:
    """Whether the decoder's map from latents has a bias: where its head's has one."""
    return isinstance(self.head, DiffusionHeadConfig) and self.head.input_bias


@dataclasses.dataclass(frozen=True)
class LatentLMConfig:
  """A decoder with several kinds of items.

  Attributes:
    language: Embedding, decoder and softmax; its vocabulary holds the special tokens.
    modalities: Kinds of latents.
    text_vocab_size: Tokens of the text's tokenizer.
    num_classes: Classes that a sequence may begin with.
  """

  language: LanguageModelConfig
  modalities: tuple[ModalityConfig, ...]
  text_vocab_size: int
  num_classes: int = 0

  def __post_init__(self):
    names = [m.name for m in self.modalities]
    if not names or len(set(names)) < len(names):
      raise ValueError(f"a LatentLM has modalities of different names, got {names}")
    if self.language.vocab_size != self.tokens.vocab_size:
      raise ValueError(
        f"{self.language.vocab_size=} must be {self.tokens.vocab_size}: {self.text_vocab_size} "
        f"tokens of text, and the special ones of {len(names)} modalities and {self.num_classes} "
        "classes"
      )

  @property
  def tokens(self) -> SpecialTokens:
    return SpecialTokens(self.text_vocab_size, len(self.modalities), self.num_classes)

  @property
  def context_limit(self) -> int | None:
    return self.language.context_limit

  @property
  def shared(self) -> Shared:
    """What heads share with the decoder."""
    c = self.language.decoder
    return Shared(c.embed_dim, c.dtype, c.initializers, c.norm_eps, num_layers=c.num_layers)


@struct.dataclass
class Items:
  """Rows of items.

  Attributes:
    tokens: Tokens; at latents, what stands in for them.
    kinds: 0 for a token, `1 + m` for a latent of modality `m`.
    latents: By modality, normalised latents; anything where there is none.
  """

  tokens: Int[Array, "B T"]
  kinds: Int[Array, "B T"]
  latents: Mapping[str, Float[Array, "B T _"]]


class LatentLM(nn.Module):
  """The model.

  Attributes:
    config: What it is made of.
  """

  config: LatentLMConfig

  def setup(self):
    c, shared = self.config, self.config.shared
    self.language = LanguageModel(c.language)
    self.inputs = {
      m.name: LatentProjection(shared, m.input_bias, name=f"{m.name}_input") for m in c.modalities
    }
    self.heads = {m.name: m.head.module(shared, m.dim, name=f"{m.name}_head") for m in c.modalities}
    self.stops = {
      m.name: StopClassifier(shared, name=f"{m.name}_stop")
      for m in c.modalities
      if m.stop == "classifier"
    }
    self.normalizers = {
      m.name: Normalizer(m.mean, m.std, name=f"{m.name}_normalizer") for m in c.modalities
    }

  def __call__(self, items: Items) -> Float[Array, "B T D"]:
    """Hidden vectors; initialises every part."""
    hidden, _ = self.hidden(items)
    if self.is_initializing():
      key = jax.random.key(0)
      for m in self.config.modalities:
        self.latent_losses(m.name, hidden, items.latents[m.name], key)
        if m.stop == "classifier":
          self.stop_logits(m.name, hidden)
      self.language.logits(hidden)
    return hidden

  def hidden(
    self,
    items: Items,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    cache: DecoderCache | None = None,
    *,
    fresh: bool = False,
    last_only: bool = False,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B #T D"], DecoderCache | None]:
    """Hidden vectors of items; arguments beside them as in `LanguageModel.hidden`."""
    dtype, vectors = self.config.language.decoder.dtype, 0.0
    for i, m in enumerate(self.config.modalities):
      here = (items.kinds == i + 1)[..., None]
      # A slot without a latent may hold anything, NaN included.
      z = jnp.where(here, items.latents[m.name], 0.0).astype(dtype)
      vectors = vectors + jnp.where(here, self.inputs[m.name](z), 0.0)
      self.normalizers[m.name]()
    return self.language.hidden(
      items.tokens,
      positions,
      segment_ids,
      lengths,
      cache,
      replaced=(items.kinds > 0, vectors),
      fresh=fresh,
      last_only=last_only,
      deterministic=deterministic,
    )

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
    """Scores of the next token, in float32."""
    return self.language.logits(hidden)

  def token_losses(
    self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
  ) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats."""
    return ops.cross_entropy(
      hidden,
      self.language.head_kernel(),
      targets,
      chunk_size=self.config.language.loss_chunk_size,
    )

  def latent_losses(
    self,
    name: str,
    hidden: Float[Array, "*B D"],
    latents: Float[Array, "*B Z"],
    key: Key[Array, ""],
  ) -> Float[Array, "*B"]:
    """The head's loss of each latent that follows a hidden vector."""
    return self.heads[name].losses(hidden, latents, key)

  def draw(
    self,
    name: str,
    hidden: Float[Array, "B D"],
    null_hidden: Float[Array, "B D"] | None,
    keys: Key[Array, " B"],
    settings: SolverSettings,
    progress: Float[Array, " B"] | None = None,
  ) -> Float[Array, "B Z"]:
    """A latent behind each hidden vector; arguments as the head's."""
    return self.heads[name].draw(hidden, null_hidden, keys, settings, progress)

  def stop_logits(self, name: str, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Log-odds that no latent follows, for modalities with `stop="classifier"`."""
    return self.stops[name](hidden)

  def normalize(self, name: str, latents: Float[Array, "... Z"]) -> Float[Array, "... Z"]:
    """Latents as the model sees them."""
    mean, std = self.normalizers[name]()
    return (latents - mean) / std

  def denormalize(self, name: str, latents: Float[Array, "... Z"]) -> Float[Array, "... Z"]:
    """Latents as the tokenizer's decoder wants them."""
    mean, std = self.normalizers[name]()
    return latents * std + mean


class Normalizer(nn.Module):
  """Two numbers, measured once and kept with the parameters; no gradient reaches them.

  Attributes:
    mean: What they start from.
    std: What they start from.
  """

  mean: float
  std: float

  @nn.compact
  def __call__(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
    values = [
      self.param(name, nn.with_logical_partitioning(nn.initializers.constant(x), ()), ())
      for name, x in (("mean", self.mean), ("std", self.std))
    ]
    mean, std = map(jax.lax.stop_gradient, values)
    return mean, std


class StopClassifier(nn.Module):
  """A two-layer perceptron from a hidden vector to the log-odds that a run of latents is over.

  Attributes:
    shared: What it shares with the decoder.
  """

  shared: Shared

  @nn.compact
  def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    s = self.shared
    x = Projection((s.embed_dim,), ("embed", "mlp"), s.init.mlp_in, s.dtype, name="in_proj")(hidden)
    out = Projection((1,), ("mlp", None), s.init.mlp_out, jnp.float32, name="out_proj")
    return out(nn.silu(x).astype(jnp.float32))[..., 0]


PRESETS = {
  "base": dict(num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072, head_depth=3),
  "medium": dict(num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096, head_depth=3),
  "large": dict(num_layers=24, embed_dim=1536, num_heads=12, mlp_dim=6144, head_depth=3),
  "xl": dict(num_layers=24, embed_dim=2048, num_heads=16, mlp_dim=8192, head_depth=3),
  "3b": dict(num_layers=32, embed_dim=2560, num_heads=20, mlp_dim=10240, head_depth=3),
  "7b": dict(num_layers=32, embed_dim=4096, num_heads=32, mlp_dim=16384, head_depth=3),
  "13b": dict(num_layers=40, embed_dim=5120, num_heads=40, mlp_dim=20480, head_depth=3),
  "b": dict(num_layers=24, embed_dim=768, num_heads=12, mlp_dim=2048, head_depth=6),
  "l": dict(num_layers=32, embed_dim=1024, num_heads=16, mlp_dim=2688, head_depth=8),
  "h": dict(num_layers=40, embed_dim=1280, num_heads=20, mlp_dim=3392, head_depth=12),
  # Of table 1, and of the model of text and images.
  "table1": dict(num_layers=32, embed_dim=1024, num_heads=16, mlp_dim=2730, head_depth=6),
  "multimodal": dict(num_layers=24, embed_dim=2048, num_heads=16, mlp_dim=6144, head_depth=6),
}
"""Sizes of the release (the first ten) and of the paper's runs; a head is as wide as the layers."""

RELEASE = dict(feed_forward="swiglu", rope_grid="linspace", init="linear", tie_embeddings=True)
"""Fields of `config.model` that the release's backbone has. Its norms have no scale; those here
begin at one. Tied embeddings stand for its lack of a softmax, where there are classes alone."""


def class_conditional(
  preset: str, *, num_classes: int = 1000, dim: int = 16, num_latents: int = 256
) -> LatentLMConfig:
  """The release's model of images by class, over latents of a 16x16 grid.

  Raises:
    ValueError: the preset is unknown.
  """
  if preset not in PRESETS:
    raise ValueError(f"unknown {preset=}; choose one of {sorted(PRESETS)}")
  sizes = dict(PRESETS[preset])
  head = DiffusionHeadConfig(depth=sizes.pop("head_depth"), mlp_dim=sizes["mlp_dim"])
  special = SpecialTokens(0, 1, num_classes)
  language = transformer(vocab_size=special.vocab_size, **sizes, **RELEASE)
  modality = ModalityConfig("image", dim, head, num_latents, "fixed")
  return LatentLMConfig(language, (modality,), 0, num_classes)


NOT_TRAINED = r".*_normalizer/.*"
"""Paths of parameters that are measured."""


def num_params(config: LatentLMConfig) -> dict[str, int]:
  """Parameters: of `language` (embedding, decoder, softmax), `heads`, `inputs`, `total`."""
  shapes = jax.eval_shape(LatentLM(config).init, jax.random.key(0), empty_items(config))
  counts = dict.fromkeys(("language", "heads", "inputs"), 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(shapes)["params"]):
    name = path[0].key
    if "normalizer" not in name:
      group = "language" if name == "language" else "inputs" if name.endswith("_input") else "heads"
      counts[group] += leaf.size
  return counts | {"total": sum(counts.values())}


def empty_items(config: LatentLMConfig, batch_size: int = 1, length: int = 2) -> Items:
  """Items of zeros, of the right shapes."""
  shape = (batch_size, length)
  return Items(
    tokens=jnp.zeros(shape, jnp.int32),
    kinds=jnp.zeros(shape, jnp.int32),
    latents={m.name: jnp.zeros((*shape, m.dim)) for m in config.modalities},
  )
