"""A language model: embedding, the decoder, and a vocabulary head.

The module is pure: `init` and `apply` take and return plain pytrees. Generation goes through three
functions over it, `init_cache`, `prefill` and `decode_step`, whose cache is a value like any other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from latentlab import ops
from latentlab.layers import (
  BlockConfig,
  Decoder,
  DecoderCache,
  DecoderConfig,
  Embedder,
  FeedForwardConfig,
  MixerConfig,
  Stage,
  VocabHead,
)
from latentlab.layers.decoder import next_positions
from latentlab.layers.positions import EMBEDDING_SCHEMES
from latentlab.typing import Array, Bool, DTypeLike, Float, Int, Params


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
  """A language model.

  Attributes:
    decoder: The decoder.
    vocab_size: Tokens.
    positions: Position scheme of the embedding: `none`, `sinusoidal` or `learned`.
    max_length: Positions that `learned` has vectors for.
    scale_embeddings: Whether embeddings are multiplied by `sqrt(D)`.
    tie_embeddings: Whether the head is the embedding's transpose.
    loss_chunk_size: Vocabulary entries whose logits the loss holds at once; all if `None`.
  """

  decoder: DecoderConfig
  vocab_size: int
  positions: str = "none"
  max_length: int = 2048
  scale_embeddings: bool = False
  tie_embeddings: bool = False
  loss_chunk_size: int | None = None

  def __post_init__(self):
    if self.positions not in EMBEDDING_SCHEMES:
      raise ValueError(f"unknown positions {self.positions!r}; choose one of {EMBEDDING_SCHEMES}")
    if self.vocab_size < 1:
      raise ValueError(f"vocab_size={self.vocab_size} must be positive")

  @property
  def context_limit(self) -> int | None:
    """Tokens a sequence can have at most; `None` where positions go on for ever."""
    return self.max_length if self.positions == "learned" else None


@struct.dataclass
class Output:
  """What a pass over tokens gives.

  Attributes:
    hidden: Normed hidden vectors.
    logits: Scores of the next token, in float32.
    cache: The cache after the last valid token, if one was given.
  """

  hidden: Float[Array, "B T D"]
  logits: Float[Array, "B T vocab"]
  cache: DecoderCache | None


class LanguageModel(nn.Module):
  """A language model.

  Attributes:
    config: What it is made of.
  """

  config: LanguageModelConfig

  def setup(self):
    c = self.config
    width, init = c.decoder.embed_dim, c.decoder.initializers.embedding
    self.embedder = Embedder(
      c.vocab_size, width, init, c.decoder.dtype, c.scale_embeddings, c.positions, c.max_length
    )
    self.decoder = Decoder(c.decoder)
    if not c.tie_embeddings:
      self.head = VocabHead(c.vocab_size, width, init)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    cache: DecoderCache | None = None,
    *,
    allowed: Bool[Array, "#B T S"] | None = None,
    key_bias: Float[Array, "B S"] | None = None,
    fresh: bool = False,
    deterministic: bool = True,
  ) -> Output:
    """Hidden vectors and logits of every token; arguments as in `hidden`."""
    hidden, cache = self.hidden(
      tokens,
      positions,
      segment_ids,
      lengths,
      cache,
      allowed=allowed,
      key_bias=key_bias,
      fresh=fresh,
      deterministic=deterministic,
    )
    return Output(hidden=hidden, logits=self.logits(hidden), cache=cache)

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    cache: DecoderCache | None = None,
    *,
    allowed: Bool[Array, "#B T S"] | None = None,
    key_bias: Float[Array, "B S"] | None = None,
    replaced: tuple[Bool[Array, "B T"], Float[Array, "B T D"]] | None = None,
    fresh: bool = False,
    last_only: bool = False,
    tile: int | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B #T D"], DecoderCache | None]:
    """Hidden vectors without the head.

    Args:
      tokens: Token ids.
      positions: Their positions; counted on from the cache, or from 0 in each document, if `None`,
        which is the faster.
      segment_ids: Packed documents, for passes without a cache.
      lengths: Valid tokens of this pass per row (right padding); all if `None`.
      cache: What was seen before.
      allowed: Keys a query may see at all (see `layers.Context`).
      key_bias: Added to the scores of each key.
      replaced: Which items are no tokens, and the embeddings of those.
      fresh: Whether `cache` holds no token yet.
      last_only: Whether only each row's last valid token is asked for; see `layers.Decoder`.
      tile: Tokens that a cross-decoder is run on at a time; see there.
      deterministic: Whether dropout is off; if not, `apply` needs a `dropout` key.
    """
    places = next_positions(tokens.shape[1], segment_ids, cache)
    x = self.embedder(tokens, places if positions is None else positions, replaced)
    return self.decoder(
      x,
      positions,
      segment_ids,
      cache,
      lengths=lengths,
      allowed=allowed,
      key_bias=key_bias,
      fresh=fresh,
      last_only=last_only,
      tile=tile,
      deterministic=deterministic,
    )

  def head_kernel(self) -> Float[Array, "D vocab"]:
    """The head's kernel, in the decoder's dtype."""
    kernel = self.embedder.embedding.T if self.config.tie_embeddings else self.head()
    return kernel.astype(self.config.decoder.dtype)

  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B vocab"]:
    """Scores of the next token, in float32."""
    return jnp.matmul(hidden, self.head_kernel(), preferred_element_type=jnp.float32)

  def token_losses(
    self,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    deterministic: bool = True,
  ) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats; holds logits of one chunk at a time."""
    hidden, _ = self.hidden(tokens, positions, segment_ids, deterministic=deterministic)
    return ops.cross_entropy(
      hidden, self.head_kernel(), targets, chunk_size=self.config.loss_chunk_size
    )


