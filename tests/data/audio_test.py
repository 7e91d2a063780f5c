import json
import wave

import numpy as np
import pytest
from scipy import signal
from scipy.io import wavfile

from latentlab import data
from latentlab.data import audio, media, media_files

RATE = 800


@pytest.fixture
def folder(tmp_path):
  """15 sounds of 3 digits by 1 speaker, 5 recordings each, of distinct lengths from 60 samples."""
  rng = np.random.default_rng(0)
  root = tmp_path / "sounds"
  root.mkdir()
  for digit in range(3):
    for index in range(5):
      samples = rng.integers(-32768, 32768, 60 + 10 * digit + index, np.int16)
      wavfile.write(root / f"{digit}_ann_{index}.wav", RATE, samples)
  return root


def _fields(path, **more):
  return dict(source="wav_folder", path=str(path), label_pattern="^([0-9])_") | more


def test_a_folder_of_digits(folder):
  built = data.build(_fields(folder, split_pattern=r"_[01]\.wav$"), 4)
  train, validation = built.splits["train"], built.splits["validation"]
  assert (train.num_rows, validation.num_rows) == (9, 6)
  assert {n[-5] for n in validation.names} == {"0", "1"}
  assert built.summary["sample_rate"] == RATE and built.summary["shape"] == [84, 1]
  for i, name in enumerate(train.names):
    _, want = wavfile.read(folder / name)
    assert train.class_names[train.labels[i]] == name[0] and train.captions[i] == ""
    batch = train.rows(np.array([i, 99]))
    assert batch["lengths"].tolist() == [len(want), 0] and batch["lengths"].dtype == np.int32
    np.testing.assert_allclose(batch["media"][0, : len(want), 0], want / 32768, atol=1e-7)
    assert not batch["media"][0, len(want) :].any() and batch["media"].shape == (2, 84, 1)
    np.testing.assert_array_equal(train.item(i), batch["media"][0])


def test_training_cuts_anywhere_and_evaluation_at_the_beginning(folder):
  built = data.build(_fields(folder, num_samples=60), 9)
  rows = built.splits["train"]
  i = rows.names.index(next(n for n in rows.names if n.startswith("1_")))
  _, whole = wavfile.read(folder / rows.names[i])
  np.testing.assert_allclose(rows.item(i)[:, 0], whole[:60] / 32768, atol=1e-7)
  cuts = rows.rows(np.full(150, i), np.arange(150))["media"][..., 0]
  begins = {
    next(b for b in range(len(whole) - 59) if np.allclose(c * 32768, whole[b : b + 60]))
    for c in cuts
  }
  assert begins == set(range(len(whole) - 59))
  # The iterator's state carries them.
  iterator = built.train_iterator(2)
  wanted = [next(iterator) for _ in range(4)]
  again = built.train_iterator(2)
  next(again)
  resumed = built.train_iterator(2)
  resumed.set_state(again.get_state())
  for want in wanted[1:]:
    got = next(resumed)
    for name in want:
      np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_resampling(folder):
  rows = data.build(_fields(folder, sample_rate=300), 4).splits["train"]
  _, whole = wavfile.read(folder / rows.names[0])
  want = np.clip(signal.resample_poly(whole / 32768, 3, 8), -1, 1)
  batch = rows.rows(np.array([0]))
  assert batch["lengths"][0] == len(want)
  np.testing.assert_allclose(batch["media"][0, : len(want), 0], want, atol=1e-6)
  # A tone keeps its pitch.
  tone = np.sin(2 * np.pi * 50 * np.arange(RATE) / RATE)[:, None].astype(np.float32)
  wanted = np.sin(2 * np.pi * 50 * np.arange(1200) / 1200)
  np.testing.assert_allclose(audio.resample(tone, RATE, 1200)[50:-50, 0], wanted[50:-50], atol=5e-3)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "float32"])
def test_sample_types_and_channels(tmp_path, kind):
  want = np.linspace(-1, 0.99, 50)[:, None] * np.array([1.0, 0.5])
  integers = {
    "uint8": lambda x: np.round(x * 128 + 128).astype(np.uint8),
    "int16": lambda x: np.round(x * 32768).astype(np.int16),
    "int32": lambda x: np.round(x * 2**31).astype(np.int32),
    "float32": lambda x: x.astype(np.float32),
  }
  wavfile.write(tmp_path / "a.wav", 100, integers[kind](want))
  rate, sound = audio.decode((tmp_path / "a.wav").read_bytes(), "a.wav")
  assert rate == 100 and sound.dtype == np.float32
  np.testing.assert_allclose(sound[:, 0], want.mean(1), atol=1e-2 if kind == "uint8" else 1e-4)


