"""Speech drawn by a model over latents: what is heard in it, whose voice it is, how long it is.

LatentLM, section 4.3 (https://arxiv.org/abs/2412.08635) asks a recogniser for word errors and a
network of speakers for similarity. No such network is at hand, so numbers carry the names of what
stands in: WER(classifier) is of a small classifier of whole utterances that is trained on the
training split, and SIM(MFCC) the cosine of standardised cepstral statistics. They compare runs on
one data set, and nothing with the paper's figures.

Similarity is to recorded speech (SIM-o) and to what the tokenizer decodes of it (SIM-r), terms of
Voicebox (https://arxiv.org/abs/2306.15687). There both are to the prompt; here, where names tell
speakers, to the mean of a speaker's training utterances, for a prompt of 0.2 seconds says little.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from latentlab.data import Data, MediaRows
from latentlab.data import prepare as prepare_text
from latentlab.eval import features as features_lib
from latentlab.eval import metrics
from latentlab.eval.media_metrics import reconstruction_metrics, same_shape
from latentlab.layers.latent_heads import SolverSettings
from latentlab.ops.latents import Noise, sample_latents
from latentlab.typing import Float, Params

Recognizer = Callable[[Sequence[np.ndarray]], Sequence[str]]
"""What is said in sounds `[S, 1]` at the data's sample rate."""

RECOGNIZERS: dict[str, Callable[[MediaRows, pathlib.Path | None], Recognizer]] = {}
"""Makers of recognisers, given the training split and a folder to keep what they learn in."""

_MOST_REFERENCES = 1_000  # Utterances by whose statistics others are standardised.
_DECODED_TOGETHER = 64  # Utterances; all at once would not fit.


def register(name: str, make: Callable[[MediaRows, pathlib.Path | None], Recognizer]) -> None:
  """Gives a maker of recognisers a name, which belongs to the word error rates that come of it.

  Raises:
    ValueError: the name is another's.
  """
  if RECOGNIZERS.get(name, make) is not make:
    raise ValueError(f"recognizer {name!r} is registered already; give yours another name")
  RECOGNIZERS[name] = make


def classifier(training: MediaRows, cache_dir: pathlib.Path | None) -> Recognizer:
  """Takes an utterance for one of the training split's classes, and says that one's text.

  Raises:
    ValueError: the split has no classes, or a class has several texts.
  """
  found = features_lib.build("classifier", training, cache_dir)
  texts: dict[int, set[str]] = {}
  for label, text in zip(training.labels.tolist(), texts_of(training), strict=True):
    texts.setdefault(label, set()).add(text)
  for label, several in texts.items():
    if len(several) > 1:
      raise ValueError(
        f"recognizer='classifier' says a class's text, and class {training.class_names[label]!r} "
        f"has {len(several)}, {sorted(several)[:3]}; register a recogniser of speech, or set ''."
      )
  words = [min(texts.get(label, {""})) for label in range(training.num_classes)]

  def recognize(sounds: Sequence[np.ndarray]) -> list[str]:
    heard = found(same_shape(sounds, found.shape)).probabilities.argmax(1)
    return [words[label] for label in heard]

  return recognize


register("classifier", classifier)


def texts_of(rows: MediaRows) -> list[str]:
  """What is said in each row: its caption, or the name of its class."""
  return [
    caption or (rows.class_names[label] if label >= 0 else "")
    for caption, label in zip(rows.captions, rows.labels.tolist(), strict=True)
  ]


