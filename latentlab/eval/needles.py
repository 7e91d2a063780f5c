"""Multi-needle retrieval, by greedy decoding.

Table 2 and figure 5 of the Differential Transformer (https://arxiv.org/abs/2410.05258), and table 4
and figure 4 of YOCO (https://arxiv.org/abs/2405.05254).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from latentlab import sample
from latentlab.data import Data
from latentlab.data.synthetic import check_length
from latentlab.eval.common import pick_model, row_batches, synthetic_task
from latentlab.eval.haystack import TextHaystack, check_depths
from latentlab.typing import Array, Bool, Int, Params


class Evaluator:
  """How many of the needles that are asked for are found, by their depth in the hay.

  Synthetic hay is that of `data.synthetic.MultiNeedle`, with the keys and values of
  `config.data.task_options` where that task is trained; an answer is right if all of its symbols
  are the likeliest, as greedy decoding would draw them. In text, numbers of cities are asked for,
  and an answer is right if the number stands in what greedy decoding writes.
  """

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    hay: str = "synthetic",
    num_needles: int | None = None,
    num_queries: int | None = None,
    num_samples: int = 50,
    seq_length: int | None = None,
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
    split: str = "validation",
    max_new_tokens: int = 20,
    model: Mapping[str, Any] | None = None,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: See `perplexity.Evaluator`.
      data: Its tokenizer is the model's; the text is one of its splits.
      compile: See `runner.Compile`.
      hay: "synthetic" or "text".
      num_needles: Needles of a sample. In synthetic hay those of the task that is trained if
        `None` or 0, and 1 in text.
      num_queries: How many of them are asked for, likewise.
      num_samples: Samples at each depth; the depths share their needles and their hay.
      seq_length: Tokens of a sample, its answers included; as in training if `None` or 0.
      depths: Parts of the hay before the needle that is asked for first; other needles lie
        anywhere. YOCO has k / 11 with k = 1 to 10.
      seed: Of the samples.
      split: Where the text comes from.
      max_new_tokens: Tokens in which a number must come in text.
      model: See `perplexity.Evaluator`.
    """
    if hay not in ("synthetic", "text"):
      raise ValueError(f"{hay=} of a needles evaluation must be 'synthetic' or 'text'.")
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
      if value < 1:
        raise ValueError(f"{name}={value} of a needles evaluation must be at least 1.")
    if seed < 0:
      raise ValueError(f"{seed=} of a needles evaluation must not be negative.")
    self._length = seq_length or data.config.seq_length
    self._depths, self._seed, self._num_samples = check_depths(depths), seed, num_samples
    self._data, self._max_new_tokens = data, max_new_tokens
    self._model = pick_model(task, model, self._length, "a needles evaluation")
    if hay == "text":
      self._haystack = TextHaystack(
        data.split_tokens(split),
        data.tokenizer,
        num_needles or 1,
        num_queries or 1,
        self._length - max_new_tokens,
      )
      self._found, self._continue = self._found_in_text, compile(self._continuations)
    else:
      self._task = synthetic_task(
        data, "multi_needle", num_needles=num_needles or None, num_queries=num_queries or None
      )
      check_length(self._task, self._length, "a needles evaluation")
      self._found, self._right = self._found_in_symbols, compile(self._right_answers)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `accuracy` of all queries, `accuracy_all` of samples, and `accuracy_depth_<percent>`.

    `accuracy_all` counts samples with every answer right, where there are several; the accuracy at
    a depth is that of the needles there, the first ones asked for.
    """
    found = self._found(params)  # depths, samples, queries
    yield "accuracy", float(found.mean())
    if found.shape[-1] > 1:
      yield "accuracy_all", float(found.all(-1).mean())
    for name, samples in zip(self._depths, found, strict=True):
      yield f"accuracy_{name}", float(samples[:, 0].mean())

  def _samples(self) -> Iterator[tuple[np.random.Generator, float]]:
    for depth in self._depths.values():
      for i in range(self._num_samples):
        yield np.random.default_rng((self._seed, i)), depth

  def _found_in_symbols(self, params: Params) -> np.ndarray:
    rows = [self._task.haystack(rng, self._length, depth) for rng, depth in self._samples()]
    symbols = np.stack([row.symbols for row in rows])
    inputs = np.insert(symbols[:, :-1], 0, self._data.tokenizer.bos_id, axis=1)
    places = rows[0].answers  # The same in every row.
    rows = {"inputs": inputs.astype(np.int32), "targets": symbols}
    right = [
      np.asarray(self._right(params, batch, places)) for batch in row_batches(rows, self._data)
    ]
    return self._by_depth(np.concatenate(right)[: len(inputs)])

  def _right_answers(
    self, params: Params, batch: Mapping[str, Array], places: Int[Array, "R n"]
  ) -> Bool[Array, "B R"]:
    variables = {"params": params}
    hidden, _ = self._model.apply(variables, batch["inputs"], method="hidden")
    logits = self._model.apply(variables, hidden[:, places], method="logits")
    return (logits.argmax(-1) == batch["targets"][:, places]).all(-1)

  def _found_in_text(self, params: Params) -> np.ndarray:
    samples = [self._haystack.prompts(*sample) for sample in self._samples()]
    prompts, answers = ([x for sample in samples for x in sample[i]] for i in (0, 1))
    tokens = np.full((len(prompts), self._length), self._data.tokenizer.pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    rows = {"prompts": tokens, "lengths": np.array([len(p) for p in prompts], np.int32)}
    drawn = [np.asarray(self._continue(params, batch)) for batch in row_batches(rows, self._data)]
    texts = [self._data.tokenizer.decode(row) for row in np.concatenate(drawn)[: len(prompts)]]
    return self._by_depth(np.array([a in text for a, text in zip(answers, texts, strict=True)]))

  def _continuations(self, params: Params, batch: Mapping[str, Array]) -> Int[Array, "B n"]:
    tokenizer = self._data.tokenizer
    stops = np.array([tokenizer.bos_id], np.int32)
    stepper = sample.TokenStepper(self._model, params, stops, np.int32(tokenizer.pad_id))
    prompts, lengths = batch["prompts"], jnp.maximum(batch["lengths"], 1)  # Rows that only fill.
    generated, _ = sample.begin(
      stepper.unstacked(),
      sample.token_sampler(greedy=True),
      prompts,
      lengths,
      sample.row_keys(0, jnp.arange(len(prompts))),
      self._max_new_tokens,
      capacity=self._length + self._max_new_tokens,
      num_items=self._max_new_tokens,
    )
    return generated.tokens

  def _by_depth(self, found: np.ndarray) -> np.ndarray:
    return found.reshape(len(self._depths), self._num_samples, -1)
