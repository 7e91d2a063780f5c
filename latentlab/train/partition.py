"""Where a run's arrays live: mesh, rules from logical to mesh axes, and the trainer that uses them.

`RULES` gives every logical axis of parameters and activations its mesh axes, and is the only such
table; `config.axis_rules` overrides entries. `make_trainer` returns a `Trainer`, under `jax.jit`
on a mesh `data, fsdp, tensor, seq`, or under `jax.pmap` as plain data parallelism. Both hold the
state as global arrays without a device axis, so whoever saves, restores or evaluates need not know
which.
"""

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from latentlab.train.state import TrainState, axis_names
from latentlab.train.step import Metrics, init_state, make_step
from latentlab.train.task import Batch, Task
from latentlab.typing import Array, Key

MESH_AXES = ("data", "fsdp", "tensor", "seq")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("head_dim", None),
  ("positions", None),
  ("layers", None),
  ("act_batch", ("data", "fsdp")),
  ("act_length", "seq"),
  ("act_embed", None),
  ("act_heads", "tensor"),
  ("act_kv_heads", "tensor"),
  ("act_mlp", "tensor"),
  ("act_vocab", "tensor"),
)
Rules = tuple[tuple[str, tuple[str, ...] | None], ...]


def make_rules(overrides: Sequence[Sequence[Any]] = (), axes: Sequence[str] = MESH_AXES) -> Rules:
  """Returns `RULES` with entries replaced or added by `config.axis_rules`.

  Args:
    overrides: Pairs of a logical axis and a mesh axis, several, or `None`.
    axes: Axes of the mesh at hand; rules for others fall away.
  """
  rules = dict(RULES)
  for override in overrides:
    if len(override) != 2 or not isinstance(override[0], str):
      raise ValueError(f"axis_rules takes pairs (logical axis, mesh axes), got {override=}.")
    rules[override[0]] = override[1]
  resolved = []
  for name, target in rules.items():
    target = (target,) if isinstance(target, str) else tuple(target or ())
    if unknown := set(target) - set(MESH_AXES):
      raise ValueError(
        f"axis_rules maps {name!r} to {sorted(unknown)}; mesh axes are {MESH_AXES} or None."
      )
    resolved.append((name, tuple(axis for axis in target if axis in axes) or None))
  return tuple(resolved)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes the mesh of `config.mesh`; one size may be -1 and takes the devices that remain."""
  devices = jax.devices() if devices is None else list(devices)
  sizes = dict(sizes)
  if unknown := set(sizes) - set(MESH_AXES):
    raise ValueError(f"config.mesh has {sorted(unknown)}; its axes are {MESH_AXES}.")
  sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f"config.mesh={sizes} needs positive sizes, and -1 at most once.")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if open_axes:
    sizes[open_axes[0]] = max(len(devices) // fixed, 1)
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"config.mesh={sizes} takes {math.prod(sizes.values())} devices, but there are "
      f"{len(devices)}; change a size, or set one to -1."
    )
  # A process feeds its own rows at full length, so its devices must hold whole rows.
  local = len(devices) // len({d.process_index for d in devices})
  if local % (sizes["tensor"] * sizes["seq"]):
    raise ValueError(
      f"config.mesh.tensor={sizes['tensor']} times config.mesh.seq={sizes['seq']} must divide "
      f"the {local} devices of a process."
    )
  shape = tuple(sizes.values())
  return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def make_trainer(
  task: Task,
  config: ml_collections.ConfigDict,
  devices: Sequence[jax.Device] | None = None,
) -> "Trainer":
  """Makes the trainer of `config.parallelism`.

  Args:
    task: What to train.
    config: Reads `parallelism`, `mesh`, `axis_rules`, `optimizer.accumulate_steps` and
      `optimizer.ema_decay`.
    devices: All devices of the run; `jax.devices()` if `None`.
  """
  trainers = {"jit": JitTrainer, "pmap": PmapTrainer}
  name = config.get("parallelism", "jit")
  if name not in trainers:
    raise ValueError(f"config.parallelism={name!r} is unknown; choose from {sorted(trainers)}.")
  mesh = make_mesh(dict(config.get("mesh", {"data": -1})), devices)
  return trainers[name](
    task,
    mesh,
    config.get("axis_rules", ()),
    accumulate_steps=config.optimizer.get("accumulate_steps", 1),
    ema_decay=config.optimizer.get("ema_decay", None),
  )


class Trainer(abc.ABC):
  """Initialises a state, places batches, and steps.

  Attributes:
    mesh: The devices, and the axes that arrays are laid out over.
    rules: Logical to mesh axes, as `nn.logical_axis_rules` takes them.
    abstract_state: Shapes, dtypes and shardings of the state: what a checkpoint restores into.
  """

  def __init__(
    self,
    task: Task,
    mesh: Mesh,
    axis_rules: Sequence[Sequence[Any]] = (),
    *,
    accumulate_steps: int = 1,
    ema_decay: float | None = None,
  ):
    self.mesh = mesh
    self.rules = make_rules(axis_rules, mesh.axis_names)
    self._task = task
    self._accumulate_steps = accumulate_steps
    self._ema_decay = ema_decay
    self._num_traces = 0
    key = jax.random.key(0)
    boxed = jax.eval_shape(task.init, key)
    state = jax.eval_shape(self._init, key)
    self.abstract_state = _shard_state(state, axis_names(boxed), mesh, self.rules)
    self._shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    self._jitted_init = jax.jit(self._init, out_shardings=self._shardings)

  @abc.abstractmethod
  def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes a step. The state given is donated: its arrays are gone afterwards."""

  @abc.abstractmethod
  def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
    """Puts this process's rows of a batch on its devices."""

  @abc.abstractmethod
  def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    """Lowers the step, to read what it compiles to."""

  def init(self, key: Key[Array, ""]) -> TrainState:
    """Makes a state, each device only its shards; equal bit for bit for every layout."""
    return self._jitted_init(key)

  def check_length(self, seq_length: int) -> None:
    """Raises a `ValueError` if windows of `seq_length` tokens do not divide over the mesh."""
    axes = dict(self.rules)["act_length"]
    if seq_length % _size(self.mesh, axes):
      raise ValueError(
        f"A sequence length of {seq_length} must be a multiple of {_size(self.mesh, axes)}, the "
        f"size of {axes} in config.mesh; change data.seq_length or config.mesh."
      )

  def num_compilations(self) -> int:
    """Returns how often the step was traced to be compiled."""
    return self._num_traces

  def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles an evaluation for this layout.

    Args:
      fn: `(params, batch, ...) -> tree of arrays`, with sums over the batch inside.

    Returns:
      The function to call with parameters on the devices and this process's rows as NumPy arrays;
      what it returns is the same on every device.
    """
    jitted = jax.jit(fn, out_shardings=NamedSharding(self.mesh, P()))

    def run(params, batch, *args):
      with self.scope():
        return jitted(params, self._place_rows(batch), *args)

    return run

  @contextlib.contextmanager
  def scope(self) -> Iterator[None]:
    """Makes mesh and rules ambient, which logical constraints and sharded ops look for."""
    with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
      yield

  def _init(self, key: Key[Array, ""]) -> TrainState:
    return init_state(self._task, key, ema_decay=self._ema_decay)

  def _make_step(self, axis_name: str | None = None) -> Callable[..., Any]:
    step = make_step(
      self._task,
      accumulate_steps=self._accumulate_steps,
      ema_decay=self._ema_decay,
      axis_name=axis_name,
    )

    def counted(state, batch):
      self._num_traces += 1
      return step(state, batch)

    return counted

  def _place_rows(self, batch: Mapping[str, np.ndarray], accumulate_steps: int = 1) -> Batch:
    """Lays `[b T ...]` out over the axes of `act_batch` and `act_length`."""
    row_axes, length_axes = (dict(self.rules)[name] for name in ("act_batch", "act_length"))
    num_row_shards = _size(self.mesh, row_axes)

    def put(x: np.ndarray) -> Array:
      rows = x.shape[0] * jax.process_count()
      if rows % (num_row_shards * accumulate_steps):
        raise ValueError(
          f"batch_size={rows} must be a multiple of {num_row_shards} (the mesh's {row_axes}) "
          f"times optimizer.accumulate_steps={accumulate_steps}."
        )
      if x.ndim > 1:
        self.check_length(x.shape[1])
      spec = P(row_axes, length_axes) if x.ndim > 1 else P(row_axes)
      sharding = NamedSharding(self.mesh, spec)
      return jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:]))

    return jax.tree.map(put, dict(batch))


class JitTrainer(Trainer):
  """One program over the whole mesh, partitioned by the compiler from shardings."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._step = jax.jit(
      self._make_step(),
      in_shardings=(self._shardings, None),  # A placed batch brings its own.
      out_shardings=(self._shardings, NamedSharding(self.mesh, P())),
      donate_argnums=0,
    )

  def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    with self.scope():
      return self._step(state, batch)

  def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
    return self._place_rows(batch, self._accumulate_steps)

  def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    with self.scope():
      return self._step.lower(state, batch)


