"""What a tokenizer's latents are worth: what is decoded from means, from draws, from bad means.

A model over latents feeds back what it drew, which is never quite right. How much worse a
reconstruction becomes with latents that are off is what the sigma-VAE's noise is to lower
(https://arxiv.org/abs/2412.08635).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from latentlab.data import Data
from latentlab.eval.common import add_sums, row_batches
from latentlab.eval.media_metrics import reconstruction_metrics
from latentlab.typing import Array, Float, Params

_PEAK = 2.0
"""Of media in [-1, 1], for the signal-to-noise ratio."""


class Evaluator:
  """Reconstruction of a split by a latent tokenizer; the same noise at each run."""

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    split: str = "validation",
    max_batches: int | None = None,
    perturbation: float = 0.2,
    media_metrics: int = 0,
    intelligibility: bool = False,
    seed: int = 0,
  ):
    """Checks the fields; nothing is compiled before the first run.

    Args:
      task: Its `model` is a `LatentTokenizer`.
      data: Holds the split.
      compile: See `runner.Compile`.
      split: Of the data.
      max_batches: How many of its batches to read; all if `None` or 0.
      perturbation: Standard deviation of what is added to means, in that of the means themselves.
      media_metrics: Of how many of the split's first rows the metrics of their kind are taken too,
        which cost more than all else here; of all if -1, of none if 0.
      intelligibility: Whether STOI is among those of sounds, by the package pystoi.
      seed: Of the noise.
    """
    if not hasattr(task.model, "posterior"):
      raise ValueError("a reconstruction needs a latent tokenizer, config.task.type says which")
    if (max_batches or 0) < 0:
      raise ValueError(f"{max_batches=} of a reconstruction must not be negative; 0 reads all.")
    if not perturbation >= 0:
      raise ValueError(f"{perturbation=} of a reconstruction must not be negative; 0 adds none.")
    if media_metrics < -1:
      raise ValueError(f"{media_metrics=} of a reconstruction must be -1 (all rows), 0 or more.")
    if intelligibility and not media_metrics:
      raise ValueError(f"{intelligibility=} is one of media_metrics; say of how many rows.")
    self._batches = data.eval_batches(split, max_batches or None)
    self._data, self._split, self._intelligibility = data, split, intelligibility
    self._num_rows = media_metrics
    self._model, self._perturbation, self._seed = task.model, perturbation, seed
    self._means, self._errors = compile(self._latent_sums), compile(self._error_sums)
    self._reconstruct = compile(self._from_means)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields `mse` and `psnr` of reconstructions from means, and of others.

    `mse_sampled` is from drawn latents, `mse_perturbed` from means that are off, `sensitivity` its
    ratio to `mse`; `latent_std` is that of the means, and `noise_ratio` what the noise's scale is
    to it. A VQ has `code_perplexity` and `code_usage` of the split's codes. With `media_metrics`,
    means over media: of images `mean_psnr` and `ssim`, of sounds `mel_distance` and, if asked for,
    `stoi`.
    """
    totals = None
    for batch in self._batches:
      totals = add_sums(totals, self._means(params, batch))
    if totals is None or not totals["count"]:
      raise ValueError("A reconstruction found no example in its batches.")
    mean = totals["sum"] / totals["count"]
    std = math.sqrt(max(totals["square"] / totals["count"] - mean**2, 0.0))
    errors = None
    for i, batch in enumerate(self._batches):
      errors = add_sums(errors, self._errors(params, batch, jnp.float32(std), jnp.int32(i)))
    mse, sampled, perturbed = (
      errors[name] / errors["count"] for name in ("means", "sampled", "perturbed")
    )
    yield "mse", float(mse)
    yield "psnr", 10 * math.log10(_PEAK**2 / max(mse, 1e-20))
    yield "mse_sampled", float(sampled)
    yield "mse_perturbed", float(perturbed)
    yield "sensitivity", float(perturbed / max(mse, 1e-20))
    yield "latent_std", std
    noise = self._model.config.noise
    if noise.kind != "none":
      level = totals["level"] / totals["count"] if noise.kind == "learned" else noise.std
      yield "noise_ratio", float(level / max(std, 1e-20))
    if "codes" in totals:
      shares = totals["codes"] / totals["codes"].sum()
      used = shares[shares > 0]
      yield "code_perplexity", math.exp(-(used * [math.log(x) for x in used]).sum())
      yield "code_usage", len(used) / len(shares)
    if self._num_rows:
      yield from self._media_metrics(params)

  def _media_metrics(self, params: Params) -> Iterator[tuple[str, float]]:
    rows = self._data.splits[self._split]
    count = rows.num_rows if self._num_rows < 0 else min(self._num_rows, rows.num_rows)
    media = rows.rows(np.arange(count))["media"]
    made = [
      np.asarray(self._reconstruct(params, b)) for b in row_batches({"media": media}, self._data)
    ]
    found = reconstruction_metrics(
      np.concatenate(made)[:count], rows, intelligibility=self._intelligibility
    )
    names = {"psnr": "mean_psnr"}  # Of one error over all media is `psnr`.
    yield from ((names.get(name, name), x) for name, x in found.items() if name != "mse")

  def _from_means(self, params: Params, batch: Mapping[str, Array]) -> Float[Array, "B ..."]:
    return self._model.apply({"params": params}, batch["media"]).reconstruction

  def _latent_sums(self, params: Params, batch: Mapping[str, Array]) -> dict[str, Array]:
    means, log_variances = self._model.apply({"params": params}, batch["media"], method="posterior")
    weights = self._latent_weights(batch, means)[..., None]
    add = lambda x: jnp.sum(weights * x)
    sums = {"sum": add(means), "square": add(jnp.square(means)), "count": add(jnp.ones_like(means))}
    if log_variances is not None:
      sums["level"] = add(jnp.exp(0.5 * log_variances))
    c = self._model.config
    if c.bottleneck == "vq":
      codes = self._model.apply({"params": params}, batch["media"], method="codes")
      sums["codes"] = jnp.zeros(c.codebook_size).at[codes].add(weights[..., 0])
    return sums

  def _error_sums(
    self, params: Params, batch: Mapping[str, Array], std: Float[Array, ""], index: Array
  ) -> dict[str, Array]:
    media = batch["media"]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(self._seed), index))
    apply = lambda *args, **options: self._model.apply({"params": params}, *args, **options)
    drawn = apply(media, keys[0])
    off = self._perturbation * std * jax.random.normal(keys[1], drawn.means.shape)
    # Of a VQ, the codes' vectors are what is off.
    latents = drawn.means if drawn.codes is None else drawn.latents
    decode = lambda z: apply(z, method="decode")
    weights = batch["weights"].reshape(-1, *[1] * (media.ndim - 1))
    if "lengths" in batch:
      weights = weights * (jnp.arange(media.shape[1]) < batch["lengths"][:, None])[..., None]
    add = lambda x: jnp.sum(weights * jnp.square(x - media))
    return {
      "means": add(decode(latents)),
      "sampled": add(drawn.reconstruction),
      "perturbed": add(decode(latents + off)),
      "count": jnp.sum(weights * jnp.ones_like(media)),
    }

  def _latent_weights(
    self, batch: Mapping[str, Array], means: Float[Array, "B N Z"]
  ) -> Float[Array, "B N"]:
    weights = jnp.broadcast_to(batch["weights"][:, None], means.shape[:2])
    if "lengths" not in batch:
      return weights
    starts = jnp.arange(means.shape[1]) * (batch["media"].shape[1] // means.shape[1])
    return weights * (starts < batch["lengths"][:, None])
