"""A paper's table beside ours: intervals over seeds, Markdown, and a picture.

A figure of ours is a mean over seeds with a 95 % t-interval. Rows are compared with the base row
seed by seed: equal seeds see the same batches in the same order, so a paired difference is free of
what a seed does to every row.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
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

  def text(self, spec: str = ".3f") -> str:
    half = "" if self.half_width is None else f" ± {self.half_width:{spec.lstrip('+')}}"
    return f"{self.mean:{spec}}{half}"


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A row beside the base row, in the paper and here.

  Attributes:
    paper: The paper's figure; `None` where it is unknown.
    paper_ratio: To the paper's base row; `None` in that row, as are `ratio` and `difference`.
    ours: Ours; `None` without a finished seed.
    ratio: To our base row, over seeds that both have.
    difference: From our base row, over these seeds.
    verdict: One of `VERDICTS`: whether the paired difference has the paper's sign, with an interval
      free of zero; empty for the base row and where either side is unknown.
  """

  paper: float | None
  paper_ratio: float | None
  ours: Estimate | None
  ratio: Estimate | None
  difference: Estimate | None
  verdict: str


def compare(
  paper: Mapping[str, float | None], ours: Mapping[str, Values], base: str
) -> dict[str, Comparison]:
  """Compares every row of `ours` with its row `base`.

  Args:
    paper: The paper's figures by row; `None` or no entry is unknown.
    ours: Ours by row and seed.
    base: A row of `ours`.
  """
  return {
    row: _compare(paper.get(row), paper.get(base), values, ours[base], row == base)
    for row, values in ours.items()
  }


def _compare(
  paper: float | None, paper_base: float | None, ours: Values, our_base: Values, is_base: bool
) -> Comparison:
  mean = Estimate.of(ours.values())
  known = paper is not None and paper_base is not None
  paper_ratio = paper / paper_base if known and not is_base else None
  seeds = [] if is_base else [seed for seed in ours if seed in our_base]
  ratio = Estimate.of(ours[seed] / our_base[seed] for seed in seeds)
  difference = Estimate.of(ours[seed] - our_base[seed] for seed in seeds)
  verdict = ""
  if known and difference is not None:
    decided = difference.half_width is not None and abs(difference.mean) > difference.half_width
    same = (paper > paper_base) == (difference.mean > 0)
    verdict = VERDICTS[2] if not decided else VERDICTS[0] if same else VERDICTS[1]
  return Comparison(paper, paper_ratio, mean, ratio, difference, verdict)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A Markdown table, its first column left-aligned."""
  lines = [header, [":---"] + ["---:"] * (len(header) - 1), *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(
  comparisons: Mapping[str, Comparison], about: Mapping[str, str], paper_name: str, our_name: str
) -> str:
  """The comparison as a Markdown table, and a sentence that counts the verdicts."""
  table = markdown_table(
    (
      "row",
      f"paper: {paper_name}",
      "ratio",
      f"ours: {our_name}",
      "ratio",
      "difference",
      "direction",
    ),
    (
      (
        f"`{row}`: {about[row]}" if about.get(row) else f"`{row}`",
        _number(c.paper, "g"),
        _number(c.paper_ratio),
        _number(c.ours),
        _number(c.ratio),
        _number(c.difference, "+.3f"),
        c.verdict,
      )
      for row, c in comparisons.items()
    ),
  )
  return f"{table}\n{verdicts(comparisons)}\n"


def verdicts(comparisons: Mapping[str, Comparison]) -> str:
  """How many of the paper's directions reproduce, and which rows do what."""
  rows = {v: [f"`{r}`" for r, c in comparisons.items() if c.verdict == v] for v in VERDICTS}
  total = sum(map(len, rows.values()))
  listed = "; ".join(f"{v}: {', '.join(names)}" for v, names in rows.items() if names)
  return (
    f"{len(rows[VERDICTS[0]])} of {total} directions reproduce with an interval free of zero"
    f"{f' ({listed})' if listed else ''}."
  )


def _number(x: Estimate | float | None, spec: str = ".3f") -> str:
  if x is None:
    return "–"
  return x.text(spec) if isinstance(x, Estimate) else f"{x:{spec}}"


def plot(
  path: pathlib.Path, comparisons: Mapping[str, Comparison], title: str, names: Sequence[str]
) -> None:
  """Draws ratios to the base row: ours with intervals, beside the paper's.

  Args:
    path: The picture.
    comparisons: By row; the base row is the line at 1.
    title: Above it.
    names: Legend of the paper's and of ours.
  """
  rows = {row: c for row, c in comparisons.items() if c.ratio or c.paper_ratio}
  figure = Figure(figsize=(7, 1.6 + 0.45 * len(rows)), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.axvline(1.0, color="0.6", linewidth=1)

  def draw(name: str, ratios: Iterable[Estimate | None], shift: float, **style: str) -> None:
    shown = [(r.mean, i + shift, r.half_width or 0.0) for i, r in enumerate(ratios) if r]
    if shown:
      x, y, half = zip(*shown, strict=True)
      axes.errorbar(x, y, xerr=half, label=name, capsize=4, **style)

  papers = [c.paper_ratio and Estimate(c.paper_ratio, None, 1) for c in rows.values()]
  draw(names[0], papers, -0.12, fmt="D", color="0.35")
  draw(names[1], [c.ratio for c in rows.values()], 0.12, fmt="o", color="tab:blue")
  if axes.containers:
    figure.legend(loc="outside lower center", ncols=2, frameon=False)  # Over no point of either.
  axes.set_yticks(range(len(rows)), rows)
  axes.set_ylim(len(rows) - 0.5, -0.5)
  axes.set_xlabel("ratio to the base row")
  axes.set_title(title)
  axes.grid(axis="x", alpha=0.3)
  figure.savefig(path, dpi=120)
