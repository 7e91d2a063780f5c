"""Mel bands are transformers' of the same scale."""

import numpy as np
import pytest

from latentlab.eval import metrics

audio_utils = pytest.importorskip(
  "transformers.audio_utils", reason="parity of mel bands needs transformers"
)


@pytest.mark.parametrize(
  ("num_mels", "window", "rate", "low", "high"),
  [(80, 1024, 24000, 0, 12000), (32, 256, 8000, 50, 3700)],
)
def test_mel_bands_are_those_of_transformers(num_mels, window, rate, low, high):
  want = audio_utils.mel_filter_bank(
    num_frequency_bins=window // 2 + 1,
    num_mel_filters=num_mels,
    min_frequency=low,
    max_frequency=high,
    sampling_rate=rate,
    norm=None,
    mel_scale="htk",
  )
  got = metrics.mel_filterbank(num_mels, window, rate, low, high)
  np.testing.assert_allclose(got, want, atol=1e-12)


def test_log_mel_is_that_of_transformers():
  sound = np.random.default_rng(0).normal(0, 0.2, 3000)
  bank = metrics.mel_filterbank(40, 512, 8000)
  window = audio_utils.window_function(512, "hann", periodic=True)
  want = audio_utils.spectrogram(
    sound,
    window,
    frame_length=512,
    hop_length=128,
    power=1.0,
    pad_mode="constant",
    mel_filters=bank,
    mel_floor=1e-5,
    log_mel="log10",
  )
  got = metrics.log_mel(sound, 8000, num_mels=40, window=512, hop=128)
  np.testing.assert_allclose(got, want.T[: len(got)], atol=1e-5)
