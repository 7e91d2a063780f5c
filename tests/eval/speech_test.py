"""The evaluator of speech, beside a model that says what it is told to, letter by letter."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from latentlab.data import latent_store, media, mixed
from latentlab.data.latent_store import LatentItem
from latentlab.eval import features as features_lib
from latentlab.eval import metrics, runner, speech
from latentlab.layers.diffusion_head import Diffusion
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latentlm import SpecialTokens

RATE, HOP = 8000, 100
WORDS = ("no", "yes")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """24 utterances of 2 words by 3 speakers, a quarter held out; a latent is 100 samples."""
  folder, rng = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
  sounds, lengths, names = np.zeros((24, 3200, 1), np.float32), [], []
  for i in range(24):
    word, speaker, length = i % 2, i // 2 % 3, HOP * int(rng.integers(16, 33))
    time = np.arange(length) / RATE
    pitch = (110, 170, 240)[speaker] * rng.uniform(0.98, 1.02)
    voice = sum(
      np.sin(2 * np.pi * k * pitch * time) / k ** (0.5 + speaker / 2)
      for k in range(1, int(3800 / pitch))
    )
    voice = voice + 2 * np.sin(2 * np.pi * (600, 2000)[word] * time)
    sounds[i, :length, 0] = 0.4 * voice / np.abs(voice).max()
    lengths.append(length)
    names.append(f"{WORDS[word]}_{'abc'[speaker]}_{i // 6}")
  texts = [name.split("_")[0] for name in names]
  arrays = dict(media=sounds, labels=texts, captions=texts, names=names, lengths=lengths)
  np.savez(folder / "sounds.npz", **arrays)
  fields = dict(source="arrays", path=str(folder / "sounds.npz"), sample_rate=RATE)
  fields["split_pattern"] = "_3$"
  found = media.build(fields, 1)

  def items(rows):
    batch = rows.rows(np.arange(rows.num_rows))
    for sound, length, label, text in zip(
      batch["media"], batch["lengths"], rows.labels, rows.captions, strict=True
    ):
      yield LatentItem(sound[:length].reshape(-1, HOP), int(label), text)

  meta = dict(key="k", dim=HOP, noise=dict(kind="none", std=0.0), num_latents=32, num_classes=2)
  meta |= dict(class_names=list(WORDS), media_shape=[3200, 1], sample_rate=RATE, codebook_size=0)
  splits = {name: items(rows) for name, rows in found.splits.items()}
  store = latent_store.write(folder / "latents", splits, meta)
  config = mixed.LatentDataConfig(
    modality="speech", media=fields, condition="text", cache_dir=str(folder)
  )
  return mixed.build(config, store, SpecialTokens(258, 1, 0), "token", 2)


@dataclasses.dataclass
class Parrot:
  """Draws the held-out items themselves: for item `i` item `i + shift`, less its last latents."""

  data: mixed.LatentData
  shift: int = 0
  drop: int = 0

  def begun(self, prompt, latents):
    return np.asarray(latents)

  def decode(self, runs):
    return [run.reshape(-1, 1) for run in runs]

  def __call__(self, prompts, settings, key, min_latents=0):
    split = self.data.store.splits["validation"]
    runs = []
    for i, prompt in enumerate(prompts):
      run = np.asarray(split.item((i + self.shift) % len(split)).means)
      runs.append(run[len(prompt) if prompt.ndim == 2 else 0 : len(run) - self.drop])
    return types.SimpleNamespace(
      media=self.decode(runs), latents=runs, lengths=[len(run) for run in runs]
    )


def _hears_exactly(training, cache_dir):
  """A recogniser of the very sounds of the data."""
  whole = media.MediaRows(training.collection, np.arange(len(training.collection.records)))
  batch = whole.rows(np.arange(whole.num_rows))["media"]

  def recognize(sounds):
    near = [np.abs(batch[:, : len(x)] - x).max((1, 2)).argmin() for x in sounds]
    return [whole.captions[i] for i in near]

  return recognize


@pytest.fixture(autouse=True)
def _recognizer(monkeypatch):
  monkeypatch.setattr(speech, "RECOGNIZERS", dict(speech.RECOGNIZERS))
  speech.register("exact", _hears_exactly)


def _run(data, shift=0, drop=0, **fields):
  task = types.SimpleNamespace(generator=lambda params, data: Parrot(data, shift, drop))
  return dict(speech.Evaluator(task, data, jax.jit, **fields).run({}))


def test_what_says_the_data_itself_is_perfect(data):
  got = _run(data, recognizer="exact", prompt_seconds=0.05, speaker_pattern="_([abc])_")
  assert got["wer"] == got["wer_real"] == got["wer_reconstructed"] == got["wer_continued"] == 0
  assert got["seconds"] == got["seconds_real"] and got["seconds_distance"] == 0
  assert got["mel_distance"] < 1e-6
  np.testing.assert_allclose(got["similarity"], got["similarity_real"], rtol=1e-5)
  assert got["speaker_accuracy"] == got["speaker_accuracy_real"] > 0.8  # By chance, a third.
  assert got["similarity_real"] > 0.3 > 0.0 > got["similarity_others"]
  for kind in ("", "_reconstructed"):  # What is decoded is what was recorded.
    assert got[f"similarity_r{kind}"] == pytest.approx(got["similarity"], rel=1e-4)
    assert got[f"speaker_accuracy_r{kind}"] == got["speaker_accuracy"]
  assert got["similarity_r_others"] == pytest.approx(got["similarity_others"], rel=1e-4)


@pytest.mark.parametrize("pattern", ["", "_([abc])_"])
def test_what_all_decoded_sounds_have_in_common_is_no_other_voice(data, monkeypatch, pattern):
  """A tokenizer that rings at one pitch: to what was recorded strange, to its own like before."""
  fields = dict(prompt_seconds=0.05, speaker_pattern=pattern)
  clean = _run(data, **fields)

  def ringing(self, runs):
    sounds = [run.reshape(-1, 1) for run in runs]
    return [x + 0.2 * np.sin(np.arange(len(x))[:, None] * 2.5).astype(x.dtype) for x in sounds]

  monkeypatch.setattr(Parrot, "decode", ringing)
  got = _run(data, **fields)
  assert got["similarity_real"] == pytest.approx(clean["similarity_real"], rel=1e-5)
  lost = clean["similarity"] - got["similarity"]
  lost_r = clean["similarity_r"] - got["similarity_r"]
  assert lost > 0.1 and abs(lost_r) < lost / 3, (lost, lost_r)
  assert got["similarity_r_others"] < got["similarity_r_reconstructed"] - 0.2
  assert "similarity_r_real" not in got


def test_durations_and_words_are_counted(data):
  rows = data.media.splits["validation"]
  got = _run(data, shift=1, drop=3, recognizer="exact")
  lengths = rows.rows(np.arange(rows.num_rows))["lengths"] / RATE
  longest = data.media.splits["train"].rows(np.arange(18))["lengths"].max() / RATE
  longest = max(longest, lengths.max())
  wrong = [
    a != b for a, b in zip(rows.captions, rows.captions[1:] + rows.captions[:1], strict=True)
  ]
  assert got["wer"] == pytest.approx(np.mean(wrong)) and 0 < np.mean(wrong)
  assert got["seconds"] == pytest.approx(lengths.mean() - 3 * HOP / RATE)
  assert got["seconds_std"] == pytest.approx(lengths.std())
  assert got["seconds_distance"] == pytest.approx(3 * HOP / RATE)
  assert got["longest"] == 0 and got["longest_real"] == np.mean(lengths == longest)
  assert "similarity" not in got


def test_similarity_is_the_cosine_of_standardised_statistics(data):
  """To beginnings where speakers are unknown; item `i` goes on as item `i + 1` does."""
  got = _run(data, shift=1, prompt_seconds=0.05)
  options = features_lib.spectrogram_options(RATE)

  def statistics(sound):
    return metrics.mfcc_statistics(sound[:, 0], RATE, **options)

  real = {}
  for name, rows in data.media.splits.items():
    batch = rows.rows(np.arange(rows.num_rows))
    real[name] = [x[:n] for x, n in zip(batch["media"], batch["lengths"], strict=True)]
  known = np.array([statistics(x) for x in real["train"]])
  embed = lambda x: (statistics(x[:, None]) - known.mean(0)) / known.std(0)
  held, cut = real["validation"], 400
  cosines = lambda sounds: [
    metrics.speaker_similarity(a[cut:, 0], b[:cut, 0], embed)
    for a, b in zip(sounds, held, strict=True)
  ]
  assert got["similarity_real"] == pytest.approx(np.mean(cosines(held)))
  assert got["similarity"] == pytest.approx(np.mean(cosines(held[1:] + held[:1])))
  others = [
    metrics.speaker_similarity(a[cut:, 0], b[:cut, 0], embed)
    for a in held
    for b in held
    if a is not b
  ]
  assert got["similarity_others"] == pytest.approx(np.mean(others))
  assert "speaker_accuracy" not in got and "wer" not in got


def test_the_classifier_says_its_classs_text(data, monkeypatch):
  training = data.media.splits["train"]
  loud = lambda x: (np.abs(np.fft.rfft(x[..., 0]))[:, 790:810].max(1) > 50).astype(int)
  answers = lambda x: features_lib.Extracted(np.zeros((len(x), 1)), np.eye(2)[loud(x)])
  built = []
  found = types.SimpleNamespace(shape=training.collection.shape)

  class Stub:
    shape = found.shape

    def __call__(self, sounds):
      return answers(sounds)

  monkeypatch.setattr(features_lib, "build", lambda *args: built.append(args) or Stub())
  recognize = speech.classifier(training, None)
  assert built == [("classifier", training, None)]
  batch = training.rows(np.arange(18))
  short = [x[:n] for x, n in zip(batch["media"], batch["lengths"], strict=True)]
  assert recognize(short) == training.captions
  records = [dataclasses.replace(r, caption=r.name) for r in training.collection.records]
  changed = dataclasses.replace(training.collection, records=records)
  with pytest.raises(ValueError, match="says a class's text, and class 'no' has 9"):
    speech.classifier(media.MediaRows(changed, training.members), None)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(recognizer="whisper"), "recognizer='whisper' is unknown; choose one of .'classifier'"),
    (dict(num_samples=1), "num_samples=1 are too few"),
    (dict(split="test"), "split='test' does not exist"),
    (dict(prompt_seconds=-1.0), "prompt_seconds=-1.0 must not be negative"),
    (dict(speaker_pattern="_(.)_"), "is of similarity; set prompt_seconds"),
    (dict(speaker_pattern="_._", prompt_seconds=0.1), "must have one group"),
    (dict(speaker_pattern="_(.", prompt_seconds=0.1), "speaker_pattern='_..' is no regular expres"),
    (dict(words=1), "unknown fields"),
  ],
)
def test_bad_fields(data, fields, message):
  section = dict(type="speech", every_steps=1) | fields
  with pytest.raises(ValueError, match=message):
    task = types.SimpleNamespace(generator=None)
    runner.build({"x": section}, task, data, lambda f: f)


def test_bad_requests(data):
  with pytest.raises(ValueError, match="leaves 0 utterances that go on"):
    _run(data, prompt_seconds=1.0)
  with pytest.raises(ValueError, match="finds no speaker in"):
    _run(data, prompt_seconds=0.05, speaker_pattern="([xyz])")
  with pytest.raises(ValueError, match="speaker_pattern='.*' finds speakers of whom none of"):
    _run(data, prompt_seconds=0.05, speaker_pattern="_([0-9])$")
  with pytest.raises(ValueError, match="speaker_pattern='.*' finds one speaker, '_'"):
    _run(data, prompt_seconds=0.05, speaker_pattern="(_)")
  with pytest.raises(ValueError, match="'exact' is registered already"):
    speech.register("exact", lambda *args: None)
  with pytest.raises(ValueError, match="a model over latents of sounds"):
    speech.Evaluator(types.SimpleNamespace(), data, jax.jit)


def test_it_draws_as_it_is_told_to(data):
  task = types.SimpleNamespace(generator=None, diffusion=Diffusion())
  fields = dict(solver="ddim", num_steps=7, guidance=1.5, temperature=0.9, lambda_min=-3.0)
  evaluator = speech.Evaluator(task, data, jax.jit, **fields)
  assert evaluator.settings == SolverSettings(**fields)
  section = dict(type="speech", every_steps=1) | fields | dict(lambda_min=50.0)
  with pytest.raises(ValueError, match="config.evals.a: lambda_min=50.0 leaves no timestep"):
    runner.build({"a": section}, task, data, jax.jit)
