import inspect
import itertools
import math

import numpy as np
import pytest
from scipy import linalg

from latentlab.eval import metrics


def _rng(seed=0):
  return np.random.default_rng(seed)


def _set(mean, covariance):
  """2 D features of exactly this mean and (unbiased) covariance."""
  size = len(mean)
  root = np.linalg.cholesky(covariance) * np.sqrt((2 * size - 1) / 2)
  return np.concatenate([mean + root.T, mean - root.T])


def test_moments_are_those_of_all_features_in_any_parts():
  features = _rng().normal(3, 2, (50, 4))
  whole = metrics.Moments.of(features)
  np.testing.assert_allclose(whole.covariance, np.cov(features.T), rtol=1e-12)
  parts = [metrics.Moments.of(part) for part in np.split(features, [1, 2, 20])]
  for order in itertools.permutations(parts):
    total = order[0] + (order[1] + order[2]) + order[3]
    assert total.count == 50
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(total.scatter, whole.scatter, rtol=1e-11)
  # Far from zero, where sums of squares would lose all digits.
  far = metrics.Moments.of(features[:20] + 1e8) + metrics.Moments.of(features[20:] + 1e8)
  np.testing.assert_allclose(far.covariance, whole.covariance, rtol=1e-5)


def test_frechet_distance_of_known_gaussians():
  a, b = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
  # Covariances that commute: |m - n|^2 + sum (sqrt a_i - sqrt b_i)^2.
  rotation = linalg.qr(_rng().normal(size=(3, 3)))[0]
  eigenvalues = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.01])
  covariances = [rotation @ np.diag(e) @ rotation.T for e in eigenvalues]
  got = metrics.frechet_distance(
    *(metrics.Moments.of(_set(m, c)) for m, c in zip((a, b), covariances, strict=True))
  )
  want = ((a - b) ** 2).sum() + ((eigenvalues[0] ** 0.5 - eigenvalues[1] ** 0.5) ** 2).sum()
  assert got == pytest.approx(want, rel=1e-9)


def test_frechet_distance_by_the_definition():
  x, y = _rng(1).normal(size=(40, 5)) @ _rng(2).normal(size=(5, 5)), _rng(3).normal(1, 2, (30, 5))
  c, d = np.cov(x.T), np.cov(y.T)
  root = linalg.sqrtm(c @ d).real
  want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d - 2 * root)
  a, b = metrics.Moments.of(x), metrics.Moments.of(y)
  assert metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
  assert metrics.frechet_distance(b, a) == pytest.approx(want, rel=1e-9)
  assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_singular_covariances():
  # Fewer features than dimensions, and dimensions that never change.
  x = np.concatenate([_rng().normal(size=(4, 6)), np.zeros((4, 2))], axis=1)
  a = metrics.Moments.of(x)
  assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
  shifted = metrics.Moments.of(x + np.arange(8))
  assert metrics.frechet_distance(a, shifted) == pytest.approx((np.arange(8) ** 2).sum(), rel=1e-6)
  # One dimension each, at right angles: nothing in common.
  line = np.array([-1.0, 1.0])
  across, along = np.stack([line, 0 * line], 1), np.stack([0 * line, line], 1)
  got = metrics.frechet_distance(metrics.Moments.of(across), metrics.Moments.of(along))
  assert got == pytest.approx(4)


def test_bad_features():
  with pytest.raises(ValueError, match=r"\[n, D\]"):
    metrics.Moments.of(np.zeros((0, 3)))
  with pytest.raises(ValueError, match="no numbers"):
    metrics.Moments.of(np.full((2, 3), np.nan))
  three, two, one = (metrics.Moments.of(np.ones(s)) for s in ((2, 3), (2, 2), (1, 3)))
  with pytest.raises(ValueError, match="of 3 and 2 features"):
    three + two
  with pytest.raises(ValueError, match="3 and 2 features have no distance"):
    metrics.frechet_distance(three, two)
  with pytest.raises(ValueError, match="at least 2 features"):
    metrics.frechet_distance(three, one)


