"""The state of a training run, and subsets of parameters by path."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
from flax import linen as nn
from flax import traverse_util

from latentlab.typing import Array, Int, Key, Params


@flax.struct.dataclass
class TrainState:
  """All that a step reads and writes; restoring it restores the run.

  Attributes:
    step: Steps taken, skipped ones included; the schedule and the keys follow it.
    params: Parameters, unboxed.
    opt_states: By group, the optimiser's state over that group's trainable parameters only.
    ema: Float32 moving average of the parameters, or `None`.
    key: Key of the run; a step folds its number in, so a resumed run draws what it would have.
    skipped: Steps skipped in a row up to now for a non-finite loss or gradient.
    total_skipped: Steps skipped since the start.
  """

  step: Int[Array, ""]
  params: Params
  opt_states: Mapping[str, Any]
  ema: Params | None
  key: Key[Array, ""]
  skipped: Int[Array, ""]
  total_skipped: Int[Array, ""]


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.Partitioned)


def unbox(params: Params) -> Params:
  """Drops the logical axes, and, unlike `nn.unbox`, never adds a sharding constraint."""
  return jax.tree.map(lambda x: x.value if _is_box(x) else x, params, is_leaf=_is_box)


def axis_names(params: Params) -> dict[str, tuple[str | None, ...]]:
  """Returns the logical axes of boxed parameters by path; `None` for each unnamed axis."""
  return {
    path: tuple(x.names) if _is_box(x) else (None,) * x.ndim
    for path, x in traverse_util.flatten_dict(params, sep="/").items()
  }


def select(params: Params, patterns: Sequence[str]) -> Params:
  """Returns the subtree of parameters whose whole path matches one of the patterns.

  Raises:
    ValueError: A pattern matches no parameter, which is nearly always a typing mistake.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  kept = set()
  for pattern in patterns:
    matches = {path for path in flat if re.fullmatch(pattern, path)}
    if not matches:
      raise ValueError(
        f"trainable {pattern=} matches none of the parameters; it has to match a whole path, "
        f"such as {sorted(flat)[0]!r}. Paths: {sorted(flat)}."
      )
    kept |= matches
  return traverse_util.unflatten_dict({p: x for p, x in flat.items() if p in kept}, sep="/")


def merge(params: Params, subset: Params) -> Params:
  """Returns `params` with the leaves of `subset` in place of its own."""
  flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(subset)
  return traverse_util.unflatten_dict(flat)
