"""Log decays as the kernels take them: exponents alone, of which every sum is finite."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels.retention.reference import document_starts

RESET = -128.0  # Its exp is 0 in float32.


def finite_gates(
  log_decay: Float[Array, "N"] | Float[Array, "B T N"],
  segment_ids: Int[Array, "B T"] | None,
  valid: Bool[Array, "B T"] | None,
) -> Float[Array, "N"] | Float[Array, "B T N"]:
  """`RESET` for what forgets everything: the start of a document, or a gate of `-inf`.

  A padded token's gate is 0, whatever it holds. A fixed decay stays one per head where there are no
  documents, and then knows of no padding.
  """
  gates = jnp.maximum(log_decay.astype(jnp.float32), RESET)
  if segment_ids is not None:
    gates = jnp.where(document_starts(segment_ids, valid)[..., None], RESET, gates)
  if valid is not None and gates.ndim == 3:
    gates = jnp.where(valid[..., None], gates, 0)
  return gates
