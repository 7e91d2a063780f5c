"""The embedded sounds: vowels of speakers that do not exist, computed and not recorded.

A vowel is the harmonics of a pitch, weighed by three resonances of a vocal tract. Those of men in
Peterson and Barney (1952) are the vowels here; a speaker has a pitch, a length of the tract, which
divides all resonances, and a tempo.
"""

import numpy as np

from latentlab.data.collection import Record

FORMANTS = {
  "a": (730, 1090, 2440),
  "e": (530, 1840, 2480),
  "i": (270, 2290, 3010),
  "o": (570, 840, 2410),
  "u": (300, 870, 2240),
}
"""Resonances in Hz."""
SPEAKERS, TAKES = 6, 8
SAMPLE_RATE = 8_000
"""Where none is asked for."""

_BANDWIDTH = 90.0
_SECONDS = {"a": 0.34, "e": 0.28, "i": 0.22, "o": 0.31, "u": 0.25}
_LONGEST = 0.5


def make(sample_rate: int) -> tuple[np.ndarray, np.ndarray, list[Record]]:
  """All takes of all speakers, the same at each call.

  Args:
    sample_rate: Samples a second.

  Returns:
    Sounds `[n, S]` in [-1, 1] with silence behind each, the samples of each, and their records:
    `<vowel>_<speaker>_<take>`, whose label and text is the vowel.

  Raises:
    ValueError: the sample rate does not hold the resonances.
  """
  if sample_rate < SAMPLE_RATE:
    raise ValueError(
      f"data.sample_rate={sample_rate} is too low for vowels; set {SAMPLE_RATE} or more."
    )
  rng = np.random.default_rng(0)
  sounds, lengths, records = [], [], []
  width = int(_LONGEST * sample_rate)
  for vowel, formants in FORMANTS.items():
    for speaker in range(SPEAKERS):
      share = speaker / (SPEAKERS - 1)
      for take in range(TAKES):
        jitter = np.exp(rng.normal(0, (0.04, 0.02, 0.1)))
        pitch = 95.0 * 2.4**share * jitter[0]
        tract = 0.95 + 0.2 * share
        seconds = _SECONDS[vowel] * (1.2 - 0.3 * ((speaker * 3) % SPEAKERS) / SPEAKERS) * jitter[2]
        length = min(int(seconds * sample_rate), width)
        sound = np.zeros(width, np.float32)
        resonances = np.array(formants) * tract * jitter[1]
        sound[:length] = _voiced(pitch, resonances, length, sample_rate, rng)
        sounds.append(sound)
        lengths.append(length)
        records.append(Record(f"{vowel}_{speaker}_{take:02}", vowel, vowel))
  return np.stack(sounds), np.array(lengths), records


def _voiced(
  pitch: float, formants: np.ndarray, length: int, sample_rate: int, rng: np.random.Generator
) -> np.ndarray:
  """A falling pitch through resonances, faded in and out, with a little breath."""
  time = np.arange(length) / sample_rate
  fall = 1 - 0.15 * np.linspace(0, 1, length)
  phase = 2 * np.pi * np.cumsum(pitch * fall) / sample_rate
  harmonics = np.arange(1, int(0.45 * sample_rate / pitch))
  frequency = harmonics[:, None] * pitch * fall.mean()
  gains = formants**2 / np.hypot(frequency**2 - formants**2, _BANDWIDTH * frequency)
  voice = gains.prod(1) / harmonics**0.5 @ np.sin(harmonics[:, None] * phase)
  voice += 0.002 * np.abs(voice).max() * rng.normal(size=length)
  fade = np.minimum(np.minimum(time, time[::-1]) / 0.03, 1)
  return 0.5 * fade * voice / np.abs(voice).max()
