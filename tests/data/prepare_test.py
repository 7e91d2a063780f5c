import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import forked_binaries
import ml_collections
import pytest

from latentlab.data import prepare, sources, token_file

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
  folder = tmp_path / "texts"
  folder.mkdir()
  for i in range(30):
    (folder / f"{i}.txt").write_text(f"text {i}: " + "the cat sat on the mat. " * (i + 1))
  return dict(path=str(folder), cache_dir=str(tmp_path / "cache"), validation_fraction=0.2)


def test_second_call_finds_the_first_ones_work(config, monkeypatch):
  first = prepare.prepare(prepare.DataConfig(**config))
  monkeypatch.setattr(token_file, "write", None)
  assert prepare.prepare(prepare.DataConfig(**config)).summary == first.summary
  assert first.path.parent == pathlib.Path(config["cache_dir"])


@pytest.mark.parametrize(
  "change",
  [
    {"max_train_bytes": 100},
    {"validation_fraction": 0.5},
    {"tokenizer": "bpe", "vocab_size": 270},
    {"tokenizer": "chars"},
    {"include": ("1*.txt",)},
  ],
)
def test_other_fields_make_another_file(config, change):
  paths = {prepare.prepare(prepare.DataConfig(**c)).path for c in (config, config | change)}
  assert len(paths) == 2


def test_changed_text_makes_another_file(config):
  first = prepare.prepare(prepare.DataConfig(**config))
  (pathlib.Path(config["path"]) / "0.txt").write_text("another text")
  assert prepare.prepare(prepare.DataConfig(**config)).path != first.path


def test_characters_are_those_of_every_split_of_a_text(tmp_path):
  text = "to be, or not to be: " * 9 + "zé?"  # The last three are held out.
  (tmp_path / "one.txt").write_text(text)
  fields = dict(path=str(tmp_path / "one.txt"), cache_dir=str(tmp_path), validation_fraction=0.1)
  file = prepare.prepare(prepare.DataConfig(**fields, tokenizer="chars"))
  assert file.tokenizer.characters == "".join(sorted(set(text)))
  cut = int(len(text) * 0.9)  # As nanoGPT cuts.
  for split, part in (("train", text[:cut]), ("validation", text[cut:])):
    bos, *ids = file.split(split).tolist()
    assert bos == file.tokenizer.bos_id and file.tokenizer.decode(ids) == part
  again = dict(path=str(file.path), tokenizer="chars")
  assert prepare.prepare(prepare.DataConfig(**again)).sha256 == file.sha256
  for other, message in (
    (dict(tokenizer="bpe"), "data.tokenizer='bpe', but .* was made with 'chars'"),
    (dict(vocab_size=9), "vocab_size=9, but"),
  ):
    with pytest.raises(ValueError, match=message):
      prepare.prepare(prepare.DataConfig(**again | other))
  with pytest.raises(ValueError, match="data.tokenizer='chars' has 14 tokens"):
    prepare.prepare(prepare.DataConfig(**fields, tokenizer="chars", vocab_size=65))


def test_bpe_learns_from_the_training_split_alone(config):
  config |= dict(tokenizer="bpe", vocab_size=268)
  unseen = {"validation": "zqzqzqzq " * 500}
  for document in sources.split("x", sources.files(config["path"]), 0.2).splits["validation"]:
    document.path.write_text(unseen["validation"])
  file = prepare.prepare(prepare.DataConfig(**config))
  assert file.tokenizer.vocab_size == 268
  assert not any(b"zq" in token for token in file.tokenizer.token_bytes)
  assert any(b"at" in token for token in file.tokenizer.token_bytes)


def test_killed_between_training_and_encoding_keeps_the_tokenizer(config, monkeypatch):
  config = prepare.DataConfig(**config, tokenizer="bpe", vocab_size=270)
  with monkeypatch.context() as m:
    m.setattr(token_file, "write", None)
    with pytest.raises(TypeError):
      prepare.prepare(config)
  monkeypatch.setattr(prepare.tokenizers.BPETokenizer, "train", None)
  assert prepare.prepare(config).tokenizer.vocab_size == 270


def test_truncated_cache_is_made_again(config):
  config = prepare.DataConfig(**config)
  first = prepare.prepare(config)
  first.path.write_bytes(b"")
  assert prepare.prepare(config).sha256 == first.sha256
  assert token_file.read(first.path, verify=True)


