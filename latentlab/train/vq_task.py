"""Training of a language model on a tokenizer's codes, beside LatentLM on its latents."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from latentlab import sample
from latentlab.data import Data
from latentlab.models import flops_per_token, registry
from latentlab.models.language_model import LanguageModel
from latentlab.models.latentlm import SpecialTokens
from latentlab.sample.codes import CodeTokens, generate_codes
from latentlab.train import latent_rows, media_sample
from latentlab.train import latents as latents_lib
from latentlab.train.latent_rows import LatentRowsTask
from latentlab.train.task import Batch, LossTerms
from latentlab.typing import Array, Float, Int, Key, Params


@dataclasses.dataclass(frozen=True)
class VQTask(LatentRowsTask):
  """Next-token prediction over documents whose latents are codes.

  Batches are those of `data.mixed`; in a run of latents, a code's token is the target.

  Attributes:
    codes: The vocabulary.
    modality: Name of the latents.
    num_codes: Codes of a run, where all are alike; `None` where runs end with a token.
  """

  codes: CodeTokens
  modality: str
  num_codes: int | None

  def init(self, key: Key[Array, ""]) -> Params:
    return self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

  @property
  def flops_per_item(self) -> float:
    return 3 * flops_per_token(self.model.config, self.seq_length)

  def generator(self, params: Params, data: Data) -> "Generator":
    """Draws from the model with these parameters."""
    return Generator(self, params, data)

  def check_sample(self, data: Data) -> None:
    super().check_sample(data)
    if not self.config.sample.temperature > 0:
      raise ValueError(
        f"config.sample.temperature={self.config.sample.temperature} divides the logits of codes, "
        "and must be positive."
      )

  def loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> LossTerms:
    return latent_rows.mean_loss("tokens", *self.sums(params, batch, key))

  def sums(
    self, params: Params, batch: Batch, key: Key[Array, ""], *, deterministic: bool = False
  ) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]]]:
    """Summed cross-entropy of `tokens`, codes among them, and their number.

    Args:
      params: Parameters.
      batch: Of `data.mixed`.
      key: Of prompts left out, and of what training drops.
      deterministic: Whether nothing is dropped.
    """
    drop_key, dropout_key = jax.random.split(key)
    inputs, targets, weights = self.rows(batch)
    if self.config.latents.prompt_dropout and not deterministic:
      dropped = latent_rows.dropped_prompts(batch, self.config.latents.prompt_dropout, drop_key)
      inputs = jnp.where(dropped, self.codes.special.null, inputs)
    nll = self.model.apply(
      {"params": params},
      inputs,
      targets,
      segment_ids=batch["segment_ids"],
      deterministic=deterministic,
      rngs={"dropout": dropout_key},
      method="token_losses",
    )
    return {"tokens": jnp.where(weights > 0, nll * weights, 0.0).sum()}, {"tokens": weights.sum()}

  @property
  def special(self) -> SpecialTokens:
    return self.codes.special

  def text_losses(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """What each target costs in nats."""
    inputs, targets, _ = self.rows(batch)
    options = dict(segment_ids=batch["segment_ids"], method="token_losses")
    return self.model.apply({"params": params}, inputs, targets, **options)

  def rows(self, batch: Batch) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Float[Array, "B T"]]:
    """Tokens that are read, those to be predicted, and their weights."""
    here, following = batch["kinds"] > 0, batch["next_kinds"] > 0
    codes = [self.codes.first + batch[f"{n}/{self.modality}"] for n in ("codes", "next_codes")]
    inputs = jnp.where(here, codes[0], batch["inputs"])
    targets = jnp.where(following, codes[1], batch["targets"])
    return inputs, targets, jnp.where(following, 1.0, batch["weights"])


class Generator(media_sample.Generator):
  """A trained model of codes with their tokenizer."""

  def runs(self, prompts, settings, keys, **options):
    task = self.task
    end = None if task.num_codes else task.codes.special.end(0)
    drawn = generate_codes(
      task.model,
      self.params,
      prompts,
      task.codes,
      bos_id=self.data.tokenizer.bos_id,
      key=keys,
      max_codes=task.num_codes or self.longest,
      settings=settings,
      end=end,
      **options,
    )
    rows = [np.pad(run, (0, self.longest - len(run))) for run in drawn]
    vectors = self.tokenizer.code_vectors(np.stack(rows).astype(np.int32))
    runs = [x[: len(run)] for x, run in zip(vectors, drawn, strict=True)]
    return runs, [""] * len(prompts)

  def captions(
    self,
    media: Float[np.ndarray, "B ..."],
    key: Key[Array, ""],
    max_tokens: int,
    tokens: sample.TokenSampler | None = None,
  ) -> list[str]:
    """Texts of media, of which the model reads the codes; as `LatentGenerator.captions`."""
    codes = self.task.codes
    found = np.asarray(self.tokenizer.codes(media))
    prompts = np.tile(self.caption_prompt(found.shape[1]), (len(found), 1))
    prompts[prompts == codes.special.latent(0)] = codes.first + found.ravel()
    drawn = sample.generate(
      self.task.model,
      self.params,
      prompts,
      sampler=media_sample.text_sampler(codes.special.text_vocab_size, codes.vocab_size, tokens),
      key=key,
      max_new_tokens=max_tokens,
      stop_tokens=(self.data.tokenizer.bos_id,),
    )
    return self.texts(drawn)


def build(config: ml_collections.ConfigDict, summary: Mapping[str, Any]) -> VQTask:
  """The task that a config describes, given what its data is (`LatentData.summary`).

  Raises:
    ValueError: a field is unknown or bad, or the tokenizer has no codes.
  """
  latent_rows.check_latents(config)
  stop, condition = config.latents.stop, config.data.condition
  if not summary.get("codebook_size"):
    raise ValueError(
      f"config.task.type='vq' is of codes, and the tokenizer of config.data.tokenizer_run="
      f"{config.data.tokenizer_run!r} has none; train one with config.model.bottleneck='vq'."
    )
  if stop not in ("fixed", "token") or (stop == "fixed" and not summary["equal_lengths"]):
    raise ValueError(
      f"config.latents.stop={stop!r} of codes must be 'token', or 'fixed' where all runs are alike."
    )
  classes = latents_lib.has_classes(condition)
  num_classes = (summary["num_classes"] if condition == "class" else 1) * classes
  special = SpecialTokens(summary["text_vocab_size"], 1, num_classes)
  codes = CodeTokens(special, summary["codebook_size"])
  language = registry.build_config(config.model.to_dict(), vocab_size=codes.vocab_size)
  num_codes = summary["num_latents"] if stop == "fixed" else None
  config = latent_rows.built(config, summary)
  return VQTask(LanguageModel(language), config, codes, config.data.modality, num_codes)
