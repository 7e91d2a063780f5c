"""What evaluators share: the model and its maps, batches of rows made on purpose, sums."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from latentlab import ops
from latentlab.data import Data, synthetic
from latentlab.layers import AttentionConfig, DiffAttentionConfig

_LOSSES = dict(latents="latent_loss", tokens="token_loss", stops="stop_loss")


def loss_name(kind: str) -> str:
  """What the loss of a kind of targets is called, of `latents`, say, or `latents/image`."""
  name, _, modality = kind.partition("/")
  return _LOSSES[name] + (f"_{modality}" if modality else "")


def pick_model(task: Any, fields: Mapping[str, Any] | None, length: int, what: str) -> Any:
  """The task's model, or the one that differs from it in `fields` of `config.model`.

  Args:
    task: Its `model` is trained; with `fields`, it has a method `variant`.
    fields: What differs in an evaluation alone.
    length: Tokens that the evaluation shows at once.
    what: The evaluation, as an error calls it.

  Raises:
    ValueError: the model has no vectors for so many positions, or other fields than `fields`.
  """
  model = task.variant(fields) if fields else task.model
  limit = model.config.context_limit
  if limit is not None and length > limit:
    raise ValueError(
      f"seq_length={length} of {what} is longer than the {limit} positions that config.model has "
      "vectors for; shorten it."
    )
  return model


def synthetic_task(data: Data, name: str, **fields: Any) -> Any:
  """The synthetic task that `data` trains, or its defaults where it trains another.

  Args:
    data: Its tokenizer is the model's.
    name: Of the task.
    **fields: Options that an evaluation has of its own; `None` leaves one as it is.

  Raises:
    ValueError: the model's tokens are no bytes, or the options are bad.
  """
  if data.tokenizer.kind != "bytes":
    raise ValueError(
      f"the task {name} is made of bytes, and this model's tokens are {data.tokenizer.kind!r}; set "
      "config.data.tokenizer='bytes'."
    )
  trained = data.config.source == "synthetic" and data.config.task == name
  options = dict(data.config.task_options) if trained else {}
  options |= {field: value for field, value in fields.items() if value is not None}
  return synthetic.TASKS[name](**options)


SOFTMAXES = (AttentionConfig, DiffAttentionConfig)


def check_softmax(model: Any, what: str, mixers: tuple[type, ...] = SOFTMAXES) -> None:
  """Raises where no layer of a model is one of these, whose softmax `what` could look at."""
  found = [block.mixer for stage in model.config.decoder.stages for block in stage.pattern]
  if not any(isinstance(mixer, mixers) for mixer in found):
    kinds = sorted({mixer.kind for mixer in found})
    raise ValueError(f"{what} needs softmax attention; this model has {kinds}.")


def layer_maps(sown: Mapping[str, Any]) -> list[ops.AttentionMaps]:
  """The maps of a pass with `mutable=["maps"]`, each with a leading axis of layers."""
  maps = jax.tree.leaves(sown["maps"], is_leaf=lambda x: isinstance(x, ops.AttentionMaps))
  return [m if m.weights.ndim == 5 else jax.tree.map(lambda x: x[None], m) for m in maps]


def row_batches(rows: Mapping[str, np.ndarray], data: Data) -> Iterator[dict[str, np.ndarray]]:
  """Cuts rows, the same on every process, into this process's parts of batches of one size.

  Rows of zeros fill the last batch. What a compiled function returns for the rows of a batch is
  therefore in the rows' order.
  """
  (count,) = {len(x) for x in rows.values()}
  size = data.batch_size // data.process_count
  for begin in range(
    data.process_index * size, -(-count // data.batch_size) * data.batch_size, data.batch_size
  ):
    parts = {name: x[begin : begin + size] for name, x in rows.items()}
    yield {
      name: np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)])
      for name, x in parts.items()
    }


def add_sums(totals: Any, sums: Any) -> Any:
  """Adds a batch's sums, a tree of arrays, in float64; `None` is nothing yet."""
  if sums is None:
    return totals
  sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
  return sums if totals is None else jax.tree.map(np.add, totals, sums)