def test_24_bits(tmp_path):
  values = np.array([-(2**23), -1, 0, 2**22])
  with wave.open(str(tmp_path / "a.wav"), "wb") as f:
    f.setnchannels(1), f.setsampwidth(3), f.setframerate(100)
    f.writeframes(b"".join(int(v).to_bytes(3, "little", signed=True) for v in values))
  _, sound = audio.decode((tmp_path / "a.wav").read_bytes(), "a.wav")
  np.testing.assert_allclose(sound[:, 0], values / 2**23, atol=1e-7)


def test_transcripts(folder):
  for path in folder.glob("*.wav"):
    path.with_suffix(".txt").write_text(f" digit {path.name[0]}\n")
  rows = data.build(_fields(folder), 4).splits["train"]
  assert rows.captions == [f"digit {n[0]}" for n in rows.names]
  (folder / "0_ann_0.txt").unlink()
  with pytest.raises(ValueError, match=r"0_ann_0\.txt', the transcript .* missing, as 1 of 15"):
    data.build(_fields(folder), 4)


def test_a_jsonl_file_of_sounds(folder):
  lines = [
    dict(audio=p.name, text=f"it says {p.name[0]}", label=p.name[0]) for p in folder.iterdir()
  ]
  path = folder / "sounds.jsonl"
  path.write_text("\n".join(json.dumps(line) for line in lines))
  built = data.build(_fields(path, label_pattern=""), 4)
  rows = built.splits["train"]
  assert rows.captions == [f"it says {n[0]}" for n in rows.names]
  assert [rows.class_names[i] for i in rows.labels] == [n[0] for n in rows.names]


def test_class_captions(folder):
  words = ("zero", "one", "two")
  rows = data.build(_fields(folder, class_captions=words), 4).splits["train"]
  assert rows.captions == [words[int(n[0])] for n in rows.names]


def test_sounds_in_memory():
  sounds = np.random.default_rng(0).uniform(-1, 1, (8, 50))
  lengths = 40 + np.arange(8)
  fields = dict(sample_rate=100, num_samples=45)
  built = media.build_arrays(sounds, np.arange(8) % 2, batch_size=2, lengths=lengths, fields=fields)
  assert built.summary["shape"] == [45, 1] and built.summary["sample_rate"] == 100
  rows = built.splits["train"]
  for i, name in enumerate(rows.names):
    n = min(lengths[int(name)], 45)
    batch = rows.rows(np.array([i]))
    assert batch["lengths"][0] == n
    np.testing.assert_allclose(batch["media"][0, :n, 0], sounds[int(name), :n], atol=1e-6)
  with pytest.raises(ValueError, match="give each sound's samples"):
    media.build_arrays(sounds, batch_size=2, lengths=lengths + 10)
  with pytest.raises(ValueError, match="give int16"):
    media.build_arrays(np.zeros((3, 4), np.uint8), batch_size=1)


@pytest.mark.parametrize(
  ("damage", "fields", "message"),
  [
    (lambda f: (f / "0_x.wav").write_bytes(b"RIFF"), {}, r"0_x\.wav' cannot be read as a wav"),
    (lambda f: (f / "0_x.wav").write_bytes(b""), {}, r"0_x\.wav' cannot be read as a wav"),
    (
      lambda f: wavfile.write(f / "0_x.wav", RATE, np.zeros(0, np.int16)),
      {},
      r"0_x\.wav'.* no samples",
    ),
    (
      lambda f: wavfile.write(f / "0_x.wav", RATE, np.full(4, np.nan, np.float32)),
      {},
      r"0_x\.wav' has samples that are no numbers",
    ),
    (lambda f: wavfile.write(f / "0_x.wav", 400, np.ones(4, np.int16)), {}, "set data.sample_rate"),
    (lambda f: wavfile.write(f / "x.wav", RATE, np.ones(4, np.int16)), {}, "no label in 'x.wav'"),
    (lambda f: None, dict(label_pattern="("), "no regular expression"),
    (lambda f: None, dict(label_pattern="(.)(.)"), "2 groups"),
    (lambda f: None, dict(class_names=("0", "1")), "the label '2', which is not among"),
    (lambda f: None, dict(flip=True), "'flip': True"),
    (lambda f: None, dict(num_samples=-1), "num_samples=-1"),
    (lambda f: [p.unlink() for p in f.iterdir()], {}, "has no .wav files"),
    (lambda f: (f / "0_ann_0.txt").write_bytes(b"\xff"), {}, "the transcript of a sound"),
  ],
)
def test_bad_folders(folder, damage, fields, message):
  damage(folder)
  with pytest.raises(ValueError, match=message):
    data.build(_fields(folder) | fields, 4)


