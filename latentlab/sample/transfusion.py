"""Texts that a Transfusion writes behind images, in the sampling loop of all models."""

from typing import Any

import jax.numpy as jnp
from flax import struct

from latentlab.models import LanguageModel, decode_step
from latentlab.models.transfusion import Transfusion, TransfusionConfig
from latentlab.sample.protocol import Cache
from latentlab.typing import Array, Bool, Float, Int, Params


class CaptionStepper(struct.PyTreeNode):
  """A Transfusion as the loop sees it, behind images that prompts hold; items are tokens.

  Prompts are all as long, as images of one tokenizer are.

  Attributes:
    config: The model.
    params: Its parameters.
    latents: Normalised latents of the prompts, without noise; anything at tokens.
    stop_tokens: Tokens that finish a row.
    pad: The token that finished rows emit.
  """

  config: TransfusionConfig = struct.field(pytree_node=False)
  params: Params
  latents: Float[Array, "B T Z"]
  stop_tokens: Any
  pad: Any = 0

  def prefill(
    self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"], capacity: int
  ) -> tuple[Float[Array, "B vocab"], Cache]:
    del lengths
    model, variables = Transfusion(self.config), {"params": self.params}
    return model.apply(variables, prompts, self.latents, capacity, method="read")

  def extend(
    self, prompts: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
  ) -> tuple[Float[Array, "B vocab"], Cache]:
    raise NotImplementedError("an image is read at once, with all that is before it")

  def step(self, item: Int[Array, " B"], cache: Cache) -> tuple[Float[Array, "B vocab"], Cache]:
    return decode_step(LanguageModel(self.config.masked), self.params["language"], item, cache)

  def ends(self, item: Int[Array, " B"]) -> Bool[Array, " B"]:
    return jnp.isin(item, self.stop_tokens)
