"""The notebooks run from top to bottom, at smoke scale."""

import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

_COLAB = pathlib.Path(__file__).parent.parent / "colab"


@pytest.mark.slow
def test_quickstart_trains_draws_and_samples(tmp_path, monkeypatch):
  monkeypatch.setenv("LATENTLAB_SMOKE", "1")
  monkeypatch.setenv("LATENTLAB_WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  monkeypatch.delenv("MPLBACKEND")  # The kernel's own draws into the notebook.
  notebook = nbformat.read(_COLAB / "quickstart.ipynb", as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(_COLAB)}}
  ).execute()
  pictures = [
    o
    for cell in notebook.cells
    for o in cell.get("outputs", ())
    if "image/png" in o.get("data", {})
  ]
  assert pictures
  sampled = notebook.cells[-1].outputs
  text = "".join(o.text for o in sampled if o.get("name") == "stdout")
  assert text.startswith("def read(") and len(text) > len("def read(")
  assert list((tmp_path / "run" / "plots").glob("*.png"))


def test_committed_notebooks_hold_no_outputs():
  for path in _COLAB.glob("*.ipynb"):
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path


def test_first_cell_clones_where_there_is_no_checkout(tmp_path, monkeypatch):
  origin = tmp_path / "origin"
  (origin / "latentlab").mkdir(parents=True)
  (origin / "latentlab" / "__init__.py").touch()
  run, commands = subprocess.run, []

  def recorded(command, **kwargs):
    commands.append(command)
    if command[0] == "git":  # The installation alone is left out.
      run(command, **kwargs)

  for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "First."]):
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    run(["git", *author, *command], cwd=origin, check=True)
  monkeypatch.setattr(subprocess, "run", recorded)
  monkeypatch.setattr(sys, "path", [*sys.path])
  monkeypatch.setenv("LATENTLAB_REPOSITORY", origin.as_uri())
  elsewhere = tmp_path / "elsewhere"
  elsewhere.mkdir()
  monkeypatch.chdir(elsewhere)
  cells = nbformat.read(_COLAB / "quickstart.ipynb", as_version=4).cells
  exec(next(cell.source for cell in cells if cell.cell_type == "code"), {})
  assert (elsewhere / "latentlab-checkout" / "latentlab" / "__init__.py").exists()
  assert pathlib.Path.cwd() == elsewhere / "latentlab-checkout"
  assert commands[1][1:4] == ["-m", "pip", "install"]
