"""Our parameters by others' names: one table serves both ways, and gradients as well as weights."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from latentlab.models import LanguageModel, LanguageModelConfig
from latentlab.typing import Int, Params

StateDict = dict[str, np.ndarray]

# Fields that change how a model is computed or trained, and not what its weights give.
_NOT_OF_WEIGHTS = {
  "chunk_size",
  "dropout_rate",
  "dtype",
  "float32_activation",
  "implementation",
  "init",
  "lambda_std",
  "loss_chunk_size",
  "max_length",
  "remat",
  "unroll",
}
_OF_XPOS = {"center", "gamma", "scale_base"}
_DEFAULTED = {"num_kv_heads": "kv_heads", "value_head_dim": "value_dim"}


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
class ConfigFile:
  """The JSON file that a library writes beside weights.

  Attributes:
    name: Of the file.
    fields: From what it holds to fields of `config.model`.
    make: From a model to what it holds.
  """

  name: str
  fields: Callable[[Mapping[str, Any]], dict[str, Any]]
  make: Callable[[LanguageModelConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array, theirs and ours.

  Attributes:
    theirs: Its name, with `{layer}` where every layer of a stage has one.
    ours: Its `/`-joined path, of a layer within its block.
    contracted: Axes in front that a projection contracts, whose kernel they hold as the transposed
      matrix `[out, in]`; 0 for arrays that they hold as we do.
    stage: The stage whose layers these are.
    stack: The path of the stacked layers, where they are no stage of a decoder.
    rows: Which of their rows each of ours is; `None` where they are in the same order.
  """

  theirs: str
  ours: str
  contracted: int = 0
  stage: int = 0
  stack: str | None = None
  rows: Int[np.ndarray, "rows"] | None = dataclasses.field(default=None, compare=False)

  @property
  def layered(self) -> bool:
    return "{layer}" in self.theirs

  @property
  def path(self) -> str:
    stack = self.stack or f"decoder/stage_{self.stage}/block_0"
    return f"{stack}/{self.ours}" if self.layered else self.ours

  def to_theirs(self, x: np.ndarray) -> np.ndarray:
    if self.contracted:
      x = x.reshape(math.prod(x.shape[: self.contracted]), -1).T
    return x if self.rows is None else x[np.argsort(self.rows)]

  def to_ours(self, x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    x = x if self.rows is None else x[self.rows]
    return (x.T if self.contracted else x).reshape(shape)

  def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    if not self.contracted:
      return tuple(shape)
    return math.prod(shape[self.contracted :]), math.prod(shape[: self.contracted])


def export_weights(entries: Iterable[Entry], params: Params) -> StateDict:
  """Parameters (or their gradients) of a module by the names of a table.

  Args:
    entries: The table.
    params: Of a model whose stages are of equal layers, or of one module.

  Raises:
    ValueError: the table and the parameters do not cover each other.
  """
  flat = traverse_util.flatten_dict(nn.unbox(params), sep="/")
  by_path = {entry.path: entry for entry in entries}
  _check_covered(flat, by_path)
  state = {}
  for path, entry in by_path.items():
    x = np.asarray(flat[path])
    arrays = {entry.theirs.format(layer=i): a for i, a in enumerate(x)} if entry.layered else None
    for name, array in (arrays or {entry.theirs: x}).items():
      # A copy, since torch takes no array that is read-only, and jax gives no other.
      state[name] = np.array(entry.to_theirs(array), np.float32, order="C")
  return state


def import_weights(entries: Iterable[Entry], state: StateDict, shapes: Params) -> Params:
  """The inverse of `export_weights`.

  Args:
    entries: The table.
    state: Arrays by its names.
    shapes: A tree with the shapes of the parameters; see `parameter_shapes`.

  Raises:
    ValueError: names are missing or unexpected, or shapes differ; all of them are listed.
  """
  flat = traverse_util.flatten_dict(shapes, sep="/")
  by_path = {entry.path: entry for entry in entries}
  _check_covered(flat, by_path)
  params, seen, missing, wrong = {}, set(), [], []
  for path, entry in by_path.items():
    shape, names = flat[path].shape, [entry.theirs]
    if entry.layered:
      names, shape = [entry.theirs.format(layer=i) for i in range(shape[0])], shape[1:]
    seen |= set(names)
    arrays, want = [], entry.their_shape(shape)
    for name in names:
      if name not in state:
        missing.append(name)
      elif state[name].shape != want:
        wrong.append(f"{name} is {state[name].shape}, the model has {want}")
      else:
        arrays.append(entry.to_ours(state[name], shape))
    if len(arrays) == len(names):
      params[path] = np.stack(arrays) if entry.layered else arrays[0]
  unexpected = sorted(state.keys() - seen)
  if missing or wrong or unexpected:
    raise ValueError(
      f"the weights are not those of the model: missing {missing}, unexpected {unexpected}, "
      f"of another shape {wrong}"
    )
  return traverse_util.unflatten_dict(params, sep="/")


def parameter_shapes(config: LanguageModelConfig) -> Params:
  """Shapes and dtypes of a model's parameters."""
  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  variables = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens)
  return nn.unbox(variables)["params"]


