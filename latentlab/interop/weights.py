"""Our parameters by others' names: one table serves both ways, and gradients as well as weights."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from latentlab.models import LanguageModel, LanguageModelConfig
from latentlab.typing import Params

StateDict = dict[str, np.ndarray]

_LAYER = "decoder/stage_0/block_0/"


@dataclasses.dataclass(frozen=True)
class Imported:
  """A model from elsewhere.

  Attributes:
    model: The `config.model` section that builds it.
    vocab_size: Its tokens.
    params: Its parameters.
  """

  model: dict[str, Any]
  vocab_size: int
  params: Params


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array, theirs and ours.

  Attributes:
    theirs: Its name, with `{layer}` where every layer has one.
    ours: Its `/`-joined path, of a layer within its block.
    contracted: Axes in front that a projection contracts, whose kernel they hold as the transposed
      matrix `[out, in]`; 0 for arrays that they hold as we do.
  """

  theirs: str
  ours: str
  contracted: int = 0

  @property
  def layered(self) -> bool:
    return "{layer}" in self.theirs

  @property
  def path(self) -> str:
    return (_LAYER if self.layered else "") + self.ours

  def to_theirs(self, x: np.ndarray) -> np.ndarray:
    if not self.contracted:
      return x
    return x.reshape(math.prod(x.shape[: self.contracted]), -1).T

  def to_ours(self, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return (x.T if self.contracted else x).reshape(shape)

  def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    if not self.contracted:
      return tuple(shape)
    return math.prod(shape[self.contracted :]), math.prod(shape[: self.contracted])


def export_weights(entries: Iterable[Entry], params: Params) -> StateDict:
  """Parameters (or their gradients) of a decoder of equal layers, by the names of a table.

  Raises:
    ValueError: the table and the parameters do not cover each other.
  """
  flat = traverse_util.flatten_dict(nn.unbox(params), sep="/")
  by_path = {entry.path: entry for entry in entries}
  if flat.keys() != by_path.keys():
    raise ValueError(
      f"the model's parameters are not those of the table: {sorted(flat.keys() ^ by_path.keys())}"
    )
  state = {}
  for path, entry in by_path.items():
    x = np.asarray(flat[path])
    arrays = {entry.theirs.format(layer=i): a for i, a in enumerate(x)} if entry.layered else None
    for name, array in (arrays or {entry.theirs: x}).items():
      # A copy, since torch takes no array that is read-only, and jax gives no other.
      state[name] = np.array(entry.to_theirs(array), np.float32, order="C")
  return state


def import_weights(
  entries: Iterable[Entry], state: StateDict, config: LanguageModelConfig
) -> Params:
  """The inverse of `export_weights`, for the model of `config`.

  Raises:
    ValueError: names are missing or unexpected, or shapes differ; all of them are listed.
  """
  flat = traverse_util.flatten_dict(parameter_shapes(config), sep="/")
  num_layers = config.decoder.num_layers
  params, seen, missing, wrong = {}, set(), [], []
  for entry in entries:
    whole = flat[entry.path].shape
    shape = whole[1:] if entry.layered else whole
    arrays = []
    for i in range(num_layers if entry.layered else 1):
      name = entry.theirs.format(layer=i)
      seen.add(name)
      if name not in state:
        missing.append(name)
      elif state[name].shape != (want := entry.their_shape(shape)):
        wrong.append(f"{name} is {state[name].shape}, the model has {want}")
      else:
        arrays.append(entry.to_ours(state[name], shape))
    if len(arrays) == (num_layers if entry.layered else 1):
      params[entry.path] = np.stack(arrays) if entry.layered else arrays[0]
  unexpected = sorted(state.keys() - seen)
  if missing or wrong or unexpected:
    raise ValueError(
      f"the weights are not those of the model: missing {missing}, unexpected {unexpected}, "
      f"of another shape {wrong}"
    )
  assert params.keys() == flat.keys(), params.keys() ^ flat.keys()
  return traverse_util.unflatten_dict(params, sep="/")


def parameter_shapes(config: LanguageModelConfig) -> Params:
  """Shapes and dtypes of a model's parameters."""
  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  variables = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
  return nn.unbox(variables)["params"]


def without_prefix(state: Mapping[str, np.ndarray], prefix: str) -> StateDict:
  """Names without a prefix that all of them have."""
  if all(name.startswith(prefix) for name in state):
    return {name.removeprefix(prefix): x for name, x in state.items()}
  return dict(state)
