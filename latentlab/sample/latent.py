"""Sampling of a LatentLM: rows that switch between tokens and latents, in the one sampling loop.

LatentLM, section 3.3 (https://arxiv.org/abs/2412.08635). Guidance runs two streams of the model in
one batch, each with a cache of its own and both fed the same items: the one of the prompt, and one
of a prompt whose tokens are left out.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from latentlab.layers.latent_heads import SolverSettings
from latentlab.models import init_cache, unstack
from latentlab.models.latentlm import Items, LatentLM, LatentLMConfig, ModalityConfig
from latentlab.sample import loop
from latentlab.sample.logits import LogitBias, TokenSampler, token_sampler
from latentlab.sample.protocol import Cache, Draw
from latentlab.typing import Array, Bool, Float, Int, Key, Params


@struct.dataclass
class Item:
  """What a step draws.

  Attributes:
    token: A token; for a latent, what stands in for it.
    kind: 0 for a token, `1 + m` for a latent of modality `m`.
    latents: By modality, normalised; zeros where it is none.
    last: Whether the row ends with it.
  """

  token: Int[Array, " B"]
  kind: Int[Array, " B"]
  latents: Mapping[str, Float[Array, "B _"]]
  last: Bool[Array, " B"]


@struct.dataclass
class Prompts:
  """What rows begin with.

  Attributes:
    items: Of the prompts, padded on the right.
    null_tokens: The tokens with those left out that guidance leaves out.
  """

  items: Items
  null_tokens: Int[Array, "B T"]


@struct.dataclass
class Features:
  """What the next item is drawn from.

  Attributes:
    hidden: Hidden vectors.
    null_hidden: Those of the null condition, under guidance.
    logits: Scores of tokens, where any may come.
  """

  hidden: Float[Array, "B D"]
  null_hidden: Float[Array, "B D"] | None
  logits: Float[Array, "B vocab"] | None


class LatentStepper(struct.PyTreeNode):
  """A LatentLM as the loop sees it.

  Attributes:
    model: The model.
    params: Its parameters.
    guided: Whether the stream of the null condition runs beside that of the prompt.
    tokens: Whether tokens may come at all, so that their scores are wanted.
    pad: What finished rows emit.
  """

  model: LatentLM = struct.field(pytree_node=False)
  params: Params
  guided: bool = struct.field(pytree_node=False, default=False)
  tokens: bool = struct.field(pytree_node=False, default=True)
  pad: Any = 0

  def prefill(
    self, prompts: Prompts, lengths: Int[Array, " B"], capacity: int
  ) -> tuple[Features, Cache]:
    streams = 2 if self.guided else 1
    cache = init_cache(self.model.config.language, streams * len(lengths), capacity)
    return self._read(prompts, lengths, cache, fresh=True)

  def extend(
    self, prompts: Prompts, lengths: Int[Array, " B"], cache: Cache
  ) -> tuple[Features, Cache]:
    return self._read(prompts, lengths, cache, fresh=False)

  def step(self, item: Item, cache: Cache) -> tuple[Features, Cache]:
    row = jax.tree.map(lambda x: x[:, None], (item.token, item.kind, dict(item.latents)))
    return self._run(self._streams(Items(*row), row[0]), None, cache)

  def ends(self, item: Item) -> Bool[Array, " B"]:
    return item.last

  def _read(self, prompts: Prompts, lengths, cache, fresh: bool) -> tuple[Features, Cache]:
    lengths = jnp.concatenate([lengths, lengths]) if self.guided else lengths
    return self._run(self._streams(prompts.items, prompts.null_tokens), lengths, cache, fresh)

  def _streams(self, items: Items, null_tokens: Int[Array, "B T"]) -> Items:
    if not self.guided:
      return items
    null = items.replace(tokens=null_tokens)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), items, null)

  def _run(self, items: Items, lengths, cache, fresh: bool = False) -> tuple[Features, Cache]:
    apply = functools.partial(self.model.apply, {"params": self.params})
    options = dict(lengths=lengths, cache=cache, fresh=fresh, last_only=True)
    hidden, cache = apply(items, **options, method="hidden")
    hidden, null_hidden = hidden[:, 0], None
    if self.guided:
      hidden, null_hidden = jnp.split(hidden, 2)
    logits = apply(hidden, method="logits") if self.tokens else None
    return Features(hidden, null_hidden, logits), cache


@struct.dataclass
class RowState:
  """Where rows are.

  Attributes:
    kind: 0 where a token comes next, `1 + m` where a latent of modality `m` may.
    count: Latents of the run that a row is in.
    tokens: The token sampler's.
  """

  kind: Int[Array, " B"]
  count: Int[Array, " B"]
  tokens: Any


class LatentSampler(struct.PyTreeNode):
  """Draws tokens from the softmax and latents from their heads; decides where runs end.

  Attributes:
    model: The model.
    params: Its parameters, of which heads are used.
    settings: Of the heads.
    tokens: Draws tokens, where any may come; `None` where none may.
    stop_tokens: Tokens that end a row.
    ends_with_run: Whether a row ends with its first run of latents.
    min_latents: Latents of a run at least.
    max_latents: Latents of a run at most.
    threshold: Probability above which a run ends, where it is the model's to say.
  """

  model: LatentLM = struct.field(pytree_node=False)
  params: Params
  settings: SolverSettings
  tokens: TokenSampler | None
  stop_tokens: Any
  min_latents: Any
  max_latents: Any
  threshold: Any = 0.5
  ends_with_run: bool = struct.field(pytree_node=False, default=True)

  def init(self, prompts: Prompts, lengths: Int[Array, " B"]) -> RowState:
    items, special = prompts.items, self.model.config.tokens
    last = jnp.take_along_axis(items.tokens, lengths[:, None] - 1, axis=1)[:, 0]
    kind = jnp.take_along_axis(items.kinds, lengths[:, None] - 1, axis=1)[:, 0]
    for i in range(len(self.model.config.modalities)):
      kind = jnp.where(last == special.begin(i), i + 1, kind)
    if self.model.config.num_classes:  # Behind a class, latents come at once.
      kind = jnp.where((last >= special.class_token(0)) & (kind == 0), 1, kind)
    # Latents at the end of a prompt are the beginning of its run.
    places = jnp.arange(items.kinds.shape[1])
    valid = places < lengths[:, None]
    other = jnp.where(valid & (items.kinds != kind[:, None]), places, -1).max(axis=1)
    count = jnp.where(kind > 0, lengths - 1 - other, 0).astype(jnp.int32)
    tokens = () if self.tokens is None else self.tokens.init(items.tokens, lengths)
    return RowState(kind.astype(jnp.int32), count, tokens)

  def __call__(
    self, features: Features, row_state: RowState, keys: Key[Array, " B"]
  ) -> tuple[Draw, RowState]:
    special, rows = self.model.config.tokens, len(row_state.kind)
    token, log_prob, tokens = jnp.zeros(rows, jnp.int32), jnp.zeros(rows), row_state.tokens
    if self.tokens is not None:
      drawn, tokens = self.tokens(features.logits, row_state.tokens, _fold(keys, 0))
      token, log_prob = drawn.item, jnp.where(row_state.kind == 0, drawn.log_prob, 0.0)
    last = (row_state.kind == 0) & jnp.isin(token, self.stop_tokens)
    kind, count, latents = jnp.zeros(rows, jnp.int32), row_state.count, {}
    following = jnp.where(row_state.kind == 0, 0, row_state.kind)
    for i, m in enumerate(self.model.config.modalities):
      inside = row_state.kind == i + 1
      over = inside & self._is_over(m, i, features, count)
      here = inside & ~over
      latents[m.name] = self._draw(m, features, here, count, _fold(keys, i + 1))
      token = jnp.where(here, special.latent(i), jnp.where(over, special.end(i), token))
      kind = jnp.where(here, i + 1, kind)
      full = m.stop == "fixed" and self.ends_with_run
      done = over | (here & (count + 1 >= m.num_latents) if full else False)
      last = last | (done & self.ends_with_run)
      following = jnp.where(over, 0, following)
      opened = (row_state.kind == 0) & (token == special.begin(i))
      following = jnp.where(opened, i + 1, following)
    count = jnp.where(kind > 0, count + 1, 0)
    item = Item(token, kind, latents, last)
    return Draw(item, log_prob), RowState(following, count, tokens)

  def _is_over(
    self, m: ModalityConfig, number: int, features: Features, count: Int[Array, " B"]
  ) -> Bool[Array, " B"]:
    """Rows whose run has no further latent."""
    special = self.model.config.tokens
    if m.stop == "fixed":
      return count >= m.num_latents
    if m.stop == "token":
      log_odds = (
        features.logits[:, special.end(number)] - features.logits[:, special.latent(number)]
      )
    else:
      log_odds = self.model.apply(
        {"params": self.params}, m.name, features.hidden, method="stop_logits"
      )
    wanted = jax.nn.sigmoid(log_odds) > self.threshold
    return (wanted & (count >= self.min_latents)) | (count >= self.max_latents)

  def _draw(
    self,
    m: ModalityConfig,
    features: Features,
    here: Bool[Array, " B"],
    count: Int[Array, " B"],
    keys: Key[Array, " B"],
  ) -> Float[Array, "B Z"]:
    """Latents of rows that are in a run of `m`; the head rests where no row is."""
    longest = m.num_latents or self.max_latents
    progress = jnp.minimum((count + 1) / longest, 1.0)

    def draw(features):
      args = (m.name, features.hidden, features.null_hidden, keys, self.settings, progress)
      return self.model.apply({"params": self.params}, *args, method="draw")

    def rest(features):
      return jnp.zeros((len(here), m.dim), jnp.float32)

    drawn = jax.lax.cond(here.any(), draw, rest, features)
    return jnp.where(here[:, None], drawn, 0.0)


def unstacked(model: LatentLM, params: Params) -> tuple[LatentLM, Params]:
  """The same model, its decoder's layers each on their own; see `models.unstack`."""
  language, part = unstack(model.config.language, params["language"])
  config = LatentLMConfig(
    language, model.config.modalities, model.config.text_vocab_size, model.config.num_classes
  )
  return LatentLM(config), dict(params) | {"language": part}


