r"""How a binary starts: flags, hosts, logging, and errors that a user can read.

A binary is `app.run(main)` with `main(config, workdir)`. Its command is the same on a CPU, a GPU
and a TPU; with several hosts, every one runs it and says where the first is:

  python -m experiments.train --config=... --workdir=... \
      --coordinator_address=10.0.0.1:1234 --num_processes=2 --process_id=0

or takes that from the cluster's own environment (Slurm, Open MPI, Cloud TPU, Kubernetes) with
`--coordinator_address=auto`. The exit code is 0 when done, 75 after SIGTERM with the state saved
(`train.loop.PREEMPTED_EXIT_CODE`), and 1 after an error.
"""

import contextlib
import difflib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

Main = Callable[[ml_collections.ConfigDict | None, str], Any]

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, with an argument: <file>.py:row=...,smoke. A field is overridden "
  "by --config.<field>=<value>.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "<host>:<port> of process 0, or 'auto' to ask the cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, on all hosts.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show tracebacks, and the libraries' own log lines.")
_OURS = ("config", "workdir", "coordinator_address", "num_processes", "process_id", "debug")


def run(
  main: Main,
  *,
  config_required: bool = True,
  flag_names: Sequence[str] = (),
) -> None:
  """Parses flags, joins the other hosts, and calls `main(config, workdir)`; does not return.

  Args:
    main: The binary. A `ValueError` from it is the user's to mend and ends the process with its
      message alone; any other error is ours and keeps its traceback.
    config_required: Whether `--config` must be given; if not, `main` gets `None` without it.
    flag_names: The binary's own flags, for the message about an unknown one.
  """
  names = (*_OURS, *flag_names)
  app.run(
    lambda _: _run(main, config_required),
    flags_parser=lambda argv: _parse(argv, names, config_required),
  )


def run_tool(main: Callable[[], Any], *, flag_names: Sequence[str]) -> None:
  """Like `run`, for a binary that has neither a run nor devices, but flags of its own alone."""
  names = ("debug", *flag_names)

  def guarded(_: Sequence[str]) -> None:
    _set_up_logging()
    with _guarded():
      main()

  app.run(guarded, flags_parser=lambda argv: _parse_flags(argv, names))


def _parse_flags(argv: Sequence[str], names: Sequence[str]) -> list[str]:
  """Parses the flags `names`, and no others."""
  try:
    rest = flags.FLAGS(list(argv))
  except flags.UnrecognizedFlagError as e:
    if e.flagname.startswith("config.") and "config" in names:
      _fail(f"--{e.flagname} overrides a field of --config, which has to be given too.")
    _fail_unknown(e.flagname, names)
  except (AttributeError, KeyError):  # How ml_collections says that a field is unknown.
    message = _unknown_field(argv)  # Raises again what the config file itself raised.
    if message is None:
      raise
    _fail(message)
  except (flags.Error, TypeError, ValueError) as e:
    _fail(_first_cause(e))
  except OSError:  # An override asked for a field of it.
    _fail_unreadable(argv)
  for name in _OURS:
    if name not in names and flags.FLAGS[name].present:
      _fail_unknown(name, names)
  if len(rest) > 1:
    _fail(f"Arguments without a flag: {rest[1:]}; flags are {_listed(f'--{n}' for n in names)}.")
  return rest


def _parse(argv: Sequence[str], names: Sequence[str], config_required: bool) -> list[str]:
  rest = _parse_flags(argv, names)
  if config_required and _CONFIG.value is None:
    _fail(
      "--config is missing: give the path of a config file, such as "
      "experiments/configs/quickstart.py."
    )
  if _CONFIG.value is not None and not isinstance(_CONFIG.value, ml_collections.ConfigDict):
    _fail_unreadable(argv)
  if not _WORKDIR.value:
    _fail("--workdir is missing: give the folder of the run.")
  return rest


