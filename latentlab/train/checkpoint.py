"""Checkpoints: one Orbax manager, the train state and the data iterator saved together.

A workdir holds `config.json`, `metrics.jsonl` and `checkpoints/<step>/{state,iterator}`. The state
is stored under the "/"-joined paths of its leaves, so that reading one needs neither the Python
classes that wrote it nor the mesh it was written from, and a mismatch has a name.
"""

import contextlib
import json
import logging
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

logger = logging.getLogger(__name__)

Tree = TypeVar("Tree")

# Copies of an array on several devices are written in parts, a slice from each, where the parts are
# worth it: each shape has its slices compiled, 10 ms, while the step that saves waits. Orbax's own
# handler also writes each array's shape beside it, which nothing here reads.
_HANDLERS = ocp.type_handlers.create_type_handler_registry(
  (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)),
  (np.ndarray, ocp.type_handlers.NumpyHandler()),
  *((kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, np.number)),
)


class UnreadableError(ValueError):
  """A checkpoint whose files are truncated, missing or damaged."""


class Checkpointer:
  """Saves and restores the checkpoints of one workdir.

  The newest `keep_last` checkpoints are kept and, when `keep_best` names an evaluation's metric,
  the best one as well. Writing is asynchronous and atomic: a checkpoint appears under its step's
  name only when it is whole.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    keep_last: int = 2,
    keep_best: str = "",
    best_mode: str = "min",
    read_only: bool = False,
  ):
    """Opens the checkpoints of `workdir`.

    Args:
      workdir: Where `checkpoints/` lies, or will.
      keep_last: How many of the newest to keep.
      keep_best: `"<evaluation>/<metric>"`, or "" to keep by age alone.
      best_mode: "min" or "max": which end of `keep_best` is the good one.
      read_only: Neither creates nor cleans up anything.
    """
    if best_mode not in ("min", "max"):
      raise ValueError(f"checkpoint.best_mode is one of min, max; got {best_mode=}.")
    if keep_last < 1:
      raise ValueError(f"checkpoint.keep_last must be at least 1; got {keep_last=}.")
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    self._keep_best, self._best_mode = keep_best.removeprefix("eval/"), best_mode
    self._read_only = read_only
    if read_only and not self.directory.is_dir():
      raise ValueError(f"There are no checkpoints in {str(workdir)!r}: train there first.")
    if not read_only:
      self._set_aside(
        [s for s in _steps_in(self.directory) if not _metrics_readable(self.directory / str(s))]
      )
    policies = [checkpoint_managers.LatestN(keep_last)]
    if keep_best:
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False
        )
      )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        best_fn=self._score if keep_best else None,
        best_mode="max",  # Of the score, which has the sign of best_mode in it.
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        create=not read_only,
        cleanup_tmp_directories=not read_only,
      ),
      item_handlers={
        "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_HANDLERS),
        "iterator": ocp.JsonCheckpointHandler(),
      },
    )
    best = self._manager.best_step() if keep_best else None
    self._best_score = -math.inf if best is None else self._score(self._manager.metrics(best) or {})

  def steps(self) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int:
    """The step of the best checkpoint by `keep_best`."""
    best = self._manager.best_step() if self._keep_best else None
    if best is None:
      raise ValueError(
        f"No checkpoint in {str(self.directory)!r} was ranked: the best is kept by "
        f"config.checkpoint.keep_best, which is {self._keep_best!r}."
      )
    return best

  def is_best(self, metrics: Mapping[str, float]) -> bool:
    """Whether `metrics` (`<evaluation>/<metric>`) beat those of every checkpoint so far."""
    ranked = self._ranked(metrics)
    return ranked is not None and self._score(ranked) > self._best_score

  def save(
    self,
    step: int,
    state: Any,
    iterator_state: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to write a checkpoint; the state may be donated as soon as this returns.

    Args:
      step: Its name.
      state: Any tree of arrays; typed PRNG keys are stored as their data.
      iterator_state: What the data iterator's `get_state` gave. It counts global batches and is
        the same on every process, so that one copy serves any number of them.
      metrics: Of the evaluation at this step, where there was one.
    """
    if step in self._manager.all_steps():
      return
    ranked = self._ranked(metrics or {})
    if ranked:
      self._best_score = max(self._best_score, self._score(ranked))
    self._manager.save(
      step,
      metrics=ranked,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeSave(_nest({k: _storable(x) for k, x in leaves(state).items()})),
        iterator=ocp.args.JsonSave(dict(iterator_state)),
      ),
    )

  def restore(
    self, target: Tree, step: int | None = None, *, partial: bool = False
  ) -> tuple[int, Tree, dict[str, Any]]:
    """Restores a state, straight into the shardings of `target`.

    Args:
      target: A tree of arrays or of `jax.ShapeDtypeStruct` with shardings. Whatever mesh wrote the
        checkpoint, every process reads the pieces it needs for this one.
      step: Which; the newest if `None`, and if that one is damaged, the newest that is not: the
        damaged ones are moved to `damaged_checkpoints/`.
      partial: Whether the checkpoint may hold more than `target`, which is left unread.

    Returns:
      The step, the state, and the data iterator's state.

    Raises:
      ValueError: the checkpoint is of another model; the first parameter that differs is named.
      UnreadableError: none could be read.
    """
    steps = self.steps()
    if step is not None and step not in steps:
      raise ValueError(
        f"There is no checkpoint of {step=} in {str(self.directory)!r}; there are {steps}."
      )
    if not steps:
      raise ValueError(f"There are no checkpoints in {str(self.directory)!r}.")
    damaged = []
    for candidate in [step] if step is not None else reversed(steps):
      try:
        state, iterator_state = self._restore_step(candidate, target, partial)
      except UnreadableError as e:
        logger.warning("%s", e)
        damaged.append(candidate)
        last_error = e
        continue
      if damaged:
        logger.warning("Falling back to the checkpoint of step %d.", candidate)
        if not self._read_only:
          self._set_aside(damaged)
          self._manager.reload()
      return candidate, state, iterator_state
    raise last_error

  def _restore_step(self, step: int, target: Tree, partial: bool) -> tuple[Tree, dict[str, Any]]:
    path = self.directory / str(step)
    wanted = leaves(target)
    abstract = {k: _abstract(x) for k, x in wanted.items()}
    found = stored_leaves(path)
    _check_same(path, {k: x for k, x in found.items() if k in abstract or not partial}, abstract)
    restored = _read(path, abstract)
    values = [_like(restored[k], x) for k, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), values), stored_iterator(path)

  def wait(self) -> None:
    """Returns once every checkpoint is on disk."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self) -> None:
    """Waits, then releases the threads."""
    self.wait()
    self._manager.close()

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def _ranked(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
    """What is stored of `metrics`: the one that ranks, when it is there and finite."""
    value = metrics.get(self._keep_best)
    return None if value is None or not math.isfinite(value) else {self._keep_best: float(value)}

  def _score(self, metrics: Mapping[str, float]) -> float:
    value = metrics.get(self._keep_best, math.inf if self._best_mode == "min" else -math.inf)
    return -value if self._best_mode == "min" else value

  def _set_aside(self, steps: Sequence[int]) -> None:
    """Moves damaged checkpoints out of the way, deleting nothing; process 0's list counts."""
    if steps and jax.process_index() == 0:
      aside = self.directory.parent / "damaged_checkpoints"
      aside.mkdir(exist_ok=True)
      for step in steps:
        names = (aside / f"{step}{suffix}" for suffix in ("", *(f".{i}" for i in range(1, 1000))))
        goal = next(name for name in names if not name.exists())
        (self.directory / str(step)).rename(goal)
        logger.warning("Moved the damaged checkpoint of step %d to %s.", step, goal)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("set_aside")