def test_inception_score():
  # Sure, and of all classes: as many as there are classes. All alike: 1.
  sure = np.tile(np.eye(4), (5, 1))
  assert metrics.inception_score(sure, 5) == (pytest.approx(4), pytest.approx(0))
  assert metrics.inception_score(np.full((6, 3), 1 / 3), 2)[0] == pytest.approx(1)
  p = _rng().dirichlet(np.ones(3), 12)
  scores = []
  for part in (p[:6], p[6:]):
    marginal = part.mean(0)
    divergences = [
      sum(q * math.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in part
    ]
    scores.append(math.exp(sum(divergences) / 6))
  assert metrics.inception_score(p, 2) == (
    pytest.approx(sum(scores) / 2),
    pytest.approx(abs(scores[0] - scores[1]) / 2),
  )
  with pytest.raises(ValueError, match="add up to 1"):
    metrics.inception_score(p * 2)
  with pytest.raises(ValueError, match="num_splits=13"):
    metrics.inception_score(p, 13)


def test_precision_and_recall_by_hand():
  # On a line, k = 1: data 0, 1, 5 reach 1, 1 and 4; samples 1.5, 2.5, 9.5 reach 1, 1 and 7.
  data, generated = np.array([[0.0], [1.0], [5.0]]), np.array([[1.5], [2.5], [9.5]])
  # 1.5 and 2.5 lie in [1, 9] around 5, and 9.5 lies nowhere. 0 is 2.5 from 1.5's end, and outside;
  # 1 lies in [0.5, 2.5], 5 in [2.5, 16.5].
  assert metrics.precision_recall(generated, data, k=1) == (
    pytest.approx(2 / 3),
    pytest.approx(2 / 3),
  )


def test_precision_and_recall_by_the_definition():
  data, generated = _rng(0).normal(size=(60, 3)), _rng(1).normal(0.7, 0.6, (50, 3))

  def covered(points, centres):
    radii = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
    hits = [
      any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
    ]
    return sum(hits) / len(hits)

  got = metrics.precision_recall(generated, data)
  assert got == (pytest.approx(covered(generated, data)), pytest.approx(covered(data, generated)))
  assert 0 < got[1] < got[0]
  assert metrics.precision_recall(data, data) == (1.0, 1.0)
  assert metrics.precision_recall(data + 100, data) == (0.0, 0.0)
  with pytest.raises(ValueError, match=r"k=3 must lie in \[1, 3\), the number of generated"):
    metrics.precision_recall(generated[:3], data)


def test_image_metrics_by_the_definition():
  images, references = _rng(0).uniform(-1, 1, (2, 3, 9, 8, 3))
  images = references + 0.3 * images
  error = [np.mean((a - b) ** 2) for a, b in zip(images, references, strict=True)]
  np.testing.assert_allclose(metrics.mse(images, references), error, rtol=1e-12)
  np.testing.assert_allclose(
    metrics.psnr(images, references), [20 * np.log10(2 / e**0.5) for e in error], rtol=1e-12
  )
  assert np.isinf(metrics.psnr(references, references)).all()
  # Window by window, channel by channel.
  w = np.exp(-np.square(np.arange(5) - 2.0) / (2 * 1.5**2))
  w = np.outer(w, w) / w.sum() ** 2
  want = []
  for x, y in zip(images, references, strict=True):
    values = []
    for top, left, channel in itertools.product(range(5), range(4), range(3)):
      a, b = (z[top : top + 5, left : left + 5, channel] for z in (x, y))
      ma, mb = (w * a).sum(), (w * b).sum()
      va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
      covariance = (w * (a - ma) * (b - mb)).sum()
      c1, c2 = 0.02**2, 0.06**2
      values.append(
        (2 * ma * mb + c1) * (2 * covariance + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
      )
    want.append(np.mean(values))
  np.testing.assert_allclose(metrics.ssim(images, references, window=5), want, rtol=1e-9)
  np.testing.assert_allclose(metrics.ssim(images, images, window=5), 1, rtol=1e-12)
  with pytest.raises(ValueError, match="window=11 must be odd and at most"):
    metrics.ssim(images, references)
  with pytest.raises(ValueError, match=r"\[n, H, W, C\]"):
    inspect.unwrap(metrics.mse)(images, references[:2])


RATE = 8000


def _tone(frequency, seconds=0.5, loudness=0.5):
  return loudness * np.sin(2 * np.pi * frequency * np.arange(int(seconds * RATE)) / RATE)


def test_mel_filterbank_by_the_definition():
  bank = metrics.mel_filterbank(10, 256, RATE, low=100, high=3500)
  assert bank.shape == (129, 10)
  mel = lambda f: 2595 * math.log10(1 + f / 700)
  edges = [
    700 * (10 ** ((mel(100) + i * (mel(3500) - mel(100)) / 11) / 2595) - 1) for i in range(12)
  ]
  for bin, band in itertools.product(range(129), range(10)):
    f, (begin, peak, end) = bin * RATE / 256, edges[band : band + 3]
    rising, falling = (f - begin) / (peak - begin), (end - f) / (end - peak)
    assert bank[bin, band] == pytest.approx(max(0, min(rising, falling)), abs=1e-9)
  with pytest.raises(ValueError, match="a band holds no bin"):
    metrics.mel_filterbank(80, 64, RATE)
  with pytest.raises(ValueError, match="high=5000"):
    metrics.mel_filterbank(8, 64, RATE, high=5000)


OPTIONS = dict(num_mels=20, window=256, hop=64)


def test_log_mel_by_the_definition():
  sound = _rng().normal(size=500) / 4
  got = metrics.log_mel(sound, RATE, **OPTIONS)
  padded = np.concatenate([np.zeros(128), sound, np.zeros(256)])
  window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
  frames = np.stack([padded[i : i + 256] * window for i in range(0, 500, 64)])
  bands = np.abs(np.fft.rfft(frames)) @ metrics.mel_filterbank(20, 256, RATE)
  np.testing.assert_allclose(got, np.log10(np.maximum(bands, 1e-5)), atol=1e-9)
  # Silence is at the floor; a tone is where it belongs.
  assert (metrics.log_mel(np.zeros(500), RATE, **OPTIONS) == -5).all()
  peaks = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 22)[1:-1] / 2595) - 1)
  loudest = metrics.log_mel(_tone(1000), RATE, **OPTIONS)[20].argmax()
  assert loudest == np.abs(peaks - 1000).argmin()


