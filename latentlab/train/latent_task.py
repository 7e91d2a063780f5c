"""Training of a LatentLM: cross-entropy of tokens and the heads' losses of latents.

`L = L_LM + w L_latents` (https://arxiv.org/abs/2412.08635, section 3.2), each a mean over all
targets of its kind in the step, however the batch was cut. Each of several modalities has a term
and a weight of its own.
"""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from latentlab.data import Data
from latentlab.layers.diffusion_head import Diffusion, DiffusionHeadConfig
from latentlab.layers.latent_heads import MixtureHeadConfig, RegressionHeadConfig
from latentlab.layers.mar_head import MarHeadConfig
from latentlab.models import flops_per_token, registry
from latentlab.models.latentlm import (
  Items,
  LatentLM,
  LatentLMConfig,
  ModalityConfig,
  SpecialTokens,
  empty_items,
)
from latentlab.ops.latents import Noise
from latentlab.train import latent_rows, media_sample
from latentlab.train import latents as latents_lib
from latentlab.train.latent_rows import LatentRowsTask
from latentlab.train.task import Batch, LossTerms
from latentlab.typing import Array, Bool, Float, Key, Params

HEADS = {
  "diffusion": DiffusionHeadConfig,
  "mar": MarHeadConfig,
  "mixture": MixtureHeadConfig,
  "regression": RegressionHeadConfig,
}


