"""Linen modules that models are made of, and the caches that pass through them."""

from latentlab.layers.attention import Attention, AttentionConfig
from latentlab.layers.cache import Cache, DecoderCache, KVCache, RetentionState, RingCache
from latentlab.layers.common import Context, Shared
from latentlab.layers.decoder import Block, BlockConfig, Decoder, DecoderConfig, MixerConfig, Stage
from latentlab.layers.diff_attention import DiffAttention, DiffAttentionConfig, lambda_schedule
from latentlab.layers.diffusion_head import Diffusion, DiffusionHead, DiffusionHeadConfig
from latentlab.layers.embedding import Embedder, VocabHead
from latentlab.layers.feed_forward import FeedForward, FeedForwardConfig
from latentlab.layers.h3 import H3, H3Config, H3State
from latentlab.layers.hyena import Hyena, HyenaConfig, HyenaState
from latentlab.layers.latent_heads import (
  LatentHeadConfig,
  MixtureHead,
  MixtureHeadConfig,
  RegressionHead,
  RegressionHeadConfig,
  SolverSettings,
)
from latentlab.layers.linear_attention import LinearAttention, LinearAttentionConfig
from latentlab.layers.mar_head import MarHead, MarHeadConfig
from latentlab.layers.norms import HeadNorm, residual_norm
from latentlab.layers.positions import PositionConfig
from latentlab.layers.retention import MultiScaleRetention, RetentionConfig
from latentlab.layers.rwkv import RwkvConfig, RwkvState, TimeMix
from latentlab.layers.shared_kv import SharedKV, SharedKVConfig

__all__ = [
  "H3",
  "Attention",
  "AttentionConfig",
  "Block",
  "BlockConfig",
  "Cache",
  "Context",
  "Decoder",
  "DecoderCache",
  "DecoderConfig",
  "DiffAttention",
  "DiffAttentionConfig",
  "Diffusion",
  "DiffusionHead",
  "DiffusionHeadConfig",
  "Embedder",
  "FeedForward",
  "FeedForwardConfig",
  "H3Config",
  "H3State",
  "HeadNorm",
  "Hyena",
  "HyenaConfig",
  "HyenaState",
  "KVCache",
  "LatentHeadConfig",
  "LinearAttention",
  "LinearAttentionConfig",
  "MarHead",
  "MarHeadConfig",
  "MixerConfig",
  "MixtureHead",
  "MixtureHeadConfig",
  "MultiScaleRetention",
  "PositionConfig",
  "RegressionHead",
  "RegressionHeadConfig",
  "RetentionConfig",
  "RetentionState",
  "RingCache",
  "RwkvConfig",
  "RwkvState",
  "Shared",
  "SharedKV",
  "SharedKVConfig",
  "SolverSettings",
  "Stage",
  "TimeMix",
  "VocabHead",
  "lambda_schedule",
  "residual_norm",
]