def generate_items(
  model: LatentLM,
  params: Params,
  prompts: Sequence[Items],
  *,
  key: Key[Array, ""] | Key[Array, " B"],
  max_items: int,
  settings: SolverSettings,
  tokens: TokenSampler | None = None,
  guided: bool | None = None,
  ends_with_run: bool = True,
  min_latents: int = 0,
  max_latents: int | None = None,
  threshold: float = 0.5,
  stop_tokens: Sequence[int] = (),
) -> loop.Generated:
  """Continues prompts with tokens and latents, in one compiled program.

  Args:
    model: The model.
    params: Its parameters.
    prompts: One for each row, items of shape `[n]` and at least one of them; see `prompt_items`. A
      run of latents at a prompt's end is the beginning of the row's own, and goes on.
    key: As in `generate`.
    max_items: Items to draw at most.
    settings: How heads draw.
    tokens: How tokens are drawn; as they come if `None`.
    guided: Whether guidance runs its second stream; if `None`, where `settings.guidance` is not 1.
    ends_with_run: Whether rows end with their first run of latents.
    min_latents: Latents of a run at least, where the model ends it.
    max_latents: Latents of a run at most; `max_items` if `None`.
    threshold: See `LatentSampler`.
    stop_tokens: Tokens that end a row.

  Returns:
    Items, `tokens` of which are an `Item` of arrays `[B, n, ...]`; latents are normalised.

  Raises:
    ValueError: a prompt is empty, or does not fit.
  """
  stepper, sampler, arrays, capacity = _prepare(
    model,
    params,
    prompts,
    key,
    max_items,
    settings,
    tokens=tokens,
    guided=guided,
    ends_with_run=ends_with_run,
    min_latents=min_latents,
    max_latents=max_latents,
    threshold=threshold,
    stop_tokens=stop_tokens,
  )
  sizes = dict(capacity=capacity, num_items=max_items)
  generated, _ = loop.begin(stepper, sampler, *arrays, max_items, **sizes)
  return generated


