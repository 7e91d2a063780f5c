"""Reads the schedules that libtpu dumps of a kernel: its loop over the grid, and what that uses."""

import dataclasses
import re

# The columns of a dump's table of units, in its order.
UNITS = "matmul matpush xlu valu vpop eup vload fill vstore spill salu".split()


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What a kernel's final bundles show.

  Attributes:
    steps: Grid steps that a core takes.
    loop: Bundles of the loop over them, whether or not a step runs them all.
    rare: Those that a branch skips on most steps: the first or last ones of a sequence.
    units: Uses of each unit in the loop, by name.
  """

  steps: int
  loop: int
  rare: int
  units: dict[str, int]


_ADDRESS = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(\w\w)?:")


def read_schedule(bundles: str, table: str) -> Schedule:
  """Reads a `final_bundles` text and its `final_hlo-static-per-bundle-utilization` table.

  Raises:
    ValueError: The texts are of another form than libtpu 0.0.52 writes.
  """
  first = last = steps = None
  regions, branches = {}, []
  for line in bundles.splitlines():
    if (m := _ADDRESS.match(line)) is None:
      continue
    address = int(m[1], 16)
    if m[2] == "LB" and first is None:
      first = address
    for region in re.findall(r"Start(?:/End)?(?: empty)? region (\d+)", line):
      regions.setdefault(int(region), address)
    if exit_test := re.search(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test", line):
      steps = int(exit_test[1]) - 2  # The pipeline runs one step ahead and one behind.
    for target in re.findall(r"sbr\.rel \(.*?target = \$region(\d+)", line):
      branches.append((address, int(target)))
  if first is None or steps is None:
    raise ValueError("No loop over grid steps in the bundles.")
  last = max(address for address, target in branches if regions.get(target, 0) <= first)
  spans = [(a, regions[t]) for a, t in branches if first < a < last and regions.get(t, 0) > a]
  start, end = max(spans, key=lambda span: span[1] - span[0])  # The kernel's own body.
  rare = sum(b - a for a, b in spans if start < a and b < end)
  rows = [
    [int(x) for x in line.split()]
    for line in table.partition("UTILIZATION:")[2].splitlines()
    if line.strip()
  ]
  if any(len(row) != len(UNITS) for row in rows):
    raise ValueError(f"A table of {len(rows[0])} units, where {len(UNITS)} are known.")
  units = dict(zip(UNITS, map(sum, zip(*rows[first : last + 1], strict=True)), strict=True))
  return Schedule(steps, last - first + 1, rare, units)
