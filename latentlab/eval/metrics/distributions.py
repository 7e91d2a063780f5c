"""How far a set of samples is from a set of data, by features of both.

Whatever the features are, they belong to the number's name: FD(classifier), say. FID is a Fréchet
distance in the features of one Inception network, and no other.
"""

import dataclasses

import numpy as np
from scipy import spatial

from latentlab.typing import Float


@dataclasses.dataclass(frozen=True)
class Moments:
  """Number, mean and scatter of features, in float64; sums of such are those of all features.

  Attributes:
    count: Features seen.
    mean: Their mean.
    scatter: The sum of the outer products of their deviations from it.
  """

  count: int
  mean: Float[np.ndarray, "D"]
  scatter: Float[np.ndarray, "D D"]

  @classmethod
  def of(cls, features: Float[np.ndarray, "n D"]) -> "Moments":
    """The moments of at least one feature."""
    features = _checked(features, "features")
    mean = features.mean(0)
    deviations = features - mean
    return cls(len(features), mean, deviations.T @ deviations)

  def __add__(self, other: "Moments") -> "Moments":
    """The moments of both sets together (Chan, Golub and LeVeque, 1979)."""
    if self.mean.shape != other.mean.shape:
      raise ValueError(
        f"moments of {len(self.mean)} and {len(other.mean)} features cannot be added; take both of "
        "the same features."
      )
    count = self.count + other.count
    gap = other.mean - self.mean
    scatter = self.scatter + other.scatter
    scatter = scatter + np.outer(gap, gap) * (self.count * other.count / count)
    return Moments(count, self.mean + gap * (other.count / count), scatter)

  @property
  def covariance(self) -> Float[np.ndarray, "D D"]:
    """Unbiased."""
    if self.count < 2:
      raise ValueError(f"a covariance needs at least 2 features, and there is {self.count}.")
    return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
  """Squared Fréchet distance of two Gaussians, `|m - n|^2 + tr(A + B - 2 (A B)^(1/2))`.

  The trace of the root is the sum of the roots of the eigenvalues of `A^(1/2) B A^(1/2)`, which is
  symmetric; covariances may therefore be singular, and nothing is added to them.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(
      f"{len(a.mean)} and {len(b.mean)} features have no distance; take both of the same features."
    )
  root = _root(a.covariance)
  eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
  cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
  gap = a.mean - b.mean
  distance = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
  return float(max(distance, 0.0))  # Rounding may take equal sets below.


def inception_score(
  probabilities: Float[np.ndarray, "n classes"], num_splits: int = 10
) -> tuple[float, float]:
  """Inception-style score: the exponential of the mean divergence of `p(y | x)` from `p(y)`.

  Args:
    probabilities: Of a classifier, which belongs to the number's name.
    num_splits: Equal parts of the samples, one after another, that are scored by themselves.

  Returns:
    Mean and standard deviation over the parts.
  """
  probabilities = _checked(probabilities, "probabilities")
  if probabilities.min() < 0 or not np.allclose(probabilities.sum(1), 1, atol=1e-4):
    raise ValueError("probabilities of a sample must not be negative, and add up to 1.")
  if not 1 <= num_splits <= len(probabilities):
    raise ValueError(f"{num_splits=} must lie in [1, {len(probabilities)}], the samples there are.")
  scores = []
  for part in np.array_split(probabilities, num_splits):
    ratio = np.divide(part, part.mean(0), out=np.ones_like(part), where=part > 0)
    scores.append(np.exp((part * np.log(ratio)).sum(1).mean()))
  return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
  generated: Float[np.ndarray, "n D"], data: Float[np.ndarray, "m D"], k: int = 3
) -> tuple[float, float]:
  """Which part of the samples lies on the data's manifold, and the reverse.

  A manifold is the union of balls around the features of a set, each of which reaches to its k-th
  nearest neighbour in the set (Kynkäänniemi et al., 2019).
  """
  generated, data = _checked(generated, "generated"), _checked(data, "data")
  for name, features in (("generated", generated), ("data", data)):
    if not 1 <= k < len(features):
      raise ValueError(f"{k=} must lie in [1, {len(features)}), the number of {name} features.")
  return _covered(generated, data, k), _covered(data, generated, k)


def _covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
  """The part of `points` within the manifold of `centres`."""
  radii = spatial.cKDTree(centres).query(centres, k=k + 1)[0][:, -1]  # The nearest one is itself.
  inside = [
    (spatial.distance.cdist(part, centres) <= radii).any(1)
    for part in np.array_split(points, -(-len(points) * len(centres) // _CHUNK))
  ]
  return float(np.concatenate(inside).mean())


_CHUNK = 1 << 24
"""Distances held in memory at a time."""


def _root(covariance: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _checked(values: np.ndarray, name: str) -> np.ndarray:
  if values.ndim != 2 or not values.size:
    raise ValueError(f"{name} of shape {values.shape} must be [n, D], and not empty.")
  values = values.astype(np.float64)
  if not np.isfinite(values).all():
    raise ValueError(f"{name} hold values that are no numbers.")
  return values
