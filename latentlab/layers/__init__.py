"""Linen modules that models are made of, and the caches that pass through them."""

from latentlab.layers.attention import Attention, AttentionConfig
from latentlab.layers.cache import Cache, DecoderCache, KVCache, RetentionState, RingCache
from latentlab.layers.common import Context, Shared
from latentlab.layers.decoder import Block, BlockConfig, Decoder, DecoderConfig, MixerConfig, Stage
from latentlab.layers.embedding import Embedder, VocabHead
from latentlab.layers.feed_forward import FeedForward, FeedForwardConfig
from latentlab.layers.h3 import H3, H3Config, H3State
from latentlab.layers.hyena import Hyena, HyenaConfig, HyenaState
from latentlab.layers.linear_attention import LinearAttention, LinearAttentionConfig
from latentlab.layers.norms import HeadNorm, residual_norm
from latentlab.layers.positions import PositionConfig
from latentlab.layers.retention import MultiScaleRetention, RetentionConfig
from latentlab.layers.rwkv import RwkvConfig, RwkvState, TimeMix

__all__ = [
  "Attention",
  "AttentionConfig",
  "Block",
  "BlockConfig",
  "Cache",
  "Context",
  "Decoder",
  "DecoderCache",
  "DecoderConfig",
  "Embedder",
  "FeedForward",
  "FeedForwardConfig",
  "H3",
  "H3Config",
  "H3State",
  "HeadNorm",
  "Hyena",
  "HyenaConfig",
  "HyenaState",
  "KVCache",
  "LinearAttention",
  "LinearAttentionConfig",
  "MixerConfig",
  "MultiScaleRetention",
  "PositionConfig",
  "RetentionConfig",
  "RetentionState",
  "RingCache",
  "RwkvConfig",
  "RwkvState",
  "Shared",
  "Stage",
  "TimeMix",
  "VocabHead",
  "residual_norm",
]
