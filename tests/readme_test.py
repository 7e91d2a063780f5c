"""What README.md shows can be run. Its two commands are run by .ci/run."""

import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_README = (_ROOT / "README.md").read_text()
_KERNELS = (_ROOT / "pallas_kernels/README.md").read_text()


@pytest.mark.parametrize(
  "code", re.findall(r"^```python\n(.*?)^```", _README + _KERNELS, re.M | re.S)
)
def test_python_blocks_run(code):
  exec(code, {})


@pytest.mark.parametrize("name", ["main-job", "tests"])
def test_commands_are_marked(name):
  assert re.search(rf"^<!-- command: {name} -->\n```\n.+\n```$", _README, re.M)
