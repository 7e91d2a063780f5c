"""Curves of a run, drawn from its `metrics.jsonl`."""

import collections
import pathlib
import re

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from latentlab.train import metrics

_AXES = re.compile(r"(\w+_)?(position|depth|shots)_(\d+)(?:_\d+)?")
"""Metrics that one evaluation has at several places of an axis."""

_AXIS_NAMES = dict(position="positions", depth="depths", shots="shots")
_LABELS = dict(positions="position", depths="depth, % of the context", shots="shots")


def write_plots(workdir: str | pathlib.Path) -> list[pathlib.Path]:
  """Writes `plots/<name>.png`: loss, learning rate, and what each evaluation measured.

  Args:
    workdir: Where `metrics.jsonl` lies and `plots/` will.

  Returns:
    The pictures.
  """
  curves: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
  for line in metrics.read_metrics(pathlib.Path(workdir) / "metrics.jsonl"):
    for name, value in line.items():
      if value is not None:
        curves[name].append((line["step"], value))
  directory = pathlib.Path(workdir) / "plots"
  directory.mkdir(exist_ok=True)
  pictures = {"loss": ["train/loss"], "lr": ["train/lr"]}
  for name in [name for name in curves if name.startswith("eval/")]:
    _, evaluation, metric = name.split("/", 2)
    if over := _AXES.fullmatch(metric):  # One picture of the last values, over that axis.
      what, axis, place = over.groups()
      title = f"{evaluation}_{what or ''}{_AXIS_NAMES[axis]}"
      curves[title].append((int(place), curves[name][-1][1]))
      pictures[title] = [title]
    else:
      pictures[f"{evaluation}_{metric}"] = [name]
      if metric == "loss":
        pictures["loss"].append(name)
  written = []
  for title, names in pictures.items():
    shown = {name: curves[name] for name in names if name in curves}
    if shown:
      written.append(_draw(directory / f"{title}.png", shown))
  return written


def _draw(path: pathlib.Path, curves: dict[str, list[tuple[int, float]]]) -> pathlib.Path:
  # The object interface: pyplot would choose a backend and keep every figure alive.
  figure = Figure(figsize=(6, 4), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for name, points in curves.items():
    axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
  axis = path.stem.rpartition("_")[2]
  axes.set_xlabel(_LABELS.get(axis, "step"))
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
  return path
