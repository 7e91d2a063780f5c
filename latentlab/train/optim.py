"""Learning-rate schedules and optimisers, by name from a config.

An optimiser here makes updates at a learning rate of one, and the training step scales them by
the schedule at its own step number, so the logged rate is the applied one, and a skipped step
moves the schedule as it moves the data. Decoupled weight decay is in the updates, so it is scaled
by the learning rate, as in PyTorch's AdamW.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.typing import ArrayLike
from optax import contrib

from latentlab.typing import Array, Float, Params

AxisNames = Mapping[str, tuple[str | None, ...]]
"""Logical axes of each parameter, by `/`-joined path."""

SCHEDULES: Mapping[str, Callable[[Array, float], Array]] = {
  "constant": lambda p, power: jnp.ones_like(p),
  "linear": lambda p, power: 1 - p,
  "cosine": lambda p, power: 0.5 * (1 + jnp.cos(jnp.pi * p)),
  "polynomial": lambda p, power: (1 - p) ** power,
}
"""Share of the way from the end's to the peak's rate, at a share `p` of the steps after warm-up."""

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")


def make_schedule(config: ml_collections.ConfigDict, train_steps: int) -> optax.Schedule:
  """Makes a linear warm-up to `peak_lr`, then a decay to `end_lr_ratio * peak_lr`.

  No step of a run has a rate of zero: step `n` of the warm-up (counted from 0) has
  `(n + 1) / warmup_steps` of the peak, and the decay would reach its end at `train_steps`, one
  past the last step.
  """
  name = _choice(config, "schedule", SCHEDULES)
  warmup = config.get("warmup_steps", 0)
  end, power = config.get("end_lr_ratio", 0.0), config.get("power", 1.0)
  if not 0 <= warmup <= train_steps:
    raise ValueError(
      f"optimizer.warmup_steps={warmup} must lie between 0 and {train_steps=}; "
      "shorten the warm-up or lengthen the run."
    )
  if not (config.peak_lr > 0 and 0 <= end <= 1):
    raise ValueError(
      f"optimizer.peak_lr={config.peak_lr} must be positive and "
      f"optimizer.end_lr_ratio={end} between 0 and 1."
    )

  def schedule(step: ArrayLike) -> Float[Array, "..."]:
    step = jnp.asarray(step, jnp.float32)
    ramp = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
    progress = jnp.clip((step - warmup) / max(train_steps - warmup, 1), 0, 1)
    return config.peak_lr * ramp * (end + (1 - end) * SCHEDULES[name](progress, power))

  return schedule


def make_optimizer(
  config: ml_collections.ConfigDict, axes: AxisNames
) -> optax.GradientTransformation:
  """Makes the optimiser `config.name` at a learning rate of one.

  Args:
    config: `name`, `b1`, `b2`, `eps`, `weight_decay`, `clip_norm` (0 or `None`: no clipping), and
      optionally `decay_embeddings`. `b1` is Muon's momentum too, and its updates are scaled to
      AdamW's size, so that learning rates carry over.
    axes: Logical axes of the parameters, which tell matrices from stacks of vectors.

  Returns:
    The transformation. Biases, scales, and whatever has one dimension per layer do not decay.
  """
  name = _choice(config, "name", OPTIMIZERS)
  b1, b2, eps = config.get("b1", 0.9), config.get("b2", 0.999), config.get("eps", 1e-8)
  decay, clip = config.get("weight_decay", 0.0), config.get("clip_norm", None)
  if decay and name in ("adam", "sgd"):
    raise ValueError(
      f"optimizer.weight_decay={decay} does nothing for optimizer.name={name!r}; "
      "set it to 0 or use 'adamw' or 'muon'."
    )
  if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps > 0 and decay >= 0):
    raise ValueError(
      f"optimizer needs 0 <= b1, b2 < 1, eps > 0 and weight_decay >= 0, "
      f"got {b1=}, {b2=}, {eps=}, weight_decay={decay}."
    )
  direction = {
    "adam": lambda: optax.scale_by_adam(b1, b2, eps),
    "adamw": lambda: optax.scale_by_adam(b1, b2, eps),
    "sgd": optax.identity,
    "muon": lambda: _muon(b1, b2, eps, axes),
  }[name]()
  return optax.chain(
    optax.clip_by_global_norm(clip) if clip else optax.identity(),
    direction,
    optax.add_decayed_weights(decay, _decay_mask(axes, config.get("decay_embeddings", True)))
    if decay
    else optax.identity(),
    optax.scale(-1.0),
  )


def _choice(config: ml_collections.ConfigDict, field: str, choices) -> str:
  if config[field] not in choices:
    raise ValueError(
      f"optimizer.{field}={config[field]!r} is unknown; choose from {sorted(choices)}."
    )
  return config[field]


def _path(path: tuple[jax.tree_util.DictKey, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _matrix_axes(names: tuple[str | None, ...]) -> tuple[int, ...]:
  """Dimensions other than those that merely stack parameters of the same kind."""
  return tuple(i for i, name in enumerate(names) if name != "layers")


def _is_matrix(path: str, names: tuple[str | None, ...]) -> bool:
  return len(_matrix_axes(names)) > 1 and path.split("/")[-1] not in ("bias", "scale")


def _is_table(names: tuple[str | None, ...]) -> bool:
  """Embeddings and heads: a vector for each of many ids, not a map between layers."""
  return "vocab" in names or "positions" in names


def _decay_mask(axes: AxisNames, decay_embeddings: bool) -> Callable[[Params], Params]:
  def decays(path, _) -> bool:
    names = axes[_path(path)]
    return _is_matrix(_path(path), names) and (decay_embeddings or not _is_table(names))

  return lambda params: jax.tree.map_with_path(decays, params)


def _muon(b1: float, b2: float, eps: float, axes: AxisNames) -> optax.GradientTransformation:
  """Muon for matrices between layers, Adam for embeddings, heads and vectors.

  A kernel reads from or writes to `embed`; its other dimensions (`heads, head_dim`) are flattened
  to the matrix's second, and stacked layers are orthogonalised one by one.
  """

  def dimensions(path, _) -> contrib.MuonDimensionNumbers | None:
    names = axes[_path(path)]
    if not _is_matrix(_path(path), names) or _is_table(names) or "embed" not in names:
      return None
    first, *rest = _matrix_axes(names)
    if names[first] == "embed":
      return contrib.MuonDimensionNumbers((first,), tuple(rest))
    return contrib.MuonDimensionNumbers((first, *rest[:-1]), (rest[-1],))

  return contrib.muon(
    -1.0,  # Descends by itself; here the chain's last link does.
    beta=b1,
    eps=eps,
    adam_b1=b1,
    adam_b2=b2,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=lambda params: jax.tree.map_with_path(dimensions, params),
  )