def test_mel_distance():
  sound = _tone(440)
  assert metrics.mel_distance(sound, sound, RATE, **OPTIONS) == 0
  # Ten times softer is 1 in every band that stands above the floor.
  noise = _rng().normal(size=4000) / 4
  assert metrics.mel_distance(noise / 10, noise, RATE, **OPTIONS) == pytest.approx(1, abs=1e-9)
  near, far = (metrics.mel_distance(_tone(f), sound, RATE, **OPTIONS) for f in (450, 2000))
  assert 0 < near < far
  with pytest.raises(ValueError, match="equally long"):
    inspect.unwrap(metrics.mel_distance)(sound[1:], sound, RATE)
  with pytest.raises(ValueError, match="no numbers"):
    metrics.mel_distance(sound * np.nan, sound, RATE)


def test_stoi_falls_with_noise():
  pytest.importorskip("pystoi")
  rng = _rng()
  syllables = np.repeat(rng.uniform(0.05, 1, 40), RATE // 20)
  speech = syllables * rng.normal(size=len(syllables)) / 4
  noise = rng.normal(size=len(speech)) / 4
  values = [metrics.stoi(speech + level * noise, speech, RATE) for level in (0, 0.5, 2)]
  assert values[0] == pytest.approx(1, abs=1e-6) and values[0] > values[1] > values[2]
  with pytest.raises(ValueError, match=r"0\.4 seconds"):
    metrics.stoi(speech[:1000], speech[:1000], RATE)


def test_speaker_similarity():
  embed = lambda x: x[:2]
  similarity = lambda a, b: metrics.speaker_similarity(np.array(a), np.array(b), embed)
  assert similarity([3.0, 4.0, 9.0], [6.0, 8.0, 0.0]) == pytest.approx(1)
  assert similarity([1.0, 0.0], [1.0, 1.0]) == pytest.approx(0.5**0.5)
  with pytest.raises(ValueError, match="no direction"):
    similarity([0.0, 0.0], [1.0, 1.0])


def test_mfcc_statistics_tell_voices_not_loudness():
  def voice(formants, seed):
    noise = _rng(seed).normal(size=RATE)
    spectrum = np.fft.rfft(noise)
    f = np.fft.rfftfreq(RATE, 1 / RATE)
    envelope = sum(np.exp(-(((f - c) / 200) ** 2)) for c in formants) + 0.01
    return np.fft.irfft(spectrum * envelope)

  embed = lambda x: metrics.mfcc_statistics(x, RATE, **OPTIONS, num_coefficients=12)
  one, again, other = voice((500, 1500), 0), voice((500, 1500), 1), voice((900, 2500), 2)
  same = metrics.speaker_similarity(one, again, embed)
  assert same > 0.95 > metrics.speaker_similarity(one, other, embed) + 0.1
  np.testing.assert_allclose(embed(one / 3), embed(one), atol=1e-9)
  assert embed(one).shape == (24,)


def test_cider_by_hand():
  # 2 images. Every word and pair but "a" is of one image, so weighs log 2; "a" weighs nothing.
  references = [["a red car"], ["a dog"]]
  scores = metrics.cider(["a red bus", "A dog!"], references)
  # Words: (red, bus) and (red, car): 1 / 2. "a red" of ("a red", "red bus") and ("a red", "red
  # car"): 1 / 2. Threes differ; there are no fours.
  assert scores[0] == pytest.approx(10 * (1 / 2 + 1 / 2 + 0 + 0) / 4)
  # "dog", and "a dog": alike; shorter n-grams than 3 alone.
  assert scores[1] == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)


