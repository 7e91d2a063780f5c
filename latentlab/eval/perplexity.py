"""Loss on held-out text: nats per token, perplexity, bits per byte; by position, and by recall."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from latentlab.data import Data
from latentlab.eval.common import add_sums, pick_model
from latentlab.eval.recall import completes_ngram
from latentlab.typing import Array, Float, Params


class Evaluator:
  """Perplexity of a language model on a split.

  Every weighted target counts once, whatever the mesh and the number of processes. Bits per byte
  divide by the raw bytes of those targets, so they compare across tokenizers.
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
    score_last: int | None = None,
    model: Mapping[str, Any] | None = None,
    num_buckets: int = 4,
    recall_order: int = 0,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: Its `model` has a method `token_losses`; with `model`, it has a method `variant`.
      data: Holds the split.
      compile: See `runner.Compile`.
      split: Of the data.
      max_batches: How many of its batches to read; all if `None` or 0.
      seq_length: Tokens of a window; as in training if `None` or 0.
      document_length: Pieces of this many tokens are cut from documents, and windows from these, so
        that every `seq_length` scores the same tokens, in as many batches; xPos' paper takes the
        first such piece of each document. Windows lie end to end over the whole split if `None` or
        0.
      score_last: Only the last tokens of each window, or of each piece where `document_length` is
        given, are scored, as in RetNet's table 8; all if `None` or 0.
      model: Fields of `config.model` that differ in this evaluation alone, for the same parameters:
        `dict(mask="blockwise_causal", mask_size=64)`, say.
      num_buckets: Equal ranges of positions whose losses are reported as `position_<first>_<last>`;
        `plots/<evaluation>_positions.png` draws them.
      recall_order: n of the n-grams by which the loss is split into that of targets that complete
        one which the document's context has already, `recall_loss` (AR-hit, with n = 2), and that
        of the rest, `other_loss`; 0 splits nothing.
    """
    if (max_batches or 0) < 0:
      raise ValueError(
        f"{max_batches=} of a perplexity evaluation must not be negative; 0 reads all."
      )
    self._batches = data.eval_batches(
      split,
      max_batches or None,
      seq_length or None,
      document_length=document_length or None,
      score_last=score_last or None,
    )
    self._model = pick_model(task, model, seq_length or 0, "a perplexity evaluation")
    self._byte_lengths = np.asarray(data.tokenizer.byte_lengths, np.float32)
    if num_buckets < 1:
      raise ValueError(f"{num_buckets=} of a perplexity evaluation must be at least 1.")
    if recall_order < 0 or recall_order == 1:
      raise ValueError(
        f"{recall_order=} of a perplexity evaluation must be at least 2, bigrams, or 0, no split."
      )
    self._num_buckets, self._recall_order = num_buckets, recall_order
    self._sums = compile(self._batch_sums)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `loss`, `perplexity`, `bits_per_byte`, and the loss by position.

    With a `recall_order`, also `recall_share` of the targets, `recall_loss` and `other_loss`.
    """
    totals, pending, length = None, None, 0
    for batch in self._batches:
      length = batch["inputs"].shape[1]
      if self._recall_order:
        tokens = (batch[name] for name in ("inputs", "targets", "segment_ids"))
        batch = batch | {"recalled": completes_ngram(*tokens, self._recall_order)}
      sums = self._sums(params, batch)
      # One batch behind: the device is never idle, and never has more than two batches queued.
      totals, pending = add_sums(totals, pending), sums
    totals = add_sums(totals, pending)
    if totals is None or not totals["weight"].sum():
      raise ValueError("A perplexity evaluation found no target with a weight in its batches.")
    loss = totals["nll"].sum() / totals["weight"].sum()
    yield "loss", float(loss)
    yield "perplexity", math.exp(min(loss, 700.0))  # The largest that a float holds.
    if totals["bytes"]:
      yield "bits_per_byte", float(totals["nll"].sum() / (math.log(2) * totals["bytes"]))
    if self._recall_order:
      recalled = totals["recalled_weight"] / totals["weight"].sum()
      yield "recall_share", float(recalled)
      if recalled:
        yield "recall_loss", float(totals["recalled_nll"] / totals["recalled_weight"])
      if recalled < 1:
        others = {
          name: totals[name].sum() - totals[f"recalled_{name}"] for name in ("nll", "weight")
        }
        yield "other_loss", float(others["nll"] / others["weight"])
    edges = self._edges(length)
    for i, (nll, weight) in enumerate(zip(totals["nll"], totals["weight"], strict=True)):
      if weight:
        yield f"position_{edges[i]}_{edges[i + 1] - 1}", float(nll / weight)

  def _batch_sums(self, params: Params, batch: Mapping[str, Array]) -> dict[str, Array]:
    weights: Float[Array, "B T"] = batch["weights"]
    nll = self._model.apply(
      {"params": params},
      batch["inputs"],
      batch["targets"],
      segment_ids=batch["segment_ids"],
      method="token_losses",
    )
    edges = self._edges(weights.shape[1])
    bucket = jnp.searchsorted(jnp.asarray(edges[1:]), batch["positions"], side="right")
    inside = bucket == jnp.arange(self._num_buckets)[:, None, None]
    sums = {
      "nll": jnp.where(inside, nll * weights, 0.0).sum((1, 2)),
      "weight": jnp.where(inside, weights, 0.0).sum((1, 2)),
      "bytes": (jnp.asarray(self._byte_lengths)[batch["targets"]] * weights).sum(),
    }
    if self._recall_order:
      recalled = jnp.where(batch["recalled"], weights, 0.0)
      sums |= {"recalled_nll": (nll * recalled).sum(), "recalled_weight": recalled.sum()}
    return sums

  def _edges(self, length: int) -> list[int]:
    """Where the ranges of positions begin, and the last one ends."""
    return [-(-i * length // self._num_buckets) for i in range(self._num_buckets + 1)]
