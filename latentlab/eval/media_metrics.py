"""Media made by a model beside real ones: those it drew, and those it was to reconstruct."""

from collections.abc import Sequence

import numpy as np

from latentlab.data import Batch, MediaRows
from latentlab.eval import metrics
from latentlab.eval.features import Extracted, Features, spectrogram_options
from latentlab.typing import Float, Int


def generation_metrics(
  generated: Float[np.ndarray, "n ..."] | Sequence[np.ndarray],
  labels: Int[np.ndarray, "n"] | None,
  reference: MediaRows | Extracted,
  features: Features,
  *,
  num_splits: int = 10,
  k: int = 3,
) -> dict[str, float]:
  """Compares generated media with a split's; all numbers belong to `features.name`.

  Args:
    generated: Media in [-1, 1]; shorter sounds are padded, as the split's are.
    labels: The class that each was asked for; -1, or `None` for all, where none was.
    reference: A split, or what `features.of_rows` has told of it before.
    features: What is compared.
    num_splits: Of the inception-style score.
    k: Neighbours of precision and recall.

  Returns:
    `frechet`, `precision` and `recall`; with a classifier, also `inception_score`, the Fréchet
    distance's companion on probabilities, and `agreement`, the part of those asked for by class
    that the classifier takes for what they were to be.
  """
  if labels is not None and len(labels) != len(generated):
    raise ValueError(f"{len(labels)} labels for {len(generated)} generated media; give one each.")
  found = features(same_shape(generated, features.shape))
  real = reference if isinstance(reference, Extracted) else features.of_rows(reference)
  moments = (metrics.Moments.of(x.features) for x in (found, real))
  precision, recall = metrics.precision_recall(found.features, real.features, k)
  out = {"frechet": metrics.frechet_distance(*moments), "precision": precision, "recall": recall}
  if found.probabilities is None:
    return out
  out["inception_score"] = metrics.inception_score(found.probabilities, num_splits)[0]
  asked = np.full(len(generated), -1) if labels is None else labels
  if (asked >= found.probabilities.shape[1]).any():
    raise ValueError(
      f"labels hold {asked.max()}, and the classifier knows {found.probabilities.shape[1]} classes."
    )
  if (asked >= 0).any():
    right = found.probabilities.argmax(1) == asked
    out["agreement"] = float(right[asked >= 0].mean())
  return out


def same_shape(
  media: np.ndarray | Sequence[np.ndarray], shape: tuple[int, ...]
) -> Float[np.ndarray, "n ..."]:
  """Media of one shape, zeros behind the shorter sounds.

  Raises:
    ValueError: a medium is of another shape, and no shorter sound.
  """
  out = np.zeros((len(media), *shape), np.float32)
  for row, medium in zip(out, media, strict=True):
    is_short = len(shape) == 2 and medium.shape[1:] == shape[1:] and len(medium) < len(row)
    if medium.shape != shape and not is_short:
      raise ValueError(
        f"a medium of shape {medium.shape} does not fit features of media of {shape}; "
        "cut it, or draw others."
      )
    row[: len(medium)] = medium
  return out


def reconstruction_metrics(
  reconstructions: Float[np.ndarray, "n ..."],
  reference: MediaRows,
  features: Features | None = None,
  *,
  intelligibility: bool = False,
) -> dict[str, float]:
  """Compares reconstructions with the first rows of a split, of which they were made.

  Args:
    reconstructions: Media in [-1, 1], in the split's order; what lies behind a sound's end is not
      looked at.
    reference: The split.
    features: What the Fréchet distance of both sets belongs to; none is measured if `None`.
    intelligibility: Also measure STOI of sounds, which needs the package pystoi.

  Returns:
    Means over media: of images `mse`, `psnr` and `ssim`; of sounds `mse`, `mel_distance` and, if
    asked for, `stoi`. With features, `frechet`.
  """
  count = len(reconstructions)
  if not 1 <= count <= reference.num_rows:
    raise ValueError(
      f"{count} reconstructions do not fit a split of {reference.num_rows}; give those of its "
      "first rows."
    )
  real = reference.rows(np.arange(count))
  if reconstructions.shape != real["media"].shape:
    raise ValueError(
      f"reconstructions of shape {reconstructions.shape} must be {real['media'].shape}, as the "
      "split's rows."
    )
  if reference.collection.kind == "image":
    if intelligibility:
      raise ValueError("intelligibility is of sounds, and these are images; leave it out.")
    pair = (reconstructions, real["media"])
    window = min(11, *(side - 1 + side % 2 for side in real["media"].shape[1:3]))
    each = {"mse": metrics.mse(*pair), "psnr": metrics.psnr(*pair)}
    each["ssim"] = metrics.ssim(*pair, window=window)
  else:
    each = _sound_metrics(reconstructions, real, reference.collection.sample_rate, intelligibility)
  out = {name: float(np.mean(values)) for name, values in each.items()}
  if features is not None:
    sets = (features(media).features for media in (reconstructions, real["media"]))
    out["frechet"] = metrics.frechet_distance(*(metrics.Moments.of(x) for x in sets))
  return out


def _sound_metrics(
  sounds: np.ndarray, real: Batch, sample_rate: int, intelligibility: bool
) -> dict[str, list[float]]:
  if not sample_rate:
    raise ValueError("metrics of sounds need their sample rate; set data.sample_rate.")
  options = spectrogram_options(sample_rate)
  each = {"mse": [], "mel_distance": []} | ({"stoi": []} if intelligibility else {})
  for sound, other, length in zip(sounds, real["media"], real["lengths"], strict=True):
    sound, other = sound[:length, 0], other[:length, 0]
    each["mse"].append(np.square(sound.astype(np.float64) - other).mean())
    each["mel_distance"].append(metrics.mel_distance(sound, other, sample_rate, **options))
    if intelligibility:
      each["stoi"].append(metrics.stoi(sound, other, sample_rate))
  return each