def stream_items(
  model: LatentLM,
  params: Params,
  prompts: Sequence[Items],
  *,
  key: Key[Array, ""] | Key[Array, " B"],
  max_items: int,
  settings: SolverSettings,
  block_size: int = 8,
  **options: Any,
) -> Iterator[loop.Generated]:
  """`generate_items` in blocks of `block_size` items, equal to it item by item.

  Two programs are compiled, for the first block and for all others. The last block may be shorter.
  Arguments are checked at once, not at the first block.

  Args:
    model: As in `generate_items`, and the next five.
    params: Parameters.
    prompts: One for each row.
    key: A key, or one per row.
    max_items: Items to draw at most.
    settings: How heads draw.
    block_size: Items of a block.
    **options: Others of `generate_items`.
  """
  if block_size < 1:
    raise ValueError(f"{block_size=} must be at least 1")
  parts = _prepare(model, params, prompts, key, max_items, settings, **options)
  stepper, sampler, arrays, capacity = parts
  return loop.blocks(stepper, sampler, arrays, max_items, capacity, block_size=block_size)


def _prepare(
  model: LatentLM,
  params: Params,
  prompts: Sequence[Items],
  key: Key[Array, ""] | Key[Array, " B"],
  max_items: int,
  settings: SolverSettings,
  *,
  tokens: TokenSampler | None = None,
  guided: bool | None = None,
  ends_with_run: bool = True,
  min_latents: int = 0,
  max_latents: int | None = None,
  threshold: float = 0.5,
  stop_tokens: Sequence[int] = (),
) -> tuple[LatentStepper, LatentSampler, tuple[Prompts, Array, Array], int]:
  """What the loop is given for the arguments of `generate_items`, and the room of its cache."""
  c = model.config
  if max_items < 1:
    raise ValueError(f"{max_items=} must be at least 1")
  lengths = np.array([len(p.tokens) for p in prompts], np.int32)
  if not len(prompts) or lengths.min() < 1:
    raise ValueError("every row needs a prompt of an item at least: a class, or <bos>")
  limit, width = c.context_limit, int(lengths.max())
  if limit is not None and width + max_items > limit:
    raise ValueError(f"a prompt of {width} items and {max_items=} exceed the context of {limit}")
  keys = loop.row_keys(key, np.arange(len(prompts))) if key.ndim == 0 else key
  batch = _batch(c, prompts, width)
  guided = float(settings.guidance) != 1.0 if guided is None else guided
  # Only rows that begin in a run and end with it never see a token.
  in_runs = all(_opens(c, int(p.tokens[-1])) or int(p.kinds[-1]) for p in prompts)
  text = not (ends_with_run and in_runs)
  wants_scores = text or any(m.stop == "token" for m in c.modalities)
  model, params = unstacked(model, params)
  stepper = LatentStepper(model, params, guided=guided, tokens=wants_scores)
  sampler = LatentSampler(
    model,
    params,
    settings,
    text_sampler(c, tokens) if text else None,
    np.asarray(stop_tokens, np.int32),
    np.int32(min_latents),
    np.int32(max_items if max_latents is None else max_latents),
    np.float32(threshold),
    ends_with_run,
  )
  return stepper, sampler, (batch, jnp.asarray(lengths), keys), width + max_items


