"""The text that a language model's training ends with, as `config.sample` describes it."""

import logging

import jax
import jax.numpy as jnp
import ml_collections

from latentlab import sample
from latentlab.data import Tokenizer
from latentlab.models import LanguageModel
from latentlab.typing import Params

logger = logging.getLogger(__name__)


def check(config: ml_collections.ConfigDict, model: LanguageModel, tokenizer: Tokenizer) -> None:
  """Raises a `ValueError` where `config.sample` asks for what `model` cannot draw."""
  c = config.sample
  if c.num_tokens < 0:
    raise ValueError(f"config.sample.num_tokens={c.num_tokens} must not be negative; 0 draws none.")
  if not c.num_tokens:
    return
  if c.temperature <= 0:
    raise ValueError(
      f"config.sample.temperature={c.temperature} must be positive; 0.01 all but "
      "takes the best token, which experiments/generate.py --greedy does."
    )
  _sampler(config)
  limit, length = model.config.context_limit, 1 + len(tokenizer.encode(c.prompt))
  if limit is not None and length + c.num_tokens > limit:
    raise ValueError(
      f"config.sample.prompt has {length} tokens with <bos>, and together with "
      f"config.sample.num_tokens={c.num_tokens} exceeds the model's context of "
      f"{limit}; shorten one of them."
    )


def show(
  config: ml_collections.ConfigDict, model: LanguageModel, params: Params, tokenizer: Tokenizer
) -> None:
  """Streams a sample to the terminal."""
  c = config.sample
  if not c.num_tokens:
    return
  if jax.process_count() > 1:
    logger.info("No sample here, where a run has several hosts: use experiments.generate.")
    return
  print(f"\nA sample (temperature {c.temperature}, top-p {c.top_p}):\n\n{c.prompt}", end="")
  for (piece,) in sample.stream_text(
    model,
    params,
    tokenizer,
    [c.prompt],
    sampler=_sampler(config),
    key=sample.row_keys(config.seed, jnp.arange(1)),
    max_new_tokens=c.num_tokens,
  ):
    print(piece.text, end="", flush=True)
  print()


def _sampler(config: ml_collections.ConfigDict) -> sample.TokenSampler:
  c = config.sample
  try:
    return sample.token_sampler(temperature=c.temperature, top_p=c.top_p)
  except ValueError as e:
    raise ValueError(
      f"config.sample.temperature={c.temperature}, config.sample.top_p={c.top_p}: {e}."
    ) from e
