"""The generate binary, on a model that was trained for one step."""

import json
import os
import pathlib
import subprocess
import sys

import forked_binaries
import pytest

from experiments.configs import common
from latentlab.train import loop

_ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("generate")
  (path / "text.txt").write_text("Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. " * 60)
  config = common.smoke(common.language_model())
  config.model.update(num_layers=1, embed_dim=16, num_heads=1)
  config.data.update(
    source="path",
    path=str(path / "text.txt"),
    tokenizer="bytes",
    vocab_size=0,
    seq_length=16,
    cache_dir=str(path / "cache"),
  )
  config.train_steps = config.checkpoint_steps = config.log_steps = 1
  config.optimizer.warmup_steps, config.evals = 0, {}
  loop.train(config, path / "run")
  return path / "run"


def _python(*args):
  env = dict(os.environ, PYTHONPATH=str(_ROOT), PYTHONIOENCODING="utf-8")
  return subprocess.run(
    [sys.executable, *args], capture_output=True, encoding="utf-8", env=env, timeout=300
  )


def test_samples(workdir, tmp_path):
  args = (
    f"--workdir={workdir}",
    "--prompt=Zwölf",
    "--prompt=",
    "--num_samples=2",
    "--num_tokens=21",
    "--top_p=0.98",
    "--seed=5",
  )
  code, streamed, errors = forked_binaries.run("generate", *args, f"--output={tmp_path}/a.jsonl")
  assert code == 0, errors
  lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
  assert [(x["prompt"], x["sample"]) for x in lines] == [
    ("Zwölf", 0),
    ("Zwölf", 1),
    ("", 0),
    ("", 1),
  ]
  assert streamed == "".join(
    f"--- prompt {i // 2 + 1}, sample {i % 2 + 1}\n{x['prompt']}{x['text']}\n"
    for i, x in enumerate(lines)
  )
  assert len({x["text"] for x in lines}) == 4
  for x in lines:
    assert x["step"] == 1 and x["seed"] == 5 and x["log_prob"] < 0
    assert x["text"] == bytes(i for i in x["tokens"] if i < 256).decode("utf-8", errors="replace")
    assert len(x["tokens"]) == 21 or x["finished"]
    assert 257 not in x["tokens"]
  # One sample alone, drawn at once, is the same as beside others.
  args = (a for a in args if a not in ("--prompt=", "--num_samples=2"))
  _, alone, errors = forked_binaries.run("generate", *args, "--nostream")
  assert alone == f"Zwölf{lines[0]['text']}\n", errors


_WRITE = r"""
import sys
import numpy as np
from experiments import generate
from latentlab import sample
from latentlab.data import ByteTokenizer
from latentlab.sample import text

generate.flags.FLAGS(["generate", "--num_tokens=9", sys.argv[1]])
rows = np.array([list("aé€😀".encode()[:9]), list("😀xyz".encode()) + [0xE2, 256]], np.int32)
def block(begin, end):
  n = end - begin
  ended = np.array([False, end == 9])
  return sample.Generated(rows[:, begin:end], np.full(2, n), ended, np.ones((2, n)))
blocks = [block(i, min(i + 2, 9)) for i in range(0, 9, 2)]
pieces = text._pieces(blocks, ByteTokenizer(), 2, 9)
out = generate._write(pieces, [">", "<"], ["first", "second"])
assert [x["text"] for x in out] == ["aé€\ufffd", "😀xyz\ufffd"], out
assert out[1]["finished"] and not out[0]["finished"] and out[0]["log_prob"] == 9
"""


@pytest.mark.parametrize("flag", ["--stream", "--nostream"])
def test_cut_characters(flag):
  done = _python("-c", _WRITE, flag)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "--- first\n>aé€\ufffd\n--- second\n<😀xyz\ufffd\n"


_ERRORS = r"""
import sys
from absl.testing import flagsaver
from experiments import generate

generate.flags.FLAGS(["generate", f"--workdir={sys.argv[1]}"])
for line in sys.stdin.read().splitlines():
  with flagsaver.flagsaver():
    for flag in line.split():
      name, _, value = flag.partition("=")
      generate.flags.FLAGS[name].parse(value)
    try:
      generate.main(None, sys.argv[1])
    except ValueError as e:
      print(str(e).replace("\n", " "))
    else:
      print("no error")
"""


def test_errors_name_flag_value_and_remedy(workdir, tmp_path):
  (tmp_path / "bad.txt").write_bytes(b"abc\xff")
  (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
  cases = {
    "top_p=1.5": "--top_p=1.5: TopP.p=1.5 must be in (0, 1]",
    "temperature=0": "--temperature=0.0: Temperature.value=0.0 must be positive; for 0 use greedy",
    "top_k=0": "--top_k=0: TopK.k=0 must be",
    "greedy=true top_k=3": "--top_k=3 means nothing with --greedy",
    "greedy=true num_samples=3": "--num_samples=3 means nothing with --greedy",
    "prompt=a prompt_file=b": "--prompt and --prompt_file are both given",
    f"prompt_file={tmp_path}/none.txt": "cannot be read: No such file",
    f"prompt_file={tmp_path}/bad.txt": "is not utf-8 at byte 3",
    f"prompt_file={tmp_path}/bad.jsonl": "on every line: 'prompt'",
    f"output={tmp_path}/none/x.jsonl": "lies in no existing folder",
    "step=7": "7",
  }
  env = dict(os.environ, PYTHONPATH=str(_ROOT))
  done = subprocess.run(
    [sys.executable, "-c", _ERRORS, str(workdir)],
    input="\n".join(cases),
    capture_output=True,
    encoding="utf-8",
    env=env,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  for message, expected in zip(done.stdout.splitlines(), cases.values(), strict=True):
    assert expected in message


def test_another_mask_for_the_same_parameters(workdir):
  """Under a window of two tokens, a sample depends on no more of the prompt than these."""

  def sampled(prompt, *more):
    args = (f"--workdir={workdir}", f"--prompt={prompt}", "--greedy", "--num_tokens=12", *more)
    code, output, errors = forked_binaries.run("generate", *args)
    assert code == 0, errors
    return output.removeprefix(prompt)

  def refused(model):
    code, _, errors = forked_binaries.run("generate", f"--workdir={workdir}", f"--model={model}")
    assert code == 1
    return errors

  window = "--model=mask=sliding_window,mask_size=2"
  # One layer: the last two tokens are all that is seen.
  assert sampled("abcxyz", window) == sampled("defghiyz", window)
  for text, message in (("mask_sise=2", "fields are"), ("mask_size=two", "is no int")):
    assert message in refused(text)
  assert "changes parameters" in refused("embed_dim=32")
