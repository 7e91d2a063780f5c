"""Huge pages for a process that computes on a CPU. Imports nothing that takes long."""

import os
import pathlib
import platform
import sys


def environment() -> dict[str, str]:
  """What to start a process with for malloc to ask for huge pages; empty where that is no gain.

  XLA's CPU backend allocates the temporaries of a program anew on each call, and glibc maps and
  unmaps blocks of that size: each step of a trainer faults in every page of them, which is a fifth
  of its time with small pages. glibc reads the wish once, at the start of a process.
  """
  libc, version = platform.libc_ver()
  setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  # Under "[always]" there is nothing to ask for, under "[never]" nothing to get.
  if libc != "glibc" or not setting.is_file() or "[madvise]" not in setting.read_text():
    return {}
  tunables = os.environ.get("GLIBC_TUNABLES", "")
  if tuple(map(int, version.split("."))) < (2, 35) or "glibc.malloc.hugetlb" in tunables:
    return {}
  return {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))}


def restart() -> None:
  """Starts this process anew where it computes on the CPU and that gives it huge pages.

  For binaries that run one large program many times; to be called before all else is imported.
  """
  wanted = environment() if _computes_on_cpu() else {}
  if wanted:  # The same process, with the same arguments.
    os.execve(sys.executable, sys.orig_argv, os.environ | wanted)


def _computes_on_cpu() -> bool:
  """Whether jax will choose the CPU, as far as one can tell before it has started."""
  if chosen := os.environ.get("JAX_PLATFORMS"):
    return chosen.split(",")[0] == "cpu"
  accelerators = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")
  return not any(any(pathlib.Path("/dev").glob(name)) for name in accelerators)
