"""Media drawn by a model over latents, beside real ones and what its tokenizer can do at best.

Distances carry the name of their features: FD(classifier) is of a small classifier trained on the
data, never the FID of a pretrained network.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.data import Data
from latentlab.data import prepare as prepare_text
from latentlab.data.latent_store import LatentItem
from latentlab.eval import features as features_lib
from latentlab.eval import metrics
from latentlab.eval.media_metrics import generation_metrics
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latentlm import Items, LatentLM
from latentlab.ops.latents import Noise, sample_latents
from latentlab.sample import row_keys
from latentlab.typing import Array, Float, Int, Key, Params

_BATCH = 32  # Rows that latents are drawn behind together.


class Evaluator:
  """Draws as many of each class, or of the split's captions in turn; same noise at each run.

  Attributes:
    settings: How `run` draws.
  """

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    num_samples: int = 500,
    features: str = "classifier",
    split: str = "train",
    solver: str = "dpm_2m",
    num_steps: int = 20,
    guidance: float = 1.0,
    temperature: float = 1.0,
    lambda_min: float | None = None,
    reconstruction: bool = False,
    seed: int = 0,
  ):
    """Checks the fields; nothing is compiled, trained or drawn before the first run.

    Args:
      task: A model's over latents.
      data: Its latents.
      compile: Unused: samples are drawn on the devices of each process.
      num_samples: How many.
      features: What media are compared by, a name of `features.NAMES`.
      split: Real media.
      solver: Of the head.
      num_steps: Of the solver.
      guidance: Scale.
      temperature: Factor of the noise that the solver starts from.
      lambda_min: Noisier levels are left out; see `ops.sample_grid`.
      reconstruction: Also compares what the tokenizer makes of the split, from means and from drawn
        latents: the level that a perfect model would reach.
      seed: Of the samples.
    """
    del compile
    if not hasattr(task, "generator"):
      raise ValueError("a generation is of a model over latents; config.task.type says which")
    if features not in features_lib.NAMES:
      raise ValueError(f"{features=} are unknown; choose from {features_lib.NAMES}.")
    if num_samples < 10:
      raise ValueError(f"{num_samples=} are too few to compare; draw 10 at least.")
    if split not in data.splits:
      raise ValueError(f"{split=} does not exist; choose from {sorted(data.splits)}.")
    self._task, self._data, self._split, self._name = task, data, split, features
    self._count, self._seed, self._reconstruction = num_samples, seed, reconstruction
    self.settings = SolverSettings(guidance, temperature, solver, num_steps, lambda_min)
    self._features = self._real = None

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `fd`, `precision`, `recall`, `is`, `agreement`; `latent_std` of draws and real ones.

    With `reconstruction`, `rfd_means` and `rfd_sampled` of the tokenizer.
    """
    yield from self.compare(*self.draw(params, self.settings)).items()
    if self._reconstruction:
      yield from self.limits(params).items()

  def draw(
    self, params: Params, settings: SolverSettings
  ) -> tuple[Any, Int[np.ndarray, "n"] | None]:
    """What was drawn (a `train.media_sample.Drawn`), and the classes that were asked for, if any.

    The noise is the same whatever the settings, and one program draws at all scales of guidance
    but 1, which runs no null condition.

    Args:
      params: Of the model.
      settings: In the place of the evaluator's own.
    """
    generator = self._task.generator(params, self._data)
    prompts, labels = generator.prompts(self._count)
    drawn = generator(prompts, settings, jax.random.key(self._seed))
    return drawn, labels if self._data.store.meta["num_classes"] else None

  def compare(self, drawn: Any, labels: Int[np.ndarray, "n"] | None) -> dict[str, float]:
    """What `run` yields of media that were drawn."""
    found = generation_metrics(drawn.media, labels, *self._reference())
    names = {"frechet": "fd", "inception_score": "is"}
    found = {names.get(name, name): value for name, value in found.items()}
    found["latent_std"] = float(np.concatenate(drawn.latents).std())
    return found | {"real_latent_std": self._data.store.meta["std"]}

  def limits(self, params: Params) -> dict[str, float]:
    """`rfd_means` and `rfd_sampled`: of what the tokenizer makes of the split's first items."""
    generator = self._task.generator(params, self._data)
    runs = dict(means=self._means(self._count), sampled=self.real_latents(self._count))
    return {
      f"rfd_{name}": generation_metrics(generator.decode(x), None, *self._reference())["frechet"]
      for name, x in runs.items()
    }

  def draw_behind_real(self, params: Params, settings: SolverSettings) -> list[np.ndarray]:
    """Runs of latents each of which is drawn behind real ones, those of the split's first items.

    What `draw` does behind its own latents: free of the errors that those add up.

    Args:
      params: Of the model.
      settings: In the place of the evaluator's own.

    Raises:
      ValueError: the model is not autoregressive over latents.
    """
    task, split = self._task, self._data.splits[self._split]
    if not isinstance(task.model, LatentLM):
      raise ValueError(
        f"a {type(task.model).__name__} draws no latent behind others; only a LatentLM does."
      )
    name, runs = task.modality.name, []
    noise_key, draw_key = jax.random.split(jax.random.key(self._seed))
    rows = np.arange(min(-(-self._count // split.per_row), split.num_rows))
    for start in range(0, len(rows), _BATCH):
      # The last rows again, so that one program serves all.
      indices = np.minimum(np.arange(start, start + min(_BATCH, len(rows))), rows[-1])
      batch = jax.tree.map(jnp.asarray, split.rows(indices))
      here, _ = task.draw_latents(params, batch, jax.random.fold_in(noise_key, start))
      items = Items(batch["inputs"], batch["kinds"], here)
      null = jnp.where(batch["droppable"], task.model.config.tokens.null, items.tokens)
      drawn = _draw_behind(
        task.model,
        params,
        name,
        items,
        null if settings.guidance != 1 else None,
        batch["segment_ids"],
        row_keys(draw_key, start * split.seq_length + np.arange(batch["inputs"].size)),
        settings,
      )
      arrays = jax.device_get((drawn, batch["next_kinds"], batch["segment_ids"]))
      count = len(rows) - start  # What is behind them in the last batch is there already.
      for latents, kinds, documents in zip(*(x[:count] for x in arrays), strict=True):
        each = (latents[(kinds > 0) & (documents == i + 1)] for i in range(split.per_row))
        runs += [run for run in each if len(run)]
    return runs[: self._count]

  def positions(self, runs: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """`position_moments` of runs beside the split's, in units of all latents' deviation."""
    unit = self._data.store.meta["std"]
    scaled = ([run / unit for run in each] for each in (runs, self.real_latents()))
    return position_moments(*scaled)

  def position_floor(self) -> list[float]:
    """As `positions`' distances, of the split's even items from its odd ones."""
    unit, real = self._data.store.meta["std"], self.real_latents()
    halves = ([run / unit for run in real[i::2]] for i in range(2))
    return position_moments(*halves)["distance"]

  def real_latents(self, count: int | None = None) -> list[np.ndarray]:
    """Latents of the split's first items, of all if `None`, as training draws them."""
    noise, key = Noise(**self._data.store.meta["noise"]), jax.random.key(self._seed)
    items, means = self._items(count), self._means(count)
    log_variances = None
    if noise.kind == "learned":
      log_variances = 2 * jnp.log(_padded([item.scales for item in items], 1.0))
    drawn = np.asarray(sample_latents(key, _padded(means, 0.0), noise, log_variances))
    return [row[: len(run)] for row, run in zip(drawn, means, strict=True)]

  def _means(self, count: int | None) -> list[np.ndarray]:
    return [item.means for item in self._items(count)]

  def _items(self, count: int | None) -> list[LatentItem]:
    split = self._data.store.splits[self._split]
    return [split.item(i) for i in range(len(split))[:count]]

  def _reference(self) -> tuple[features_lib.Extracted, features_lib.Features]:
    """What is known of the split's media, and the features; made at the first call."""
    if self._features is None:
      media = self._data.media
      cache = prepare_text.cache_dir(self._data.config.cache_dir)
      self._features = features_lib.build(self._name, media.splits["train"], cache)
      self._real = self._features.of_rows(media.splits[self._split])
    return self._real, self._features


@functools.partial(jax.jit, static_argnames=("model", "name"))
def _draw_behind(
  model: LatentLM,
  params: Params,
  name: str,
  items: Items,
  null_tokens: Int[Array, "B T"] | None,
  segment_ids: Int[Array, "B T"],
  keys: Key[Array, " places"],
  settings: SolverSettings,
) -> Float[Array, "B T Z"]:
  """A latent behind each item, guided where there are null tokens, as the tokenizer has it."""
  apply = functools.partial(model.apply, {"params": params})

  def hidden(tokens):
    vectors, _ = apply(items.replace(tokens=tokens), segment_ids=segment_ids, method="hidden")
    return vectors.reshape(-1, vectors.shape[-1])

  null_hidden = None if null_tokens is None else hidden(null_tokens)
  drawn = apply(name, hidden(items.tokens), null_hidden, keys, settings, method="draw")
  return apply(name, drawn.reshape(*items.tokens.shape, -1), method="denormalize")


def position_moments(
  drawn: Sequence[Float[np.ndarray, "_ Z"]], real: Sequence[Float[np.ndarray, "_ Z"]]
) -> dict[str, list[float]]:
  """How far drawn latents are from real ones at each position of their runs.

  An autoregressive model that is thrown off by its own errors departs from the data as it goes on;
  one that is not keeps its distance.

  Args:
    drawn: Runs.
    real: Runs.

  Returns:
    By position, as far as two runs of each reach: `distance`, the squared Fréchet distance of
    Gaussians over the channels; `std` of drawn latents and `real_std`, over runs and channels.
  """
  found = dict(distance=[], std=[], real_std=[])
  for place in itertools.count():
    here = [np.array([run[place] for run in runs if len(run) > place]) for runs in (drawn, real)]
    if min(map(len, here)) < 2:
      return found
    found["distance"].append(metrics.frechet_distance(*(metrics.Moments.of(x) for x in here)))
    for name, x in zip(("std", "real_std"), here, strict=True):
      found[name].append(float((x - x.mean(0)).std()))


def _padded(runs: Sequence[np.ndarray], value: float) -> Float[Array, "n T Z"]:
  """Runs of one length."""
  longest = max(map(len, runs))
  return jnp.stack(
    [np.pad(run, ((0, longest - len(run)), (0, 0)), constant_values=value) for run in runs]
  )
