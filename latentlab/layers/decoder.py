"""The one decoder: stages of a repeated pattern of blocks, each a mixer and a feed-forward.

`(embeddings, positions, segment_ids, cache) -> (hidden, cache)`; embedding and heads are outside.
A model is a configuration of this module: what mixes tokens, how positions enter, which norm and
which feed-forward are choices of each block. With `shared_kv` it is a decoder-decoder (YOCO,
https://arxiv.org/abs/2405.05254): the stages before make keys and values once, and those behind
read them, so that a prompt needs the latter for its last token alone.

Parameters of a stage are stacked over its repeats and scanned, so that a deep model compiles as
fast as a shallow one; on a CPU the scan is unrolled, which changes no parameter and hence no
checkpoint.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn

from latentlab import ops
from latentlab.layers import initializers
from latentlab.layers.cache import Cache, DecoderCache
from latentlab.layers.common import Context, Shared, wanted
from latentlab.layers.feed_forward import FeedForward, FeedForwardConfig
from latentlab.layers.norms import NORMS, residual_norm
from latentlab.layers.positions import PositionConfig
from latentlab.layers.shared_kv import SharedKVConfig, SharedKVProjection
from latentlab.typing import Array, Bool, DTypeLike, Float, Int
from pallas_kernels.common import target_platform

REFUSED = {
  ("retention", "alibi"): "ALiBi biases a softmax score; retention has none, and decays by itself",
  ("retention", "xpos"): "retention collapsed xPos's decay to one scalar a head; both would decay "
  "twice: use rope",
  ("linear_attention", "alibi"): "ALiBi biases a softmax score; linear attention has none",
  ("linear_attention", "xpos"): "xPos's decay would weigh the numerator alone: use rope",
}
REFUSED |= {
  (mixer, scheme): f"{name} makes no products of positions' queries and keys for it to turn or bias"
  for mixer, name in (("rwkv", "RWKV"), ("h3", "H3"), ("hyena", "Hyena"))
  for scheme in ("rope", "xpos", "alibi")
}
"""Pairs (mixer, position scheme) that mean nothing, and why. All others compose."""

RESIDUALS = ("pre", "deepnorm")
CROSS_INPUTS = ("hidden", "embeddings")

REMAT_POLICIES = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_saveable,
  "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@runtime_checkable
class MixerConfig(Protocol):
  """What the decoder asks of a token mixer: any frozen dataclass with these will do."""

  kind: str
  positions: PositionConfig

  def module(self, shared: Shared, *, name: str) -> nn.Module:
    """A module with `(x, context, cache) -> (y, cache)`."""

  def init_cache(self, batch_size: int, max_length: int, dtype: DTypeLike) -> Cache:
    """What it remembers before the first token."""

  def flops_per_token(self, embed_dim: int, seq_length: int) -> float:
    """Matmul flops of a forward pass, per token."""


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """One block: a token mixer, then a feed-forward, each on a branch with a norm.

  Attributes:
    mixer: Token mixer.
    feed_forward: Feed-forward.
    norm: Norm of each branch.
    init: Initialisation scheme of this block; the decoder's if `None`.
  """

  mixer: MixerConfig
  feed_forward: FeedForwardConfig
  norm: str = "rms"
  init: str | None = None

  def __post_init__(self):
    if self.norm not in NORMS:
      raise ValueError(f"unknown norm {self.norm!r}; choose one of {NORMS}")
    pair = (self.mixer.kind, self.mixer.positions.kind)
    if pair in REFUSED:
      raise ValueError(f"mixer {pair[0]!r} with positions {pair[1]!r}: {REFUSED[pair]}")
    if self.init is not None:
      initializers.make(self.init, num_layers=1, embed_dim=1)


@dataclasses.dataclass(frozen=True)
class Stage:
  """A pattern of blocks, repeated; parameters are stacked over the repeats.

  Attributes:
    pattern: The blocks of one repeat, in order.
    repeats: How often the pattern is run.
    stacked: Whether its parameters and caches have a leading axis of repeats; a stage that is run
      once can do without.
  """

  pattern: tuple[BlockConfig, ...]
  repeats: int
  stacked: bool = True

  def __post_init__(self):
    if not self.pattern or self.repeats < 1:
      raise ValueError(f"a stage has a block and runs once at least, got {self!r}")
    if self.repeats > 1 and not self.stacked:
      raise ValueError(f"{self.repeats=} of a stage are stacked; make a stage of each")

  @property
  def num_layers(self) -> int:
    return len(self.pattern) * self.repeats


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder.

  Attributes:
    embed_dim: Width `D` of the residual stream.
    stages: What it runs, in order.
    shared_kv: Keys and values that all stages from `num_self_stages` on read; `None` for none.
    num_self_stages: Stages of the self-decoder, whose output these are made of.
    cross_input: What the cross-decoder begins with: the self-decoder's output (`hidden`), or the
      `embeddings` (YOCO's "unstacked" layout).
    final_norm: Norm after the last block, where residuals are `pre`.
    residual: `pre`, `x + f(norm(x))`, or `deepnorm`, `norm(alpha x + f(x))` with
      `alpha = (2 L)^(1/4)` (DeepNet, https://arxiv.org/abs/2203.00555, for decoders).
    dtype: Dtype of activations and matmuls (parameters are float32).
    init: Initialisation scheme, a name of `initializers.SCHEMES`.
    norm_eps: Epsilon of the norms on the residual stream.
    dropout_rate: Dropout of each branch.
    remat: What the backward pass keeps, a name of `REMAT_POLICIES`.
    unroll: Repeats of a stage unrolled in one step of its scan; `None` unrolls all of them on a
      CPU, where XLA spreads a loop poorly over cores, and none elsewhere.
  """

  embed_dim: int
  stages: tuple[Stage, ...]
  shared_kv: SharedKVConfig | None = None
  num_self_stages: int = 0
  cross_input: str = "hidden"
  final_norm: str = "rms"
  residual: str = "pre"
  dtype: DTypeLike = jnp.float32
  init: str = "normal"
  norm_eps: float = 1e-6
  dropout_rate: float = 0.0
  remat: str = "none"
  unroll: int | None = None

  def __post_init__(self):
    if self.remat not in REMAT_POLICIES:
      raise ValueError(f"unknown remat {self.remat!r}; choose one of {sorted(REMAT_POLICIES)}")
    if self.residual not in RESIDUALS:
      raise ValueError(f"unknown residual {self.residual!r}; choose one of {RESIDUALS}")
    if not 0.0 <= self.dropout_rate < 1.0:
      raise ValueError(f"dropout_rate={self.dropout_rate} is not in [0, 1)")
    self._check_shared_kv()

  def _check_shared_kv(self):
    c, last = self.shared_kv, len(self.stages)
    if self.cross_input not in CROSS_INPUTS:
      raise ValueError(f"unknown cross_input {self.cross_input!r}; choose one of {CROSS_INPUTS}")
    if c is None and (self.num_self_stages or self.cross_input != "hidden"):
      raise ValueError(
        f"{self.num_self_stages=} and {self.cross_input=} belong to a decoder with shared_kv"
      )
    if c is not None and not 0 <= self.num_self_stages < last:
      raise ValueError(f"{self.num_self_stages=} leaves no stage of {last} to read shared_kv")
    for i, stage in enumerate(self.stages):
      for mixer in (block.mixer for block in stage.pattern):
        reads, should = getattr(mixer, "shared_kv", False), c is not None
        should = should and i >= self.num_self_stages
        if reads != should:
          raise ValueError(
            f"stage {i} has {mixer}, where mixers with shared_kv={should} belong: all stages from "
            f"{self.num_self_stages=} on read the shared keys and values, and no other does"
          )
        if reads and mixer.shared_sizes != (c.num_kv_heads, c.key_dim, c.value_dim):
          raise ValueError(
            f"stage {i} reads keys and values of {mixer.shared_sizes} (heads, key and value "
            f"features), and {c} are others"
          )
        if reads and mixer.positions != c.positions:
          raise ValueError(f"stage {i} has {mixer.positions}, and its keys are of {c.positions}")

  @property
  def num_layers(self) -> int:
    return sum(stage.num_layers for stage in self.stages)

  @property
  def residual_scale(self) -> float | None:
    """DeepNorm's alpha; `None` for norms before the branches."""
    return (2 * self.num_layers) ** 0.25 if self.residual == "deepnorm" else None

  @property
  def initializers(self) -> initializers.Initializers:
    return initializers.make(self.init, num_layers=self.num_layers, embed_dim=self.embed_dim)

  def init_cache(self, batch_size: int, max_length: int) -> DecoderCache:
    """An empty cache with room for `max_length` tokens a row."""

    def empty(block: BlockConfig, stage: Stage) -> Cache:
      cache = block.mixer.init_cache(batch_size, max_length, self.dtype)
      if not stage.stacked:
        return cache
      return jax.tree.map(lambda x: jnp.broadcast_to(x, (stage.repeats, *x.shape)), cache)

    return DecoderCache(
      lengths=jnp.zeros((batch_size,), jnp.int32),
      stages=tuple(tuple(empty(block, s) for block in s.pattern) for s in self.stages),
      stacked=tuple(s.stacked for s in self.stages),
      shared=self.shared_kv and self.shared_kv.init_cache(batch_size, max_length, self.dtype),
    )

  def flops_per_token(self, seq_length: int) -> float:
    """Matmul flops of a forward pass over `seq_length` tokens, per token."""
    return self._flops(self.stages, seq_length) + self._shared_flops

  def prefill_flops(self, length: int) -> float:
    """Matmul flops of reading a prompt, of whose tokens a cross-decoder runs for the last alone."""
    if self.shared_kv is None:
      return self.flops_per_token(length) * length
    before, behind = self.stages[: self.num_self_stages], self.stages[self.num_self_stages :]
    each = self._flops(before, length) + self._shared_flops
    return each * length + self._flops(behind, 2 * length)  # The last query sees all keys.

  @property
  def _shared_flops(self) -> float:
    return 0 if self.shared_kv is None else self.shared_kv.flops_per_token(self.embed_dim)

  def _flops(self, stages: tuple[Stage, ...], seq_length: int) -> float:
    return sum(
      stage.repeats
      * (
        block.mixer.flops_per_token(self.embed_dim, seq_length)
        + block.feed_forward.flops_per_token(self.embed_dim)
      )
      for stage in stages
      for block in stage.pattern
    )