def test_cider_by_the_definition():
  words = "a the red blue car dog runs on".split()
  rng = _rng()
  text = lambda: " ".join(rng.choice(words, rng.integers(4, 8)))
  references = [[text() for _ in range(rng.integers(1, 4))] for _ in range(6)]
  candidates = [text() for _ in range(6)]
  grams = lambda t, n: [tuple(t.split()[i : i + n]) for i in range(len(t.split()) - n + 1)]
  for sigma in (None, 6.0):
    want = []
    for candidate, texts in zip(candidates, references, strict=True):
      by_reference = []
      for other in texts:
        cosines = []
        for n in range(1, 5):
          vocabulary = sorted({g for t in [candidate, *sum(references, [])] for g in grams(t, n)})
          df = np.array(
            [sum(any(g in grams(t, n) for t in r) for r in references) for g in vocabulary]
          )
          weight = np.log(6 / np.maximum(df, 1))
          x, y = (
            np.array([grams(t, n).count(g) for g in vocabulary]) * weight
            for t in (candidate, other)
          )
          norm = np.linalg.norm(x) * np.linalg.norm(y)
          cosines.append(((x if sigma is None else np.minimum(x, y)) @ y) / norm if norm else 0.0)
        gap = len(candidate.split()) - len(other.split())
        by_reference.append(np.mean(cosines) * (1 if sigma is None else np.exp(-(gap**2) / 72)))
      want.append(10 * np.mean(by_reference))
    got = metrics.cider(candidates, references, sigma)
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert 0 < got.max() < 10
  perfect = metrics.cider([r[0] for r in references], [r[:1] for r in references])
  np.testing.assert_allclose(perfect, 10)
  for bad, message in (
    (([], []), "at least 2 images"),
    ((["a"], [["a"], ["b"]]), "1 candidates for 2"),
    ((["a", "b"], [["a"], []]), "image 1 has no reference"),
  ):
    with pytest.raises(ValueError, match=message):
      metrics.cider(*bad)


@pytest.mark.parametrize(
  ("answer", "others", "want"),
  [
    ("Two", ["2", "two", "2.", "three"], 1.0),
    ("a dog", ["dog", "the dog", "cat"], 2 / 3),
    ("dog", ["cat"] * 10, 0.0),
    ("dog", ["dog"] * 10, 1.0),
    ("it's red", ["It's red!"], 1 / 3),
  ],
)
def test_vqa_accuracy(answer, others, want):
  assert metrics.vqa_accuracy(answer, others) == pytest.approx(want)


def test_word_error_rate():
  pytest.importorskip("jiwer")
  references = ["The cat sat on the mat.", "a dog"]
  # One word changed, one removed, one added; of 8.
  assert metrics.word_error_rate(["the cat sit on mat", "a big dog"], references) == 3 / 8
  assert metrics.word_error_rate(references, references) == 0
  with pytest.raises(ValueError, match="reference 1, '!', has no words"):
    metrics.word_error_rate(["a", "b"], ["a", "!"])


def test_missing_packages_are_named(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "pystoi", None)
  monkeypatch.setitem(__import__("sys").modules, "jiwer", None)
  with pytest.raises(ValueError, match=r"latentlab\[audio\]"):
    metrics.stoi(np.ones(9), np.ones(9), RATE)
  with pytest.raises(ValueError, match=r"latentlab\[audio\]"):
    metrics.word_error_rate(["a"], ["a"])


def test_sounds_shorter_than_a_window_have_frames_too():
  sound = np.random.default_rng(0).uniform(-1, 1, 300)
  options = dict(num_mels=32, window=256, hop=128)
  whole = metrics.log_mel(np.pad(sound[:20], (0, 280)), 8000, **options)
  short = metrics.log_mel(sound[:20], 8000, **options)
  assert short.shape == (1, 32)
  np.testing.assert_allclose(short[0], whole[0], rtol=1e-12)
