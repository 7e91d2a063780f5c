"""Outliers among attention logits and hidden states.

Table 5 of the Differential Transformer (https://arxiv.org/abs/2410.05258): the largest magnitudes
that a trained model has on a text, and the median beside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.data import Data
from latentlab.eval.common import add_sums, check_softmax, layer_maps, pick_model
from latentlab.typing import Array, Bool, Float, Int, Num, Params

QUANTITIES = ("logits", "hidden")
TOP = (1, 2, 3, 10, 100)

_DROPPED = 13
"""Bits of a float32's mantissa that a bin of the histogram does not tell apart, of 23."""


class Evaluator:
  """The largest magnitudes on a split, and their median, over all layers, heads and tokens.

  Of attention logits those count that the mask shows; hidden states are what each block hands on.
  The median is exact to a part in a thousand: that of a histogram of a thousand bins an octave.

  All layers' logits and hidden states of a batch are in memory at once, logits as `L B M T T` in
  float32: 45 GB a row of 28 layers, 24 maps and 4096 tokens. Where they do not fit, a shorter
  `seq_length` is the remedy, or, for hidden states, `quantities` without "logits".
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
    quantities: Sequence[str] = QUANTITIES,
    model: Mapping[str, Any] | None = None,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: See `perplexity.Evaluator`.
      data: Holds the split.
      compile: See `runner.Compile`.
      split: Of the data.
      max_batches: How many of its batches to read; all if `None` or 0. The paper reads 0.4 million
        tokens.
      seq_length: Tokens of a window; as in training if `None` or 0.
      quantities: Of "logits" and "hidden".
      model: See `perplexity.Evaluator`.
    """
    if not quantities or set(quantities) - set(QUANTITIES):
      raise ValueError(
        f"quantities={tuple(quantities)} of an activations evaluation must be among {QUANTITIES}."
      )
    if (max_batches or 0) < 0:
      raise ValueError(
        f"{max_batches=} of an activations evaluation must not be negative; 0 reads all."
      )
    self._batches = data.eval_batches(split, max_batches or None, seq_length or None)
    self._model = pick_model(task, model, seq_length or 0, "an activations evaluation")
    if "logits" in quantities:
      check_softmax(self._model, "activations with quantities 'logits'")
    self._quantities = tuple(quantities)
    self._summary = compile(self._batch_summary)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `<quantity>_top_<k>`, the k-th largest, and `<quantity>_median`."""
    largest = {name: np.zeros(0, np.float32) for name in self._quantities}
    counts = None
    for batch in self._batches:
      tops, histograms = self._summary(params, batch)
      counts = add_sums(counts, histograms)
      for name, top in tops.items():
        merged = np.concatenate([largest[name], np.asarray(top)])
        largest[name] = -np.sort(-merged)[: max(TOP)]
    for name in self._quantities:
      if counts is None or not (total := int(counts[name].sum())):
        raise ValueError(f"An activations evaluation found no {name} in its batches.")
      for k in TOP:
        if k <= total:
          yield f"{name}_top_{k}", float(largest[name][k - 1])
      yield f"{name}_median", histogram_median(counts[name])

  def _batch_summary(
    self, params: Params, batch: Mapping[str, Array]
  ) -> tuple[dict[str, Float[Array, " k"]], dict[str, Int[Array, " bins"]]]:
    """The largest magnitudes of a batch, and their histogram, of each quantity."""
    valid = batch["segment_ids"] > 0
    collections = {"logits": "maps", "hidden": "hidden"}
    _, sown = self._model.apply(
      {"params": params},
      batch["inputs"],
      segment_ids=batch["segment_ids"],
      mutable=[collections[name] for name in self._quantities],
      method="hidden",
    )
    values = {}
    if "logits" in self._quantities:
      pairs = (valid[:, None, :, None] & valid[:, None, None, :])[None]
      values["logits"] = [(m.logits, m.visible & pairs) for m in layer_maps(sown)]
    if "hidden" in self._quantities:
      values["hidden"] = [(x, valid[..., None]) for x in jax.tree.leaves(sown["hidden"])]
    return (
      {name: _top([_magnitudes(*x) for x in found]) for name, found in values.items()},
      {name: sum(histogram(*x) for x in found) for name, found in values.items()},
    )


def _magnitudes(x: Float[Array, "*shape"], counted: Bool[Array, "..."]) -> Float[Array, " n"]:
  """Magnitudes in float32; -1 for what does not count."""
  return jnp.where(counted, jnp.abs(x.astype(jnp.float32)), -1.0).ravel()


def _top(magnitudes: list[Float[Array, " n"]]) -> Float[Array, " k"]:
  """The largest of all of them, at most `max(TOP)`."""
  best = jnp.concatenate([jax.lax.top_k(x, min(len(x), max(TOP)))[0] for x in magnitudes])
  return jax.lax.top_k(best, min(len(best), max(TOP)))[0]


def histogram(x: Float[Array, "*shape"], counted: Bool[Array, "..."]) -> Int[Array, " bins"]:
  """How many magnitudes lie in each bin; bins are those of the leading bits of a float32.

  Args:
    x: Values.
    counted: Which of them count, broadcast to their shape.
  """
  bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
  counted = jnp.broadcast_to(counted, x.shape).astype(jnp.int32)
  return jnp.zeros(1 << (31 - _DROPPED), jnp.int32).at[bits >> _DROPPED].add(counted)


def histogram_median(counts: Num[np.ndarray, " bins"]) -> float:
  """The median of what `histogram` counted, between the edges of its bin."""
  below = np.cumsum(counts)
  bin = int(np.searchsorted(below, below[-1] / 2))
  low, high = (np.array([bin, bin + 1], np.int32) << _DROPPED).view(np.float32)
  inside = (below[-1] / 2 - (below[bin] - counts[bin])) / counts[bin]
  return float(low + (high - low) * inside)
