"""What every operation shares: which platform a call is for, and which implementation serves it."""

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax import Array

_logger = logging.getLogger(__name__)


def target_platform() -> str:
  """The platform being compiled for: "cpu", "gpu" or "tpu".

  The ambient mesh decides, and not `default_backend()`: an ahead-of-time compile for a TPU runs
  in a process whose backend is a CPU.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = jax.default_backend() if device is None else device.platform
  return "gpu" if platform in ("cuda", "rocm") else platform


def resolve(
  implementation: str | Sequence[str] | None, known: Collection[str], default: Sequence[str]
) -> tuple[str, ...]:
  """The names to try, in order, for an `implementation` argument.

  Raises:
    ValueError: A name is unknown, or there is none.
  """
  if implementation is None:
    return tuple(default)
  names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
  if not names or not set(names) <= set(known):
    raise ValueError(f"{implementation=} is not among {tuple(known)}; name one of those, or None.")
  return names


def dispatch(
  op: str,
  implementations: Mapping[str, Callable[..., Any]],
  defaults: Mapping[str, Sequence[str]],
  implementation: str | Sequence[str] | None,
  *args: Any,
) -> Any:
  """Calls the first implementation that accepts the arguments, in the order asked for.

  Args:
    op: Its name, for the log.
    implementations: Functions of `args` by name. One that cannot serve its arguments raises
      `NotImplementedError` with the reason; every other error escapes.
    defaults: The names tried where `implementation` is `None`, in order, by target platform.
    implementation: A name is a demand, a sequence is tried in order.
    *args: Checked arguments.

  Raises:
    ValueError: A name is unknown.
    ExceptionGroup: Every implementation asked for refused; holds the reasons.
  """
  default = defaults.get(target_platform(), defaults["cpu"])
  names, refusals = resolve(implementation, implementations, default), []
  for name in names:
    try:
      out = implementations[name](*args)
    except NotImplementedError as e:
      refusals.append(e)
    else:
      note_choice(op, name)
      return out
  raise ExceptionGroup(f"No implementation of {op} among {names} accepts these inputs.", refusals)


@functools.cache
def note_choice(op: str, name: str) -> None:
  """Logs once per process that `name` serves `op`: a silent fallback spoils a benchmark."""
  _logger.info("%s runs as %r.", op, name)


def vary_alike(*arrays: Array) -> tuple[Array, ...]:
  """The arrays, all marked as varying over each manual mesh axis that any of them varies over.

  Inside `shard_map` the carry of a scan and the operands of a `custom_vjp` must agree in this;
  autodiff then turns the mark on a replicated operand into the sum of its gradient.
  """
  varying = [jax.typeof(a).manual_axis_type.varying for a in arrays]
  union = frozenset().union(*varying)
  return tuple(
    jax.lax.pcast(a, tuple(sorted(union - v)), to="varying") if v != union else a
    for a, v in zip(arrays, varying, strict=True)
  )
