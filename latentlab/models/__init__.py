"""One file per paper: presets of the one decoder, and what is truly that paper's own."""

from latentlab.models import baselines, diff_transformer, retnet, transformer, yoco
from latentlab.models.language_model import (
  LanguageModel,
  LanguageModelConfig,
  Output,
  decode_step,
  flops_per_token,
  init_cache,
  num_params,
  prefill,
  score_prompts,
  unstack,
)
from latentlab.models.registry import build_config

__all__ = [
  "LanguageModel",
  "LanguageModelConfig",
  "Output",
  "baselines",
  "build_config",
  "decode_step",
  "diff_transformer",
  "flops_per_token",
  "init_cache",
  "num_params",
  "prefill",
  "retnet",
  "score_prompts",
  "transformer",
  "unstack",
  "yoco",
]
