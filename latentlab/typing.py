"""Array aliases, and the legend of dimension letters used in annotations and einsum strings.

  B batch             T query length       S key length        D model width
  N query heads       K key/value heads    G = N / K           H query and key head size
  V value head size   F feed-forward width C chunk length      M chunks
  L layers            Z latent channels    `vocab` is written out

Public arrays are laid out `B T N H`. Run-time checks of these annotations are switched on by the
test suite (jaxtyping's import hook), so the library itself pays nothing for them.
"""

from collections.abc import Mapping
from typing import Any

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Key, Num, Shaped, UInt32

Params = Mapping[str, Any]
"""A tree of parameters as Linen makes it: nested mappings with arrays at the leaves."""

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "Key", "Num", "Params", "Shaped", "UInt32"]