class Block(nn.Module):
  """Residual block: a token mixer, then a feed-forward.

  Attributes:
    config: Its parts.
    shared: What it shares with the other blocks.
  """

  config: BlockConfig
  shared: Shared

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], context: Context, cache: Cache | None
  ) -> tuple[Float[Array, "B T D"], Cache | None]:
    c, shared = self.config, self.shared
    dropout = nn.Dropout(shared.dropout_rate, deterministic=shared.deterministic)
    alpha = shared.residual_scale
    norm = residual_norm(c.norm, shared, name="mixer_norm")
    y, cache = c.mixer.module(shared, name="mixer")(norm(x) if alpha is None else x, context, cache)
    x = x + dropout(y) if alpha is None else norm(alpha * x + dropout(y))
    norm = residual_norm(c.norm, shared, name="feed_forward_norm")
    feed_forward = FeedForward(c.feed_forward, shared, name="feed_forward")
    y = feed_forward(norm(x) if alpha is None else x)
    x = x + dropout(y) if alpha is None else norm(alpha * x + dropout(y))
    if wanted(self, "hidden"):
      self.sow("hidden", "residual", x)
    return nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed")), cache


class Pattern(nn.Module):
  """One repeat of a stage: the body of its scan.

  Attributes:
    blocks: The blocks, in order.
    shared: What they share.
    remat: What the backward pass keeps of each block, a name of `REMAT_POLICIES`.
    looped: Whether a loop runs this body, and not copies of it side by side.
  """

  blocks: tuple[BlockConfig, ...]
  shared: Shared
  remat: str
  looped: bool

  @nn.compact
  def __call__(self, x, caches, first_layer, context):
    block = Block
    if self.remat != "none":
      # Side by side, the compiler would see both computations of a block and keep the first.
      policy = REMAT_POLICIES[self.remat]
      block = nn.remat(Block, policy=policy, prevent_cse=not self.looped)
    updated = []
    for i, config in enumerate(self.blocks):
      here = context.replace(layer=first_layer + i)
      cache = caches[i] if caches is not None else None
      shared = self.shared
      if config.init is not None:
        sizes = dict(num_layers=shared.num_layers, embed_dim=shared.embed_dim)
        shared = dataclasses.replace(shared, init=initializers.make(config.init, **sizes))
      x, cache = block(config, shared, name=f"block_{i}")(x, here, cache)
      updated.append(cache)
    return x, tuple(updated) if caches is not None else None


