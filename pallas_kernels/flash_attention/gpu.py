"""cuDNN's attention, by way of `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.common import target_platform
from pallas_kernels.flash_attention.reference import Options, Result
from pallas_kernels.visibility import Visibility, without_padding


def cudnn(
  options: Options,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K V"],
  visibility: Visibility,
) -> Result | tuple[Float[Array, "B T N V"], None]:
  """The implementation "cudnn"; the log-sum-exps are `None`, since its have no gradient."""
  if target_platform() != "gpu":
    raise NotImplementedError(f"cuDNN is for GPUs, and the target is a {target_platform()}.")
  if q.dtype not in (jnp.bfloat16, jnp.float16) or {k.dtype, v.dtype} != {q.dtype}:
    raise NotImplementedError(f"cuDNN takes bfloat16 or float16, not {q.dtype=}.")
  if q.shape[3] % 8 or q.shape[3] > 256 or v.shape[3] != q.shape[3]:
    raise NotImplementedError(
      f"cuDNN takes equal head sizes, multiples of 8 up to 256, not {q.shape=} {v.shape=}."
    )
  if options.return_lse:
    raise NotImplementedError("cuDNN's log-sum-exps have no gradient.")
  if visibility.segment_ids is not None:
    raise NotImplementedError("cuDNN is not told of packed documents here.")
  if options.causal and (options.q_offset != 0 or q.shape[1] != k.shape[1]):
    raise NotImplementedError("cuDNN's causal mask is for queries as many as keys.")
  # Of a row without keys its softmax is undefined: it reads one, and the output is cleared.
  lengths = visibility.lengths
  k, v = without_padding(k, v, lengths)
  seen = None if lengths is None else _seen(options, lengths, q.shape[1])
  try:
    out = jax.nn.dot_product_attention(
      q,
      k,
      v,
      scale=options.scale,
      is_causal=options.causal,
      query_seq_lengths=None if lengths is None else jnp.full_like(lengths, q.shape[1]),
      key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1),
      local_window_size=None if options.window is None else (options.window - 1, 0),
      implementation="cudnn",
    )
  except RuntimeError as e:  # "cuDNN is not detected": a refusal, and no fault of ours.
    raise NotImplementedError(str(e)) from e
  return (out if seen is None else jnp.where(seen[..., None, None], out, 0)), None


def _seen(options, lengths, length):
  """Queries that see a key: not those whose window lies in the padding, nor any of an empty row."""
  first = jnp.zeros(length, jnp.int32)
  if options.window is not None:
    first = jnp.maximum(jnp.arange(length) - options.window + 1, 0)
  return first < lengths[:, None]