def test_wav_files_are_read_back(tmp_path):
  sound = np.random.default_rng(0).uniform(-1, 1, (70, 1))
  sound[3] = 2.0
  media_files.write_wav(tmp_path / "new" / "a.wav", sound, 8000)
  rate, got = audio.decode((tmp_path / "new" / "a.wav").read_bytes(), "a.wav")
  assert rate == 8000
  np.testing.assert_allclose(got, np.clip(sound, -1, 1), atol=5e-5)
  for bad, message in ((np.zeros((3, 2)), r"shape \(3, 2\)"), (np.full(3, np.inf), "no numbers")):
    with pytest.raises(ValueError, match=message):
      media_files.write_wav(tmp_path / "b.wav", bad, 8000)
  with pytest.raises(ValueError, match="sample_rate=0"):
    media_files.write_wav(tmp_path / "b.wav", np.zeros(3), 0)


def test_a_wav_file_grows(tmp_path):
  sound = np.random.default_rng(0).uniform(-1, 1, (70, 1))
  wav, grown = media_files.WavWriter(tmp_path / "new" / "a.wav", 8000), tmp_path / "new" / "a.wav"
  for begin, end in ((0, 30), (30, 30), (30, 70)):
    wav.write(sound[begin:end])
    _, got = audio.decode(grown.read_bytes(), "a.wav")
    np.testing.assert_allclose(got, sound[:end], atol=5e-5)  # Whole after each piece.
  with pytest.raises(ValueError, match="no numbers"):
    wav.write(np.full(3, np.nan))
  media_files.write_wav(tmp_path / "b.wav", sound, 8000)
  assert (tmp_path / "b.wav").read_bytes() == grown.read_bytes()
  with wave.open(str(tmp_path / "at_once.wav"), "wb") as at_once:
    at_once.setparams((1, 2, 8000, 0, "NONE", ""))
    at_once.writeframes(np.round(sound.ravel() * 32767).astype("<i2").tobytes())
  assert (tmp_path / "at_once.wav").read_bytes() == grown.read_bytes()
  with pytest.raises(ValueError, match="is empty"):
    media_files.write_wav(tmp_path / "c.wav", sound[:0], 8000)


def test_vowels_are_their_pitch_and_resonances():
  built = data.build(dict(source="vowels"), 4)
  rows = built.splits["train"]
  assert built.summary["sample_rate"] == 8000 and rows.class_names == ("a", "e", "i", "o", "u")
  assert built.summary == data.build(dict(source="vowels"), 4).summary  # The same at each call.
  chosen = np.arange(0, rows.num_rows, 4)
  batch, names = rows.rows(chosen), [rows.names[i] for i in chosen]
  assert np.abs(batch["media"]).max() <= 0.5 and len(set(batch["lengths"])) > 50
  pitches, peaks = {}, {}
  for name, sound, length in zip(names, batch["media"][..., 0], batch["lengths"], strict=True):
    vowel, speaker, _ = name.split("_")
    spectrum = np.abs(np.fft.rfft(sound[:length] * np.hanning(length), 1 << 15))
    hertz = np.arange(len(spectrum)) * 8000 / (1 << 15)
    correlation = np.correlate(sound[:length], sound[:length], "full")[length:]
    pitches.setdefault(speaker, []).append(8000 / (correlation[25:110].argmax() + 26))
    above = (hertz > 1400) & (hertz < 3500)
    peaks.setdefault(vowel, []).append((spectrum[above] ** 2).sum() / (spectrum**2).sum())
  by_speaker = [np.median(pitches[s]) for s in sorted(pitches)]
  np.testing.assert_allclose(by_speaker, 0.925 * 95 * 2.4 ** np.linspace(0, 1, 6), rtol=0.12)
  # The second resonance of e and i lies high, that of o and u low.
  high = {vowel: np.mean(shares) for vowel, shares in peaks.items()}
  assert min(high["e"], high["i"]) > 3 * max(high["o"], high["u"])


def test_sounds_may_be_scaled_to_one_peak(folder):
  plain, scaled = (data.build(_fields(folder, **more), 4) for more in ({}, dict(peak=0.25)))
  for a, b in ((plain.splits[n].item(1), scaled.splits[n].item(1)) for n in plain.splits):
    np.testing.assert_allclose(b, a * 0.25 / np.abs(a).max(), rtol=1e-6)
  assert plain.summary["media_sha256"] != scaled.summary["media_sha256"]
  for bad, message in (
    (_fields(folder, peak=1.5), "data.peak=1.5 must be at most 1"),
    (_fields(folder, peak=float("nan")), "data.peak=nan must be at most 1"),
    (dict(source="vowels", peak=0.5), "data.peak=0.5 is of data.source='wav_folder'"),
    (dict(source="vowels", sample_rate=4000), "data.sample_rate=4000 is too low for vowels"),
    (dict(source="vowels", class_names=("a",)), "data.source='vowels' have names"),
  ):
    with pytest.raises(ValueError, match=message):
      data.build(bad, 4)
