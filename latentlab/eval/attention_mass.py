"""How much attention goes to the answer, and how much to noise.

Table 3 and figure 1 of the Differential Transformer (https://arxiv.org/abs/2410.05258). Its maps
are signed, and their rows do not sum to 1; the paper does not say how it normalises them. Both ways
are here: `signed` divides by the sum, so that negative weights count against a part, and `absolute`
takes magnitudes. For a single softmax they are the same.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.data import Data
from latentlab.data.synthetic import check_length
from latentlab.eval.common import (
  add_sums,
  check_softmax,
  layer_maps,
  pick_model,
  row_batches,
  synthetic_task,
)
from latentlab.eval.haystack import check_depths
from latentlab.typing import Array, Float, Params

PARTS = ("bos", "needle", "answer", "noise", "query")
"""Of a row: its first token; of the needle asked for, mark and key, and value; the rest of the hay
and the other needles; what follows the hay."""


class Evaluator:
  """Shares of the attention of the tokens that produce an answer, on the synthetic needle task.

  Heads count equally, and so do layers. A head's share of a part is its attention to it, over its
  attention to everything, both summed over samples.

  All layers' maps of a batch are in memory at once, `L B N T T` in float32: 22.5 GB a row of 28
  layers, 12 heads and 4096 tokens. A shorter `seq_length` is the remedy.
  """

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    num_needles: int | None = None,
    num_samples: int = 50,
    seq_length: int | None = None,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
    model: Mapping[str, Any] | None = None,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: See `perplexity.Evaluator`.
      data: Its tokens are bytes; where it is the task `multi_needle`, needles are as there.
      compile: See `runner.Compile`.
      num_needles: Needles of a sample, one of which is asked for.
      num_samples: Samples at each depth; the depths share their needles and their hay.
      seq_length: Symbols of a sample; as in training if `None` or 0.
      depths: Parts of the hay before the needle that is asked for; the others lie anywhere.
      seed: Of the samples.
      model: See `perplexity.Evaluator`.
    """
    if num_samples < 1 or seed < 0:
      raise ValueError(
        f"{num_samples=} of an attention_mass evaluation must be at least 1, and {seed=} not "
        "negative."
      )
    self._length = seq_length or data.config.seq_length
    self._depths, self._seed, self._num_samples = check_depths(depths), seed, num_samples
    self._data = data
    self._task = synthetic_task(
      data, "multi_needle", num_needles=num_needles or None, num_queries=1
    )
    check_length(self._task, self._length, "an attention_mass evaluation")
    self._model = pick_model(task, model, self._length, "an attention_mass evaluation")
    check_softmax(self._model, "attention_mass")
    self._sums = compile(self._batch_sums)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `<part>_signed` and `<part>_absolute`, and answer and noise by depth behind them."""
    samples = [
      (i, self._task.haystack(np.random.default_rng((self._seed, j)), self._length, depth))
      for i, depth in enumerate(self._depths.values())
      for j in range(self._num_samples)
    ]
    symbols = np.stack([row.symbols for _, row in samples])
    inputs = np.insert(symbols[:, :-1], 0, self._data.tokenizer.bos_id, axis=1).astype(np.int32)
    begin, value, end = np.stack([1 + row.needles[0] for _, row in samples], axis=1).astype(
      np.int32
    )
    rows = {
      "inputs": inputs,
      "begin": begin,
      "value": value,
      "end": end,
      "depth": np.array([1 + i for i, _ in samples], np.int32),  # 0 for rows that only fill.
    }
    totals = None
    for batch in row_batches(rows, self._data):
      totals = add_sums(totals, self._sums(params, batch))
    shares = {}
    for way, sums in totals.items():  # heads of all layers, parts, depths
      whole = sums.sum(2)
      shares[way] = (whole / whole.sum(1, keepdims=True)).mean(0)
      for part, share in zip(PARTS, shares[way], strict=True):
        yield f"{part}_{way}", float(share)
    for way, sums in totals.items():
      by_depth = (sums / sums.sum(1, keepdims=True)).mean(0)
      for part in ("answer", "noise"):
        for depth, share in zip(self._depths, by_depth[PARTS.index(part)], strict=True):
          yield f"{part}_{way}_{depth}", float(share)

  def _batch_sums(
    self, params: Params, batch: Mapping[str, Array]
  ) -> dict[str, Float[Array, "heads parts depths"]]:
    _, sown = self._model.apply(
      {"params": params}, batch["inputs"], mutable=["maps"], method="hidden"
    )
    parts = self._parts(batch)
    depth = jax.nn.one_hot(batch["depth"] - 1, len(self._depths))
    # The rows of a batch have their queries in one place, at which the answer is produced.
    first = self._length - self._task.value_length
    sums = {"signed": [], "absolute": []}
    for maps in layer_maps(sown):
      weights = maps.weights[:, :, :, first:]
      for way, x in (("signed", weights), ("absolute", jnp.abs(weights))):
        x = jnp.einsum("LBNTS,BPS,BZ->LNPZ", x, parts, depth)
        sums[way].append(x.reshape(-1, *x.shape[2:]))
    return jax.tree.map(jnp.concatenate, sums, is_leaf=lambda x: isinstance(x, list))

  def _parts(self, batch: Mapping[str, Array]) -> Float[Array, "B parts T"]:
    """1 where a token belongs to a part; every token belongs to one."""
    place = jnp.arange(self._length)
    begin, value, end = (batch[name][:, None] for name in ("begin", "value", "end"))
    query = place > self._length - self._task.needle_length
    parts = {
      "bos": place == 0,
      "needle": (begin <= place) & (place < value),
      "answer": (value <= place) & (place < end),
      "query": query,
    }
    taken = [jnp.broadcast_to(x, (len(begin), self._length)) for x in parts.values()]
    parts = dict(zip(parts, taken, strict=True))
    parts["noise"] = ~jnp.stack(taken).any(0)
    return jnp.stack([parts[name] for name in PARTS], axis=1).astype(jnp.float32)
