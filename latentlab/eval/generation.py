"""Media drawn by a model over latents, beside real ones and what its tokenizer can do at best.

Distances carry the name of their features: FD(classifier) is of a small classifier trained on the
data, never the FID of a pretrained network.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.data import Data
from latentlab.data import prepare as prepare_text
from latentlab.eval import features as features_lib
from latentlab.eval.media_metrics import generation_metrics
from latentlab.layers.latent_heads import SolverSettings
from latentlab.ops.latents import Noise, sample_latents
from latentlab.typing import Params


class Evaluator:
  """Draws as many of each class, or of the split's captions in turn; same noise at each run."""

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
    self._settings = SolverSettings(
      guidance=guidance, temperature=temperature, solver=solver, num_steps=num_steps
    )
    self._features = self._real = None

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `fd`, `precision`, `recall`, `is`, `agreement`; `latent_std` of draws and real ones.

    With `reconstruction`, `rfd_means` and `rfd_sampled` of the tokenizer.
    """
    if self._features is None:
      media = self._data.media
      cache = prepare_text.cache_dir(self._data.config.cache_dir)
      self._features = features_lib.build(self._name, media.splits["train"], cache)
      self._real = self._features.of_rows(media.splits[self._split])
    generator = self._task.generator(params, self._data)
    prompts, labels = generator.prompts(self._count)
    drawn = generator(prompts, self._settings, jax.random.key(self._seed))
    labels = labels if self._data.store.meta["num_classes"] else None
    found = generation_metrics(drawn.media, labels, self._real, self._features)
    names = {"frechet": "fd", "inception_score": "is"}
    yield from ((names.get(name, name), value) for name, value in found.items())
    yield "latent_std", float(np.concatenate(drawn.latents).std())
    yield "real_latent_std", self._data.store.meta["std"]
    if self._reconstruction:
      yield from self._tokenizer(generator)

  def _tokenizer(self, generator: Any) -> Iterator[tuple[str, float]]:
    split, meta = self._data.store.splits[self._split], self._data.store.meta
    means = [split.item(i) for i in range(min(len(split), self._count))]
    noise, key = Noise(**meta["noise"]), jax.random.key(self._seed)
    for name in ("means", "sampled"):
      runs = [item.means for item in means]
      if name == "sampled":
        log_variances = None
        if noise.kind == "learned":
          log_variances = 2 * jnp.log(jnp.stack([item.scales for item in means]))
        runs = list(np.asarray(sample_latents(key, jnp.stack(runs), noise, log_variances)))
      media = generator.decode(runs)
      found = generation_metrics(media, None, self._real, self._features)
      yield f"rfd_{name}", found["frechet"]
