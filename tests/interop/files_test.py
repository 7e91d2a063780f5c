"""Folders of weights as model hubs have them: whole, in parts, and damaged."""

import json

import numpy as np
import pytest

from latentlab import interop

STATE = {name: np.full(3, i, np.float32) for i, name in enumerate("abc")}
PARTS = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}
INDEX = "model.safetensors.index.json"


def _write_parts(folder, places):
  for file in set(PARTS.values()):
    interop.write(folder / file, {k: x for k, x in STATE.items() if PARTS[k] == file})
  (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=places)))


def test_a_folder_is_read_whole_or_in_parts(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  for folder in (whole, parts):
    folder.mkdir()
  interop.write(whole / "model.safetensors", STATE)
  _write_parts(parts, PARTS)
  for folder in (whole, parts):
    found = interop.read(folder)
    assert found.keys() == STATE.keys()
    for name, x in STATE.items():
      np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize(
  "places, message",
  [
    (PARTS | dict(d="2.safetensors"), r"2.safetensors' does not hold .* differ in \['d'\]"),
    (dict(a="1.safetensors", b="2.safetensors"), r"differ in \['c'\]"),
    (PARTS | dict(d="3.safetensors"), "3.safetensors' is no file"),
    (PARTS | dict(d="../3.safetensors"), "no .safetensors file beside it"),
    (PARTS | dict(d="weights.bin"), "no .safetensors file beside it"),
    ([], "no weight_map"),
  ],
  ids=str,
)
def test_an_index_that_is_wrong(tmp_path, places, message):
  _write_parts(tmp_path, places)
  with pytest.raises(ValueError, match=message):
    interop.read(tmp_path)


def test_a_folder_without_weights(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="holds neither model.safetensors nor"):
    interop.read(tmp_path)


def test_json_that_is_none(tmp_path):
  for text, message in (("[1]", "no JSON object, but a list"), ("{", "is no JSON")):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
      interop.read_json(tmp_path / "a.json")
  with pytest.raises(ValueError, match="cannot be read"):
    interop.read_json(tmp_path / "b.json")
