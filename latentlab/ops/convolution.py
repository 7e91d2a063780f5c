"""Causal convolutions over time, a filter for each channel."""

import jax.numpy as jnp

from latentlab.ops.positions import document_positions
from latentlab.typing import Array, Float, Int


def short_convolution(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "W C"],
  *,
  history: Float[Array, "B W-1 C"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
  """`y_t = sum_{j<W} kernel_j x_{t-j}`, one sweep over the tokens for each of the filter's `W`.

  Args:
    x: Inputs.
    kernel: The filter; its first row meets the token itself.
    history: The inputs before the first token, oldest first; zeros if `None`.
    lengths: Valid tokens per row (right padding).
    segment_ids: Packed documents; a filter reaches back to the start of its token's, and the
      history belongs to the row's first.

  Returns:
    The outputs, and the inputs that the next pass has for a history: those before the first padded
    token.
  """
  batch_size, length, channels = x.shape
  reach = kernel.shape[0] - 1
  if history is None:
    history = jnp.zeros((batch_size, reach, channels), x.dtype)
  inputs = jnp.concatenate([history.astype(x.dtype), x], axis=1)
  seen = None
  if segment_ids is not None:
    places = document_positions(segment_ids)
    # The history is that of the row's first document.
    seen = jnp.where(places == jnp.arange(length), reach, places)[..., None]
  y = kernel[0] * x
  for lag in range(1, reach + 1):
    before = inputs[:, reach - lag : reach - lag + length]
    y += kernel[lag] * (before if seen is None else jnp.where(seen >= lag, before, 0))
  if lengths is None:
    return y, inputs[:, length:]
  last = lengths[:, None] + jnp.arange(reach)
  return y, jnp.take_along_axis(inputs, last[..., None], axis=1)
