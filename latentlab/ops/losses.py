"""Losses over a vocabulary."""

import functools

import jax
import jax.numpy as jnp

from latentlab.typing import Array, Float, Int
from pallas_kernels.common import vary_alike


def cross_entropy(
  hidden: Float[Array, "B T D"],
  kernel: Float[Array, "D vocab"],
  targets: Int[Array, "B T"],
  *,
  chunk_size: int | None = None,
) -> Float[Array, "B T"]:
  """Negative log-likelihood of `targets` under `softmax(hidden @ kernel)`, in nats.

  Matmuls run in `hidden`'s dtype and accumulate in float32, as do all statistics.

  Args:
    hidden: Final states.
    kernel: Output embedding; with no `chunk_size`, its vocabulary may be sharded.
    targets: Token ids.
    chunk_size: Vocabulary entries whose logits are held at once, recomputed by the backward; any
      size is accepted. `None` computes all logits, once, and keeps them in `hidden`'s dtype.
  """
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"{chunk_size=} must be at least 1, or None for the whole vocabulary.")
  if chunk_size is None or chunk_size >= kernel.shape[1]:
    return _whole(*vary_alike(hidden, kernel, targets))
  return _chunked(chunk_size, *vary_alike(hidden, kernel, targets))


def _logits(hidden, kernel):
  return jnp.einsum(
    "BTD,Dv->BTv",
    hidden,
    kernel.astype(hidden.dtype),
    preferred_element_type=jnp.promote_types(hidden.dtype, jnp.float32),
  )


def _is_target(logits, targets):
  # A comparison where a gather would do: it fuses, and leaves a sharded vocabulary in its place.
  return jnp.arange(logits.shape[-1]) == targets[..., None]


@jax.custom_vjp
def _whole(hidden, kernel, targets):
  return _whole_fwd(hidden, kernel, targets)[0]


def _whole_fwd(hidden, kernel, targets):
  logits = _logits(hidden, kernel)
  lse = jax.nn.logsumexp(logits, axis=-1)
  target = jnp.where(_is_target(logits, targets), logits, 0).sum(-1)
  # Log-probabilities, not logits: rounded in bfloat16, the likely ones keep a small absolute error.
  return lse - target, (hidden, kernel, targets, (logits - lse[..., None]).astype(hidden.dtype))


def _whole_bwd(residuals, grad):
  hidden, kernel, targets, log_probs = residuals
  probs = jnp.exp(log_probs.astype(jnp.promote_types(log_probs.dtype, jnp.float32)))
  return *_grads(hidden, kernel, targets, probs, grad), None


def _grads(hidden, kernel, targets, probs, grad):
  grad = ((probs - _is_target(probs, targets)) * grad[..., None]).astype(hidden.dtype)
  d_hidden = jnp.einsum(
    "BTv,Dv->BTD", grad, kernel.astype(hidden.dtype), preferred_element_type=probs.dtype
  )
  d_kernel = jnp.einsum("BTD,BTv->Dv", hidden, grad, preferred_element_type=probs.dtype)
  return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype)


_whole.defvjp(_whole_fwd, _whole_bwd)


def _scan_chunks(body, carry, size, vocab):
  """Runs `carry = body(carry, start, size)` over the vocabulary; the ragged chunk comes last."""
  count, tail = divmod(vocab, size)
  carry, _ = jax.lax.scan(lambda c, i: (body(c, i * size, size), None), carry, jnp.arange(count))
  return body(carry, count * size, tail) if tail else carry


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(size, hidden, kernel, targets):
  return _chunked_fwd(size, hidden, kernel, targets)[0]


def _chunked_fwd(size, hidden, kernel, targets):
  def body(carry, start, size):
    highest, total, target = carry
    logits = _logits(hidden, jax.lax.dynamic_slice_in_dim(kernel, start, size, 1))
    new = jnp.maximum(highest, logits.max(-1))
    total = total * jnp.exp(highest - new) + jnp.exp(logits - new[..., None]).sum(-1)
    target += jnp.where(_is_target(logits, targets - start), logits, 0).sum(-1)
    return new, total, target

  zeros = jnp.zeros_like(hidden[..., 0], jnp.promote_types(hidden.dtype, jnp.float32))
  carry = jnp.full_like(zeros, -jnp.inf), zeros, zeros
  highest, total, target = _scan_chunks(body, carry, size, kernel.shape[1])
  lse = highest + jnp.log(total)
  return lse - target, (hidden, kernel, targets, lse)


def _chunked_bwd(size, residuals, grad):
  hidden, kernel, targets, lse = residuals

  def body(carry, start, size):
    d_hidden, d_kernel = carry
    chunk = jax.lax.dynamic_slice_in_dim(kernel, start, size, 1)
    probs = jnp.exp(_logits(hidden, chunk) - lse[..., None])
    dh, dk = _grads(hidden, chunk, targets - start, probs, grad)
    return d_hidden + dh, jax.lax.dynamic_update_slice_in_dim(d_kernel, dk, start, 1)

  carry = jnp.zeros_like(hidden, lse.dtype), jnp.zeros_like(kernel)
  d_hidden, d_kernel = _scan_chunks(body, carry, size, kernel.shape[1])
  return d_hidden.astype(hidden.dtype), d_kernel, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)