def stack(
  mixer: MixerConfig,
  feed_forward: FeedForwardConfig,
  *,
  vocab_size: int,
  num_layers: int,
  embed_dim: int,
  norm: str = "rms",
  residual: str = "pre",
  positions: str = "none",
  max_length: int = 2048,
  scale_embeddings: bool = False,
  tie_embeddings: bool = False,
  loss_chunk_size: int | None = None,
  dtype: DTypeLike = jnp.float32,
  init: str = "normal",
  norm_eps: float = 1e-6,
  dropout_rate: float = 0.0,
  remat: str = "none",
  unroll: int | None = None,
) -> LanguageModelConfig:
  """A language model of equal layers: what the presets of the papers have in common.

  Args:
    mixer: Token mixer of every layer.
    feed_forward: Feed-forward of every layer.
    vocab_size: Tokens.
    num_layers: Layers `L`.
    embed_dim: Width `D`.
    norm: `rms` or `layer`.
    residual: `pre` or `deepnorm`; see `layers.DecoderConfig`.
    positions: Position scheme of the embedding; a mixer's own is in its configuration.
    max_length: Positions of `learned`.
    scale_embeddings: Multiply embeddings by `sqrt(D)`.
    tie_embeddings: Head is the embedding's transpose.
    loss_chunk_size: Vocabulary entries per chunk of the loss.
    dtype: Dtype of activations.
    init: Initialisation scheme.
    norm_eps: Epsilon of the norms.
    dropout_rate: Dropout of each branch.
    remat: What the backward pass keeps.
    unroll: Layers unrolled in one step of the scan.

  Raises:
    ValueError: a name is unknown, or a pair means nothing.
  """
  try:
    dtype = jnp.dtype(dtype)
  except TypeError as e:
    raise ValueError(f"unknown {dtype=}; choose float32, bfloat16 or float16") from e
  block = BlockConfig(mixer, feed_forward, norm)
  return LanguageModelConfig(
    decoder=DecoderConfig(
      embed_dim=embed_dim,
      stages=(Stage((block,), num_layers),),
      final_norm=norm,
      residual=residual,
      dtype=dtype,
      init=init,
      norm_eps=norm_eps,
      dropout_rate=dropout_rate,
      remat=remat,
      unroll=unroll,
    ),
    vocab_size=vocab_size,
    positions=positions,
    max_length=max_length,
    scale_embeddings=scale_embeddings,
    tie_embeddings=tie_embeddings,
    loss_chunk_size=loss_chunk_size,
  )


def init_cache(config: LanguageModelConfig, batch_size: int, max_length: int) -> DecoderCache:
  """An empty cache with room for `max_length` tokens a row."""
  return config.decoder.init_cache(batch_size, max_length)


def prefill(
  model: LanguageModel,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"] | None = None,
  max_length: int | None = None,
  cache: DecoderCache | None = None,
  *,
  early_exit: bool = True,
  tile: int | None = None,
) -> tuple[Float[Array, "B vocab"], DecoderCache]:
  """Reads prompts of different lengths in one pass.

  A cross-decoder and the head run for each row's last token alone (YOCO's early exit), unless the
  caller wants them to run for all, which changes no result beyond rounding, and with `tile` none.

  Args:
    model: The model.
    params: Its parameters.
    tokens: Prompts, padded on the right.
    lengths: Valid tokens per row, each at least 1; `T` if `None`.
    max_length: Room of the cache; `T` if `None`, and unused where `cache` is given.
    cache: What was seen before.
    early_exit: Whether to leave out what no later token needs.
    tile: Tokens that a cross-decoder is run on at a time; see `layers.Decoder`.

  Returns:
    The logits behind each row's last valid token, and the cache.

  Raises:
    ValueError: the prompts do not fit into `max_length`.
  """
  fresh = cache is None
  cache = _room(model, tokens, max_length) if fresh else cache
  options = dict(lengths=lengths, cache=cache, fresh=fresh, last_only=early_exit, tile=tile)
  hidden, cache = model.apply({"params": params}, tokens, **options, method="hidden")
  if not early_exit:
    last = jnp.full(tokens.shape[:1], tokens.shape[1]) if lengths is None else lengths
    hidden = jnp.take_along_axis(hidden, last[:, None, None] - 1, axis=1)
  return model.apply({"params": params}, hidden[:, 0], method="logits"), cache


