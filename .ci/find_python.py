"""Prints the path of a Python of at least the version given that can make virtual environments.

  python .ci/find_python.py 3.12

Candidates are run, not trusted: a version manager's shim may exist and answer "command not found".
The oldest that will do comes first, since wheels appear for a new Python last. Without any, exits
with 1 and prints what was tried.
"""

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

_PROBE = "import ensurepip, sys, venv; print('%d.%d.%d' % sys.version_info[:3])"
_FOLDERS = (
  "~/.pyenv/versions/*/bin",
  "~/.local/share/uv/python/*/bin",
  "~/.asdf/installs/python/*/bin",
  "~/.local/share/mise/installs/python/*/bin",
  "~/.rye/py/*/bin",
  "~/*conda*/bin",
  "~/*conda*/envs/*/bin",
  "~/*forge*/bin",
  "/opt/*/bin",
  "/opt/python/*/bin",
  "/opt/hostedtoolcache/Python/*/x64/bin",
  "/usr/local/bin",
  "/usr/bin",
)


def _expand(pattern: str) -> Iterator[pathlib.Path]:
  path = pathlib.Path(pattern).expanduser()
  yield from sorted(pathlib.Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def candidates() -> list[pathlib.Path]:
  """`python3.N` in every folder of PATH, not only the first, then in version managers' folders."""
  on_path = [pathlib.Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p]
  if root := os.environ.get("PYENV_ROOT"):
    on_path += _expand(f"{root}/versions/*/bin")
  folders = [*on_path, *(folder for pattern in _FOLDERS for folder in _expand(pattern))]
  found = (path for folder in folders for path in sorted(folder.glob("python3*")))
  return list(dict.fromkeys(p for p in found if p.name == "python3" or p.name[8:].isdigit()))


def probe(path: pathlib.Path) -> tuple[tuple[int, ...] | None, str]:
  """The version of an interpreter that runs and has venv, or None and why not."""
  try:
    result = subprocess.run(
      [path, "-c", _PROBE], capture_output=True, text=True, timeout=30, check=False
    )
  except (OSError, subprocess.TimeoutExpired) as e:
    return None, str(e)
  if result.returncode:
    return None, (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[0]
  version = result.stdout.strip()
  return tuple(map(int, version.split("."))), version


def main(minimum: str) -> int:
  wanted = tuple(map(int, minimum.split(".")))
  tried = {path: probe(path) for path in candidates()}
  good = {path: version for path, (version, _) in tried.items() if version and version >= wanted}
  if not good:
    for path, (_, said) in tried.items():
      print(f"  tried {path}: {said}", file=sys.stderr)
    return 1
  print(min(good, key=good.get))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1]))
