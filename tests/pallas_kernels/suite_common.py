"""What suites of ops share: outputs with every gradient, errors, and bounds at edges of blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def outputs_and_gradients(op, args, *, learned=None):
  """Outputs, and the gradients of a sum that weighs all of them at random.

  Args:
    op: Returns an array, or several; where one is `-inf`, it has no part in the sum.
    args: Of `op`.
    learned: Which of them have gradients; all if `None`.
  """

  def weighed(*args):
    outs = op(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    rng = np.random.default_rng(1)
    total = 0
    for x in outs:
      # Weights that bfloat16 holds, or its gradients would start out rounded.
      w = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16).astype(x.dtype)
      total += jnp.sum(jnp.where(x == -jnp.inf, 0, x) * w)
    return total.astype(jnp.float32), outs

  learned = range(len(args)) if learned is None else learned
  (_, outs), grads = jax.jit(jax.value_and_grad(weighed, learned, has_aux=True))(*args)
  return outs, grads


def relative_error(got, want) -> float:
  """Of the norm; log-sum-exps of `-inf` are the same ones, and apart from it."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  np.testing.assert_array_equal(got == -np.inf, want == -np.inf)
  got, want = (np.where(x == -np.inf, 0, x) for x in (got, want))
  assert np.isfinite(want).all()
  # What cancels to nothing, as the gradient of one key's score, is measured by what it is made of.
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 0.1 * want.size**0.5)


def attention_bounds(case: Any, block: int) -> dict[str, Any]:
  """`lengths`, `q_offset` and documents of three rows: on, before and after the edges of blocks.

  Args:
    case: `padded`, `row_offsets` and `packed` say which it has, `length` and `keys` how long it is.
    block: Tokens of a block.
  """
  bounds = {}
  if case.padded:
    bounds["lengths"] = jnp.array([case.keys, block + 2, 0])
  if case.row_offsets:
    bounds["q_offset"] = jnp.array([0, 3, block])
  if case.packed:
    starts = np.array([[1, block, case.keys], [block // 2, block + 1, 2 * block], 3 * [case.keys]])
    documents = lambda length: jnp.asarray(
      np.sum(np.arange(length)[:, None] >= starts[:, None], -1) % 2  # An id returns.
    )
    bounds["segment_ids"] = documents(case.length)
    if case.keys != case.length:
      bounds["kv_segment_ids"] = documents(case.keys)
  return bounds
