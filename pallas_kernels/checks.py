"""Checks of arguments; each message has what was given, and what would do."""

import jax.numpy as jnp
from jax import Array


def check_shapes(given: str, **expected: tuple[Array | None, list[tuple[int, ...]]]) -> None:
  """Holds arrays to the shapes that they may have.

  Args:
    given: The arguments that the shapes follow from, as a message shows them.
    **expected: By an argument's name, its array, or `None` if it was left out, and the shapes.

  Raises:
    ValueError: An array has none of its shapes.
  """
  for name, (array, shapes) in expected.items():
    if array is not None and array.shape not in shapes:
      raise ValueError(
        f"{name} has shape {array.shape}; with {given} it must be {' or '.join(map(str, shapes))}."
      )


def check_integers(**arrays: Array | None) -> None:
  """Raises `ValueError` where an array that counts or names tokens is of no integer type."""
  for name, array in arrays.items():
    if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"{name} counts or names tokens; {array.dtype=} must be an integer type.")


def check_at_least_one(**requests: int | None) -> None:
  """Raises `ValueError` where a request, left open by `None`, is less than 1."""
  for name, request in requests.items():
    if request is not None and request < 1:
      raise ValueError(
        f"{name}={request} must be at least 1, or None for the implementation's own."
      )
