"""Causal convolutions over time, a filter for each channel.

`y_t = sum_j kernel_j x_{t-j}`, for filters of a few taps and for filters as long as the sequence.
"""

import functools

import jax
import jax.numpy as jnp

from latentlab.ops.positions import document_positions
from latentlab.typing import Array, Float, Int
from pallas_kernels.retention.reference import document_starts, state_dtype

_UNROLL = 8  # Taps that the compiler sees at once.


def short_convolution(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "W C"],
  *,
  history: Float[Array, "B W-1 C"] | None = None,
  lengths: Int[Array, " B"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"]]:
  """A causal convolution, one sweep over the tokens for each tap.

  Args:
    x: Inputs.
    kernel: The filter; its first tap meets the token itself.
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
    seen = jnp.where(places == jnp.arange(length), reach, places)[..., None]

  def tap(y, lag_and_weight):
    lag, weight = lag_and_weight
    before = jax.lax.dynamic_slice_in_dim(inputs, reach - lag, length, axis=1)
    return y + weight * (before if seen is None else jnp.where(seen >= lag, before, 0)), None

  taps = jnp.arange(1, reach + 1), kernel[1:].astype(x.dtype)
  y, _ = jax.lax.scan(tap, kernel[0].astype(x.dtype) * x, taps, unroll=min(_UNROLL, reach) or 1)
  if lengths is None:
    return y, inputs[:, length:]
  last = lengths[:, None] + jnp.arange(reach)
  return y, jnp.take_along_axis(inputs, last[..., None], axis=1)


def long_convolution(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "T C"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T C"]:
  """A causal convolution with as many taps as tokens, by FFT in float32: `O(T log T)`.

  It is causal up to rounding: a transform mixes the rounding errors of all tokens.

  Args:
    x: Inputs.
    kernel: The filter; its first tap meets the token itself.
    segment_ids: Packed documents, each of which costs a transform of the whole row.
  """
  dtype = state_dtype(x.dtype)
  wide, kernel = x.astype(dtype), kernel.astype(dtype)
  if segment_ids is None:
    return _convolve(wide, kernel).astype(x.dtype)
  runs = jnp.cumsum(document_starts(segment_ids, None), axis=1)
  return _in_documents(wide, kernel, runs).astype(x.dtype)


def _convolve(x: Float[Array, "B T C"], kernel: Float[Array, "T C"]) -> Float[Array, "B T C"]:
  length = x.shape[1]
  size = 2 * length  # Room for the tail, which would come back at the front.
  product = jnp.fft.rfft(x, size, axis=1) * jnp.fft.rfft(kernel, size, axis=0)
  return jnp.fft.irfft(product, size, axis=1)[:, :length]


def _one_document(x, kernel, runs, index):
  """The convolution within each row's document of this index, and zeros elsewhere."""
  inside = (runs == index)[..., None]
  return jnp.where(inside, _convolve(jnp.where(inside, x, 0), kernel), 0)


# A loop over as many documents as the fullest row has, a number that autodiff would have to know.
@jax.custom_vjp
def _in_documents(x, kernel, runs):
  add = lambda index, y: y + _one_document(x, kernel, runs, index)
  return jax.lax.fori_loop(0, runs.max() + 1, add, jnp.zeros_like(x))


def _in_documents_fwd(x, kernel, runs):
  return _in_documents(x, kernel, runs), (x, kernel, runs)


def _in_documents_bwd(residuals, d_y):
  x, kernel, runs = residuals

  def add(index, sums):
    one = functools.partial(_one_document, runs=runs, index=index)
    return jax.tree.map(jnp.add, sums, jax.vjp(one, x, kernel)[1](d_y))

  zeros = (jnp.zeros_like(x), jnp.zeros_like(kernel))
  return *jax.lax.fori_loop(0, runs.max() + 1, add, zeros), None


_in_documents.defvjp(_in_documents_fwd, _in_documents_bwd)
