"""Features of media by which sets are compared, and the probabilities of classes.

No pretrained network is at hand, so a small classifier is trained on the data's own training
split, once and always in the same way. Numbers carry its name, FD(classifier), and compare runs on
one data set alone.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import traverse_util

from latentlab.data import MediaRows, files
from latentlab.eval import metrics
from latentlab.typing import Array, Float, Params

logger = logging.getLogger(__name__)

NAMES = ("classifier", "pixels")
_VERSION = 1  # Of what a classifier is and how it is trained.
_STEPS, _BATCH, _PEAK_LR = 300, 64, 3e-3
_CHUNK = 256  # Media looked at together.
_MOST_ROWS = 10_000  # That a classifier is trained on; they are held in memory.
_NUM_MELS, _WINDOW_SECONDS = 32, 0.025


@dataclasses.dataclass(frozen=True)
class Extracted:
  """What is known of media.

  Attributes:
    features: Float64.
    probabilities: Of classes, float64; `None` where features have no classifier.
  """

  features: Float[np.ndarray, "n D"]
  probabilities: Float[np.ndarray, "n classes"] | None


@dataclasses.dataclass(frozen=True)
class Features:
  """Features of media by a name, which belongs to every number that comes of them.

  Attributes:
    name: One of `NAMES`.
    shape: Of a medium.
    extract: Features, and logits or `None`, of a batch of media.
  """

  name: str
  shape: tuple[int, ...]
  extract: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]

  def __call__(self, media: Float[np.ndarray, "n ..."]) -> Extracted:
    """Looks at media in [-1, 1], `[n, H, W, C]`, or at sounds `[n, S, 1]`."""
    if media.shape[1:] != self.shape or not len(media):
      raise ValueError(
        f"media of shape {media.shape} have no features of {self.name!r}, which are of "
        f"{self.shape}; give at least one of that shape."
      )
    chunks = [self.extract(media[i : i + _CHUNK]) for i in range(0, len(media), _CHUNK)]
    features = np.concatenate([features for features, _ in chunks]).astype(np.float64)
    if chunks[0][1] is None:
      return Extracted(features, None)
    logits = np.concatenate([logits for _, logits in chunks]).astype(np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return Extracted(features, powers / powers.sum(1, keepdims=True))

  def of_rows(self, rows: MediaRows, max_rows: int | None = None) -> Extracted:
    """Looks at a split, or at its first rows, which are a fair sample."""
    count = rows.num_rows if max_rows is None else min(max_rows, rows.num_rows)
    return self(rows.rows(np.arange(count))["media"])


def build(
  name: str, training: MediaRows, cache_dir: pathlib.Path | None = None, seed: int = 0
) -> Features:
  """The features of a name.

  Args:
    name: "classifier", the last hidden layer of one that is trained on the labels; or "pixels",
      which are looked at as they are (of sounds, the log mel spectrogram).
    training: The split that a classifier is trained on.
    cache_dir: Where it is kept, by a digest of what it is made from; nowhere if `None`.
    seed: Of its initial weights and the order of its batches.

  Raises:
    ValueError: the name is unknown, or the split has no classes.
  """
  look = _preprocessing(training)
  shape = training.collection.shape
  if name == "pixels":
    return Features(name, shape, lambda media: (look(media).reshape(len(media), -1), None))
  if name != "classifier":
    raise ValueError(f"features={name!r} are unknown; choose from {NAMES}.")
  if training.num_classes < 2 or (training.labels < 0).any():
    raise ValueError(
      f"features='classifier' need labels of at least 2 classes, and the training split has "
      f"{training.num_classes}; label it, or set features='pixels'."
    )
  model = _Classifier(training.num_classes)
  params = _trained(model, training, look, cache_dir, seed)

  def extract(media: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    padded = np.zeros((_CHUNK, *media.shape[1:]), np.float32)  # One program for all sizes.
    padded[: len(media)] = media
    features, logits = jax.device_get(_apply(model, params, look(padded)))
    return features[: len(media)], logits[: len(media)]

  return Features(name, shape, extract)


def spectrogram_options(sample_rate: int) -> dict[str, int]:
  """Options of `metrics.log_mel` for any sample rate: windows of 25 to 50 ms."""
  window = 1 << int(np.ceil(np.log2(sample_rate * _WINDOW_SECONDS)))
  return dict(num_mels=_NUM_MELS, window=window, hop=window // 2)


class _Classifier(nn.Module):
  """Convolutions down to four pixels a side, a hidden layer, and classes."""

  num_classes: int
  channels: int = 16
  hidden: int = 32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"]
  ) -> tuple[Float[Array, "B hidden"], Float[Array, "B classes"]]:
    x = nn.gelu(nn.Conv(self.channels, (3, 3))(x))
    while max(x.shape[1:3]) > 4:
      x = nn.gelu(nn.Conv(2 * self.channels, (3, 3), strides=2)(x))
    features = nn.gelu(nn.Dense(self.hidden, name="hidden")(x.reshape(len(x), -1)))
    return features, nn.Dense(self.num_classes, name="classes")(features)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: _Classifier, params: Params, x: Array) -> tuple[Array, Array]:
  return model.apply({"params": params}, x)


def _preprocessing(rows: MediaRows) -> Callable[[np.ndarray], np.ndarray]:
  """From media to images: those as they are, and log mel spectrograms of sounds."""
  if rows.collection.kind == "image":
    return lambda media: media
  rate = rows.collection.sample_rate
  if not rate:
    raise ValueError("features of sounds need their sample rate; set data.sample_rate.")
  options = spectrogram_options(rate)

  def spectrograms(media: np.ndarray) -> np.ndarray:
    bands = [metrics.log_mel(sound[:, 0], rate, **options) for sound in media]
    return np.stack(bands)[..., None].astype(np.float32)

  return spectrograms


def _trained(
  model: _Classifier,
  training: MediaRows,
  look: Callable[[np.ndarray], np.ndarray],
  cache_dir: pathlib.Path | None,
  seed: int,
) -> Params:
  """Parameters from the cache folder, or trained and put there."""
  path = None if cache_dir is None else cache_dir / f"classifier-{_key(training, seed)}.npz"
  if path is not None and path.exists():
    with np.load(path, allow_pickle=False) as file:
      return traverse_util.unflatten_dict({name: file[name] for name in file.files}, sep="/")
  logger.info("Training the classifier whose features samples are compared by.")
  params = jax.device_get(_train(model, training, look, seed))
  if path is not None:
    flat = traverse_util.flatten_dict(params, sep="/")
    files.write(path, functools.partial(_save, flat))
  return params


def _save(arrays: dict[str, np.ndarray], path: pathlib.Path) -> None:
  with path.open("wb") as file:  # Given a name, savez would add to it.
    np.savez(file, **arrays)


def _train(
  model: _Classifier, training: MediaRows, look: Callable[[np.ndarray], np.ndarray], seed: int
) -> Params:
  optimizer = optax.adamw(optax.cosine_decay_schedule(_PEAK_LR, _STEPS), weight_decay=1e-3)

  @jax.jit
  def step(params: Params, state: Any, x: Array, labels: Array) -> tuple[Params, Any]:
    def loss(params: Params) -> Array:
      _, logits = model.apply({"params": params}, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  count = min(training.num_rows, _MOST_ROWS)  # The first rows are a fair sample.
  chunks = np.split(np.arange(count), range(_CHUNK, count, _CHUNK))
  images = np.concatenate([look(training.rows(chunk)["media"]) for chunk in chunks])
  rng = np.random.default_rng(seed)
  params = jax.jit(model.init)(jax.random.key(seed), images[:_BATCH])["params"]
  state = optimizer.init(params)
  for _ in range(_STEPS):
    chosen = rng.integers(0, count, _BATCH)
    params, state = step(params, state, images[chosen], training.labels[chosen])
  return params


def _key(training: MediaRows, seed: int) -> str:
  found = training.collection
  parts = [_VERSION, found.digest, found.shape, repr(found.transform), found.class_names]
  parts += [found.sample_rate, list(training.names), seed]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