@dataclasses.dataclass(frozen=True)
class LatentLMTask(LatentRowsTask):
  """Next-item prediction over packed documents of tokens and latents.

  Batches are those of `data.mixed`.

  Attributes:
    noises: By modality, what was added to means when the tokenizer drew latents.
    sections: By modality, the fields of `config.latents` that are its own.
    number: The modality that samples are of.
  """

  noises: Mapping[str, Noise]
  sections: Mapping[str, ml_collections.ConfigDict]
  number: int = 0

  def init(self, key: Key[Array, ""]) -> Params:
    return self.model.init(key, empty_items(self.model.config))["params"]

  @property
  def modality(self) -> ModalityConfig:
    return self.model.config.modalities[self.number]

  def of(self, modality: str) -> "LatentLMTask":
    """The same task, whose samples and config are of this modality of `data.modalities` alone."""
    names = [m.name for m in self.model.config.modalities]
    if len(names) == 1 and modality == names[0]:
      return self
    config = latents_lib.config_of(self.config, modality)
    return dataclasses.replace(self, config=config, number=names.index(modality))

  @property
  def diffusion(self) -> Diffusion | None:
    return getattr(self.modality.head, "diffusion", None)

  @property
  def flops_per_item(self) -> float:
    language = self.model.config.language
    width, heads = language.decoder.embed_dim, 0.0
    for m in self.model.config.modalities:
      if isinstance(m.head, DiffusionHeadConfig | MarHeadConfig):
        head = m.head.num_draws * m.head.flops_per_row(width, m.dim)
      else:
        head = 2 * m.head.num_params(width, m.dim)
      heads += head * self._capacity(m) / self.seq_length
    return 3 * (flops_per_token(language, self.seq_length) + heads)

  @property
  def scores_tokens(self) -> bool:
    """Whether any target of the softmax is trained on."""
    first, *others = self.model.config.modalities
    classes = latents_lib.has_classes(self.config.data.condition)
    return bool(others) or not classes or first.stop == "token"

  def generator(self, params: Params, data: Data) -> media_sample.LatentGenerator:
    """Draws from the model with these parameters."""
    return media_sample.LatentGenerator(self, params, data)

  def count(self, batch: Batch) -> dict[str, Float[Array, ""]]:
    counts = dict(tokens=batch["weights"].sum())
    for i in range(len(self.noises)):
      counts[self._kind("latents", i)] = (batch["next_kinds"] == i + 1).sum()
      counts[self._kind("stops", i)] = _asks_for_stop(batch, i).sum()
    return {name: x.astype(jnp.float32) for name, x in counts.items()}

  def _kind(self, kind: str, number: int) -> str:
    """What targets of a kind are called: by their modality too, where there are several."""
    several = len(self.model.config.modalities) > 1
    return f"{kind}/{self.model.config.modalities[number].name}" if several else kind

  def loss(
    self, params: Params, batch: Batch, key: Key[Array, ""], counts: Mapping[str, Array]
  ) -> LossTerms:
    sums, weights = self.sums(params, batch, key)
    scales = {
      self._kind("latents", i): self.sections[m.name].loss_weight
      for i, m in enumerate(self.model.config.modalities)
    }
    return latent_rows.joint_loss(sums, weights, counts, scales)

  def sums(
    self, params: Params, batch: Batch, key: Key[Array, ""], *, deterministic: bool = False
  ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
    """Summed losses of `latents`, and of `tokens` and `stops` where there are any; their counts.

    Of several modalities `latents/<name>` and `stops/<name>`.

    Args:
      params: Parameters.
      batch: Of `data.mixed`.
      key: Of the latents' noise, of the heads' draws, and of what training drops.
      deterministic: Whether nothing is dropped.
    """
    noise_key, drop_key, head_key, dropout_key = jax.random.split(key, 4)
    here, following = self.draw_latents(params, batch, noise_key)
    tokens = batch["inputs"]
    if self.config.latents.prompt_dropout and not deterministic:
      dropped = latent_rows.dropped_prompts(batch, self.config.latents.prompt_dropout, drop_key)
      tokens = jnp.where(dropped, self.model.config.tokens.null, tokens)
    apply = functools.partial(self.model.apply, {"params": params})
    hidden, _ = apply(
      Items(tokens, batch["kinds"], here),
      segment_ids=batch["segment_ids"],
      deterministic=deterministic,
      rngs={"dropout": dropout_key},
      method="hidden",
    )
    sums, weights = {}, {}
    for i, m in enumerate(self.model.config.modalities):
      kind, its_key = self._kind("latents", i), _folded(head_key, i)
      sums[kind] = self._latent_sum(apply, hidden, following[m.name], batch, i, its_key)
      weights[kind] = batch["next_kinds"] == i + 1
      if m.stop == "classifier":
        kind = self._kind("stops", i)
        sums[kind] = self._stop_sum(apply, hidden, batch, i)
        weights[kind] = _asks_for_stop(batch, i)
    if self.scores_tokens:
      nll = apply(hidden, batch["targets"], method="token_losses")
      weights["tokens"] = batch["weights"]
      sums["tokens"] = jnp.where(weights["tokens"] > 0, nll * weights["tokens"], 0.0).sum()
    return sums, {name: x.astype(jnp.float32).sum() for name, x in weights.items()}

  @property
  def special(self) -> SpecialTokens:
    return self.model.config.tokens

  def text_losses(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """What each target costs in nats, latents being read as their means."""
    variables = {"params": params}
    here, _ = self.draw_latents(params, batch, jax.random.key(0), as_means=True)
    items = Items(batch["inputs"], batch["kinds"], here)
    options = dict(segment_ids=batch["segment_ids"], method="hidden")
    hidden, _ = self.model.apply(variables, items, **options)
    return self.model.apply(variables, hidden, batch["targets"], method="token_losses")

  def draw_latents(
    self, params: Params, batch: Batch, key: Key[Array, ""], *, as_means: bool = False
  ) -> tuple[dict[str, Float[Array, "B T _"]], dict[str, Float[Array, "B T _"]]]:
    """By modality, normalised latents of the items that are read, and of those to be predicted.

    Args:
      params: Parameters.
      batch: Of `data.mixed`.
      key: Of the noise.
      as_means: Whether nothing is drawn.
    """
    here, following = {}, {}
    for i, (name, noise) in enumerate(self.noises.items()):
      normalize = functools.partial(self.model.apply, {"params": params}, name, method="normalize")
      section = self.sections[name]
      how = ("mean", "mean") if as_means else (section.input, section.target)
      drawn = latent_rows.draw_latents(batch, name, noise, *how, normalize, _folded(key, i))
      here[name], following[name] = drawn
    return here, following

  def _latent_sum(
    self, apply, hidden, following, batch: Batch, number: int, key
  ) -> Float[Array, ""]:
    """Summed losses of a modality's latents to be predicted, for which alone its head is run."""
    m = self.model.config.modalities[number]
    mask = batch["next_kinds"] == number + 1
    capacity = self._capacity(m)
    if capacity < mask.shape[1]:
      places = jnp.argsort(~mask, axis=1, stable=True)[:, :capacity]
      mask = jnp.take_along_axis(mask, places, axis=1)
      hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
      following = jnp.take_along_axis(following, places[..., None], axis=1)
    following = jnp.where(mask[..., None], following, 0.0)
    losses = apply(m.name, hidden, following, key, method="latent_losses")
    return jnp.where(mask, losses, 0.0).sum()

  def _capacity(self, m: ModalityConfig) -> int:
    """Latents that a row holds at most; all its places where that is not known."""
    per_row = self.config.data.documents_per_row
    return m.num_latents * per_row if m.num_latents and per_row else self.seq_length

  def _stop_sum(self, apply, hidden, batch: Batch, number: int) -> Float[Array, ""]:
    name = self.model.config.modalities[number].name
    log_odds = apply(name, hidden, method="stop_logits")
    over = batch["next_kinds"] == 0
    losses = jnp.where(over, jax.nn.softplus(-log_odds), jax.nn.softplus(log_odds))
    return jnp.where(_asks_for_stop(batch, number), losses, 0.0).sum()


def _folded(key: Key[Array, ""], number: int) -> Key[Array, ""]:
  """A key for each modality; the first one's is the key itself."""
  return jax.random.fold_in(key, number) if number else key


def _asks_for_stop(batch: Batch, number: int) -> Bool[Array, "B T"]:
  """Places behind which a latent of a modality may come, or not."""
  return (batch["modes"] == number + 1) & (batch["segment_ids"] > 0)


def build(config: ml_collections.ConfigDict, summary: Mapping[str, Any]) -> LatentLMTask:
  """The task that a config describes, given what its data is (`LatentData.summary`).

  Raises:
    ValueError: a field is unknown or bad.
  """
  classes = latents_lib.has_classes(config.data.condition)
  num_classes = (summary["num_classes"] if config.data.condition == "class" else 1) * classes
  latent_rows.check_latents(config)
  parts = latents_lib.modalities(config)
  summaries = {config.data.modality: summary} | dict(summary.get("others", {}))
  if set(parts) != set(summaries):
    raise ValueError(
      f"the run's latents are of {sorted(summaries)}, and its config has {sorted(parts)}"
    )
  modalities = tuple(
    ModalityConfig(
      name,
      summaries[name]["dim"],
      build_head(part.latents.head.to_dict()),
      summaries[name]["num_latents"] if summaries[name]["equal_lengths"] else None,
      part.latents.stop,
      summaries[name]["mean"],
      summaries[name]["std"],
    )
    for name, part in parts.items()
  )
  tokens = SpecialTokens(summary["text_vocab_size"], len(modalities), num_classes)
  language = registry.build_config(config.model.to_dict(), vocab_size=tokens.vocab_size)
  model = LatentLM(LatentLMConfig(language, modalities, tokens.text_vocab_size, num_classes))
  noises = {name: Noise(**summaries[name]["noise"]) for name in parts}
  sections = {name: part.latents for name, part in parts.items()}
  return LatentLMTask(model, latent_rows.built(config, summary), noises, sections)


def head_fields(kind: str) -> dict[str, type]:
  """The fields of `config.latents.head` beside `kind`, and their types.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind not in HEADS:
    raise ValueError(
      f"config.latents.head.kind={kind!r} is unknown; choose one of {sorted(HEADS)}."
    )
  owners = (HEADS[kind], Diffusion) if kind == "diffusion" else (HEADS[kind],)
  return plain_fields(*owners)


def plain_fields(*owners: type) -> dict[str, type]:
  """Fields of dataclasses that are numbers, switches or names, as a config file has them."""
  hints = {name: t for owner in owners for name, t in typing.get_type_hints(owner).items()}
  plain = {
    n: next((k for k in (int, float, bool, str) if k in (t, *typing.get_args(t))), None)
    for n, t in hints.items()
  }
  return {name: kind for name, kind in plain.items() if kind is not None}


def build_head(fields: Mapping[str, Any]) -> Any:
  """A head's configuration from `config.latents.head`, where `None` is a default.

  Raises:
    ValueError: a kind or field is unknown.
  """
  given = {name: x for name, x in fields.items() if x is not None}
  kind = given.pop("kind", "diffusion")
  known = head_fields(kind)
  if unknown := sorted(set(given) - set(known)):
    raise ValueError(
      f"config.latents.head has fields that kind={kind!r} does not: {unknown}; choose among "
      f"{sorted(known)}."
    )
  own = {f.name for f in dataclasses.fields(HEADS[kind])}
  options = {name: x for name, x in given.items() if name in own}
  if kind == "diffusion":
    levels = {name: x for name, x in given.items() if name not in own}
    options["diffusion"] = Diffusion(**levels)
  return HEADS[kind](**options)