def text_sampler(config: LatentLMConfig, sampler: TokenSampler | None) -> TokenSampler:
  """A sampler that never draws what is no text, except for the tokens that open a run."""
  special = config.tokens
  openers = {special.begin(i) for i in range(len(config.modalities))}
  banned = set(range(special.text_vocab_size, special.vocab_size)) - openers
  ban = LogitBias.ban(sorted(banned), special.vocab_size)
  sampler = token_sampler() if sampler is None else sampler
  return sampler.replace(filters=(ban, *sampler.filters))


def prompt_items(
  config: LatentLMConfig, tokens: np.ndarray, latents: Mapping[str, np.ndarray] | None = None
) -> Items:
  """A prompt of tokens, with normalised latents where tokens stand in for some.

  Args:
    config: Of the model.
    tokens: The tokens, `[n]`.
    latents: By modality, the latents in their order.

  Raises:
    ValueError: there are more or fewer latents than places for them, or no such token.
  """
  tokens = np.asarray(tokens, np.int32)
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.tokens.vocab_size:
    raise ValueError(f"{tokens=} are not all in a vocabulary of {config.tokens.vocab_size}")
  kinds, placed = np.zeros(len(tokens), np.int32), {}
  for i, m in enumerate(config.modalities):
    places = tokens == config.tokens.latent(i)
    given = np.zeros((0, m.dim)) if latents is None or m.name not in latents else latents[m.name]
    if given.shape != (places.sum(), m.dim):
      raise ValueError(
        f"the prompt has {places.sum()} places for latents of {m.name!r} with {m.dim} channels, "
        f"and {given.shape=}"
      )
    kinds[places] = i + 1
    placed[m.name] = np.zeros((len(tokens), m.dim), np.float32)
    placed[m.name][places] = given
  return Items(tokens, kinds, placed)


