import os
import signal
import subprocess
import sys
import zlib

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from latentlab import data
from latentlab.data import batches

SEQ = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """40 documents of distinct lengths, in which no window occurs twice."""
  root = tmp_path_factory.mktemp("texts")
  for i in range(40):
    (root / f"{i:02}.txt").write_text(" ".join(f"{i}é{j}" for j in range(2 + i)))
  return root


@pytest.fixture(scope="module")
def fields(folder, tmp_path_factory):
  return dict(
    path=str(folder),
    seq_length=SEQ,
    validation_fraction=0.2,
    cache_dir=str(tmp_path_factory.mktemp("cache")),
  )


SYNTHETIC = dict(source="synthetic", task="associative_recall", seq_length=SEQ)


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _assert_equal(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(params=["bytes", "bpe", "synthetic"])
def any_fields(request, fields):
  return {
    "bytes": fields,
    "bpe": fields | dict(tokenizer="bpe", vocab_size=300),
    "synthetic": SYNTHETIC,
  }[request.param]


@pytest.mark.parametrize("packing", ["segments", "stream"])
def test_format(any_fields, packing):
  built = data.build(any_fields | {"packing": packing}, 4)
  for batch in [next(built.train_iterator(0)), *built.eval_batches("validation")]:
    for name in ("inputs", "targets", "positions", "segment_ids"):
      assert batch[name].shape == (4, SEQ) and batch[name].dtype == np.int32
    assert batch["weights"].shape == (4, SEQ) and batch["weights"].dtype == np.float32
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    assert batch["inputs"].max() < built.tokenizer.vocab_size
    assert not batch["weights"][batch["segment_ids"] == 0].any()


def _naive_row(window, bos, pad, packing):
  """One row by a loop over its tokens; `None` marks what lies past the end."""
  row = {name: [] for name in ("inputs", "targets", "positions", "segment_ids", "weights")}
  segment, position = 1, 0
  for i, (token, target) in enumerate(zip(window, window[1:], strict=False)):
    if token == bos and i and packing == "segments":
      segment, position = segment + 1, 0
    gone = target is None
    row["inputs"].append(pad if token is None else token)
    row["targets"].append(pad if gone else target)
    row["positions"].append(0 if gone else position)
    row["segment_ids"].append(0 if gone else segment)
    row["weights"].append(float(not gone and target != bos))
    position += 1
  return row


@pytest.mark.parametrize("packing", ["segments", "stream"])
def test_rows_against_a_loop(fields, packing):
  built = data.build(fields | {"packing": packing}, 4)
  windows = built.splits["validation"]
  tokens = [int(t) for t in windows.tokens] + [None] * 4 * SEQ
  got = list(built.eval_batches("validation"))
  rows = {name: np.concatenate([b[name] for b in got]) for name in got[0]}
  for i, begin in enumerate(range(0, len(windows.tokens) - 1, SEQ)):
    want = _naive_row(tokens[begin : begin + SEQ + 1], 256, 257, packing)
    for name, values in want.items():
      assert rows[name][i].tolist() == values, (name, i)
  assert i == windows.num_rows - 1
  assert not rows["weights"][i + 1 :].any() and not rows["segment_ids"][i + 1 :].any()


def test_training_learns_where_documents_end(fields):
  built = data.build(fields, 4)
  rows = built.training.rows(np.arange(built.training.num_rows))
  ends = rows["targets"] == built.tokenizer.bos_id
  assert ends.any() and (rows["weights"][ends] == 1).all()


def test_evaluation_weighs_every_raw_byte_once(fields):
  for change in ({}, dict(tokenizer="bpe", vocab_size=300)):
    built = data.build(fields | change, 4)
    for split in ("train", "validation"):
      weighed = b"".join(
        built.tokenizer.decode_bytes(b["targets"][b["weights"] > 0])
        for b in built.eval_batches(split)
      )
      assert weighed == built.raw_bytes(split)
      assert len(weighed) == built.summary[f"{split}_bytes"]


def test_raw_bytes_are_the_documents(fields, folder):
  built = data.build(fields, 4)
  together = built.raw_bytes("train") + built.raw_bytes("validation")
  assert len(together) == sum(p.stat().st_size for p in folder.iterdir())
  assert all(p.read_bytes() in together for p in folder.iterdir())


def test_the_whole_corpus_behind_a_limited_one(fields):
  limited = data.build(fields | dict(max_train_bytes=500), 1)
  assert len(limited.raw_bytes("train")) <= 500
  assert limited.whole_corpus_bytes() == data.build(fields, 1).raw_bytes("train")


def test_raw_bytes_of_a_few_batches(fields):
  built = data.build(fields, 4)
  first = list(built.eval_batches("validation", max_batches=2))
  assert len(first) == 2
  shown = built.tokenizer.decode_bytes(np.concatenate([b["targets"].ravel() for b in first]))
  assert shown == built.raw_bytes("validation", max_batches=2)


def test_every_window_exactly_once_per_epoch(fields):
  built = data.build(fields, 1)
  n = built.summary["train_windows"]
  want = sorted(tuple(r) for r in built.training.rows(np.arange(n))["inputs"].tolist())
  epochs = []
  iterator = built.train_iterator(3)
  for _ in range(3):
    rows = [tuple(b["inputs"][0].tolist()) for b in _take(iterator, n)]
    assert sorted(rows) == want
    epochs.append(rows)
  other = [tuple(b["inputs"][0].tolist()) for b in _take(built.train_iterator(4), n)]
  assert len({tuple(e) for e in [want, *epochs, other]}) == 5


def test_batches_straddle_epochs(fields):
  """No window is dropped or repeated where the batch size does not divide an epoch."""
  built = data.build(fields, 8)
  n = built.summary["train_windows"]
  assert n % 8
  rows = np.concatenate([b["inputs"] for b in _take(built.train_iterator(0), n // 4)])
  single = _take(data.build(fields, 1).train_iterator(0), len(rows))
  assert len(rows) > n
  np.testing.assert_array_equal(rows, np.concatenate([b["inputs"] for b in single]))


@pytest.mark.parametrize("n", [1, 2, 3, 255, 256, 1000])
def test_order_is_a_permutation(n):
  windows = batches.Windows(np.zeros(n + 1, np.uint16), data.ByteTokenizer(), 1, "stream", False)
  for epoch in range(3):
    order = windows.order(np.arange(n) + epoch * n, seed=2**32 - 1)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("process_count", [2, 4])
def test_rows_do_not_depend_on_the_number_of_processes(any_fields, process_count):
  def run(build):
    return [*_take(build.train_iterator(1), 3), *build.eval_batches("validation", 2)]

  want = run(data.build(any_fields, 8))
  parts = [run(data.build(any_fields, 8, p, process_count)) for p in range(process_count)]
  got = [
    {name: np.concatenate([b[name] for b in bs]) for name in bs[0]}
    for bs in zip(*parts, strict=True)
  ]
  _assert_equal(got, want)


@pytest.mark.parametrize("options", [dict(), dict(score_last=3)], ids=str)
def test_pieces_do_not_depend_on_the_number_of_processes(fields, options):
  def run(*process):
    built = data.build(fields, 4, *process)
    return list(built.eval_batches("train", seq_length=10, document_length=30, **options))

  parts = [run(p, 2) for p in range(2)]
  got = [
    {name: np.concatenate([b[name] for b in bs]) for name in bs[0]}
    for bs in zip(*parts, strict=True)
  ]
  _assert_equal(got, run())


def test_split_and_carry_the_state(any_fields):
  built = data.build(any_fields, 4)
  want = _take(built.train_iterator(5), 9)
  for cut in (0, 1, 4, 8):
    first = built.train_iterator(5)
    head = _take(first, cut)
    state = first.get_state()
    assert state == {"next_index": cut}
    _take(first, 3)  # What was prefetched or read after the state was taken does not matter.
    second = data.build(any_fields, 4).train_iterator(5)
    second.set_state(state)
    _assert_equal(head + _take(second, 9 - cut), want)


def test_state_is_the_same_on_every_process(fields):
  states = []
  for p in range(4):
    iterator = data.build(fields, 8, p, 4).train_iterator(0)
    _take(iterator, 5)
    states.append(iterator.get_state())
  assert states == [{"next_index": 5}] * 4


def test_prefetch_does_not_change_anything(fields, monkeypatch):
  runs = []
  for threads, ahead in ((0, 0), (1, 1), (4, 20)):
    monkeypatch.setattr(batches, "_READ_OPTIONS", grain.ReadOptions(threads, ahead))
    iterator = data.build(fields, 4).train_iterator(0)
    runs.append((_take(iterator, 12), iterator.get_state()))
  for got, state in runs[1:]:
    _assert_equal(got, runs[0][0])
    assert state == runs[0][1]


def test_resume_through_orbax(fields, tmp_path):
  iterator = data.build(fields, 4).train_iterator(0)
  _take(iterator, 3)
  with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
    manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    want = _take(iterator, 4)  # Training goes on while the checkpoint is being written.
    manager.wait_until_finished()
    restored = manager.restore(
      3,
      args=ocp.args.Composite(
        data=grain.checkpoint.CheckpointRestore(data.build(fields, 4).train_iterator(0))
      ),
    )
  _assert_equal(_take(restored["data"], 4), want)


_RUN = """
import sys, zlib, grain, orbax.checkpoint as ocp
from latentlab import data
path, cache, workdir, steps = sys.argv[1:]
iterator = data.build(dict(path=path, cache_dir=cache, seq_length=16, validation_fraction=0.2),
                      4).train_iterator(0)
with ocp.CheckpointManager(workdir) as manager:
  begin = manager.latest_step() or 0
  if begin:
    manager.restore(begin, args=ocp.args.Composite(
        data=grain.checkpoint.CheckpointRestore(iterator)))
  for step in range(begin + 1, int(steps) + 1):
    print(step, zlib.crc32(next(iterator)["inputs"]), flush=True)
    if step % 3 == 0:
      manager.save(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
      manager.wait_until_finished()
      print("saved", step, flush=True)
"""


def test_kill_and_resume(fields, tmp_path):
  """Batches after SIGKILL and resume are those of a run that was never killed."""
  uninterrupted = _take(data.build(fields, 4).train_iterator(0), 8)
  want = {i: str(zlib.crc32(b["inputs"])) for i, b in enumerate(uninterrupted, 1)}

  def start(steps, hash_seed):
    arguments = [fields["path"], fields["cache_dir"], str(tmp_path), str(steps)]
    return subprocess.Popen(
      [sys.executable, "-c", _RUN, *arguments],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": hash_seed},
    )

  seen = {}
  with start(10**6, "1") as process:
    for line in process.stdout:
      name, value = line.split()
      if name == "saved":
        process.send_signal(signal.SIGKILL)
        break
      seen[int(name)] = value
  with start(8, "2") as process:
    resumed = dict(line.split() for line in process.stdout)
  del resumed["saved"]
  resumed = {int(k): v for k, v in resumed.items()}
  assert min(resumed) > 3 and max(resumed) == 8
  assert seen | resumed == want


def test_seen_bytes(fields):
  built = data.build(fields, 4)
  n = built.summary["train_windows"]
  tokens = built.training.tokens
  rows = built.training.rows(np.arange(n))["inputs"]
  number = {tuple(row): i for i, row in enumerate(rows.tolist())}
  assert len(number) == n
  iterator = built.train_iterator(7)
  seen = np.zeros(len(tokens), bool)
  for count in range(1, n // 4 + 3):
    for row in next(iterator)["inputs"].tolist():
      begin = number[tuple(row)] * SEQ
      seen[begin : begin + SEQ + 1] = True
    assert built.seen_bytes(count, 7) == built.tokenizer.decode_bytes(tokens[seen])
  assert seen[: n * SEQ + 1].all()
  assert built.seen_bytes(0, 7) == b""
  assert built.seen_bytes(10**9, 7) == built.tokenizer.decode_bytes(tokens[: n * SEQ + 1])


def test_max_train_bytes(fields):
  built = data.build(fields | {"max_train_bytes": 500}, 4)
  assert 499 <= built.summary["train_bytes"] == len(built.raw_bytes("train")) <= 500
  assert built.summary["validation_bytes"] == data.build(fields, 4).summary["validation_bytes"]


def test_summary(fields):
  summary = data.build(fields, 4).summary
  assert summary["train_documents"] + summary["validation_documents"] == 40
  assert len(summary["corpus_digest"]) == 64
  assert summary["train_windows"] == (summary["train_tokens"] - 1) // SEQ


def test_corpus_without_validation(fields):
  built = data.build(fields | {"validation_fraction": 0}, 4)
  with pytest.raises(ValueError, match=r"split='validation' does not exist; choose from \['train'"):
    built.eval_batches("validation")


def _weighed(batches):
  """The targets that carry weight, in order, and the batches."""
  batches = list(batches)
  return np.concatenate([b["targets"][b["weights"] > 0] for b in batches]), batches


@pytest.mark.parametrize("seq_length", [1, 5, 15, 30])
def test_segments_of_documents_hold_the_same_targets_at_every_length(fields, seq_length):
  """Against a loop over documents; 30 targets a piece, most documents having a rest."""
  built = data.build(fields, 4)
  for split in ("train", "validation"):
    tokens = built.splits[split].tokens
    starts = [*np.flatnonzero(tokens == 256), len(tokens)]
    rows = []
    for begin, end in zip(starts, starts[1:], strict=False):
      for piece in range(begin, end - 30, 30):
        for place in range(piece, piece + 30, seq_length):
          rows.append(tokens[place : place + seq_length + 1])
    got = list(built.eval_batches(split, seq_length=seq_length, document_length=30))
    inputs, targets, weights, positions, segment_ids = (
      np.concatenate([b[name] for b in got])
      for name in ("inputs", "targets", "weights", "positions", "segment_ids")
    )
    n, per_batch = len(rows), 4 * 30 // seq_length
    assert len(inputs) == -(-n // per_batch) * per_batch
    np.testing.assert_array_equal(inputs[:n], [row[:-1] for row in rows])
    np.testing.assert_array_equal(targets[:n], [row[1:] for row in rows])
    assert weights[:n].all() and not weights[n:].any() and not segment_ids[n:].any()
    assert (segment_ids[:n] == 1).all()  # No window holds parts of two documents.
    assert (positions[:n] == np.arange(seq_length)).all()


def test_the_same_pieces_in_a_few_batches(fields):
  built = data.build(fields, 4)
  calls = [
    _weighed(built.eval_batches("train", 2, seq_length=n, document_length=30)) for n in (30, 10, 3)
  ]
  for targets, batches_ in calls:
    assert len(batches_) == 2 and len(targets) == 2 * 4 * 30
    np.testing.assert_array_equal(targets, calls[0][0])


@pytest.mark.parametrize("seq_length", [7, 12, 30])
def test_last_targets_of_a_piece_have_more_or_less_before_them(fields, seq_length):
  built = data.build(fields, 4)
  whole, _ = _weighed(built.eval_batches("train", seq_length=30, document_length=30))
  want = whole.reshape(-1, 30)[:, -7:].ravel()
  got, shown = _weighed(
    built.eval_batches("train", seq_length=seq_length, document_length=30, score_last=7)
  )
  np.testing.assert_array_equal(got, want)
  assert {b["inputs"].shape for b in shown} == {(4, seq_length)}


def test_last_targets_of_windows(fields):
  built = data.build(fields, 4)
  whole, some = (list(built.eval_batches("validation", score_last=n)) for n in (None, 5))
  for a, b in zip(whole, some, strict=True):
    assert (b["weights"][:, :-5] == 0).all()
    np.testing.assert_array_equal(b["weights"][:, -5:], a["weights"][:, -5:])
    for name in a.keys() - {"weights"}:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(document_length=24), "document_length=24 must be a multiple of seq_length=16"),
    (dict(document_length=-16), "document_length=-16 must be at least seq_length=16"),
    (dict(document_length=12, score_last=3), "document_length=12 must be at least seq_length=16"),
    (dict(document_length=1600), "document_length=1600 is longer than every document .* has 2"),
    (dict(score_last=17), r"score_last=17 of an evaluation must lie in \[1, seq_length=16\]"),
    (dict(score_last=-1), "score_last=-1"),
  ],
  ids=str,
)
def test_bad_protocols(fields, options, message):
  with pytest.raises(ValueError, match=message):
    data.build(fields, 4).eval_batches("train", **options)
  option = "score_last" if "score_last" in options else "document_length"
  with pytest.raises(ValueError, match=f"'synthetic' has no {option}"):
    data.build(SYNTHETIC, 4).eval_batches("train", **{option: SEQ})


def _write(tmp_path, content):
  (tmp_path / "x.txt").write_bytes(content)
  return dict(path=str(tmp_path / "x.txt"), cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "x.txt' is empty"),
    (b"ab\xffcd", "x.txt' is not utf-8: byte 0xff at offset 2"),
    (b"short", "data.seq_length=256 is longer than the training split of .* 5 tokens; shorten"),
  ],
)
def test_bad_corpus(tmp_path, content, message):
  with pytest.raises(ValueError, match=message):
    data.build(_write(tmp_path, content), 4)


def test_bad_fields(fields, tmp_path):
  with pytest.raises(ValueError, match="batch_size=6 must be .* multiple of process_count=4"):
    data.build(fields, 6, 0, 4)
  with pytest.raises(ValueError, match="batch_size=0"):
    data.build(fields, 0)
  with pytest.raises(ValueError, match="no field \\['shuffle'\\]"):
    data.build(fields | {"shuffle": True}, 4)
  with pytest.raises(ValueError, match="does not exist"):
    data.build(fields | {"path": str(tmp_path / "nowhere")}, 4)
  with pytest.raises(ValueError, match="seed=-1"):
    data.build(fields, 4).train_iterator(-1)
  with pytest.raises(ValueError, match="data.task='sort' is unknown; choose from"):
    data.build(SYNTHETIC | {"task": "sort"}, 4)
  with pytest.raises(ValueError, match="data.tokenizer='bpe'"):
    data.build(SYNTHETIC | {"tokenizer": "bpe"}, 4)
  with pytest.raises(ValueError, match="seq_length=4 of config.data is too short"):
    data.build(SYNTHETIC | {"seq_length": 4}, 4)
  with pytest.raises(ValueError, match="has no raw bytes"):
    data.build(SYNTHETIC, 4).raw_bytes("train")
