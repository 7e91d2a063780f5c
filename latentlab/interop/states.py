"""What a model remembers of prompts, in a file: read them once, go on in another process.

A RetNet's state has the same few megabytes behind any prompt; a Transformer's file grows with it.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from latentlab.layers import DecoderCache
from latentlab.models import LanguageModelConfig, init_cache
from latentlab.typing import Array, Float

_LOGITS, _ROOM = "logits", "max_length"


def save_state(
  path: str | pathlib.Path,
  logits: Float[Array, "B vocab"],
  cache: DecoderCache,
  *,
  max_length: int,
) -> None:
  """Writes what `prefill` returned to a `.safetensors` file.

  Args:
    path: The file.
    logits: Of the next token.
    cache: The cache.
    max_length: The room that it was made with.
  """
  from safetensors.flax import save_file

  tensors = {_LOGITS: logits, **_flatten(cache)}
  save_file({k: jnp.asarray(x) for k, x in tensors.items()}, path, {_ROOM: str(max_length)})


def load_state(
  path: str | pathlib.Path, config: LanguageModelConfig
) -> tuple[Float[Array, "B vocab"], DecoderCache]:
  """Reads what `save_state` wrote, for `decode_step` to go on from.

  Args:
    path: The file.
    config: The model that made it.

  Raises:
    ValueError: the file is not of a state, or that of another model.
  """
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, framework="flax") as file:
      metadata = file.metadata() or {}
      tensors = {name: file.get_tensor(name) for name in file.keys()}
  except (OSError, SafetensorError) as e:
    raise ValueError(f"{str(path)!r} is no state that can be read: {e}") from e
  if _LOGITS not in tensors or not metadata.get(_ROOM, "").isdigit():
    raise ValueError(
      f"{str(path)!r} holds no state, but {sorted(tensors)}; write it by save_state."
    )
  logits = tensors.pop(_LOGITS)
  make = functools.partial(init_cache, config, logits.shape[0], int(metadata[_ROOM]))
  target = jax.eval_shape(make)
  wanted = {k: (x.shape, x.dtype) for k, x in _flatten(target).items()}
  found = {k: (x.shape, x.dtype) for k, x in tensors.items()}
  wanted[_LOGITS], found[_LOGITS] = config.vocab_size, logits.shape[1]
  differ = [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
  if differ:
    name = differ[0]
    raise ValueError(
      f"{str(path)!r} is of another model: {name} is {found.get(name)}, not {wanted.get(name)}."
    )
  leaves = [tensors[name] for name in _flatten(target)]
  return logits, jax.tree.unflatten(jax.tree.structure(target), leaves)


def _flatten(cache: DecoderCache) -> dict[str, Any]:
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
  }
