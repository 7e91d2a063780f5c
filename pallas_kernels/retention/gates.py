"""Log decays as the kernels take them: exponents alone, of which every sum is finite."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

RESET = -128.0  # Its exp is 0 in float32.


def finite_gates(
  log_decay: Float[Array, "N"] | Float[Array, "B T N"],
  starts: Bool[Array, "B T"] | None,
  valid: Bool[Array, "B T"] | None,
) -> Float[Array, "N"] | Float[Array, "B T N"]:
  """`RESET` for what forgets everything: the start of a document, or a gate of `-inf`.

  A padded token's gate is 0, whatever it holds. A fixed decay stays one per head where there are no
  documents, and then knows of no padding.

  Args:
    log_decay: At most 0.
    starts: Where documents start (`reference.document_starts`); `None` if there are none.
    valid: Which tokens are no padding; all if `None`.
  """
  gates = jnp.maximum(log_decay.astype(jnp.float32), RESET)
  if starts is not None:
    gates = jnp.where(starts[..., None], RESET, gates)
  if valid is not None and gates.ndim == 3:
    gates = jnp.where(valid[..., None], gates, 0)
  return gates
