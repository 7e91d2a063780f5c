"""Sampling of a language model over a tokenizer's codes, guided on its logits.

The baseline of LatentLM with discrete latents (https://arxiv.org/abs/2412.08635, section 4): codes
are tokens. Guidance runs two streams in one batch, each with a cache of its own and both fed the
same codes, as it does for a LatentLM.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from latentlab import ops
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models import LanguageModel, decode_step, prefill, unstack
from latentlab.models.latentlm import SpecialTokens
from latentlab.sample import loop
from latentlab.sample.logits import LogitBias, Temperature, TokenSampler
from latentlab.sample.protocol import Cache, Draw
from latentlab.typing import Array, Bool, Float, Int, Key, Params


@dataclasses.dataclass(frozen=True)
class CodeTokens:
  """A vocabulary with codes behind all else.

  Attributes:
    special: What comes before them.
    codebook_size: Codes.
  """

  special: SpecialTokens
  codebook_size: int

  @property
  def first(self) -> int:
    """The token of code 0."""
    return self.special.vocab_size

  @property
  def vocab_size(self) -> int:
    return self.first + self.codebook_size

  def null_of(self, bos_id: int) -> Int[np.ndarray, " vocab"]:
    """Each token as a prompt has it that guidance leaves out: no text and no class.

    What frames a prompt stays, as do codes.
    """
    special, tokens = self.special, np.arange(self.vocab_size, dtype=np.int32)
    is_class = (tokens >= special.vocab_size - special.num_classes) & (tokens < self.first)
    is_text = (tokens < special.text_vocab_size) & (tokens != bos_id)
    return np.where(is_class | is_text, special.null, tokens).astype(np.int32)


@struct.dataclass
class Features:
  """What the next code is drawn from.

  Attributes:
    logits: Scores of tokens.
    null_logits: Those behind the null prompt, under guidance.
  """

  logits: Float[Array, "B vocab"]
  null_logits: Float[Array, "B vocab"] | None


class GuidedStepper(struct.PyTreeNode):
  """A language model as the loop sees it, beside itself behind the null prompt.

  Attributes:
    model: The model.
    params: Its parameters.
    null_of: Each token as the null prompt has it.
    stop_tokens: Tokens that end a row.
    guided: Whether the stream of the null prompt runs.
    pad: What finished rows emit.
  """

  model: LanguageModel = struct.field(pytree_node=False)
  params: Params
  null_of: Any
  stop_tokens: Any
  guided: bool = struct.field(pytree_node=False, default=False)
  pad: Any = 0

  def prefill(
    self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"], capacity: int
  ) -> tuple[Features, Cache]:
    rows = self._streams(prompts), self._twice(lengths)
    return self._features(*prefill(self.model, self.params, *rows, capacity))

  def extend(
    self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
  ) -> tuple[Features, Cache]:
    rows = self._streams(prompts), self._twice(lengths)
    return self._features(*prefill(self.model, self.params, *rows, cache=cache))

  def step(self, item: Int[Array, " B"], cache: Cache) -> tuple[Features, Cache]:
    return self._features(*decode_step(self.model, self.params, self._twice(item), cache))

  def ends(self, item: Int[Array, " B"]) -> Bool[Array, " B"]:
    return jnp.isin(item, self.stop_tokens)

  def _streams(self, tokens: Int[Array, "B T"]) -> Int[Array, "streams T"]:
    if not self.guided:
      return tokens
    return jnp.concatenate([tokens, jnp.asarray(self.null_of)[tokens]])

  def _twice(self, x: Int[Array, " B"]) -> Int[Array, " streams"]:
    return jnp.concatenate([x, x]) if self.guided else x

  def _features(self, logits: Float[Array, "streams vocab"], cache: Cache):
    both = jnp.split(logits, 2) if self.guided else (logits, None)
    return Features(*both), cache


@struct.dataclass
class RowState:
  """Where rows are.

  Attributes:
    count: Codes drawn.
    tokens: The token sampler's.
  """

  count: Int[Array, " B"]
  tokens: Any


class GuidedSampler(struct.PyTreeNode):
  """Draws tokens from guided logits.

  Attributes:
    settings: Of which the guidance is used.
    tokens: Draws from logits.
    longest: Tokens of a row at most, where guidance follows the share that is drawn.
    stop_tokens: Tokens that end a row, which has a code before them.
  """

  settings: SolverSettings
  tokens: TokenSampler
  longest: Any
  stop_tokens: Any

  def init(self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"]) -> RowState:
    return RowState(jnp.zeros_like(lengths), self.tokens.init(prompts, lengths))

  def __call__(
    self, features: Features, row_state: RowState, keys: Key[Array, " B"]
  ) -> tuple[Draw, RowState]:
    count, logits = row_state.count + 1, features.logits
    if features.null_logits is not None:
      scale = self.settings.scale(jnp.minimum(count / self.longest, 1.0))
      logits = ops.guide(logits, features.null_logits, scale)
    ends = jnp.isin(jnp.arange(logits.shape[1]), self.stop_tokens)
    logits = jnp.where((count == 1)[:, None] & ends, -jnp.inf, logits)
    drawn, tokens = self.tokens(logits, row_state.tokens, keys)
    return drawn, RowState(count, tokens)


def generate_codes(
  model: LanguageModel,
  params: Params,
  prompts: Sequence[np.ndarray],
  codes: CodeTokens,
  *,
  bos_id: int,
  key: Key[Array, ""] | Key[Array, " B"],
  max_codes: int,
  settings: SolverSettings,
  tokens: TokenSampler | None = None,
  end: int | None = None,
  guided: bool | None = None,
) -> list[Int[np.ndarray, " n"]]:
  """Draws codes behind prompts, in one compiled program.

  Args:
    model: The model.
    params: Its parameters.
    prompts: Tokens of each row, at least one.
    codes: The vocabulary.
    bos_id: The token that begins texts.
    key: As in `generate`.
    max_codes: Codes of a row; at most so many, and one at least, where it may end.
    settings: Of which the guidance is used, and the temperature, which divides logits.
    tokens: Draws tokens, in the place of that temperature.
    end: The token that ends a row; no row ends early if `None`.
    guided: Whether the null stream runs; if `None`, where `settings.guidance` is not 1.

  Raises:
    ValueError: a prompt is empty or is no part of the vocabulary, or the model is too short.
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  if max_codes < 1 or not len(prompts) or lengths.min() < 1:
    raise ValueError(f"rows need a prompt of a token at least, and {max_codes=} to be positive")
  width, limit, num_items = int(lengths.max()), model.config.context_limit, max_codes + bool(end)
  if limit is not None and width + num_items > limit:
    raise ValueError(f"a prompt of {width} tokens and {max_codes=} exceed the context of {limit}")
  rows = np.stack([np.pad(p, (0, width - len(p))) for p in prompts]).astype(np.int32)
  if not 0 <= rows.min() <= rows.max() < codes.vocab_size:
    raise ValueError(f"prompts are not all in a vocabulary of {codes.vocab_size} tokens")
  keys = loop.row_keys(key, np.arange(len(prompts))) if key.ndim == 0 else key
  guided = float(settings.guidance) != 1.0 if guided is None else guided
  stops = () if end is None else (end,)
  ban = LogitBias.ban(sorted(set(range(codes.first)) - set(stops)), codes.vocab_size)
  sampler = TokenSampler((Temperature(settings.temperature),)) if tokens is None else tokens
  sampler = sampler.replace(filters=(ban, *sampler.filters))
  stops = np.asarray(stops, np.int32)
  sampler = GuidedSampler(settings, sampler, np.int32(max_codes), stops)
  config, params = unstack(model.config, params)
  stepper = GuidedStepper(LanguageModel(config), params, codes.null_of(bos_id), stops, guided)
  sizes = dict(capacity=width + num_items, num_items=num_items)
  args = (stepper, sampler, jnp.asarray(rows), jnp.asarray(lengths), keys, num_items)
  generated, _ = loop.begin(*args, **sizes)
  drawn = zip(np.asarray(generated.tokens), np.asarray(generated.lengths), strict=True)
  # Where rows end, the last token is no code; where they do not, the one too many is dropped.
  return [row[:n][row[:n] >= codes.first][:max_codes] - codes.first for row, n in drawn]
