"""Sampling: a step protocol, filters of logits, and a compiled loop."""

from latentlab.sample.logits import (
  Filter,
  LogitBias,
  MinP,
  RepetitionPenalty,
  Temperature,
  TokenAutomaton,
  TokenSampler,
  TopK,
  TopP,
  token_sampler,
)
from latentlab.sample.loop import (
  Carry,
  Generated,
  TokenStepper,
  advance,
  begin,
  begin_in_slices,
  generate,
  row_keys,
  stream,
)
from latentlab.sample.protocol import Draw, Sampler, Stepper
from latentlab.sample.text import Piece, stream_text

__all__ = [
  "Carry",
  "Draw",
  "Filter",
  "Generated",
  "LogitBias",
  "MinP",
  "Piece",
  "RepetitionPenalty",
  "Sampler",
  "Stepper",
  "Temperature",
  "TokenAutomaton",
  "TokenSampler",
  "TokenStepper",
  "TopK",
  "TopP",
  "advance",
  "begin",
  "begin_in_slices",
  "generate",
  "row_keys",
  "stream",
  "stream_text",
  "token_sampler",
]
