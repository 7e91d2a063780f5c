"""The loop: how a run starts, ends, stops and goes on."""

import contextlib
import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from experiments.configs import common
from latentlab.train import checkpoint, loop, metrics


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  rng = np.random.default_rng(0)
  words = "the quick brown fox jumps over a lazy dog while nobody sees".split()
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(400)))
  return path


@pytest.fixture
def config(text):
  c = common.smoke(common.language_model())
  c.data.update(path=str(text), cache_dir=str(text.parent))
  c.optimizer.peak_lr = 3e-3
  return c


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
  """A run of 8 steps on 8 devices, with checkpoints at 4 and 8."""
  c = common.smoke(common.language_model())
  c.data.update(path=str(text), cache_dir=str(text.parent))
  c.optimizer.peak_lr = 3e-3
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, loop.train(c, workdir)


def _params(workdir, config):
  return jax.device_get(loop.load(workdir, config).params)


def _assert_close(a, b, rtol):
  def close(x, y):
    assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)

  jax.tree.map(close, a, b)


def test_learns_and_leaves_everything_behind(finished):
  workdir, final = finished
  lines = metrics.read_metrics(workdir / "metrics.jsonl")
  assert [x["step"] for x in lines] == [1, 2, 4, 6, 8]
  assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.1
  assert ["perf/compile_sec" in x for x in lines] == [True] + 4 * [False]
  for name in (
    "train/grad_norm",
    "train/lr",
    "perf/tokens_per_sec",
    "perf/model_flops_per_sec",
    "perf/memory",
  ):
    assert name in lines[-1]
  assert [x["step"] for x in lines if "eval/validation/bits_per_byte" in x] == [4, 8]
  assert final["eval/validation/loss"] == lines[-1]["eval/validation/loss"]
  assert {p.name for p in (workdir / "plots").iterdir()} >= {
    "loss.png",
    "lr.png",
    "validation_bits_per_byte.png",
    "validation_positions.png",
  }
  assert json.loads((workdir / "config.json").read_text())["train_steps"] == 8
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "8"]


def test_a_finished_run_starts_no_step(finished, config, capsys):
  workdir, final = finished
  before = (workdir / "metrics.jsonl").read_text()
  assert loop.train(config, workdir) == final
  assert (workdir / "metrics.jsonl").read_text() == before
  assert "Bits per raw byte, the fewest first:\n  validation  " in capsys.readouterr().out


def test_load_reads_the_config_of_the_run(finished):
  workdir, final = finished
  run = loop.load(workdir)
  assert run.step == 8 and run.config.data.include == ("*",)
  with pytest.raises(ValueError, match="step='last'"):
    loop.load(workdir, step="last")
  with pytest.raises(ValueError, match="config.json"):
    loop.read_config(workdir / "plots")


@pytest.mark.parametrize(
  "change",
  [dict(mesh=dict(data=2, fsdp=2, tensor=2, seq=1)), dict(parallelism="pmap")],
  ids=["mesh", "pmap"],
)
def test_resumes_on_another_layout(finished, config, tmp_path, change, caplog):
  """Steps 5 to 8 on another layout, from `config.resume`'s checkpoint of step 4."""
  source, final = finished
  config.update(change)
  with checkpoint.Checkpointer(source, read_only=True) as c:
    assert c.steps() == [4, 8]
  older = tmp_path / "older"
  (older / "checkpoints").mkdir(parents=True)
  os.rename(source / "checkpoints" / "4", older / "checkpoints" / "4")
  try:
    config.resume = str(older)
    with caplog.at_level(logging.INFO, "latentlab"):
      resumed = loop.train(config, tmp_path / "new")
  finally:
    os.rename(older / "checkpoints" / "4", source / "checkpoints" / "4")
  assert "resumed config.resume=" in caplog.text and "at step 4" in caplog.text
  lines = metrics.read_metrics(tmp_path / "new" / "metrics.jsonl")
  assert [x["step"] for x in lines] == [5, 6, 8]
  assert resumed["train/loss"] == pytest.approx(final["train/loss"], rel=1e-5)
  _assert_close(_params(tmp_path / "new", config), _params(source, config), rtol=1e-4)


