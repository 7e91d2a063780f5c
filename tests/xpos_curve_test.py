"""The script of figure 1 draws, and its figures are those of the curves."""

import json
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent


def test_lex_07_figure_1_is_drawn(tmp_path):
  command = [sys.executable, "-m", "experiments.xpos_curve", f"--output={tmp_path}"]
  subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
  curves = json.loads((tmp_path / "figure1_curve.json").read_text())["curves"]
  assert curves["RoPE"]["sum_of_rises"] == pytest.approx(849.7, rel=1e-3)
  assert curves["xPos"]["sum_of_rises"] == pytest.approx(172.9, rel=1e-3)
  assert curves["xPos"]["attention_resolution"] == pytest.approx(0.4207, abs=1e-4)
  assert (tmp_path / "figure1_curve.png").stat().st_size > 5_000
  committed = json.loads((_ROOT / "experiments/results/xpos/figure1_curve.json").read_text())
  for name, figures in curves.items():
    assert committed["curves"][name] == pytest.approx(figures, rel=1e-3)
