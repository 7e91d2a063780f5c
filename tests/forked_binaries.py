"""The experiments' binaries, each in a process of its own that is forked where all is imported.

Importing is most of what a small command costs; a server of forks does it once.
"""

import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile

_CONTEXT = multiprocessing.get_context("forkserver")
# What these import starts neither a backend of jax nor a thread, so that it may be forked.
_CONTEXT.set_forkserver_preload(["latentlab.interop", "latentlab.train.loop"])


def run(module: str, *args: object) -> tuple[int, str, str]:
  """Exit code, output and errors of `python -m experiments.<module> <args>`."""
  with tempfile.TemporaryDirectory() as folder:
    files = [str(pathlib.Path(folder, name)) for name in ("stdout", "stderr")]
    options = (module, [str(x) for x in args], files, dict(os.environ), os.getcwd())
    process = _CONTEXT.Process(target=_main, args=options)
    process.start()
    process.join()
    output, errors = (pathlib.Path(file).read_text("utf-8") for file in files)
  return process.exitcode, output, errors


def _main(module: str, args: list[str], files: list[str], environ: dict[str, str], cwd: str):
  for number, file in enumerate(files, start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
  os.chdir(cwd)
  os.environ.clear()
  os.environ.update(environ)
  sys.argv[1:] = args
  runpy.run_module(f"experiments.{module}", run_name="__main__", alter_sys=True)