def without_prefix(state: Mapping[str, np.ndarray], *prefixes: str) -> StateDict:
  """Names without the first of the prefixes that all of them have."""
  for prefix in prefixes:
    if all(name.startswith(prefix) for name in state):
      return {name.removeprefix(prefix): x for name, x in state.items()}
  return dict(state)


def count_layers(state: Iterable[str], prefix: str) -> int:
  """How many layers are named behind a prefix."""
  pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
  return len({m[1] for name in state if (m := pattern.match(name))})


def sizes_from(library: str, state: StateDict, names: Mapping[str, str]) -> dict[str, np.ndarray]:
  """The arrays whose shapes tell a model's sizes.

  Args:
    library: Whose weights they should be.
    state: The weights.
    names: The arrays' names, by what they are called in the result.

  Raises:
    ValueError: some are missing, or are no matrices where names end in `weight`.
  """
  if missing := [name for name in names.values() if name not in state]:
    raise ValueError(
      f"the weights are not those of {library}: {missing} are missing among {sorted(state)[:20]}"
    )
  found = {key: state[name] for key, name in names.items()}
  for key, name in names.items():
    if name.endswith(".weight") and found[key].ndim != 2:
      raise ValueError(f"{name} is {found[key].shape}, which is no matrix")
  return found


def tied_head(
  state: StateDict, embedding: Entry, head: Entry, tied: bool | None
) -> tuple[bool, StateDict]:
  """Whether a head is the embedding, and the weights that are left to import.

  Args:
    state: The weights, a tied head among them or not: libraries save it, or do not.
    embedding: The embedding's entry.
    head: The head's.
    tied: What is told; if `None`, it is tied where it is missing or repeats the embedding.

  Returns:
    `tied`, and the weights without a head that repeats a tied embedding. One that differs is left,
    for an importer that has no place for it.
  """
  repeats = head.theirs in state and np.array_equal(state[head.theirs], state[embedding.theirs])
  if tied is None:
    tied = repeats or head.theirs not in state
  dropped = {head.theirs} if tied and repeats else set()
  return bool(tied), {name: x for name, x in state.items() if name not in dropped}


def number(found: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
  """A positive number that a library's configuration tells; `default` where it is not there.

  Raises:
    ValueError: it is none, or no `kind`.
  """
  value = found.get(name)
  if value is None:
    return default
  whole = isinstance(value, int) and not isinstance(value, bool)
  if not (whole or (kind is float and isinstance(value, float))) or not value > 0:
    raise ValueError(f"{name}={value!r} is no positive {kind.__name__}")
  return kind(value)


def check_told(library: str, fields: Mapping[str, Any], hints: Mapping[str, str]) -> None:
  """Raises a `ValueError` for fields that weights do not tell, with hints what they may be."""
  if untold := {name: hint for name, hint in hints.items() if fields.get(name) is None}:
    listed = "; ".join(f"{name} ({hint})" for name, hint in untold.items())
    raise ValueError(f"the weights of {library} do not tell all of the model; give {listed}")


def check_same(library: str, config: LanguageModelConfig, theirs: LanguageModelConfig) -> None:
  """Raises a `ValueError` that names what a library has otherwise.

  Args:
    library: Its name.
    config: Our model.
    theirs: What the library makes of our model's sizes.
  """
  ours, theirs = dict(_leaves(config)), dict(_leaves(theirs))
  wrong = [
    f"{path}={ours.get(path)!r} instead of {theirs.get(path)!r}"
    for path in {**ours, **theirs}
    if ours.get(path) != theirs.get(path)
  ]
  if wrong:
    raise ValueError(f"{library} has no such model: {', '.join(wrong)}")


def mixer_kinds(config: LanguageModelConfig) -> list[str]:
  """Kinds of the mixers of each stage, of those whose layers are alike; empty for others."""
  patterns = [stage.pattern for stage in config.decoder.stages]
  return [] if any(len(p) > 1 for p in patterns) else [p[0].mixer.kind for p in patterns]


def _leaves(x: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """What a configuration says of a model's mathematics, by dotted names."""
  if isinstance(x, tuple) and any(map(dataclasses.is_dataclass, x)):
    for i, item in enumerate(x):
      yield from _leaves(item, f"{path}[{i}]")
  elif dataclasses.is_dataclass(x):
    yield path, type(x).__name__
    skipped = _NOT_OF_WEIGHTS | (_OF_XPOS if getattr(x, "kind", None) == "rope" else set())
    for field in dataclasses.fields(x):
      if field.name not in skipped:
        value = getattr(x, _DEFAULTED.get(field.name, ""), getattr(x, field.name))
        yield from _leaves(value, f"{path}.{field.name}".removeprefix("."))
  else:
    yield path, x


def _check_covered(flat: Mapping[str, Any], by_path: Mapping[str, Entry]) -> None:
  if flat.keys() != by_path.keys():
    raise ValueError(
      f"the model's parameters are not those of the table: {sorted(flat.keys() ^ by_path.keys())}"
    )