def score_prompts(
  model: LanguageModel,
  params: Params,
  tokens: Int[Array, "B T"],
  lengths: Int[Array, " B"] | None = None,
  max_length: int | None = None,
  *,
  early_exit: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B vocab"], DecoderCache]:
  """`prefill` that also returns the log-probability of each token of the prompts.

  Args:
    model: See `prefill`.
    params: See there.
    tokens: See there.
    lengths: See there.
    max_length: See there.
    early_exit: Must be off: the probabilities of a prompt need every token's hidden vector.

  Returns:
    Log-probabilities under the model, 0 for each row's first token and for padding; and what
    `prefill` returns.

  Raises:
    ValueError: `early_exit`, or the prompts do not fit.
  """
  if early_exit:
    raise ValueError(
      "early_exit=True runs the cross-decoder for the last token of a prompt alone, and its "
      "log-probabilities need all of them: leave early_exit off"
    )
  cache = _room(model, tokens, max_length)
  variables = {"params": params}
  hidden, cache = model.apply(
    variables, tokens, lengths=lengths, cache=cache, fresh=True, method="hidden"
  )
  targets = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
  nll = ops.cross_entropy(
    hidden,
    model.apply(variables, method="head_kernel"),
    targets,
    chunk_size=model.config.loss_chunk_size,
  )
  full = jnp.full(tokens.shape[:1], tokens.shape[1]) if lengths is None else lengths
  known = jnp.arange(tokens.shape[1]) < full[:, None] - 1
  log_probs = jnp.where(known, -nll, 0.0)
  log_probs = jnp.concatenate([jnp.zeros_like(log_probs[:, :1]), log_probs[:, :-1]], axis=1)
  last = jnp.take_along_axis(hidden, full[:, None, None] - 1, axis=1)[:, 0]
  return log_probs, model.apply(variables, last, method="logits"), cache


def _room(model: LanguageModel, tokens: Int[Array, "B T"], max_length: int | None) -> DecoderCache:
  batch_size, num_tokens = tokens.shape
  max_length = num_tokens if max_length is None else max_length
  if num_tokens > max_length:
    raise ValueError(f"prompts of {num_tokens} tokens do not fit into {max_length=}")
  return init_cache(model.config, batch_size, max_length)


def decode_step(
  model: LanguageModel, params: Params, tokens: Int[Array, " B"], cache: DecoderCache
) -> tuple[Float[Array, "B vocab"], DecoderCache]:
  """Reads one token a row; returns the logits of the next, and the cache."""
  out = model.apply({"params": params}, tokens[:, None], cache=cache)
  return out.logits[:, 0], out.cache


def unstack(config: LanguageModelConfig, params: Params) -> tuple[LanguageModelConfig, Params]:
  """The same model with parameters and caches of each layer on their own, as decoding wants them.

  A loop over tokens then reads weights where they lie and writes caches where they are. Of a stack,
  every step would copy every layer's slice, out of the weights and into the caches.

  Args:
    config: The model; where nothing is stacked it is returned as it is.
    params: Its parameters, which are copied: drop the old ones if memory is short.
  """
  if not any(stage.stacked for stage in config.decoder.stages):
    return config, params
  params = nn.unbox(params)
  decoder = {k: x for k, x in params["decoder"].items() if not k.startswith("stage_")}
  stages, num_self_stages = [], config.decoder.num_self_stages
  for i, stage in enumerate(config.decoder.stages):
    if i == config.decoder.num_self_stages:
      num_self_stages = len(stages)
    stack = params["decoder"][f"stage_{i}"]
    for r in range(stage.repeats):
      layer = jax.tree.map(lambda x, r=r: x[r], stack) if stage.stacked else stack
      decoder[f"stage_{len(stages)}"] = layer
      stages.append(Stage(stage.pattern, 1, stacked=False))
  decoder_config = dataclasses.replace(
    config.decoder, stages=tuple(stages), num_self_stages=num_self_stages
  )
  config = dataclasses.replace(config, decoder=decoder_config)
  return config, params | {"decoder": decoder}


def num_params(config: LanguageModelConfig) -> dict[str, int]:
  """Parameters: `body` (decoder without norms' scales), `norms`, `embedding`, `head`, `total`."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
  counts = dict.fromkeys(("body", "norms", "embedding", "head"), 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(shapes)["params"]):
    names = [p.key for p in path]
    if names[0] == "decoder":
      group = "norms" if any("norm" in name for name in names) else "body"
    else:
      group = {"embedder": "embedding", "head": "head"}[names[0]]
    counts[group] += leaf.size
  return counts | {"total": sum(counts.values())}


def flops_per_token(config: LanguageModelConfig, seq_length: int) -> float:
  """Matmul flops of a forward pass, per token; training takes three times as many.

  Causal attention counts half of its square, embeddings count nothing, recomputation never counts.
  """
  head = 2 * config.decoder.embed_dim * config.vocab_size
  return config.decoder.flops_per_token(seq_length) + head