def test_init_from_starts_at_step_zero_with_those_parameters(finished, config, tmp_path, caplog):
  source, final = finished
  config.update(init_from=str(source), train_steps=2)
  config.optimizer.ema_decay = 0.5
  with caplog.at_level(logging.INFO, "latentlab"):
    run = loop.train(config, tmp_path)
  assert "config.init_from" in caplog.text
  lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
  assert lines[0]["step"] == 1 and lines[0]["train/loss"] < 1.05 * final["train/loss"]
  assert run["eval/validation/loss"] == pytest.approx(final["eval/validation/loss"], rel=0.1)


def test_stops_when_it_diverges_and_keeps_the_good_checkpoint(config, tmp_path):
  config.optimizer.update(peak_lr=1e16, schedule="constant", warmup_steps=0)
  config.update(log_steps=1, checkpoint_steps=1, max_skipped_steps=2, evals={})
  with pytest.raises(loop.DivergedError, match="last 3 steps up to 4"):
    loop.train(config, tmp_path)
  lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
  assert [x["train/skipped"] for x in lines] == [0, 1, 2, 3]
  assert lines[0]["train/grad_norm"] > 0 and lines[1]["train/grad_norm"] is None
  with checkpoint.Checkpointer(tmp_path, read_only=True) as c:
    assert c.steps() == [1]


def test_sigterm_saves_and_leaves(config, tmp_path, monkeypatch, finished):
  """SIGTERM in step 3; the handler is the one that a scheduler's signal reaches."""
  config.update(log_steps=1)
  config.checkpoint.keep_best = "validation/loss"
  traces = []
  original = loop.partition.JitTrainer.step

  def step(self, state, batch):
    if int(state.step) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    out = original(self, state, batch)
    traces.append(self.num_compilations())
    return out

  monkeypatch.setattr(loop.partition.JitTrainer, "step", step)
  handler = signal.getsignal(signal.SIGTERM)
  # Reading the step for the test's sake is a transfer that the guard would refuse.
  monkeypatch.setattr(loop.jax, "transfer_guard", lambda _: contextlib.nullcontext())
  with pytest.raises(loop.Preempted) as e:
    loop.train(config, tmp_path)
  assert e.value.code == loop.PREEMPTED_EXIT_CODE == 75 and e.value.step == 3
  assert signal.getsignal(signal.SIGTERM) == handler
  assert set(traces) == {1}
  with checkpoint.Checkpointer(tmp_path, read_only=True) as c:
    assert c.steps() == [3]
  monkeypatch.undo()
  final = loop.train(config, tmp_path)
  assert final["train/loss"] == finished[1]["train/loss"]
  assert loop.load(tmp_path, step="best").step == 8


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(train_steps=0), "config.train_steps=0"),
    (dict(max_skipped_steps=-1), "max_skipped_steps=-1"),
    (dict(optimizer=dict(ema_decay=1.0)), "ema_decay=1.0 must be in"),
    (dict(optimizer=dict(clip_norm=-1.0)), "clip_norm=-1.0"),
    (dict(sample=dict(num_tokens=4, temperature=0.0)), "sample.temperature=0.0 must be positive"),
    (dict(sample=dict(num_tokens=4, top_p=2.0)), "sample.top_p=2.0: TopP"),
    (
      dict(sample=dict(num_tokens=31, prompt="ab"), model=dict(positions="learned", max_length=32)),
      "prompt has 3 tokens .* context of 32",
    ),
    (
      dict(mesh=dict(seq=2), evals=dict(validation=dict(seq_length=33))),
      "length of 33 must be a mu",
    ),
    (dict(checkpoint=dict(keep_best="test/loss")), r"none of config.evals: \['validation'\]"),
    (dict(evals=dict(validation=dict(type="perplex"))), r"choose one of \[.*'perplexity'.*\]"),
    (dict(evals=dict(validation=dict(every_steps=0))), "validation.every_steps=0"),
    (dict(evals=dict(validation=dict(splt="x"))), "unknown fields.*splt.*max_batches"),
    (dict(evals=dict(validation=dict(split="test"))), "split='test'.*choose from"),
    (dict(parallelism="vmap"), "choose from"),
    (dict(model=dict(positions="learned", max_length=8)), "max_length=8"),
    (dict(resume="/nowhere"), "train there first"),
    (dict(logging=dict(tensorboard=True)), "tensorboardX"),
  ],
  ids=str,
)
def test_bad_configs_fail_before_anything_is_compiled(
  config, tmp_path, monkeypatch, change, message
):
  with config.unlocked():
    config.update(change)

  def compiled(*_):
    raise AssertionError("It went as far as a step.")

  monkeypatch.setattr(loop.partition.JitTrainer, "step", compiled)
  monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path)


