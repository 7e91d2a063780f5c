"""Losses of a model over latents on a split: of its tokens, as perplexity, and of its latents."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from latentlab.data import Data
from latentlab.eval.common import add_sums, loss_name
from latentlab.typing import Params


class Evaluator:
  """Losses over a split; noise and timesteps are the same at each run."""

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    split: str = "validation",
    max_batches: int | None = None,
    seed: int = 0,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: A model's over latents.
      data: Holds the split.
      compile: See `runner.Compile`.
      split: Of the data.
      max_batches: How many of its batches to read; all if `None` or 0.
      seed: Of noise and timesteps.
    """
    if not hasattr(task, "sums"):
      raise ValueError("losses of items are of a model over latents; config.task.type says which")
    if (max_batches or 0) < 0:
      raise ValueError(f"{max_batches=} must not be negative; 0 reads all.")
    self._batches, self._seed = data.eval_batches(split, max_batches or None), seed
    self._sums = compile(lambda p, batch, key: task.sums(p, batch, key, deterministic=True))

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `latent_loss`, `stop_loss` of a classifier, `token_loss` in nats and `perplexity`.

    The first two of each modality, where there are several: `latent_loss_image`.
    """
    totals, key = None, jax.random.key(self._seed)
    for i, batch in enumerate(self._batches):
      totals = add_sums(totals, self._sums(params, batch, jax.random.fold_in(key, i)))
    if totals is None:
      raise ValueError("The split has no batch.")
    sums, weights = totals
    for kind in sorted(sums):
      if weights[kind]:
        yield loss_name(kind), float(sums[kind] / weights[kind])
    if weights.get("tokens"):
      yield "perplexity", math.exp(min(float(sums["tokens"] / weights["tokens"]), 700.0))
