"""Generated media beside real ones: distance of the distributions, quality, variety, class."""

import numpy as np

from latentlab.data import MediaRows
from latentlab.eval import metrics
from latentlab.eval.features import Extracted, Features
from latentlab.typing import Float, Int


def generation_metrics(
  generated: Float[np.ndarray, "n ..."],
  labels: Int[np.ndarray, "n"] | None,
  reference: MediaRows | Extracted,
  features: Features,
  *,
  num_splits: int = 10,
  k: int = 3,
) -> dict[str, float]:
  """Compares generated media with a split's; all numbers belong to `features.name`.

  Args:
    generated: Media in [-1, 1].
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
  found = features(generated)
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