def restore_params(
  workdir: str | pathlib.Path,
  target: Tree,
  *,
  renames: Sequence[tuple[str, str]] = (),
  new: Sequence[str] = (),
  average: bool = False,
) -> Tree:
  """Starts parameters from another run's newest checkpoint: `config.init_from`.

  Args:
    workdir: The other run's workdir.
    target: The freshly initialised parameters, on their devices.
    renames: `(pattern, replacement)` pairs, applied by `re.sub` in order to the "/"-joined paths of
      the checkpoint; a path that becomes empty is dropped.
    new: Patterns; a parameter whose whole path one of them matches may be absent from the
      checkpoint and keeps its fresh value.
    average: Whether to take the parameters' moving average, where the run kept one.

  Returns:
    The parameters, in `target`'s shardings.

  Raises:
    ValueError: a parameter is missing, unused, renamed twice to one name, or of another shape.
  """
  with Checkpointer(workdir, read_only=True) as source:
    if not source.steps():
      raise ValueError(f"There are no checkpoints in {str(source.directory)!r}.")
    path = source.directory / str(source.steps()[-1])
  stored = stored_leaves(path)
  part = "ema/" if average and any(k.startswith("ema/") for k in stored) else "params/"
  found = {k.removeprefix(part): x for k, x in stored.items() if k.startswith(part)}
  origin: dict[str, str] = {}
  for name in found:
    goal = name
    for pattern, replacement in renames:
      goal = re.sub(pattern, replacement, goal)
    if goal and goal in origin:
      raise ValueError(f"init_rename gives both {origin[goal]!r} and {name!r} the name {goal!r}.")
    if goal:
      origin[goal] = name
  wanted = leaves(target)
  missing = [k for k in wanted if k not in origin and not any(re.fullmatch(p, k) for p in new)]
  unused = [k for k in origin if k not in wanted]
  if missing or unused:
    raise ValueError(
      f"init_from {str(workdir)!r} does not fit this model. "
      f"Missing from the checkpoint (rename with init_rename, or allow by init_new): {missing}. "
      f"Unused (rename, or drop by renaming to the empty string): {unused}."
    )
  taken = {k: x for k, x in wanted.items() if k in origin}
  _check_same(path, {k: found[origin[k]] for k in taken}, taken, dtypes=False)
  restored = _read(path, {part + origin[k]: _abstract(x) for k, x in taken.items()})
  values = [restored[part + origin[k]] if k in taken else x for k, x in wanted.items()]
  logger.info("Initialised %d of %d parameters from %s.", len(taken), len(wanted), path)
  return jax.tree.unflatten(jax.tree.structure(target), values)


def leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by "/"-joined path, in the tree's order."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def stored_leaves(path: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """Names, shapes and dtypes of the state in the checkpoint directory `path`, without its data."""
  for p in (path, *path.rglob("*")):  # Nothing outside of the workdir is read or moved.
    if p.is_symlink():
      raise ValueError(f"A checkpoint holds no symbolic links; {str(p)!r} is one.")
  with _reading(path):
    stored = leaves(ocp.PyTreeCheckpointHandler().metadata(path / "state").tree)
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in stored.items()}


def stored_iterator(path: pathlib.Path) -> dict[str, Any]:
  """The data iterator's state in the checkpoint directory `path`."""
  with _reading(path):
    return json.loads((path / "iterator" / "metadata").read_text())


def _read(path: pathlib.Path, target: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  # The handler rather than the manager: its restore holds no barrier for a failed process to miss.
  tree = _nest(target)
  args = ocp.args.PyTreeRestore(
    tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True
  )
  with _reading(path):
    return leaves(ocp.PyTreeCheckpointHandler().restore(path / "state", args=args))


class _reading(contextlib.AbstractContextManager):
  """Turns what Orbax and TensorStore raise about damaged files into `UnreadableError`.

  Orbax wraps a short read of an array in a bare `Exception`, which is matched by its exact type.
  With several processes, a failure on one is raised on all: one that is left behind in a
  collective would hang.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
    damaged = kind is not None and (
      kind is Exception or issubclass(kind, (ValueError, OSError, KeyError))
    )
    if error is not None and not damaged:
      return  # Ours or the machine's fault, not the file's.
    if jax.process_count() > 1:
      damaged = bool(multihost_utils.process_allgather(np.array(damaged)).any())
    if damaged:
      reason = str(error).splitlines()[0] if error else "another process could not read it"
      raise UnreadableError(f"The checkpoint {str(self.path)!r} is damaged: {reason}") from error


def _check_same(
  path: pathlib.Path,
  found: Mapping[str, jax.ShapeDtypeStruct],
  wanted: Mapping[str, Any],
  dtypes: bool = True,
) -> None:
  """Raises a `ValueError` that names the first leaf in which two states differ."""

  def describe(x: Any) -> str:
    return "nothing" if x is None else f"{jnp.dtype(x.dtype).name}{list(x.shape)}"

  for name in (*wanted, *found):
    a, b = wanted.get(name), found.get(name)
    if a is None or b is None or a.shape != b.shape or (dtypes and a.dtype != b.dtype):
      raise ValueError(
        f"The checkpoint {str(path)!r} is of another model or optimizer. The first difference "
        f"is {name!r}: expected {describe(a)}, found {describe(b)}. Use another workdir, or "
        "start from its parameters with config.init_from."
      )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _is_key(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _storable(x: Any) -> Any:
  return jax.random.key_data(x) if _is_key(x) else x


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  """The shape that is stored for `x`, on the devices of `x`."""
  stored = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
  return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=x.sharding)


def _like(stored: jax.Array, x: Any) -> jax.Array:
  """What was stored for `x`, as a typed key where that is one."""
  if not _is_key(x):
    return stored
  impl = []  # `key_impl` takes no abstract key, but does take a traced one.
  jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), x)
  return jax.random.wrap_key_data(stored, impl=impl[0])


def _steps_in(directory: pathlib.Path) -> list[int]:
  return [int(p.name) for p in directory.glob("*") if p.name.isdigit()]


def _metrics_readable(path: pathlib.Path) -> bool:
  """Whether the manager can be opened at all: it reads every checkpoint's metrics at the start."""
  file = path / "metrics" / "metrics"
  try:
    return not file.exists() or isinstance(json.loads(file.read_text()), dict)
  except ValueError:
    return False