def test_resuming_with_another_model_names_the_parameter(finished, config, tmp_path):
  config.model.embed_dim = 16
  config.resume = str(finished[0])
  with pytest.raises(ValueError, match=r"first difference is 'params/.*expected.*16.*found.*32"):
    loop.train(config, tmp_path)


@pytest.fixture
def copied(finished, tmp_path):
  """The finished run, to be changed."""
  return shutil.copytree(finished[0], tmp_path / "copied")


@pytest.mark.parametrize("field", ["workdir", "resume", "init_from"])
def test_going_on_with_another_tokenizer_is_an_error(copied, config, tmp_path, field):
  data = loop._build_data(config)
  if field != "workdir":
    config[field] = str(copied)
  tokenizer = loop.data_lib.BPETokenizer.train(["ab" * 9], 258)
  tokenizer.save(copied / "tokenizer.json")
  workdir = copied if field == "workdir" else tmp_path / "new"
  with pytest.raises(
    ValueError,
    match=(
      f"tokenizer {tokenizer.digest[:12]}, but .* {data.tokenizer.digest[:12]}.*another workdir"
    ),
  ):
    loop.train(config, workdir)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(batch_size=16), "config.batch_size: 8 -> 16"),
    (dict(seed=1), "config.seed: 0 -> 1"),
    (dict(data=dict(packing="stream")), "data.packing: 'segments' -> 'stream'"),
  ],
  ids=str,
)
def test_going_on_with_other_batches_is_an_error(finished, config, change, message):
  config.update(change)
  with pytest.raises(ValueError, match=message):
    loop.train(config, finished[0])


def test_damaged_notes_of_a_run(copied, config, caplog):
  (copied / "config.json").write_text("{")
  corpus = json.loads((copied / "corpus.json").read_text())
  (copied / "corpus.json").write_text(json.dumps(corpus | {"tokens_sha256": "0"}))
  with pytest.raises(ValueError, match="config.json' is not json"):
    loop.read_config(copied)
  with caplog.at_level(logging.WARNING, "latentlab"):
    loop.train(config, copied)
  assert "config.json' is not json" in caplog.text and "corpus changed" in caplog.text
  assert loop.read_config(copied).train_steps == 8


def test_an_evaluation_that_fails_costs_no_steps(config, tmp_path, monkeypatch):
  def fail(self, params):
    raise RuntimeError("no evaluation today")

  config.update(train_steps=2)
  monkeypatch.setattr(loop.eval_lib.Evaluation, "run", fail)
  with pytest.raises(RuntimeError, match="today"):
    loop.train(config, tmp_path)
  with checkpoint.Checkpointer(tmp_path, read_only=True) as c:
    assert c.steps() == [2]
  assert metrics.read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 2


def test_load_on_fewer_devices(copied, caplog):
  path = copied / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "mesh": {"data": 4, "tensor": 4}}))
  with caplog.at_level(logging.INFO, "latentlab"):
    run = loop.load(copied)
  assert "takes 16 devices, but there are 8" in caplog.text
  assert dict(run.trainer.mesh.shape)["data"] == 8


def test_hosts_with_other_data_are_an_error(config, monkeypatch):
  data = loop._build_data(config)
  loop._check_hosts_agree(data)
  monkeypatch.setattr(loop.multihost_utils, "process_allgather", lambda x: np.stack([x, x + 1]))
  with pytest.raises(ValueError, match="different data; this one has the tokenizer"):
    loop._check_hosts_agree(data)


def test_summary_compares_and_survives_what_is_not_finite(config, tmp_path, capsys):
  latest = {
    "train/loss": float("nan"),
    "eval/validation/bits_per_byte": 2.0,
    "eval/ngram/bits_per_byte_order_1": 4.5,
    "eval/ngram/bits_per_byte_order_3": 2.5,
    "eval/ngram/bits_per_byte_whole_corpus_order_3": 1.5,
  }
  loop._print_summary(latest, config, tmp_path, [])
  printed = capsys.readouterr().out
  assert "Below all n-grams of the bytes seen: yes" in printed
  assert printed.count("not finite") == 1
  for value in (float("nan"), None, 2.6):
    loop._print_summary(latest | {"eval/validation/bits_per_byte": value}, config, tmp_path, [])
    assert "bytes seen: no" in capsys.readouterr().out