def test_output_is_opened_and_checked(config, tmp_path):
  fields = prepare.DataConfig(**config, tokenizer="bpe", vocab_size=270)
  made = prepare.prepare(fields, output=tmp_path / "out.bin")
  for tokenizer, vocab_size in (("", 0), ("bpe", 0), ("bpe", 270)):
    again = prepare.DataConfig(path=str(made.path), tokenizer=tokenizer, vocab_size=vocab_size)
    assert prepare.prepare(again).sha256 == made.sha256
  with pytest.raises(ValueError, match="data.vocab_size=300, but .* vocabulary of 270; set"):
    prepare.prepare(prepare.DataConfig(path=str(made.path), tokenizer="bpe", vocab_size=300))
  with pytest.raises(ValueError, match="data.tokenizer='bytes', but .* made with 'bpe'"):
    prepare.prepare(prepare.DataConfig(path=str(made.path)))
  other = prepare.tokenizers.BPETokenizer.train(["an entirely different text"], 262)
  other.save(tmp_path / "other.json")
  with pytest.raises(ValueError, match="other.json', but .* made with 'bpe'"):
    prepare.prepare(prepare.DataConfig(path=str(made.path), tokenizer=str(tmp_path / "other.json")))
  with pytest.raises(ValueError, match="max_train_bytes=9 cannot limit a token file"):
    prepare.prepare(prepare.DataConfig(path=str(made.path), tokenizer="", max_train_bytes=9))
  with pytest.raises(ValueError, match="is a token file already"):
    prepare.prepare(prepare.DataConfig(path=str(made.path)), output=tmp_path / "again.bin")


def test_loaded_tokenizer(config, tmp_path):
  trained = prepare.prepare(prepare.DataConfig(**config, tokenizer="bpe", vocab_size=270)).tokenizer
  trained.save(tmp_path / "bpe.json")
  loaded = prepare.DataConfig(**config, tokenizer=str(tmp_path / "bpe.json"))
  assert prepare.prepare(loaded).tokenizer.digest == trained.digest


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"source": "web"}, r"data.source='web' is unknown; choose from \('standard_library'"),
    ({"packing": "tight"}, "data.packing='tight'"),
    ({"seq_length": 0}, "data.seq_length=0"),
    ({"include": "*.py"}, "data.include='\\*.py' must be a list"),
    ({"source": "path"}, "needs data.path"),
    ({"source": "synthetic", "path": "x"}, "has no meaning"),
    ({"sequence_length": 3}, r"no field \['sequence_length'\]; choose from \['source'"),
    ({"source": "path", "path": __file__, "vocab_size": 300}, "data.vocab_size=300, but"),
  ],
)
def test_errors(change, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    fields = ml_collections.ConfigDict(change | {"cache_dir": str(tmp_path)})
    prepare.prepare(prepare.DataConfig.of(fields))


def test_cache_dir(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert prepare.cache_dir() == tmp_path / "latentlab"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert prepare.cache_dir() == tmp_path / "home/.cache/latentlab"


def test_binary_killed_and_run_again(config, tmp_path):
  output = tmp_path / "out.bin"
  command = [
    sys.executable,
    "-m",
    "experiments.prepare",
    f"--path={config['path']}",
    "--tokenizer=bpe",
    "--vocab_size=270",
    f"--output={output}",
    f"--cache_dir={config['cache_dir']}",
  ]
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
  time.sleep(0.5)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert not output.with_suffix(".json").exists()
  summary = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
  assert summary == token_file.read(output, verify=True).summary


def test_ids_beyond_the_vocabulary(tmp_path):
  class Bad(prepare.tokenizers.ByteTokenizer):
    bos_id = 300

    def to_dict(self):
      return prepare.tokenizers.ByteTokenizer().to_dict()

  path = token_file.write(tmp_path / "x.bin", Bad(), {"train": ["a"]}, {}).path
  with pytest.raises(ValueError, match="holds the id 300, but its tokenizer has 258"):
    prepare.prepare(prepare.DataConfig(path=str(path)))


def test_output_is_checked_before_any_work(config, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, "_corpus", None)
  with pytest.raises(ValueError, match="out.v1' must end in '.bin'"):
    prepare.prepare(prepare.DataConfig(**config), output=tmp_path / "out.v1")


def test_binary_fails_with_one_message(config, tmp_path):
  output = f"--output={tmp_path / 'out.bin'}"
  for arguments, message in (
    (["--pth=x", output], "Unknown flag --pth (did you mean path?); choose among --debug, --sou"),
    (["--workdir=x", output], "Unknown flag --workdir"),
    ([], "--output is missing"),
    ([f"--path={tmp_path / 'none.txt'}", output], "none.txt"),
  ):
    code, _, errors = forked_binaries.run("prepare", *arguments)
    assert code == 1 and message in errors and "Traceback" not in errors, errors
  arguments = f"--path={config['path']}", f"--cache_dir={config['cache_dir']}", output
  code, _, errors = forked_binaries.run("prepare", *arguments)
  assert code == 0 and "Encoding texts with bytes" in errors