def _run(main: Main, makes_workdir: bool) -> None:
  _set_up_logging()
  with _guarded():
    if _COORDINATOR.value == "auto":
      _join_cluster()
    elif _COORDINATOR.value:
      if _NUM_PROCESSES.value is None or _PROCESS_ID.value is None:
        raise ValueError(
          "--coordinator_address needs --num_processes and --process_id as well, or is 'auto'."
        )
      jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    elif _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
      raise ValueError("--num_processes and --process_id need --coordinator_address.")
    devices = jax.devices()
    logging.getLogger("latentlab").info(
      "Process %d of %d: %d devices (%s).",
      jax.process_index(),
      jax.process_count(),
      len(devices),
      devices[0].device_kind,
    )
    if makes_workdir:
      pathlib.Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
    elif not pathlib.Path(_WORKDIR.value).is_dir():
      raise ValueError(f"--workdir={_WORKDIR.value!r} is no folder; give that of a run.")
    main(_CONFIG.value, os.path.abspath(_WORKDIR.value))


def _join_cluster() -> None:
  try:
    jax.distributed.initialize()
  except ValueError as e:
    raise ValueError(
      "--coordinator_address=auto finds no cluster here; it knows Slurm, Open MPI, Cloud TPU and "
      "Kubernetes. Elsewhere give <host>:<port> of process 0, with --num_processes and "
      f"--process_id. ({e})"
    ) from e


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
  """Ends the process with the message alone where an error is the user's to mend."""
  try:
    yield
  except (ValueError, OSError) as e:
    if _DEBUG.value:
      raise
    _fail(f"{e}\n(--debug shows where this comes from.)")


def _set_up_logging() -> None:
  """Our lines go to stderr; the libraries' only from warnings on, except with `--debug`."""
  absl_logging.set_verbosity(absl_logging.DEBUG if _DEBUG.value else absl_logging.WARNING)
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
  # Other hosts say the same things as the first; what differs is worth a warning.
  quiet = not _DEBUG.value and _PROCESS_ID.value not in (None, 0)
  for name in ("latentlab", "pallas_kernels"):
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def _unknown_field(argv: Sequence[str]) -> str | None:
  """The message about the first override of a field that the config does not have."""
  config = flags.FLAGS["config"].parser.parse(_config_path(argv))
  for argument in argv:
    if not argument.startswith("--config."):
      continue
    node, path = config, "config"
    for field in argument.removeprefix("--config.").partition("=")[0].split("."):
      choices = sorted(node) if isinstance(node, ml_collections.ConfigDict) else []
      if field not in choices:
        return (
          f"Unknown field --{path}.{field}{_close(field, choices)}; {path} has {_listed(choices)}."
        )
      node, path = node[field], f"{path}.{field}"
  return None


def _config_path(argv: Sequence[str]) -> str:
  """The value of `--config`; of several the last one, which is the one that counts."""
  path = ""
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    if argument.startswith("--config="):
      path = argument.partition("=")[2]
    elif argument == "--config":
      path = following
  return path


def _first_cause(e: BaseException) -> str:
  """The config file's own words, where ml_collections puts a whole traceback in front of them."""
  while "Error whilst parsing config file" in str(e) and e.__context__:
    e = e.__context__
  return str(e)


def _close(name: str, choices: Iterable[str]) -> str:
  match = difflib.get_close_matches(name, list(choices), n=1)
  return f" (did you mean {match[0]}?)" if match else ""


def _listed(names: Iterable[str]) -> str:
  return ", ".join(names) or "no fields"


def _fail_unreadable(argv: Sequence[str]) -> NoReturn:
  _fail(f"--config={_config_path(argv)!r} is no file that can be read.")


def _fail_unknown(name: str, names: Sequence[str]) -> NoReturn:
  _fail(
    f"Unknown flag --{name}{_close(name, names)}; choose among {_listed(f'--{n}' for n in names)}."
  )


def _fail(message: str) -> NoReturn:
  print(f"Error: {message}", file=sys.stderr)
  sys.exit(1)
