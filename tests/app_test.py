"""Flags, and what a user is told who got one wrong."""

import os
import subprocess
import sys

import forked_binaries
import pytest
from absl import flags

from experiments.configs import common
from latentlab import app, huge_pages

CONFIG = """
from experiments.configs import common

def get_config(arg=None):
  arg = common.parse_arg(arg, row=("small", "large"), smoke=False, seed=0)
  return common.language_model(seed=arg.seed)
"""


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG)
  yield path
  flags.FLAGS.unparse_flags()
  for name in [n for n in flags.FLAGS if n.startswith("config.")]:
    delattr(flags.FLAGS, name)


@pytest.fixture
def parse(monkeypatch, config_file):
  def run(*args, config_required=True):
    monkeypatch.setattr(sys, "argv", ["binary", *args])  # Where ml_collections finds overrides.
    app._parse(sys.argv, app._OURS, config_required)

  return run


def test_overrides_reach_the_config(parse, config_file):
  parse(
    f"--config={config_file}:row=large,seed=3",
    "--workdir=w",
    "--config.optimizer.b1=0.5",
    "--config.evals.validation.max_batches=2",
  )
  config = flags.FLAGS.config
  assert (config.seed, config.optimizer.b1, config.evals.validation.max_batches) == (3, 0.5, 2)


@pytest.mark.parametrize(
  "arguments, messages",
  [
    (["--wrkdir=x"], ["Unknown flag --wrkdir (did you mean workdir?)", "--coordinator_address"]),
    (["--config.seed=1"], ["--config, which has to be given"]),
    (
      ["--config=C", "--workdir=w", "--config.optimizer.peek_lr=1"],
      ["--config.optimizer.peek_lr (did you mean peak_lr?)", "warmup_steps"],
    ),
    (
      ["--config=C", "--workdir=w", "--config.optimiser.peak_lr=1"],
      ["--config.optimiser (did you mean optimizer?)", "train_steps"],
    ),
    (["--config=C", "--workdir=w", "--config.seed.x=1"], ["--config.seed.x; config.seed has no"]),
    (
      ["--config=C", "--workdir=w", "--config.seed=many"],
      ["--config.seed=many", "invalid literal"],
    ),
    (["--config=C:seed=abc", "--workdir=w"], ["Error: config argument seed='abc' is no int"]),
    (["--config=none.py", "--workdir=w", "--config.seed=1"], ["'none.py' is no file"]),
    (["--config=C:row=medium", "--workdir=w"], ["unknown row='medium'", "['small', 'large']"]),
    (["--config=C:rwo=small", "--workdir=w"], ["'rwo'", "['row', 'seed', 'smoke']"]),
    (["--config=none.py", "--workdir=w"], ["'none.py' is no file"]),
    (["--workdir=w"], ["--config is missing"]),
    (["--config=C"], ["--workdir is missing"]),
    (["--config=C", "--workdir=w", "train"], ["without a flag: ['train']"]),
  ],
  ids=lambda x: "" if isinstance(x, tuple) else None,
)
def test_mistakes_end_in_one_message_with_the_choices(
  parse, config_file, capsys, arguments, messages
):
  arguments = [a.replace("=C", f"={config_file}") for a in arguments]
  with pytest.raises(SystemExit) as e:
    parse(*arguments)
  assert e.value.code == 1
  printed = capsys.readouterr().err
  for message in messages:
    assert message in printed
  assert "Traceback" not in printed and len(printed.splitlines()) == 1


def test_the_last_config_counts():
  argv = ["b", "--config=x.py", "--seed=1", "--config", "y.py:row=z"]
  assert app._config_path(argv) == "y.py:row=z"
  assert app._config_path(["b", "--config"]) == ""


def test_config_may_be_optional(parse):
  parse("--workdir=w", config_required=False)
  assert flags.FLAGS.config is None


def test_a_binary_fails_with_one_message(config_file, tmp_path, monkeypatch):
  """The whole way: a bad value that only the trainer can see, and hosts that cannot meet."""
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # A fork cannot start anew.
  where = f"--config={config_file}", f"--workdir={tmp_path}"
  args = (*where, "--config.data.path=/nowhere/text.txt")
  for more, message in (
    ((), "/nowhere/text.txt"),
    (("--num_processes=2",), "need --coordinator_address"),
    (("--coordinator_address=auto",), "Slurm, Open MPI, Cloud TPU"),
  ):
    code, _, errors = forked_binaries.run("train", *args, *more)
    assert code == 1 and "Error: " in errors and message in errors, errors
    assert "Traceback" not in errors


def test_arguments_of_a_config_file():
  fields = dict(row=("1b3", "2b7"), smoke=False, seed=0, lr=0.5, heads=(1, 2))
  arg = common.parse_arg("row=2b7,smoke,seed=4,heads=2", **fields)
  assert (arg.row, arg.smoke, arg.seed, arg.lr, arg.heads) == ("2b7", True, 4, 0.5, 2)
  assert vars(common.parse_arg(None, **fields)) == dict(
    row="1b3", smoke=False, seed=0, lr=0.5, heads=1
  )
  assert common.parse_arg("smoke=false,lr=1e-3", **fields).lr == 1e-3


@pytest.mark.parametrize(
  "arg, message",
  [
    ("rows=1b3", r"'rows'; choose among \['row', 'seed', 'smoke'\]"),
    ("row=6b7", r"row='6b7'; choose one of \['1b3', '2b7'\]"),
    ("row", "needs a value"),
    ("seed=x", "seed='x' is no int"),
    ("smoke=maybe", r"smoke='maybe'; choose one of \['true', 'false'\]"),
  ],
)
def test_unknown_arguments_are_errors(arg, message):
  with pytest.raises(ValueError, match=message):
    common.parse_arg(arg, row=("1b3", "2b7"), smoke=False, seed=0)


def test_a_misspelt_field_in_a_config_file_is_an_error():
  c = common.language_model()
  with pytest.raises(AttributeError, match="train_steps"):
    c.train_step = 5
  c.model.positions = "xpos"  # The model's own check comes later, with its choices.
  c.evals.more = dict(type="perplexity", every_steps=1)


_COUNT_FAULTS = """
import resource
import jax, jax.numpy as jnp

step = jax.jit(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w) @ w)
x, w = jnp.ones((2**15, 512)), jnp.ones((512, 512))  # 64 MiB a temporary: 16,384 pages.
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  step(x, w).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
_HUGE_PAGES = huge_pages.environment()
_needs_huge_pages = pytest.mark.skipif(
  not _HUGE_PAGES, reason="malloc cannot ask for huge pages here, or has been told to"
)


@_needs_huge_pages
def test_huge_pages_save_page_faults():
  def faults(environment):
    command = [sys.executable, "-c", _COUNT_FAULTS]
    done = subprocess.run(
      command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return int(done.stdout)

  assert faults(_HUGE_PAGES) < faults({}) / 4


@_needs_huge_pages
def test_restarts_once_with_huge_pages(monkeypatch):
  program = (
    "import os, sys; from latentlab import huge_pages; print(os.getpid(), flush=True); "
    "huge_pages.restart(); assert 'jax' not in sys.modules; "
    "print(os.getpid(), os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"
  )
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=8")
  done = subprocess.run(
    [sys.executable, "-c", program, "--workdir=a b"], capture_output=True, text=True, check=True
  )
  first, second, last = done.stdout.splitlines()
  want = f"{first} glibc.malloc.arena_max=8:glibc.malloc.hugetlb=1 --workdir=a b"
  assert (second, last) == (first, want)
