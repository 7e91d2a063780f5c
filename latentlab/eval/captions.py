"""Texts that a model over latents writes of media, and what it gives the texts of a split.

The small version of how LatentLM's table 3 and figure 8 tell models of text and images apart
(https://arxiv.org/abs/2412.08635). Losses count text alone, over the same targets whatever images
are to the model; captions are the best token each time.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from latentlab import sample
from latentlab.data import Data
from latentlab.eval import metrics
from latentlab.eval.common import add_sums
from latentlab.typing import Params


class Evaluator:
  """Losses of a split's texts, and captions of its media beside all those that they have."""

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    split: str = "validation",
    max_batches: int | None = None,
    max_media: int = 0,
    max_tokens: int = 0,
  ):
    """Checks the fields; nothing is compiled or written before the first run.

    Args:
      task: A model's over latents, with text.
      data: Holds the split; its documents have captions behind media.
      compile: See `runner.Compile`; captions are written on the devices of each process.
      split: Of the data.
      max_batches: How many of its batches losses are of; all if `None` or 0.
      max_media: Of how many media captions are written, the first ones; all if 0.
      max_tokens: Of a caption at most; those of the split's longest, and its end, if 0.
    """
    if not hasattr(task, "text_sums") or not hasattr(task, "text_losses"):
      raise ValueError(
        "captions are of a model over latents with text; config.task.type says which"
      )
    if data.documents.condition not in ("caption", "both"):
      raise ValueError(
        f"data.condition={data.documents.condition!r} trains no captions; set 'caption' or 'both'."
      )
    if not data.summary["equal_lengths"]:
      raise ValueError(
        "captions are of media of one length, and data.media has sounds of several, whose padding "
        "would be read with them; leave this evaluation out."
      )
    for name, value in dict(max_batches=max_batches or 0, max_media=max_media).items():
      if value < 0:
        raise ValueError(f"{name}={value} must not be negative; 0 takes all.")
    if max_tokens < 0:
      raise ValueError(f"{max_tokens=} must not be negative; 0 is as long as the split's captions.")
    self._task, self._data, self._split = task, data, split
    self._batches = data.eval_batches(split, max_batches or None)
    self._max_media, self._max_tokens = max_media, max_tokens
    self._sums = compile(task.text_sums)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields losses, and how captions agree with those that the media have.

    `text_loss` in nats a token and `text_perplexity` are of all texts, `caption_loss` and
    `caption_perplexity` of those behind media; `exact` is the part of captions that are one of
    their medium's, and `cider` the mean CIDEr of them.
    """
    totals = None
    for batch in self._batches:
      totals = add_sums(totals, self._sums(params, batch))
    sums, counts = totals or ({}, {})
    for name in ("text", "caption"):
      if not counts.get(name):
        raise ValueError(f"Split {self._split!r} has no {name}: its media have no captions.")
      loss = float(sums[name] / counts[name])
      yield f"{name}_loss", loss
      yield f"{name}_perplexity", math.exp(min(loss, 700.0))  # The largest that a float holds.
    rows, references = self._media()
    written = self._written(params, rows)
    hits = [text in texts for text, texts in zip(written, references, strict=True)]
    yield "exact", float(np.mean(hits))
    if len(references) > 1:
      yield "cider", float(metrics.cider(written, references).mean())

  def _media(self) -> tuple[np.ndarray, list[list[str]]]:
    """Rows of the media that captions are written of, and the captions that each has."""
    split = self._data.media.splits[self._split]
    found: dict[str, tuple[int, list[str]]] = {}
    for row, (name, caption) in enumerate(zip(split.names, split.captions, strict=True)):
      found.setdefault(name, (row, []))[1].append(caption)
    chosen = list(found.values())[: self._max_media or None]
    return np.array([row for row, _ in chosen]), [captions for _, captions in chosen]

  def _written(self, params: Params, rows: np.ndarray) -> list[str]:
    """A caption of each row's medium."""
    split = self._data.media.splits[self._split]
    generator = self._task.generator(params, self._data)
    longest = max(len(self._data.tokenizer.encode(text)) for text in split.captions)
    count = self._max_tokens or min(longest, self._data.documents.max_text) + 1
    options = dict(tokens=sample.token_sampler(greedy=True))
    written, size = [], min(generator.batch_size, len(rows))
    for start in range(0, len(rows), size):
      here = rows[start : start + size]
      padded = np.concatenate([here, np.repeat(here[:1], size - len(here))])  # One program.
      media = split.rows(padded)["media"]
      texts = generator.captions(media, jax.random.key(0), count, **options)
      written += texts[: len(here)]
    return written
