"""A paper's table beside ours: intervals over seeds, Markdown, and a picture.

A figure of ours is a mean over seeds with a 95 % t-interval. Rows are compared with a base row seed
by seed: equal seeds see the same batches in the same order, so a paired difference is free of what
a seed does to every row.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import special

Values = Mapping[int, float]
"""A metric by seed."""

VERDICTS = ("reproduces", "opposite", "undecided")


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over seeds.

  Attributes:
    mean: The mean.
    half_width: Half of its 95 % t-interval; `None` with fewer than two seeds.
    num_seeds: Seeds.
  """

  mean: float
  half_width: float | None
  num_seeds: int

  @classmethod
  def of(cls, values: Iterable[float]) -> "Estimate | None":
    """Of at least one value; `None` of none."""
    x = np.array(list(values), np.float64)
    if x.size < 2:
      return cls(float(x[0]), None, 1) if x.size else None
    half = special.stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / math.sqrt(x.size)
    return cls(float(x.mean()), float(half), int(x.size))

  def text(self, sign: str = "") -> str:
    half = "" if self.half_width is None else f" ± {_decimals(self.half_width)}"
    return f"{_decimals(self.mean, sign)}{half}"


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A row beside its base row, in the paper and here.

  Attributes:
    paper: The paper's figure; `None` where it is unknown.
    paper_ratio: To the paper's base row; `None` in that row, as are `ratio` and `difference`.
    ours: Ours; `None` without a finished seed.
    ratio: To our base row, over seeds that both have; `None` where that is not positive.
    difference: From our base row, over these seeds.
    verdict: One of `VERDICTS`: whether the paired difference has the paper's sign, with an interval
      free of zero; empty for a base row, and where either side is unknown or the paper's rows are
      equal.
  """

  paper: float | None
  paper_ratio: float | None
  ours: Estimate | None
  ratio: Estimate | None
  difference: Estimate | None
  verdict: str


@dataclasses.dataclass(frozen=True)
class Axis:
  """What a table's columns are numbers of.

  Attributes:
    name: Of the quantity.
    values: By column; columns without one are not drawn.
    log: Whether the axis is logarithmic.
    log_figures: Whether the axis of the figures is.
  """

  name: str
  values: Mapping[str, float]
  log: bool = False
  log_figures: bool = False


Columns = Mapping[str, Mapping[str, Comparison]]
"""Comparisons by column, then by row; every column has the same rows."""


def compare(
  paper: Mapping[str, float | None], ours: Mapping[str, Values], bases: Mapping[str, str]
) -> dict[str, Comparison]:
  """Compares rows with their base rows.

  Args:
    paper: The paper's figures by row; `None` or no entry is unknown.
    ours: Ours by row and seed.
    bases: The base row of each row of `ours`; a row is its own where it is compared with none.
  """
  return {
    row: _compare(paper.get(row), paper.get(base), values, ours[base], row == base)
    for row, values in ours.items()
    for base in (bases[row],)
  }


def _compare(
  paper: float | None, paper_base: float | None, ours: Values, our_base: Values, is_base: bool
) -> Comparison:
  mean = Estimate.of(ours.values())
  known = paper is not None and paper_base is not None and not is_base
  paper_ratio = paper / paper_base if known and paper_base > 0 else None
  seeds = [] if is_base else [seed for seed in ours if seed in our_base]
  positive = all(our_base[seed] > 0 for seed in seeds)
  ratio = Estimate.of(ours[seed] / our_base[seed] for seed in seeds) if positive else None
  difference = Estimate.of(ours[seed] - our_base[seed] for seed in seeds)
  verdict = ""
  if known and paper != paper_base and difference is not None:
    decided = difference.half_width is not None and abs(difference.mean) > difference.half_width
    same = (paper > paper_base) == (difference.mean > 0)
    verdict = VERDICTS[2] if not decided else VERDICTS[0] if same else VERDICTS[1]
  return Comparison(paper, paper_ratio, mean, ratio, difference, verdict)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table, its first column left-aligned."""
  lines = [header, [":---"] + ["---:"] * (len(header) - 1), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(columns: Columns, about: Mapping[str, str], names: Mapping[str, str]) -> str:
  """The comparisons as Markdown: of several columns an overview, then a table each.

  Args:
    columns: The comparisons.
    about: What each row is, in words.
    names: What is ours in each column.
  """
  several = len(columns) > 1
  parts = [_overview(columns, about)] if several else []
  for column, comparisons in columns.items():
    title = f"\n## {column}\n\n" if several else ""
    labels = {} if several else about  # Once is enough.
    parts.append(f"{title}{_column(comparisons, labels, column, names[column])}")
  return "".join(parts)


def _overview(columns: Columns, about: Mapping[str, str]) -> str:
  header, cells = ["row"], {row: [_label(row, about)] for row in _rows(columns)}
  for column, comparisons in columns.items():
    known = _known(comparisons)
    header += [f"{column}: paper", "ours"] if known else [f"{column}: ours"]
    for row, c in comparisons.items():
      cells[row] += [paper_figure(c.paper)] * known + [_text(c.ours)]
  return markdown_table(header, cells.values())


def _column(
  comparisons: Mapping[str, Comparison], about: Mapping[str, str], column: str, name: str
) -> str:
  known = _known(comparisons)
  header = ["row", *[f"paper: {column}", "ratio"] * known, f"ours: {name}", "ratio", "difference"]
  rows = (
    [
      _label(row, about),
      *[paper_figure(c.paper), _text(c.paper_ratio)] * known,
      _text(c.ours),
      _text(c.ratio),
      _text(c.difference, "+"),
      *[c.verdict] * known,
    ]
    for row, c in comparisons.items()
  )
  table = markdown_table(header + ["direction"] * known, rows)
  decided = any(c.verdict for c in comparisons.values())
  return f"{table}\n{verdicts(comparisons)}\n" if decided else table


def verdicts(comparisons: Mapping[str, Comparison]) -> str:
  """How many of the paper's directions reproduce, and which rows do what."""
  rows = {v: [f"`{r}`" for r, c in comparisons.items() if c.verdict == v] for v in VERDICTS}
  total = sum(map(len, rows.values()))
  listed = "; ".join(f"{v}: {', '.join(names)}" for v, names in rows.items() if names)
  return (
    f"{len(rows[VERDICTS[0]])} of {total} directions reproduce with an interval free of zero"
    f"{f' ({listed})' if listed else ''}."
  )


def _rows(columns: Columns) -> list[str]:
  return list(next(iter(columns.values())))


def _known(comparisons: Mapping[str, Comparison]) -> bool:
  return any(c.paper is not None for c in comparisons.values())


def _label(row: str, about: Mapping[str, str]) -> str:
  return f"`{row}`: {about[row]}" if about.get(row) else f"`{row}`"


def paper_figure(x: float | None) -> str:
  """A figure of a paper, as it is printed there."""
  return "–" if x is None else f"{x:g}" if abs(x) < 1e6 else f"{x:.6g}"


def _text(x: Estimate | float | None, sign: str = "") -> str:
  if x is None:
    return "–"
  return x.text(sign) if isinstance(x, Estimate) else _decimals(x, sign)


def _decimals(x: float, sign: str = "") -> str:
  """Three of them, except of numbers that have run away."""
  return f"{x:{sign}.3f}" if abs(x) < 1e5 else f"{x:{sign}.3g}"


def plot(path: pathlib.Path, columns: Columns, title: str, axis: Axis | None = None) -> None:
  """Draws the paper's figures and ours with intervals.

  Args:
    path: The picture.
    columns: The comparisons.
    title: Above it.
    axis: Draws a line for each row over it, the paper's and ours side by side; without one, a panel
      for each column has each row's ratio to its base row.
  """
  figure = Figure(layout="constrained")
  FigureCanvasAgg(figure)
  if axis is None:
    _plot_ratios(figure, columns)
  else:
    _plot_lines(figure, columns, axis)
  figure.suptitle(title)
  figure.savefig(path, dpi=120)


_OURS, _PAPER = dict(fmt="o", color="tab:blue"), dict(fmt="D", color="0.35")


def _plot_ratios(figure: Figure, columns: Columns) -> None:
  rows = [
    r for r in _rows(columns) if any(c[r].ratio or c[r].paper_ratio for c in columns.values())
  ]
  figure.set_size_inches(3 + 4 * len(columns), 1.9 + 0.45 * len(rows))
  panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0].tolist()
  for axes, (column, comparisons) in zip(panels, columns.items(), strict=True):
    axes.axvline(1.0, color="0.6", linewidth=1)
    papers = [_exact(comparisons[r].paper_ratio) for r in rows]
    ours = [comparisons[r].ratio for r in rows]
    for name, ratios, shift, style in (
      ("paper", papers, -0.12, _PAPER),
      ("ours", ours, 0.12, _OURS),
    ):
      _errorbar(axes, [i + shift for i in range(len(rows))], ratios, name, across=True, **style)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(column, fontsize="medium")
    axes.set_xlabel("ratio to the base row")
    axes.grid(axis="x", alpha=0.3)
  _legend(figure, panels)