class PmapTrainer(Trainer):
  """Data parallelism: every device has the whole state and its own rows, `[devices, rows, ...]`.

  Random keys differ by device, so with dropout a run is like, and not equal to, one under `jit`.
  """

  def __init__(self, task: Task, mesh: Mesh, *args, **kwargs):
    if mesh.shape["data"] != mesh.size:
      raise ValueError(
        f"config.parallelism='pmap' is data parallelism only, but config.mesh={dict(mesh.shape)};"
        " set all but config.mesh.data to 1, or use 'jit'."
      )
    devices = tuple(mesh.devices.flat)
    super().__init__(task, Mesh(devices, ("data",)), *args, **kwargs)
    # Unmapped in and out: pmap holds such arrays once per device and shows them without a device
    # axis, so the state is as jit's. A typed key goes as its words, which several processes need.
    step = self._make_step(axis_name="data")

    def on_words(words, state, batch):
      state, metrics = step(state.replace(key=jax.random.wrap_key_data(words)), batch)
      return state.replace(key=None), metrics

    self._pmapped = jax.pmap(
      on_words,
      axis_name="data",
      in_axes=(None, None, 0),
      out_axes=(None, None),
      devices=devices,
      donate_argnums=1,
    )

  def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    words = jax.random.key_data(state.key)
    new, metrics = self._pmapped(words, state.replace(key=None), batch)
    new, metrics = jax.tree.map(self._as_global, (new, metrics))
    return new.replace(key=state.key), metrics

  def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
    num_local = len(self.mesh.local_devices)

    def put(x: np.ndarray) -> Array:
      if x.shape[0] % (num_local * self._accumulate_steps):
        raise ValueError(
          f"batch_size={x.shape[0] * jax.process_count()} must be a multiple of {self.mesh.size} "
          f"devices times optimizer.accumulate_steps={self._accumulate_steps}."
        )
      x = x.reshape(num_local, -1, *x.shape[1:])
      return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P("data")), x)

    return jax.tree.map(put, dict(batch))

  def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
    return self._pmapped.lower(jax.random.key_data(state.key), state.replace(key=None), batch)

  def _as_global(self, x: Array) -> Array:
    """Joins the processes' equal arrays that pmap returned to one, without a copy."""
    if jax.process_count() == 1:
      return x
    shards = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(self.mesh, P()), shards)


