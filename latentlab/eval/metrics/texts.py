"""How near a text is to others: captions, answers, transcripts."""

import collections
import re
from collections.abc import Sequence

import numpy as np

_NUM_GRAMS = 4


def cider(
  candidates: Sequence[str], references: Sequence[Sequence[str]], sigma: float | None = None
) -> np.ndarray:
  """CIDEr of captions (Vedantam et al., 2015), times 10: one number for each image.

  The cosine of TF-IDF vectors of n-grams, averaged over n from 1 to 4 and over references. Words
  are runs of letters and digits in lower case, and not stemmed.

  Args:
    candidates: A caption for each image.
    references: Captions of each image; those of all images tell which n-grams are rare.
    sigma: CIDEr-D instead: no n-gram counts more often than in the reference, and a difference of
      length costs a Gaussian factor of this width; 6 in the paper.
  """
  if len(candidates) != len(references):
    raise ValueError(f"{len(candidates)} candidates for {len(references)} images; give one each.")
  if len(references) < 2:
    raise ValueError("CIDEr weighs n-grams by how many images have them: give at least 2 images.")
  if empty := [i for i, texts in enumerate(references) if not texts]:
    raise ValueError(f"image {empty[0]} has no reference; give one, or leave the image out.")
  reference_counts = [[_ngrams(text) for text in texts] for texts in references]
  images_with = collections.Counter(
    gram for counts in reference_counts for gram in set().union(*counts)
  )

  def vectors(counts: collections.Counter) -> list[dict[tuple[str, ...], float]]:
    out = [{} for _ in range(_NUM_GRAMS)]
    for gram, count in counts.items():
      rarity = np.log(len(references) / max(images_with[gram], 1))
      out[len(gram) - 1][gram] = count * rarity
    return out

  scores = []
  for candidate, counts in zip(candidates, reference_counts, strict=True):
    own_counts = _ngrams(candidate)
    own = vectors(own_counts)
    similarities = []
    for count in counts:
      cosines = [_cosine(a, b, sigma is not None) for a, b in zip(own, vectors(count), strict=True)]
      gap = _length(own_counts) - _length(count)
      factor = 1.0 if sigma is None else np.exp(-(gap**2) / (2 * sigma**2))
      similarities.append(factor * np.mean(cosines))
    scores.append(10 * np.mean(similarities))
  return np.array(scores)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
  """`min(n / 3, 1)`, where `n` people gave the answer (Antol et al., 2015).

  Answers are compared in lower case, without punctuation and articles, numbers up to ten as digits.
  """
  if not human_answers:
    raise ValueError("VQA accuracy needs at least one person's answer.")
  wanted = _normalized(answer)
  return min(sum(_normalized(other) == wanted for other in human_answers) / 3, 1.0)


def word_error_rate(transcripts: Sequence[str], references: Sequence[str]) -> float:
  """Words to be changed, added and removed, by the words of all references (package jiwer).

  Words are compared in lower case, without punctuation.
  """
  try:
    import jiwer
  except ImportError as e:
    raise ValueError("WER needs the package jiwer: pip install 'latentlab[audio]'.") from e
  if len(transcripts) != len(references):
    raise ValueError(
      f"{len(transcripts)} transcripts for {len(references)} references; give one each."
    )
  if empty := [i for i, text in enumerate(references) if not _words(text)]:
    raise ValueError(f"reference {empty[0]}, {references[empty[0]]!r}, has no words; leave it out.")
  join = lambda texts: [" ".join(_words(text)) for text in texts]
  return float(jiwer.wer(join(references), join(transcripts)))


def _words(text: str) -> list[str]:
  return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def _ngrams(text: str) -> collections.Counter:
  words = _words(text)
  return collections.Counter(
    tuple(words[i : i + n]) for n in range(1, _NUM_GRAMS + 1) for i in range(len(words) - n + 1)
  )


def _length(counts: collections.Counter) -> int:
  return sum(count for gram, count in counts.items() if len(gram) == 1)


def _cosine(own: dict, other: dict, clip: bool) -> float:
  norm = np.linalg.norm(list(own.values())) * np.linalg.norm(list(other.values()))
  if not norm:
    return 0.0
  limit = min if clip else lambda a, b: a
  return sum(limit(x, other[gram]) * other[gram] for gram, x in own.items() if gram in other) / norm


_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_ARTICLES = {"a", "an", "the"}


def _normalized(answer: str) -> str:
  digits = {word: str(i) for i, word in enumerate(_NUMBERS)}
  return " ".join(digits.get(word, word) for word in _words(answer) if word not in _ARTICLES)