def next_positions(
  num_tokens: int, segment_ids: Int[Array, "B T"] | None = None, cache: DecoderCache | None = None
) -> Int[Array, "#B T"]:
  """Positions counted on from the cache, or from 0 in each document."""
  if segment_ids is not None:
    return ops.document_positions(segment_ids)
  positions = jnp.arange(num_tokens, dtype=jnp.int32)[None]
  return positions if cache is None else positions + cache.lengths[:, None]


class Decoder(nn.Module):
  """The decoder.

  Attributes:
    config: What it is made of.
  """

  config: DecoderConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "#B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: DecoderCache | None = None,
    *,
    lengths: Int[Array, " B"] | None = None,
    allowed: Bool[Array, "#B T S"] | None = None,
    key_bias: Float[Array, "B S"] | None = None,
    fresh: bool = False,
    last_only: bool = False,
    tile: int | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B #T D"], DecoderCache | None]:
    """Runs `T` tokens, after those that `cache` has seen.

    Args:
      x: Embeddings.
      positions: Position of each token; `next_positions` if `None`, which is the faster: causal
        masks then hide whole blocks, known before they are computed.
      segment_ids: Packed documents, for passes without a cache.
      cache: What was seen before; `None` outside of generation.
      lengths: Valid tokens of this pass per row (right padding); all if `None`.
      allowed: Keys a query may see at all; see `Context`.
      key_bias: Added to the scores of each key; see `Context`.
      fresh: Whether `cache` holds no token yet, which saves attention the look into it.
      last_only: Whether the last valid token of each row is all that is asked for. A cross-decoder
        then runs for it alone: what it remembers of the others, the self-decoder has made.
      tile: Runs a cross-decoder on so many tokens at a time; with `last_only`, on those around the
        last one. Results do not then depend on `last_only` in a single bit, where a product of one
        row may else add up in another order than one of many.
      deterministic: Whether dropout is off; if not, `apply` needs a `dropout` key.

    Returns:
      Normed hidden vectors (one a row with `last_only`), and the cache after the last valid token
      (`None` if none was given).

    Raises:
      ValueError: `segment_ids` with a cache, or `tile` is not positive.
    """
    c = self.config
    if tile is not None and tile < 1:
      raise ValueError(f"{tile=} of a cross-decoder must be positive")
    if cache is not None and segment_ids is not None:
      raise ValueError("packed documents and a cache do not mix: decode one document a row")
    num_tokens = x.shape[1]
    in_place = positions is None
    if in_place:
      positions = next_positions(num_tokens, segment_ids, cache)
    context = Context(
      positions, segment_ids, lengths, allowed, key_bias, in_place=in_place, fresh=fresh
    )
    shared = Shared(
      c.embed_dim,
      c.dtype,
      c.initializers,
      c.norm_eps,
      c.dropout_rate,
      deterministic,
      c.residual_scale,
      c.num_layers,
    )
    x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)

    embeddings, shared_cache = x, None
    stages, first_layer = [], 0
    parts = [(x, context)]  # Of the tokens; several where a cross-decoder is run by tiles.
    for i, stage in enumerate(c.stages):
      if c.shared_kv is not None and i == c.num_self_stages:
        project = SharedKVProjection(c.shared_kv, shared, name="shared_kv")
        seen, shared_cache = project(parts[0][0], context, None if cache is None else cache.shared)
        context = context.replace(shared=seen)
        x = embeddings if c.cross_input == "embeddings" else parts[0][0]
        parts = _parts(x, context, last_only, tile)
      caches = cache.stages[i] if cache is not None else None
      if stage.stacked:
        unroll = c.unroll or (stage.repeats if target_platform() == "cpu" else 1)
        unroll = min(unroll, stage.repeats)
        pattern = nn.scan(
          Pattern,
          variable_axes={"params": 0, "intermediates": 0, "maps": 0, "hidden": 0},
          split_rngs={"params": True, "dropout": True},
          in_axes=(0, 0, nn.broadcast),
          out_axes=0,
          length=stage.repeats,
          unroll=unroll,
          metadata_params={nn.PARTITION_NAME: "layers"},
        )
        looped = unroll < stage.repeats
        layers = first_layer + jnp.arange(stage.repeats) * len(stage.pattern)
      else:
        pattern, looped, layers = Pattern, False, first_layer
      pattern = pattern(stage.pattern, shared, c.remat, looped, name=f"stage_{i}")
      results = [pattern(x, caches, layers, context) for x, context in parts]
      parts = [(x, part) for (x, _), (_, part) in zip(results, parts, strict=True)]
      stages.append(results[0][1])
      first_layer += stage.num_layers

    if last_only and c.shared_kv is None:
      parts = _parts(*parts[0], last_only, None)
    parts = [x for x, _ in parts]
    if c.residual == "pre":  # Behind every branch, there is one behind the last.
      norm = residual_norm(c.final_norm, shared, name="final_norm")
      parts = [norm(x) for x in parts]
    if last_only and c.shared_kv is not None and tile is not None:
      last = _last(context, num_tokens) % tile
      parts = [jnp.take_along_axis(parts[0], last[..., None], axis=1)]
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)[:, :num_tokens]
    if cache is not None:
      seen = num_tokens if lengths is None else lengths
      cache = dataclasses.replace(
        cache, lengths=cache.lengths + seen, stages=tuple(stages), shared=shared_cache
      )
    return x, cache


