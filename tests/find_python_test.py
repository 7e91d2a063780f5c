"""CI finds an interpreter by running candidates."""

import importlib.util
import pathlib
import sys

import pytest

_PATH = pathlib.Path(__file__).parent.parent / ".ci" / "find_python.py"


@pytest.fixture(name="find_python")
def _find_python(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location("find_python", _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setattr(module, "_FOLDERS", ())
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.delenv("PYENV_ROOT", raising=False)
  return module


def _executable(path: pathlib.Path, script: str) -> None:
  path.write_text(f"#!/bin/sh\n{script}\n")
  path.chmod(0o755)


def test_a_shim_is_no_interpreter(find_python, tmp_path, capsys):
  _executable(tmp_path / "python3.99", 'echo "pyenv: python3.99: command not found" >&2; exit 127')
  assert find_python.main("3.12") == 1
  assert "python3.99: pyenv: python3.99: command not found" in capsys.readouterr().err


def test_the_oldest_that_will_do_comes_first(find_python, tmp_path, capsys):
  for version in ("3.9.1", "3.14.0", "3.13.2"):
    _executable(tmp_path / f"python{version.rpartition('.')[0]}", f"echo {version}")
  assert find_python.main("3.12") == 0
  assert capsys.readouterr().out.strip() == str(tmp_path / "python3.13")


def test_a_real_one_is_run(find_python):
  version, said = find_python.probe(pathlib.Path(sys.executable))
  assert version == sys.version_info[:3], said
