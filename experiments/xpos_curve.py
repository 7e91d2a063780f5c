r"""The expected score against distance, of RoPE and xPos: figure 1 of arXiv 2212.10554.

  python -m experiments.xpos_curve

Writes `<output>/figure1_curve.png`, and the figures of the curves as `.json`. Nothing is trained:
this is equation 8, `g(n) = sum_i cos(n theta_i) zeta_i^n`.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from latentlab import app, ops

_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Features per head.", lower_bound=2)
_LENGTH = flags.DEFINE_integer("length", 2048, "Distances.", lower_bound=2)
_SCALE_BASE = flags.DEFINE_float("scale_base", 512.0, "xPos's tokens per unit of decay.")
_OUTPUT = flags.DEFINE_string("output", "experiments/results/xpos", "Folder of the results.")


def main() -> None:
  options = dict(length=_LENGTH.value, head_dim=_HEAD_DIM.value)
  curves = {
    "RoPE": ops.xpos_curve(**options, scale_base=np.inf),
    "xPos": ops.xpos_curve(**options, scale_base=_SCALE_BASE.value),
  }
  figures = {name: _describe(curve) for name, curve in curves.items()}
  folder = pathlib.Path(_OUTPUT.value)
  folder.mkdir(parents=True, exist_ok=True)
  data = options | dict(scale_base=_SCALE_BASE.value, curves=figures)
  (folder / "figure1_curve.json").write_text(json.dumps(data, indent=1) + "\n")
  print(json.dumps(data, indent=1))

  figure = Figure(figsize=(7, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for name, curve in curves.items():
    axes.plot(curve, label=name, linewidth=1)
  axes.set_xlabel("distance")
  axes.set_ylabel("expected score")
  axes.set_title(f"xPos, figure 1: equation 8 with {_HEAD_DIM.value} features")
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(folder / "figure1_curve.png", dpi=120)


def _describe(curve: np.ndarray) -> dict[str, float]:
  """How far from smooth a curve is, and its attention resolution."""
  steps = np.diff(curve)
  return {
    "sum_of_rises": float(np.maximum(steps, 0).sum()),
    "std_of_steps_in_second_half": float(steps[len(curve) // 2 :].std()),
    "attention_resolution": float(ops.attention_resolution(jnp.asarray(curve, jnp.float32))),
  }


if __name__ == "__main__":
  app.run_tool(main, flag_names=("head_dim", "length", "scale_base", "output"))
