import json

import numpy as np
import pytest

from latentlab.data import token_file, tokenizers

BYTES = tokenizers.ByteTokenizer()


@pytest.fixture
def file(tmp_path):
  splits = {"train": ["ab", "", "é"], "validation": ["c"]}
  return token_file.write(tmp_path / "x.bin", BYTES, splits, {"corpus": "x"})


def test_round_trip(file):
  b = BYTES.bos_id
  assert file.split("train").tolist() == [b, 97, 98, b, b, 0xC3, 0xA9]
  assert file.split("validation").tolist() == [b, 99]
  assert file.splits["train"] == token_file.Split(0, 7, 4, 3)
  assert isinstance(file.tokens, np.memmap) and file.tokens.dtype == np.uint16
  assert not file.tokens.flags.writeable
  for path in (file.path, file.path.with_suffix(".json")):
    again = token_file.read(path, verify=True)
    assert (again.sha256, again.summary) == (file.sha256, file.summary)
    assert token_file.is_token_file(path)
  assert sorted(p.name for p in file.path.parent.iterdir()) == ["x.bin", "x.json"]


def test_summary_counts(file):
  assert file.summary["train_bytes"] == 4 and file.summary["validation_tokens"] == 2
  assert file.summary["corpus"] == "x" and file.summary["vocab_size"] == 258


def test_an_interrupted_write_leaves_the_old_file(file):
  def texts():
    yield "new"
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    token_file.write(file.path, BYTES, {"train": texts()}, {})
  assert token_file.read(file.path, verify=True).sha256 == file.sha256
  assert sorted(p.name for p in file.path.parent.iterdir()) == ["x.bin", "x.json"]


def test_truncated(file):
  file.path.write_bytes(file.path.read_bytes()[:-1])
  with pytest.raises(ValueError, match="has 17 bytes, but its sidecar says 18; it is truncated"):
    token_file.read(file.path)


def test_changed(file):
  data = bytearray(file.path.read_bytes())
  data[2] ^= 1
  file.path.write_bytes(data)
  with pytest.raises(ValueError, match="sha256"):
    token_file.read(file.path, verify=True)


@pytest.mark.parametrize("name", ["x.bin", "x.json"])
def test_half_of_the_pair_is_missing(file, name):
  other = file.path.with_name({"x.bin": "x.json", "x.json": "x.bin"}[name])
  (file.path.parent / name).unlink()
  with pytest.raises(ValueError, match="a token file is a pair"):
    token_file.read(other)


@pytest.mark.parametrize(
  ("text", "message"),
  [("{", "is not json"), ("[]", "is not the sidecar"), ('{"version": 0}', "is not the sidecar")],
)
def test_bad_sidecar(file, text, message):
  file.path.with_suffix(".json").write_text(text)
  with pytest.raises(ValueError, match=message):
    token_file.read(file.path)


def test_changed_tokenizer(file):
  sidecar = file.path.with_suffix(".json")
  layout = json.loads(sidecar.read_text())
  sidecar.write_text(json.dumps(layout | {"tokenizer_digest": "0"}))
  with pytest.raises(ValueError, match="tokenizer .* was changed"):
    token_file.read(file.path)


def test_lossy_tokenizer_is_refused(tmp_path):
  class Lossy(tokenizers.ByteTokenizer):
    def encode(self, text):
      return super().encode(text.strip())

  with pytest.raises(ValueError, match="not lossless: a text of 2 bytes became tokens of 1"):
    token_file.write(tmp_path / "x.bin", Lossy(), {"train": ["a "]}, {})
  assert not list(tmp_path.iterdir())


def test_overwrites_nothing_of_the_user(tmp_path):
  (tmp_path / "x.json").write_text('{"my": "corpus"}')
  assert not token_file.is_token_file(tmp_path / "x.json")
  with pytest.raises(ValueError, match="another file"):
    token_file.write(tmp_path / "x.bin", BYTES, {"train": ["a"]}, {})
  with pytest.raises(ValueError, match="must end in '.bin'"):
    token_file.write(tmp_path / "x.v1", BYTES, {"train": ["a"]}, {})
  assert (tmp_path / "x.json").read_text() == '{"my": "corpus"}'


def test_wide_vocabulary_takes_four_bytes(tmp_path):
  class Wide(tokenizers.ByteTokenizer):
    vocab_size = 70_000

  tokens = token_file.write(tmp_path / "x.bin", Wide(), {"train": ["a"]}, {}).path.read_bytes()
  assert np.frombuffer(tokens, "<u4").tolist() == [256, 97]


def test_unknown_split(file):
  with pytest.raises(ValueError, match=r"split='test' .* \['train', 'validation'\]"):
    file.split("test")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"sha256": None}, r"lacks or spoils \['sha256'\]"),
    ({"splits": []}, r"lacks or spoils \['splits'\]"),
    ({"dtype": "O"}, "dtype='O'"),
    ({"dtype": "<f2"}, "dtype='<f2'"),
    ({"splits": {"train": {"begin": 0}}}, "split 'train' of"),
    (
      {"splits": {"train": dict(begin=0, end=10, num_bytes=1, num_documents=1)}},
      "does not lie in its 9 tokens",
    ),
    ({"splits": {"train": dict(begin=4, end=2, num_bytes=1, num_documents=1)}}, "'train'"),
    ({"tokenizer": {"model": 3}}, "the tokenizer in .*x.json' cannot be read"),
  ],
)
def test_spoilt_sidecar(file, change, message):
  sidecar = file.path.with_suffix(".json")
  layout = {**json.loads(sidecar.read_text()), **change}
  sidecar.write_text(json.dumps({k: v for k, v in layout.items() if v is not None}))
  assert token_file.is_token_file(sidecar)
  with pytest.raises(ValueError, match=message):
    token_file.read(file.path)
