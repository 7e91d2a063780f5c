"""What a training run optimises: a task, its groups of parameters, and the language model's task.

A task owns the model's initialisation and one or several groups. A group is a loss, an optimiser,
and patterns that say which parameters they train, so frozen subsets, two-stage and adversarial
training differ in their groups and share one step and one loop.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import traverse_util

from latentlab.data import Data
from latentlab.models import flops_per_token, registry
from latentlab.models.language_model import LanguageModel
from latentlab.train import optim, text_sample
from latentlab.train.state import axis_names
from latentlab.typing import Array, Float, Key, Params

Batch = Mapping[str, Array]


@flax.struct.dataclass
class LossTerms:
  """A loss as two sums. The objective is `total / weight`.

  Sums are added over microbatches, devices and processes before they are divided, so the
  objective does not depend on how a batch was cut, even where weights are uneven.

  Attributes:
    total: Sum of the weighted losses.
    weight: Sum of the weights; not differentiated.
    metrics: Further quantities, each a sum and its weight.
  """

  total: Float[Array, ""]
  weight: Float[Array, ""]
  metrics: Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]] = flax.struct.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters that one loss and one optimiser train.

  Attributes:
    name: Key of the optimiser's state; prefixes the metrics of a task with several groups.
    loss: `(params, batch, key) -> LossTerms`, a function of all parameters; with `count`, it also
      takes the counts.
    optimizer: Updates at a learning rate of one; the step scales them by `schedule`.
    schedule: Learning rate at a step of the run.
    trainable: Regular expressions, each to match whole `/`-joined paths of parameters.
    count: A tree of sums over a batch's rows, which the loss is handed as they are over the whole
      step: an objective of several means, each over a number of its own, divides by them, and gives
      the part of the step that it has seen as its `weight`.
  """

  name: str
  loss: Callable[..., LossTerms]
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  trainable: tuple[str, ...] = (".*",)
  count: Callable[[Batch], Any] | None = None


@runtime_checkable
class Task(Protocol):
  """A model to initialise and the groups that train it."""

  @property
  def groups(self) -> tuple[Group, ...]:
    """The groups; no parameter may belong to two."""

  def init(self, key: Key[Array, ""]) -> Params:
    """Returns parameters boxed with the names of their logical axes."""


@runtime_checkable
class RunTask(Task, Protocol):
  """What a whole run, from its first batch to its sample, asks of a task besides."""

  @property
  def items_per_step(self) -> int:
    """What a step reads: tokens, patches, or latents."""

  @property
  def flops_per_item(self) -> float:
    """Matmul flops of training on one of them, backward pass included."""

  def check_sample(self, data: Data) -> None:
    """Raises a `ValueError` where `config.sample` asks for what cannot be drawn."""

  def show_sample(self, params: Params, data: Data, workdir: pathlib.Path) -> None:
    """Draws what `config.sample` asks for, for the eye, once training has ended."""


@dataclasses.dataclass(frozen=True)
class LanguageModelTask:
  """Next-token prediction over packed documents.

  Batches hold `inputs`, `targets`, `positions`, `segment_ids` and `weights`, all `[B T]`.

  Attributes:
    model: A model with `init(key, tokens)` and a method `token_losses`.
    config: The experiment; reads `optimizer`, `train_steps` and `task.trainable`.
  """

  model: nn.Module
  config: ml_collections.ConfigDict

  def init(self, key: Key[Array, ""]) -> Params:
    return self.model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

  def variant(self, fields: Mapping[str, Any]) -> LanguageModel:
    """The model with other `fields` of `config.model`, for the same parameters.

    Raises:
      ValueError: a field is unknown, or one of them changes the shapes of parameters.
    """
    built = self.model.config
    section = _model_section(self.config) | dict(fields)
    model = LanguageModel(registry.build_config(section, vocab_size=built.vocab_size))
    old, new = (_shapes(dataclasses.replace(self, model=m)) for m in (self.model, model))
    if changed := [p for p in sorted(old.keys() | new.keys()) if old.get(p) != new.get(p)]:
      path = changed[0]
      raise ValueError(
        f"model={dict(fields)} changes parameters ({path} from {old.get(path)} to "
        f"{new.get(path)}); an evaluation may only change fields of config.model that leave their "
        "shapes alone."
      )
    return model

  @functools.cached_property
  def groups(self) -> tuple[Group, ...]:
    axes = axis_names(jax.eval_shape(self.init, jax.random.key(0)))
    schedule = optim.make_schedule(self.config.optimizer, self.config.train_steps)
    optimizer = optim.make_optimizer(self.config.optimizer, axes)
    trainable = tuple(self.config.get("task", {}).get("trainable", (".*",)))
    return (Group("model", self.loss, optimizer, schedule, trainable),)

  @property
  def items_per_step(self) -> int:
    return self.config.batch_size * self.config.data.seq_length

  @property
  def flops_per_item(self) -> float:
    # A backward pass takes twice the flops of a forward pass.
    return 3 * flops_per_token(self.model.config, self.config.data.seq_length)

  def check_sample(self, data: Data) -> None:
    text_sample.check(self.config, self.model, data.tokenizer)

  def show_sample(self, params: Params, data: Data, workdir: pathlib.Path) -> None:
    del workdir
    text_sample.show(self.config, self.model, params, data.tokenizer)

  def loss(self, params: Params, batch: Batch, key: Key[Array, ""]) -> LossTerms:
    weights = batch["weights"]
    nll: Float[Array, "B T"] = self.model.apply(
      {"params": params},
      batch["inputs"],
      batch["targets"],
      segment_ids=batch["segment_ids"],
      deterministic=False,
      rngs={"dropout": key},
      method="token_losses",
    )
    return LossTerms(total=jnp.sum(nll * weights), weight=jnp.sum(weights))


def _shapes(task: LanguageModelTask) -> dict[str, tuple[int, ...]]:
  """Shapes of parameters by their paths."""
  params = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
  flat = traverse_util.flatten_dict(params, sep="/")
  return {path: x.shape for path, x in flat.items()}


def _model_section(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """`config.model`, told how long training's windows are where it asks."""
  section = config.model.to_dict()
  if "train_length" in registry.fields(section.get("name")) and not section.get("train_length"):
    section["train_length"] = config.get("data", {}).get("seq_length")
  return section


def build_language_model(config: ml_collections.ConfigDict, vocab_size: int) -> LanguageModelTask:
  """The task of a config.

  Raises:
    ValueError: a field of `config.model` is unknown or bad.
  """
  model_config = registry.build_config(_model_section(config), vocab_size=vocab_size)
  limit, length = model_config.context_limit, config.get("data", {}).get("seq_length", 0)
  if limit is not None and length > limit:
    raise ValueError(
      f"config.data.seq_length={length} is longer than config.model.max_length={limit}, up to "
      "which learned positions have vectors; raise max_length or shorten seq_length."
    )
  return LanguageModelTask(LanguageModel(model_config), config)
