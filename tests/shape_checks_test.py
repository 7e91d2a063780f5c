"""The run-time shape checks are on, and let transformations rebuild pytrees."""

import flax
import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import shape_checks
from jaxtyping import Array, Float

from latentlab import ops


def test_hook_is_on():
  x = jnp.ones((2, 3, 4, 6))
  positions = jnp.zeros((2, 3), jnp.int32)
  assert ops.apply_rope(x, positions).shape == x.shape
  with pytest.raises(jaxtyping.TypeCheckError, match="apply_rope"):
    ops.apply_rope(x[0], positions)
  with pytest.raises(jaxtyping.TypeCheckError, match="positions"):
    ops.apply_rope(x, positions[:, :2])


def test_functions_are_checked_under_jit():
  @jax.jit
  @jaxtyping.jaxtyped(typechecker=shape_checks.typechecked)
  def total(x: Float[Array, "B T"]) -> Float[Array, "B"]:
    return x.sum(axis=1)

  with pytest.raises(jaxtyping.TypeCheckError):
    total(jnp.ones(3))


def test_pytrees_take_stacked_and_placeholder_leaves():
  @jaxtyping.jaxtyped(typechecker=shape_checks.typechecked)
  @flax.struct.dataclass
  class Cache:
    k: Float[Array, "B S"]

  cache = Cache(jnp.ones((2, 3)))
  assert jax.tree.map(lambda _: 0, cache).k == 0
  assert jax.vmap(lambda i: Cache(i * cache.k))(jnp.arange(4.0)).k.shape == (4, 2, 3)
