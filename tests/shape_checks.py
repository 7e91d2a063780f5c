"""The checker that jaxtyping's import hook puts on every function while the tests run.

beartype, because typeguard 4 parses the shape strings inside `tuple[...]` as Python and fails.
"""

from collections.abc import Callable

import beartype

# An int where a float is asked for is no mistake.
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def typechecked(function: Callable) -> Callable:
  # A dataclass's generated __init__ is left alone: transformations rebuild pytrees with stacked
  # arrays, specs or axis numbers at their leaves, which the annotations of one array don't allow.
  return function if function.__name__ == "__init__" else _check(function)
