"""The notebooks run from top to bottom, at smoke scale."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import pytest

_COLAB = pathlib.Path(__file__).parent.parent / "colab"
_NOTEBOOKS = sorted(_COLAB.glob("*.ipynb"))


@pytest.fixture
def execute(tmp_path, monkeypatch, cpu_flags):
  """Runs a notebook at smoke scale, in the workdir `tmp_path / "run"`."""
  if os.environ["JAX_PLATFORMS"] == "cpu":
    monkeypatch.setenv("XLA_FLAGS", cpu_flags(1))
  monkeypatch.setenv("LATENTLAB_SMOKE", "1")
  monkeypatch.setenv("LATENTLAB_WORKDIR", str(tmp_path / "run"))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  monkeypatch.delenv("MPLBACKEND")  # The kernel's own draws into the notebook.

  def run(name):
    notebook = nbformat.read(_COLAB / name, as_version=4)
    nbclient.NotebookClient(
      notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(_COLAB)}}
    ).execute()
    return notebook

  return run


def _pictures(notebook):
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
  return [o for o in outputs if "image/png" in o.get("data", {})]


def _printed(cell):
  return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


@pytest.mark.slow
def test_quickstart_trains_draws_and_samples(execute, tmp_path):
  notebook = execute("quickstart.ipynb")
  assert _pictures(notebook)
  text = _printed(notebook.cells[-1])
  assert text.startswith("def read(") and len(text) > len("def read(")
  assert list((tmp_path / "run" / "plots").glob("*.png"))


@pytest.mark.slow
def test_length_extrapolation_evaluates_by_length_and_writes_on(execute, tmp_path):
  notebook = execute("length_extrapolation.ipynb")
  assert len(_pictures(notebook)) == 2  # The theory's curves, and perplexity by length.
  sizes, _, text = _printed(notebook.cells[-1]).partition("\n")
  short, long, longest = ast.literal_eval(sizes).values()
  assert longest == long <= short * 2  # The cache of blocks grows with no length.
  assert text.startswith("def read(") and len(text) > len("def read(")
  for row in ("rope", "xpos"):
    assert (tmp_path / "run" / row / "metrics.jsonl").exists()


@pytest.mark.slow
def test_retnet_has_one_function_and_a_state_of_one_size(execute):
  notebook = execute("retnet.ipynb")  # Which asserts what it says.
  assert len(_pictures(notebook)) == 3
  printed = "".join(_printed(cell) for cell in notebook.cells if cell.cell_type == "code")
  assert printed.count("differs from parallel") == 4
  (equal,) = re.findall(r"at 512 tokens: ([\d,]+) and ([\d,]+) bytes", printed)
  state, keys = (int(x.replace(",", "")) for x in equal)
  assert state == pytest.approx(keys, rel=0.01)  # Positions and lengths aside.


@pytest.mark.slow
def test_diff_transformer_shows_both_maps_and_their_difference(execute, tmp_path):
  notebook = execute("diff_transformer.ipynb")  # Which asserts that weights are the difference.
  assert len(_pictures(notebook)) == 4  # Lambda, maps, a row of them, shares of attention.
  printed = "".join(_printed(cell) for cell in notebook.cells if cell.cell_type == "code")
  (before,) = re.findall(r"lambda before ([-\d. ]+) after", printed)
  before = [float(x) for x in before.split()]
  # The schedule, and chance of about 0.04 (`std^2 sqrt(2 H)`), by layer.
  assert before == pytest.approx([0.2, 0.356, 0.471], abs=0.2)
  assert before[0] < before[-1]
  shares = re.findall(r"(answer|noise) +(\w+).*? (-?[\d.]+)\n", printed)
  assert len(shares) == 6 and sum(float(x) for _, model, x in shares if model == "Transformer") < 1
  for row in ("transformer", "diff"):
    assert (tmp_path / "run" / f"{row}_needles" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_yoco_has_one_cache_and_leaves_early(execute, tmp_path):
  notebook = execute("yoco.ipynb")  # Which asserts what it says.
  assert len(_pictures(notebook)) == 2  # Bytes, and times.
  printed = "".join(_printed(cell) for cell in notebook.cells if cell.cell_type == "code")
  tokens = re.findall(r"at 1M tokens: +([\d.]+) GB", printed)
  transformer, *yocos = (float(x) for x in tokens)
  assert len(yocos) == 2 and all(24 < transformer / x < 26 for x in yocos)
  assert printed.count("differ by") == 4 and printed.count(" ms\n") == 3
  _, _, text = _printed(notebook.cells[-1]).partition("diff_attention\n")
  assert text.startswith("import os") and len(text) > len("import os\n\n\ndef read(")
  assert (tmp_path / "run" / "combined" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_latentlm_draws_digits_and_sweeps_steps_and_guidance(execute, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  notebook = execute("latentlm.ipynb")
  assert len(_pictures(notebook)) == 3  # Reconstructions, digits, the sweep.
  printed = "".join(_printed(cell) for cell in notebook.cells if cell.cell_type == "code")
  assert len(re.findall(r"steps, guidance [\d.]+: FD\(classifier\) [\d.]+", printed)) == 4
  assert (tmp_path / "run" / "tokenizer" / "metrics.jsonl").exists()


def test_every_notebook_is_run_here():
  source = pathlib.Path(__file__).read_text()
  for path in _NOTEBOOKS:
    assert f'execute("{path.name}")' in source, f"no test runs {path.name}"


def test_committed_notebooks_hold_no_outputs():
  for path in _NOTEBOOKS:
    cells = nbformat.read(path, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path


@pytest.mark.parametrize("path", _NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_clones_where_there_is_no_checkout(path, tmp_path, monkeypatch):
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
  cells = nbformat.read(path, as_version=4).cells
  exec(next(cell.source for cell in cells if cell.cell_type == "code"), {})
  assert (elsewhere / "latentlab-checkout" / "latentlab" / "__init__.py").exists()
  assert pathlib.Path.cwd() == elsewhere / "latentlab-checkout"
  assert commands[1][1:4] == ["-m", "pip", "install"]
