"""Files of named tensors: safetensors, and torch's where they hold tensors alone."""

import json
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from latentlab.interop.weights import StateDict

_TORCH = (".pt", ".pth", ".bin")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read(path: str | pathlib.Path) -> StateDict:
  """Reads a file's tensors as float32, whatever floats it holds.

  Args:
    path: A `.safetensors` file, or one of torch (`.pt`, `.pth`, `.bin`), which is read without
      running what a pickle may hold; or a folder with `model.safetensors`, or with the files that
      its `model.safetensors.index.json` lists.

  Raises:
    ValueError: there is no such file, or it is none of these.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return read(path / _WHOLE) if (path / _WHOLE).is_file() else _read_shards(path)
  if not path.is_file():
    raise ValueError(f"{str(path)!r} is no file; give one of tensors.")
  if path.suffix == ".safetensors":
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    try:
      state = load_file(path)
    except SafetensorError as e:
      raise ValueError(f"{str(path)!r} is damaged, or no safetensors file: {e}") from e
  elif path.suffix in _TORCH:
    state = _read_torch(path)
  else:
    choices = (".safetensors", *_TORCH)
    raise ValueError(f"{str(path)!r} ends in none of {choices}; convert it to safetensors.")
  return {name: np.array(x, np.float32) for name, x in state.items()}


def write(
  path: str | pathlib.Path, state: StateDict, metadata: Mapping[str, str] | None = None
) -> None:
  """Writes named tensors to a `.safetensors` file."""
  from safetensors.numpy import save_file

  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise ValueError(f"{str(path)!r} has to end in .safetensors, which is what is written.")
  state = {name: np.ascontiguousarray(x) for name, x in state.items()}
  save_file(state, path, None if metadata is None else dict(metadata))


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Raises:
    ValueError: it cannot be read, or holds something else.
  """
  try:
    found = json.loads(pathlib.Path(path).read_text("utf-8"))
  except OSError as e:
    raise ValueError(f"{str(path)!r} cannot be read: {e.strerror}.") from e
  except ValueError as e:
    raise ValueError(f"{str(path)!r} is no JSON: {e}") from e
  if not isinstance(found, dict):
    raise ValueError(f"{str(path)!r} holds no JSON object, but a {type(found).__name__}.")
  return found


def _read_shards(folder: pathlib.Path) -> StateDict:
  """Tensors of several files, each of them in the one that the index says."""
  if not (folder / _INDEX).is_file():
    raise ValueError(
      f"{str(folder)!r} holds neither {_WHOLE} nor {_INDEX}; give the file of weights itself, or "
      "convert them to safetensors."
    )
  places = read_json(folder / _INDEX).get("weight_map")
  if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
    raise ValueError(f"{str(folder / _INDEX)!r} has no weight_map from names to files.")
  state = {}
  for file in sorted(set(places.values())):
    if pathlib.Path(file).name != file or not file.endswith(".safetensors"):
      raise ValueError(f"{str(folder / _INDEX)!r} lists {file!r}, no .safetensors file beside it.")
    found = read(folder / file)
    listed = {name for name, place in places.items() if place == file}
    if found.keys() != listed:
      raise ValueError(
        f"{str(folder / file)!r} does not hold what {_INDEX} says: they differ in "
        f"{sorted(found.keys() ^ listed)}"
      )
    state |= found
  return state


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError as e:
    raise ValueError(f"{str(path)!r} needs torch to be read; convert it to safetensors.") from e

  try:
    state = torch.load(path, map_location="cpu", weights_only=True)
  except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as e:
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise ValueError(
      f"{str(path)!r} holds more than tensors, or is damaged, and is not read ({reason}). Where it "
      "is trusted, save its state dict alone: torch.save(model.state_dict(), path)."
    ) from e
  state = _tensors(state)
  if not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
    raise ValueError(f"{str(path)!r} is no state dict: not all that it holds is a named tensor.")
  return {name: x.float().numpy() for name, x in state.items()}


def _tensors(state: Any) -> dict[str, Any]:
  """The state dict itself, or what trainers keep under `model`."""
  if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
    state = state["model"]
  return dict(state) if isinstance(state, Mapping) else {}
