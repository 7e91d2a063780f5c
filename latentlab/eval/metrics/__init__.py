"""Metrics of media and of texts about them: pure functions of arrays and strings, in float64."""

from latentlab.eval.metrics.distributions import (
  Moments,
  frechet_distance,
  inception_score,
  precision_recall,
)
from latentlab.eval.metrics.images import mse, psnr, ssim
from latentlab.eval.metrics.sounds import (
  log_mel,
  mel_distance,
  mel_filterbank,
  mfcc_statistics,
  speaker_similarity,
  stoi,
)
from latentlab.eval.metrics.texts import cider, vqa_accuracy, word_error_rate

__all__ = [
  "Moments",
  "cider",
  "frechet_distance",
  "inception_score",
  "log_mel",
  "mel_distance",
  "mel_filterbank",
  "mfcc_statistics",
  "mse",
  "precision_recall",
  "psnr",
  "speaker_similarity",
  "ssim",
  "stoi",
  "vqa_accuracy",
  "word_error_rate",
]