def _size(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[axis] for axis in axes)


def _shard_state(
  state: TrainState, axes: Mapping[str, tuple[str | None, ...]], mesh: Mesh, rules: Rules
) -> TrainState:
  """Gives each leaf of an abstract state its sharding.

  Optimisers and averages keep trees like the parameters': a leaf whose path ends in a parameter's
  path and which has its shape is laid out like it, and any other is on every device.
  """
  shapes = {_path(path): x.shape for path, x in jax.tree.leaves_with_path(state.params)}
  specs = {path: _spec(path, shapes[path], names, mesh, rules) for path, names in axes.items()}

  def shard(path, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    suffixes = (_path(path[i:]) for i in range(len(path)))
    parameter = next((s for s in suffixes if shapes.get(s) == x.shape), None)
    sharding = NamedSharding(mesh, specs.get(parameter, P()))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map_with_path(shard, state)


def _path(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(
  path: str, shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh, rules: Rules
) -> P:
  if unknown := {name for name in names if name is not None} - dict(rules).keys():
    raise ValueError(
      f"Parameter {path!r} has the logical axes {sorted(unknown)}, for which there is no rule; "
      "add them to config.axis_rules."
    )
  spec = nn.logical_to_mesh_axes(names, rules)
  for i, (size, target) in enumerate(zip(shape, spec, strict=True)):
    if size % _size(mesh, target):
      # The activations that the parameter makes have to be whole as well.
      whole = tuple((n, None) for n in (names[i], f"act_{names[i]}") if dict(rules).get(n))
      raise ValueError(
        f"Dimension {i} ({names[i]!r}) of parameter {path!r} has size {size}, which does not "
        f"divide over {_size(mesh, target)} devices of mesh axes {target}. Change the size, "
        f"config.mesh, or keep it whole with config.axis_rules={whole}."
      )
  return spec
