"""One file per paper: presets of the one decoder, and what is truly that paper's own."""

from latentlab.models import baselines, retnet, transformer
from latentlab.models.language_model import (
  LanguageModel,
  LanguageModelConfig,
  Output,
  decode_step,
  flops_per_token,
  init_cache,
  num_params,
  prefill,
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
  "flops_per_token",
  "init_cache",
  "num_params",
  "prefill",
  "retnet",
  "transformer",
  "unstack",
]
