"""Many-shot classification in context, and how much the order of the examples matters.

Figures 6, 7 and 11 of the Differential Transformer (https://arxiv.org/abs/2410.05258), on the
synthetic task `data.synthetic.ManyShot`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from latentlab.data import Data
from latentlab.data.synthetic import ManyShot
from latentlab.eval.common import pick_model, row_batches, synthetic_task
from latentlab.typing import Array, Bool, Params

ORDERS = ("random", "alternating")


class Evaluator:
  """Accuracy by the number of examples, and over orders of the same examples.

  A sample is a mapping of its own with examples of it, as many of every item as of each other, or
  one more, and queries of items among them. An answer is right if it is the likeliest token, as
  greedy decoding would draw it. The margin between best and worst order is that of a sample's
  accuracy over its queries, and is averaged over samples.
  """

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    shots: Sequence[int] = (),
    num_permutations: int = 10,
    num_samples: int = 4,
    num_queries: int = 8,
    order: str = "random",
    seq_length: int | None = None,
    seed: int = 0,
    model: Mapping[str, Any] | None = None,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: See `perplexity.Evaluator`.
      data: Its tokens are bytes; where it is the task `many_shot`, items and labels are as there.
      compile: See `runner.Compile`.
      shots: Numbers of examples; if empty, as many as `seq_length` holds, half and a quarter of
        them.
      num_permutations: Orders of a sample's examples, the same queries behind each.
      num_samples: Mappings.
      num_queries: Queries of a sample.
      order: "random", or "alternating", where classes take turns, in an order that is random.
      seq_length: Tokens of a row, its answer included; as in training if `None` or 0.
      seed: Of the samples.
      model: See `perplexity.Evaluator`.
    """
    counts = dict(
      num_permutations=num_permutations, num_samples=num_samples, num_queries=num_queries
    )
    for name, value in counts.items():
      if value < 1:
        raise ValueError(f"{name}={value} of a many_shot evaluation must be at least 1.")
    if seed < 0:
      raise ValueError(f"{seed=} of a many_shot evaluation must not be negative.")
    if order not in ORDERS:
      raise ValueError(f"{order=} of a many_shot evaluation must be one of {ORDERS}.")
    self._length = seq_length or data.config.seq_length
    self._task: ManyShot = synthetic_task(data, "many_shot")
    most = (self._length - 1 - self._task.item_length) // self._task.example_length
    self._shots = tuple(sorted(set(shots))) or tuple(n for n in (most // 4, most // 2, most) if n)
    if not self._shots or self._shots[0] < 1 or self._shots[-1] > most:
      raise ValueError(
        f"shots={tuple(shots)} of a many_shot evaluation must lie in [1, {most}]: seq_length="
        f"{self._length} holds no more examples and a query of {self._task}."
      )
    self._counts = tuple(counts[n] for n in ("num_samples", "num_permutations", "num_queries"))
    self._order, self._seed, self._data = order, seed, data
    self._model = pick_model(task, model, self._length, "a many_shot evaluation")
    self._right = compile(self._right_answers)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `accuracy`, `best`, `worst` and `spread` with most examples, and by their number.

    `best` and `worst` are of the orders of each sample, and `spread` is between them;
    `accuracy_shots_<n>` and `spread_shots_<n>` are those of fewer examples too.
    """
    found = {}
    for shots in self._shots:
      rows = self._rows(shots)
      right = [np.asarray(self._right(params, batch)) for batch in row_batches(rows, self._data)]
      right = np.concatenate(right)[: len(rows["inputs"])].reshape(self._counts)
      found[shots] = right.mean(-1)  # samples, permutations
    by_order = found[self._shots[-1]]
    best, worst = by_order.max(1).mean(), by_order.min(1).mean()
    yield "accuracy", float(by_order.mean())
    yield "best", float(best)
    yield "worst", float(worst)
    yield "spread", float(best - worst)
    for shots, by_order in found.items():
      yield f"accuracy_shots_{shots}", float(by_order.mean())
    for shots, by_order in found.items():
      yield f"spread_shots_{shots}", float(np.ptp(by_order, axis=1).mean())

  def _rows(self, shots: int) -> dict[str, np.ndarray]:
    """Rows of every sample, order and query, in this order."""
    num_samples, num_permutations, num_queries = self._counts
    size = self._task.item_length
    rows, answers = [], []
    for i in range(num_samples):
      rng = np.random.default_rng((self._seed, i))
      mapping = self._task.mapping(rng)
      shown = _in_turn(rng, np.arange(len(mapping)), shots)
      queries = mapping[_in_turn(rng, np.unique(shown), num_queries)]
      for _ in range(num_permutations):
        examples = mapping[self._permuted(rng, shown, mapping[:, -1])].ravel()
        rows += [np.concatenate([examples, query[:size]]) for query in queries]
        answers += queries[:, -1].tolist()
    tokens = np.full((len(rows), self._length), self._data.tokenizer.pad_id, np.int32)
    tokens[:, 0] = self._data.tokenizer.bos_id
    tokens[:, 1 : len(rows[0]) + 1] = rows
    places = np.full(len(rows), len(rows[0]), np.int32)
    return {"inputs": tokens, "places": places, "answers": np.array(answers, np.int32)}

  def _permuted(
    self, rng: np.random.Generator, shown: np.ndarray, labels: np.ndarray
  ) -> np.ndarray:
    shown = rng.permutation(shown)
    if self._order == "random":
      return shown
    classes, of_item = np.unique(labels, return_inverse=True)
    turn = rng.permutation(len(classes))[of_item[shown]]
    rounds = np.array([(turn[:i] == c).sum() for i, c in enumerate(turn)])
    return shown[np.lexsort((turn, rounds))]

  def _right_answers(self, params: Params, batch: Mapping[str, Array]) -> Bool[Array, " B"]:
    variables = {"params": params}
    hidden, _ = self._model.apply(variables, batch["inputs"], method="hidden")
    hidden = jnp.take_along_axis(hidden, batch["places"][:, None, None], axis=1)[:, 0]
    logits = self._model.apply(variables, hidden, method="logits")
    return logits.argmax(-1) == batch["answers"]


def _in_turn(rng: np.random.Generator, items: np.ndarray, count: int) -> np.ndarray:
  """`count` of the items, none of which comes again before all others have come."""
  rounds = [rng.permutation(items) for _ in range(-(-count // len(items)))]
  return np.concatenate(rounds)[:count]
