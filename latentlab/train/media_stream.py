"""Sounds while they are drawn: a block of latents, and the samples that it completes.

A causal tokenizer needs nothing of what comes later (LatentLM, section 2.4,
https://arxiv.org/abs/2412.08635), so that its decoder follows the sampler block by block, and what
it has made can be heard. Two programs draw, and one decodes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from latentlab import sample
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.tokenizer_bodies import SpeechBody
from latentlab.sample import latent
from latentlab.train.media_sample import Generator, LatentGenerator
from latentlab.typing import Array, Key


def can_stream(generator: Generator) -> bool:
  """Whether latents come one after another, and a causal decoder makes sounds of them."""
  body = generator.tokenizer.model.config.body
  return isinstance(generator, LatentGenerator) and isinstance(body, SpeechBody)


def stream(
  generator: LatentGenerator,
  prompts: Sequence[np.ndarray],
  settings: SolverSettings,
  key: Key[Array, ""],
  *,
  block_size: int = 8,
  **options: Any,
) -> Iterator[list[np.ndarray]]:
  """Draws what `generator` draws for these arguments, all rows in one batch, in pieces.

  Args:
    generator: A trained model.
    prompts: Tokens, each of which opens a run; see `data.mixed.Documents.prompt`.
    settings: How latents are drawn.
    key: Random key.
    block_size: Latents of a piece.
    **options: Of `sample.latent.generate_items`.

  Returns:
    An iterator over blocks: of each row the samples `[S, 1]` that the block adds, none once its run
    has ended.

  Raises:
    ValueError: the model draws no sounds, or not one latent after another.
  """
  if not can_stream(generator):
    raise ValueError(
      f"a {type(generator).__name__} with a {type(generator.tokenizer.model.config.body).__name__} "
      "streams nothing; a LatentGenerator of sounds does."
    )
  task, options = generator.task, generator.limits | options
  items = [latent.prompt_items(task.model.config, p) for p in prompts]
  keys = sample.row_keys(key, np.arange(len(prompts)))
  blocks = latent.stream_items(
    task.model,
    generator.params,
    items,
    settings=settings,
    key=keys,
    block_size=min(block_size, options["max_items"]),
    **options,
  )
  return _decoded(generator, blocks, len(prompts), min(block_size, options["max_items"]))


def _decoded(
  generator: LatentGenerator, blocks: Iterator[sample.Generated], num_rows: int, block_size: int
) -> Iterator[list[np.ndarray]]:
  tokenizer, name = generator.tokenizer, generator.task.modality.name
  hop, dim = tokenizer.model.config.body.hop, tokenizer.model.config.dim
  cache = tokenizer.model.config.init_decode_cache(num_rows)
  for block in blocks:
    # Latents come first in every row: its prompt opens a run, and it ends with it.
    runs = latent.drawn_latents(block, name, generator.task.number)
    padded = np.zeros((num_rows, block_size, dim), np.float32)
    for row, run in zip(padded, runs, strict=True):
      row[: len(run)] = run
    samples, cache = tokenizer.decode_step(generator.denormalize(padded), cache)
    yield [row[: len(run) * hop] for row, run in zip(samples, runs, strict=True)]