def _last(context: Context, length: int) -> Int[Array, "B 1"]:
  """Places of the rows' last valid tokens; 0 in a row without any."""
  if context.lengths is None:
    return jnp.full((1, 1), length - 1)
  return jnp.maximum(context.lengths - 1, 0)[:, None]


def _parts(
  x: Float[Array, "B T D"], context: Context, last_only: bool, tile: int | None
) -> list[tuple[Float[Array, "B _ D"], Context]]:
  """The tokens that a cross-decoder runs for, with their contexts: all, the last ones, or tiles."""
  batch, length = x.shape[:2]
  if not last_only and tile is None:
    return [(x, context)]
  if last_only:
    starts = [_last(context, length) // (tile or 1) * (tile or 1)]
  else:
    starts = [jnp.full((1, 1), start) for start in range(0, length, tile)]
  places = (jnp.minimum(start + jnp.arange(tile or 1), length - 1) for start in starts)
  positions = jnp.broadcast_to(context.positions, (batch, length))
  allowed = context.allowed
  if allowed is not None:
    allowed = jnp.broadcast_to(allowed, (batch, *allowed.shape[1:]))
  parts = []
  for rows in places:
    rows = jnp.broadcast_to(rows, (batch, rows.shape[1]))
    take = lambda a, rows=rows: jnp.take_along_axis(a, rows, axis=1)
    wide = lambda a, rows=rows: jnp.take_along_axis(a, rows[..., None], axis=1)
    part = context.replace(
      positions=take(positions),
      segment_ids=None if context.segment_ids is None else take(context.segment_ids),
      lengths=None,
      allowed=None if allowed is None else wide(allowed),
      in_place=False,
      fresh=False,
    )
    parts.append((wide(x), part))
  return parts
