"""Attention resolution of a trained model (xPos, https://arxiv.org/abs/2212.10554, section 4.3)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from latentlab import ops
from latentlab.data import Data
from latentlab.eval.common import add_sums, check_softmax, pick_model
from latentlab.layers import AttentionConfig
from latentlab.typing import Array, Params


class Evaluator:
  """Attention resolution on a split, of every layer and as the mean of layers.

  Scores are those of the softmax, with ALiBi's bias; they are averaged over texts, and over heads,
  before the resolution is taken. Only pairs that the mask shows count.
  """

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    split: str = "validation",
    max_batches: int | None = None,
    seq_length: int | None = None,
    document_length: int | None = None,
    model: Mapping[str, Any] | None = None,
    average_heads: bool = True,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: See `perplexity.Evaluator`.
      data: Holds the split.
      compile: See `runner.Compile`.
      split: Of the data.
      max_batches: How many of its batches to read; all if `None` or 0.
      seq_length: Tokens of a window; as in training if `None` or 0.
      document_length: See `perplexity.Evaluator`.
      model: See there.
      average_heads: Whether scores are averaged over heads, or else resolutions are.
    """
    options = dict(document_length=document_length or None)
    self._batches = data.eval_batches(split, max_batches or None, seq_length or None, **options)
    self._model = pick_model(task, model, seq_length or 0, "an attention_resolution evaluation")
    check_softmax(self._model, "attention_resolution of one map", (AttentionConfig,))
    self._average_heads = average_heads
    self._sums = compile(self._batch_sums)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `resolution`, the mean of the layers, and `layer_<i>` from 0 on."""
    layers = None
    for batch in self._batches:
      layers = add_sums(layers, self._sums(params, batch))
    if layers is None or not layers[0].counts.any():
      raise ValueError("An attention resolution found no pair of tokens in its batches.")
    resolutions = []
    for layer in layers:
      scores = layer.scores / np.maximum(layer.counts, 1)  # N T
      if self._average_heads:
        scores = scores.mean(0, keepdims=True)
      seen = jnp.asarray(layer.counts > 0)
      resolutions.append(float(ops.attention_resolution(jnp.asarray(scores), seen).mean()))
    yield "resolution", sum(resolutions) / len(resolutions)
    for i, value in enumerate(resolutions):
      yield f"layer_{i}", value

  def _batch_sums(self, params: Params, batch: Mapping[str, Array]) -> list[ops.Distances]:
    _, sown = self._model.apply(
      {"params": params},
      batch["inputs"],
      segment_ids=batch["segment_ids"],
      lengths=jnp.sum(batch["segment_ids"] > 0, axis=1),  # A batch's missing rows are all padding.
      mutable="intermediates",
      method="hidden",
    )
    layers = []
    for i, stage in enumerate(self._model.config.decoder.stages):
      blocks = [
        sown["intermediates"]["decoder"][f"stage_{i}"][f"block_{j}"]["mixer"]["distances"][0]
        for j, block in enumerate(stage.pattern)
        if isinstance(block.mixer, AttentionConfig)
      ]
      if stage.stacked:  # The blocks of a pattern take turns.
        repeats = range(stage.repeats)
        layers += [ops.Distances(b.scores[r], b.counts[r]) for r in repeats for b in blocks]
      else:
        layers += blocks
    return layers
