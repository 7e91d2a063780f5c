"""The first state and the step: pure functions made from a task.

The same step runs under `jax.jit` on a mesh, where sums over the batch are global, and under
`jax.pmap`, where `axis_name` makes them so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from latentlab.train.state import TrainState, merge, select, unbox
from latentlab.train.task import Batch, Group, LossTerms, Task
from latentlab.typing import Array, Float, Key, Params

Metrics = Mapping[str, Float[Array, ""]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(task: Task, key: Key[Array, ""], *, ema_decay: float | None = None) -> TrainState:
  """Returns the state before the first step."""
  init_key, run_key = jax.random.split(key)
  params = unbox(task.init(init_key))
  _check_groups(task.groups, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_states={g.name: g.optimizer.init(select(params, g.trainable)) for g in task.groups},
    ema=jax.tree.map(lambda x: x.astype(jnp.float32), params) if ema_decay else None,
    key=run_key,
    skipped=jnp.zeros((), jnp.int32),
    total_skipped=jnp.zeros((), jnp.int32),
  )


def make_step(
  task: Task,
  *,
  accumulate_steps: int = 1,
  ema_decay: float | None = None,
  axis_name: str | None = None,
) -> Step:
  """Makes the step of a task.

  All groups see the parameters as they were before the step. If any group's loss, gradient or
  update is not finite (a batch whose weights are all zero included), nothing but the counters
  changes.

  Args:
    task: Its groups are optimised.
    accumulate_steps: Microbatches a batch is cut into; gradients are those of the whole batch.
    ema_decay: Decay of the parameters' moving average, approached as `(1 + n) / (10 + n)` so that
      a short run's average is not its initialisation; no average if `None` or zero.
    axis_name: Mapped axis to sum over, under `jax.pmap`.

  Returns:
    `(state, batch) -> (state, metrics)`. Metrics are float32 scalars: `loss`, `grad_norm` (before
    clipping), `lr` and the task's own, under `<group>/` where there are several groups, and
    `skipped`, the steps skipped in a row.
  """
  if accumulate_steps < 1:
    raise ValueError(f"optimizer.accumulate_steps must be at least 1, got {accumulate_steps=}.")

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    params, opt_states = state.params, dict(state.opt_states)
    metrics: dict[str, Array] = {}
    ok = jnp.array(True)
    for i, group in enumerate(task.groups):
      counts = group.count and group.count(batch)
      if axis_name is not None:
        counts = jax.lax.psum(counts, axis_name)
      grads, terms = _gradients(
        group, state.params, batch, jax.random.fold_in(key, i), accumulate_steps, counts
      )
      if axis_name is not None:
        grads, terms = jax.lax.psum((grads, terms), axis_name)
      grads = jax.tree.map(lambda g, weight=terms.weight: g / weight, grads)
      loss, grad_norm = terms.total / terms.weight, optax.tree.norm(grads)
      ok &= jnp.isfinite(loss) & jnp.isfinite(grad_norm)

      trainable = select(state.params, group.trainable)
      updates, opt_states[group.name] = group.optimizer.update(
        grads, state.opt_states[group.name], trainable
      )
      lr = jnp.asarray(group.schedule(state.step), jnp.float32)
      updates = jax.tree.map(lambda u, lr=lr: lr * u, updates)
      ok &= jnp.isfinite(optax.tree.norm(updates))
      params = merge(params, optax.apply_updates(trainable, updates))

      prefix = f"{group.name}/" if len(task.groups) > 1 else ""
      own = {name: total / weight for name, (total, weight) in terms.metrics.items()}
      for name, value in {"loss": loss, "grad_norm": grad_norm, "lr": lr, **own}.items():
        metrics[prefix + name] = value.astype(jnp.float32)

    new = (params, opt_states, _average(state, params, ema_decay))
    old = (state.params, dict(state.opt_states), state.ema)
    params, opt_states, ema = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
    skipped = jnp.where(ok, 0, state.skipped + 1)
    state = state.replace(
      step=state.step + 1,
      params=params,
      opt_states=opt_states,
      ema=ema,
      skipped=skipped,
      total_skipped=state.total_skipped + ~ok,
    )
    return state, metrics | {"skipped": skipped.astype(jnp.float32)}

  return step


def _check_groups(groups: Sequence[Group], params: Params) -> None:
  owner: dict[str, str] = {}
  if len({group.name for group in groups}) < len(groups):
    raise ValueError(f"Groups need different names, got {[group.name for group in groups]}.")
  for group in groups:
    for path in traverse_util.flatten_dict(select(params, group.trainable), sep="/"):
      if path in owner:
        raise ValueError(
          f"Groups {owner[path]!r} and {group.name!r} both train {path!r}; "
          "narrow the trainable patterns of one."
        )
      owner[path] = group.name


def _gradients(
  group: Group,
  params: Params,
  batch: Batch,
  key: Key[Array, ""],
  accumulate_steps: int,
  counts: Any,
) -> tuple[Params, LossTerms]:
  """Returns the gradient of a batch's total loss, not yet divided by its weight, and the sums."""

  def total(trainable: Params, microbatch: Batch, key: Key[Array, ""]) -> tuple[Array, LossTerms]:
    args = (merge(params, trainable), microbatch, key)
    terms = group.loss(*args) if group.count is None else group.loss(*args, counts)
    return terms.total, terms

  def sums(microbatch: Batch, key: Key[Array, ""]) -> tuple[Params, LossTerms]:
    trainable = select(params, group.trainable)
    out = jax.grad(total, has_aux=True)(trainable, microbatch, key)
    return jax.tree.map(lambda x: x.astype(jnp.float32), out)

  if accumulate_steps == 1:
    return sums(batch, key)

  def add(carry: Any, xs: tuple[Batch, Key[Array, ""]]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, carry, sums(*xs)), None

  xs = _microbatches(batch, accumulate_steps), jax.random.split(key, accumulate_steps)
  shapes = jax.eval_shape(sums, *jax.tree.map(lambda x: x[0], xs))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, xs)[0]


def _microbatches(batch: Batch, n: int) -> Batch:
  """Cuts `[B ...]` into `[n B/n ...]`, taking every n-th row: shards keep their own rows."""

  def cut(x: Array) -> Array:
    if x.shape[0] % n:
      raise ValueError(
        f"A batch of {x.shape[0]} rows does not divide into "
        f"optimizer.accumulate_steps={n} microbatches; change batch_size or accumulate_steps."
      )
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(cut, batch)


def _average(state: TrainState, params: Params, ema_decay: float | None) -> Params | None:
  if not ema_decay:
    return state.ema
  taken = (state.step - state.total_skipped).astype(jnp.float32)
  decay = jnp.minimum(ema_decay, (1 + taken) / (10 + taken))
  return jax.tree.map(
    lambda mean, x: decay * mean + (1 - decay) * x.astype(jnp.float32), state.ema, params
  )