def begun(
  config: LatentLMConfig, tokens: np.ndarray, latents: np.ndarray, number: int = 0
) -> Items:
  """A prompt whose run has begun: normalised latents of a modality `[n Z]` behind its tokens.

  Raises:
    ValueError: latents do not come behind such tokens.
  """
  tokens, name = np.asarray(tokens), config.modalities[number].name
  if not (tokens.size and _opens(config, int(tokens[-1]))):
    raise ValueError(f"{tokens=} open no run of latents; end them with a class, or with <begin>")
  run = np.full(len(latents), config.tokens.latent(number))
  return prompt_items(config, np.concatenate([tokens, run]), {name: latents})


def drawn_latents(generated: loop.Generated, name: str, number: int = 0) -> list[np.ndarray]:
  """The latents of each row, `[n Z]`, normalised."""
  item = jax.device_get(generated.tokens)
  lengths = np.asarray(generated.lengths)
  rows = []
  for kinds, latents, length in zip(item.kind, item.latents[name], lengths, strict=True):
    rows.append(latents[:length][kinds[:length] == number + 1])
  return rows


def drawn_tokens(generated: loop.Generated) -> list[np.ndarray]:
  """The tokens of each row, without what stands in for latents."""
  item = jax.device_get(generated.tokens)
  lengths = np.asarray(generated.lengths)
  rows = zip(item.kind, item.token, lengths, strict=True)
  return [tokens[:length][kinds[:length] == 0] for kinds, tokens, length in rows]


def _fold(keys: Key[Array, " B"], number: int) -> Key[Array, " B"]:
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)


def _opens(config: LatentLMConfig, token: int) -> bool:
  special = config.tokens
  begins = [special.begin(i) for i in range(len(config.modalities))]
  first_class = special.vocab_size - config.num_classes
  return token in begins or token >= first_class


def _batch(config: LatentLMConfig, prompts: Sequence[Items], width: int) -> Prompts:
  def padded(x: np.ndarray) -> np.ndarray:
    return np.pad(x, [(0, width - len(x)), *[(0, 0)] * (x.ndim - 1)])

  items = jax.tree.map(lambda *xs: jnp.asarray(np.stack([padded(x) for x in xs])), *prompts)
  nulls = [null_tokens(config, p) for p in prompts]
  return Prompts(items, jnp.asarray(np.stack([padded(x) for x in nulls])))


def null_tokens(config: LatentLMConfig, prompt: Items) -> np.ndarray:
  """The prompt's tokens with its text, or its class, left out.

  What frames a prompt stays: its first token, where it is no class, and what opens a run.
  """
  special, tokens = config.tokens, np.asarray(prompt.tokens)
  is_class = tokens >= special.vocab_size - config.num_classes
  is_text = (tokens < special.text_vocab_size) & (np.arange(len(tokens)) > 0)
  return np.where(is_class | is_text, special.null, tokens).astype(np.int32)