class Evaluator:
  """Says what is said in a split's first rows, and goes on with their beginnings.

  Attributes:
    settings: How it draws.
  """

  def __init__(
    self,
    task: Any,
    data: Data,
    compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    *,
    split: str = "validation",
    num_samples: int = 100,
    recognizer: str = "",
    prompt_seconds: float = 0.0,
    speaker_pattern: str = "",
    solver: str = "dpm_2m",
    num_steps: int = 20,
    guidance: float = 1.0,
    temperature: float = 1.0,
    lambda_min: float | None = None,
    seed: int = 0,
  ):
    """Checks the fields; nothing is compiled, trained or drawn before the first run.

    Args:
      task: A LatentLM's.
      data: Its latents, of sounds.
      compile: Unused: samples are drawn on the devices of each process.
      split: Whose rows are said again.
      num_samples: How many of them; all if they are fewer.
      recognizer: What hears words, a name of `RECOGNIZERS`; word errors are not measured if empty.
      prompt_seconds: Of an utterance's beginning, behind which the rest is drawn; similarity is not
        measured if 0.
      speaker_pattern: A regular expression with one group, which finds the speaker in an item's
        name. Similarity is then to the mean of the speaker's training utterances; if empty, to the
        beginning itself.
      solver: Of the head.
      num_steps: Of the solver.
      guidance: Scale.
      temperature: Factor of the noise that the solver starts from.
      lambda_min: Noisier levels are left out; see `ops.sample_grid`.
      seed: Of the samples.
    """
    del compile
    if not hasattr(task, "generator") or not data.summary.get("sample_rate"):
      raise ValueError(
        "speech is drawn by a model over latents of sounds, whose sample rate is known; "
        "config.task.type and config.data.media say which"
      )
    if recognizer and recognizer not in RECOGNIZERS:
      raise ValueError(
        f"{recognizer=} is unknown; choose one of {sorted(RECOGNIZERS)}, register yours with "
        "latentlab.eval.speech.register, or leave it empty."
      )
    if data.documents.condition not in ("class", "text", "both"):
      raise ValueError(
        f"data.condition={data.documents.condition!r} asks for no words; speech is of 'class', "
        "'text' and 'both'."
      )
    if split not in data.splits:
      raise ValueError(f"{split=} does not exist; choose from {sorted(data.splits)}.")
    if num_samples < 2:
      raise ValueError(f"{num_samples=} are too few; draw 2 at least.")
    if not prompt_seconds >= 0:
      raise ValueError(f"{prompt_seconds=} must not be negative; 0 draws behind no beginning.")
    if speaker_pattern and not prompt_seconds:
      raise ValueError(f"{speaker_pattern=} is of similarity; set prompt_seconds, or leave it out.")
    try:
      pattern = re.compile(speaker_pattern)
    except re.error as e:
      raise ValueError(f"{speaker_pattern=} is no regular expression ({e}).") from e
    if speaker_pattern and pattern.groups != 1:
      raise ValueError(f"{speaker_pattern=} must have one group, around the speaker.")
    self._task, self._data, self._split, self._seed = task, data, split, seed
    self._decoded: _References | None = None
    self._recognizer, self._count = recognizer, min(num_samples, len(data.store.splits[split]))
    self._prompt_seconds, self._speaker_pattern = prompt_seconds, speaker_pattern
    self.settings = SolverSettings(guidance, temperature, solver, num_steps, lambda_min)

  def run(self, params: Params) -> Iterator[tuple[str, float]]:
    """Yields how long drawn utterances are, what is heard in them, and whose voices go on.

    `seconds` and `seconds_std` of drawn utterances and, with `_real` behind, of the split's;
    `seconds_distance`, the 1-Wasserstein distance of both sets; `longest`, the part of each that is
    as long as the longest of the data, where drawing stops whatever the model says. `wer`, and
    that of real utterances (`wer_real`), of what the tokenizer makes of their means
    (`wer_reconstructed`), and of beginnings that went on (`wer_continued`). `similarity` of what is
    drawn behind beginnings to the speaker; that of the real rest and of its reconstruction, and
    `similarity_others` of the real rest to the speakers of others, the floor. With a speaker
    pattern, `speaker_accuracy`, the part of each whose own speaker is the nearest of all. The same
    with `_r` behind the first word (SIM-r beside SIM-o) is to what the tokenizer makes of the
    speaker's means: what it does to all of these alike is then no difference. `mel_distance` of
    reconstructions.
    """
    if self._prompt_seconds:
      self._check_similarity()  # Before anything is drawn.
    generator = self._task.generator(params, self._data)
    drawn = generator(self._prompts, self.settings, jax.random.key(self._seed))
    yield from self._durations(drawn.lengths)
    reconstructed = generator.decode(self._means)
    rows = self._rows
    found = reconstruction_metrics(same_shape(reconstructed, rows.collection.shape), rows)
    yield "mel_distance", found["mel_distance"]
    if self._recognizer:
      for name, sounds in (
        ("wer", drawn.media),
        ("wer_real", self._real),
        ("wer_reconstructed", reconstructed),
      ):
        yield name, metrics.word_error_rate(self._recognize(sounds), self._texts)
    if self._prompt_seconds:
      yield from self._similarity(generator, reconstructed)

  def _durations(self, lengths: Sequence[int]) -> Iterator[tuple[str, float]]:
    pair = np.array(lengths), np.array([len(means) for means in self._means])
    longest = max(int(s.lengths.max()) for s in self._data.store.splits.values())
    for ending, counts in zip(("", "_real"), pair, strict=True):
      yield f"seconds{ending}", float(counts.mean() * self._seconds)
      yield f"seconds_std{ending}", float(counts.std() * self._seconds)
      yield f"longest{ending}", float((counts >= longest).mean())
    yield "seconds_distance", float(stats.wasserstein_distance(*pair) * self._seconds)

  def _similarity(
    self, generator: Any, reconstructed: Sequence[np.ndarray]
  ) -> Iterator[tuple[str, float]]:
    """Of the rest of utterances that go on behind their beginnings."""
    count, chosen = self._prompt_latents, self._going_on
    # What training reads are draws, not means.
    noise, key = Noise(**self._data.store.meta["noise"]), jax.random.key(self._seed)
    items = [self._data.store.splits[self._split].item(i) for i in chosen]
    scales = [item.scales[:count] for item in items] if noise.kind == "learned" else None
    log_variances = None if scales is None else 2 * jnp.log(jnp.stack(scales))
    begins = jnp.stack([item.means[:count] for item in items])
    begins = np.asarray(sample_latents(key, begins, noise, log_variances))
    prompts = [generator.begun(self._prompts[i], z) for i, z in zip(chosen, begins, strict=True)]
    rest = generator(prompts, self.settings, jax.random.fold_in(key, 1), min_latents=count + 1)
    whole = [np.concatenate(pair) for pair in zip(begins, rest.latents, strict=True)]
    cut, continued = count * self._hop, generator.decode(whole)
    if self._recognizer:
      texts = [self._texts[i] for i in chosen]
      yield "wer_continued", metrics.word_error_rate(self._recognize(continued), texts)
    known = {
      name: np.stack([self._statistics(sounds[i][cut:]) for i in which])
      for name, sounds, which in (
        ("", continued, range(len(chosen))),
        ("_real", self._real, chosen),
        ("_reconstructed", reconstructed, chosen),
      )
    }
    recorded, decoded = self._recorded, self._references(generator)
    yield from self._to_speakers(recorded, "", known, "_real", self._real, chosen)
    del known["_real"]  # What was recorded is no match for what was decoded.
    yield from self._to_speakers(decoded, "_r", known, "_reconstructed", reconstructed, chosen)

  def _to_speakers(
    self,
    reference: "_References",
    kind: str,
    known: Mapping[str, Float[np.ndarray, "n features"]],
    floor: str,
    beginnings: Sequence[np.ndarray],
    chosen: Sequence[int],
  ) -> Iterator[tuple[str, float]]:
    """Similarity of sounds to their speakers, or to their beginnings where speakers are unknown.

    Args:
      reference: Of the speakers, and in whose units statistics are compared.
      kind: Stands in the names of what is yielded, behind `similarity`.
      known: Statistics of the sounds of `chosen`, by what stands at the end of these names.
      floor: Those of them whose similarity to other speakers is the floor.
      beginnings: Sounds of all utterances, `[S 1]`, whose beginnings stand for their speakers.
      chosen: Utterances of the split.
    """
    if self._speaker_pattern:
      speakers = self._speakers(reference)
      names = sorted(speakers)
      own = [names.index(self._speaker(self._rows.names[i])) for i in chosen]
      every = np.stack([speakers[name] for name in names])
    else:
      own, cut = list(range(len(chosen))), self._prompt_latents * self._hop
      begun = np.stack([self._statistics(beginnings[i][:cut]) for i in chosen])
      every = reference.standard(begun)
    for ending, vectors in known.items():
      cosines = _directions(reference.standard(vectors)) @ _directions(every).T
      yield f"similarity{kind}{ending}", float(cosines[np.arange(len(own)), own].mean())
      if self._speaker_pattern:
        yield f"speaker_accuracy{kind}{ending}", float((cosines.argmax(1) == own).mean())
      if ending == floor:
        strangers = np.array(own)[:, None] != np.arange(len(every))
        yield f"similarity{kind}_others", float(cosines[strangers].mean())

  def _check_similarity(self) -> None:
    """Raises a `ValueError` where there is nothing to go on behind, or nobody to be like."""
    if len(self._going_on) < 2:
      raise ValueError(
        f"prompt_seconds={self._prompt_seconds} leaves {len(self._going_on)} utterances that go on "
        "behind it; shorten it."
      )
    if not self._speaker_pattern:
      return
    speaking = {self._speaker(self._rows.names[i]) for i in self._going_on}
    heard = {self._speaker(name) for name in self._recorded.names}
    if unheard := sorted(speaking - heard):
      raise ValueError(
        f"speaker_pattern={self._speaker_pattern!r} finds speakers of whom none of "
        f"training's first {_MOST_REFERENCES} utterances is, {unheard[:3]}; mend it, or leave it "
        "empty."
      )
    if len(heard) < 2:
      raise ValueError(
        f"speaker_pattern={self._speaker_pattern!r} finds one speaker, {min(heard)!r}, "
        "and similarity is beside others; mend it, or leave it empty."
      )

  @property
  def _prompt_latents(self) -> int:
    return max(1, round(self._prompt_seconds / self._seconds))

  @functools.cached_property
  def _going_on(self) -> list[int]:
    """Utterances that are longer than the beginnings that are given."""
    return [i for i, means in enumerate(self._means) if len(means) > self._prompt_latents]

  @functools.cached_property
  def _prompts(self) -> list[np.ndarray]:
    documents, items = self._data.documents, self._data.store.splits[self._split]
    if documents.condition == "class":
      return [documents.prompt(int(label)) for label in items.labels[: self._count]]
    return [documents.prompt(text=text) for text in items.captions[: self._count]]

  @functools.cached_property
  def _means(self) -> list[np.ndarray]:
    split = self._data.store.splits[self._split]
    return [split.item(i).means for i in range(self._count)]

  @functools.cached_property
  def _rows(self) -> MediaRows:
    return self._data.media.splits[self._split]

  @functools.cached_property
  def _real(self) -> list[np.ndarray]:
    batch = self._rows.rows(np.arange(self._count))
    return [sound[:n] for sound, n in zip(batch["media"], batch["lengths"], strict=True)]

  @functools.cached_property
  def _texts(self) -> list[str]:
    return texts_of(self._rows)[: self._count]

  @functools.cached_property
  def _recognize(self) -> Recognizer:
    cache = prepare_text.cache_dir(self._data.config.cache_dir)
    return RECOGNIZERS[self._recognizer](self._data.media.splits["train"], cache)

  @property
  def _rate(self) -> int:
    return self._data.summary["sample_rate"]

  @property
  def _hop(self) -> int:
    """Samples of a latent."""
    return self._rows.collection.shape[0] // self._data.store.meta["num_latents"]

  @property
  def _seconds(self) -> float:
    """Of a latent."""
    return self._hop / self._rate

  def _statistics(self, sound: Float[np.ndarray, "S 1"]) -> Float[np.ndarray, "features"]:
    options = features_lib.spectrogram_options(self._rate)
    return metrics.mfcc_statistics(sound[:, 0], self._rate, **options)

  def _references(self, generator: Any) -> "_References":
    """`_recorded` as the tokenizer decodes it; once, as all evaluations of a run have one."""
    if self._decoded is None:
      items, count = self._data.store.splits["train"], len(self._recorded.names)
      known = []
      # In parts: a thousand long sounds are no small thing to hold.
      for start in range(0, count, _DECODED_TOGETHER):
        some = range(start, min(start + _DECODED_TOGETHER, count))
        known += [
          self._statistics(x) for x in generator.decode([items.item(i).means for i in some])
        ]
      self._decoded = _References(self._recorded.names, np.stack(known))
    return self._decoded

  @functools.cached_property
  def _recorded(self) -> "_References":
    """Of training's first utterances, which are a fair sample."""
    rows = self._data.media.splits["train"]
    count = min(rows.num_rows, _MOST_REFERENCES)
    found = []
    for i in range(count):
      batch = rows.rows(np.array([i]))
      found.append(self._statistics(batch["media"][0, : batch["lengths"][0]]))
    return _References(list(rows.names[:count]), np.stack(found))

  def _speakers(self, reference: "_References") -> dict[str, Float[np.ndarray, "features"]]:
    """Of each speaker, the mean of the training utterances."""
    spoken: dict[str, list[np.ndarray]] = {}
    vectors = reference.standard(reference.known)
    for name, vector in zip(reference.names, vectors, strict=True):
      spoken.setdefault(self._speaker(name), []).append(vector)
    return {speaker: np.mean(vectors, axis=0) for speaker, vectors in spoken.items()}

  def _speaker(self, name: str) -> str:
    found = re.search(self._speaker_pattern, name)
    if found is None or not found[1]:
      raise ValueError(
        f"speaker_pattern={self._speaker_pattern!r} finds no speaker in {name!r}; mend it."
      )
    return found[1]


@dataclasses.dataclass(frozen=True)
class _References:
  """Utterances that others are compared with.

  Attributes:
    names: Of their items.
    known: Their statistics.
  """

  names: list[str]
  known: Float[np.ndarray, "n features"]

  def standard(self, x: Float[np.ndarray, "*n features"]) -> Float[np.ndarray, "*n features"]:
    """In units of these utterances', so that cosines of strangers are near 0."""
    mean, std = self._moments
    return (x - mean) / np.maximum(std, 1e-6)

  @functools.cached_property
  def _moments(self) -> tuple[Float[np.ndarray, "features"], Float[np.ndarray, "features"]]:
    return self.known.mean(0), self.known.std(0)


def _directions(vectors: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n features"]:
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  if not (norms > 0).all():
    raise ValueError("an embedding of zeros, or of values that are no numbers, has no direction.")
  return vectors / norms