def _plot_lines(figure: Figure, columns: Columns, axis: Axis) -> None:
  drawn = sorted((x, columns[column]) for column, x in axis.values.items())
  x = [value for value, _ in drawn]
  known = any(_known(comparisons) for _, comparisons in drawn)
  figure.set_size_inches(12 if known else 7, 4.6)
  panels = figure.subplots(1, 1 + known, squeeze=False)[0].tolist()
  for i, row in enumerate(_rows(columns)):
    style = dict(fmt="o-", color=f"C{i}", markersize=4)
    _errorbar(panels[-1], x, [c[row].ours for _, c in drawn], row, **style)
    if known:
      _errorbar(panels[0], x, [_exact(c[row].paper) for _, c in drawn], row, **style)
  for axes, name in zip(panels, ["paper"] * known + ["ours"], strict=True):
    axes.set_title(name, fontsize="medium")
    axes.set_xlabel(axis.name)
    if axis.log:
      axes.set_xscale("log", base=2)
    if axis.log_figures:
      axes.set_yscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.grid(alpha=0.3)
  _legend(figure, panels)


def _exact(x: float | None) -> Estimate | None:
  return None if x is None else Estimate(x, None, 1)


def _errorbar(
  axes: Axes,
  places: Sequence[float],
  estimates: Sequence[Estimate | None],
  name: str,
  *,
  across: bool = False,
  **style: object,
) -> None:
  """Points at those of the places that have an estimate; `across` puts the places on the y axis."""
  shown = [(p, e.mean, e.half_width or 0.0) for p, e in zip(places, estimates, strict=True) if e]
  if not shown:
    return
  place, mean, half = zip(*shown, strict=True)
  points = dict(x=mean, y=place, xerr=half) if across else dict(x=place, y=mean, yerr=half)
  axes.errorbar(**points, label=name, capsize=4, **style)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
  """One for all panels, over no point of any."""
  found = {
    label: handle
    for axes in panels
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
  }
  if found:
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=6, frameon=False)
