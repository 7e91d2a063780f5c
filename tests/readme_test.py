"""What README.md shows can be run. Its two commands are run by .ci/run."""

import pathlib
import re

import pytest

_README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", _README, re.M | re.S))
def test_python_blocks_run(code):
  exec(code, {})


@pytest.mark.parametrize("name", ["main-job", "tests"])
def test_commands_are_marked(name):
  assert re.search(rf"^<!-- command: {name} -->\n```\n.+\n```$", _README, re.M)
