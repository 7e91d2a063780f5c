import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf

from latentlab.data import tokenizers

TEXT = (
  "def f(x):\n  return x  # naïve café, 東京 🙂\n\n\n\tfor i in range(10): print(i)\n" * 40
  + "<bos> and <pad> are text here\r\n \n"
)


@pytest.fixture(scope="module")
def bpe():
  return tokenizers.BPETokenizer.train([TEXT, "print(range(10))"], 300)


@pytest.fixture(params=["bytes", "bpe", "chars"])
def tokenizer(request, bpe):
  if request.param == "chars":
    return tokenizers.CharTokenizer.train([TEXT, "\x00\x7f\u0080\U0010ffff"])
  return tokenizers.ByteTokenizer() if request.param == "bytes" else bpe


@pytest.mark.parametrize("text", [TEXT, "", " ", "\n", "a\n" * 7, "\x00\x7f\u0080\U0010ffff"])
def test_loses_nothing(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
  # Special tokens come from the data pipeline alone, never from a text that spells their names.
  assert not np.isin(ids, [tokenizer.bos_id, tokenizer.pad_id]).any()


def test_special_tokens_have_no_bytes(tokenizer):
  special = [tokenizer.bos_id, tokenizer.pad_id]
  assert tokenizer.decode_bytes(special) == b""
  assert (np.flatnonzero(tokenizer.byte_lengths == 0) == sorted(special)).all()
  assert len(tokenizer.token_bytes) == tokenizer.vocab_size


def test_cut_character_decodes_to_replacement(tokenizer):
  ids = tokenizer.encode("é")
  assert tokenizer.decode_bytes(ids) == "é".encode()
  assert tokenizers.ByteTokenizer().decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_characters_are_numbered_by_code_point():
  tokenizer = tokenizers.CharTokenizer.train(["ca", "b🙂", "é", ""])
  assert tokenizer.characters == "abcé🙂"
  assert tokenizer.encode("🙂cabé").tolist() == [4, 2, 0, 1, 3]
  assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (5, 6, 7)
  assert tokenizer.byte_lengths.tolist() == [1, 1, 1, 2, 4, 0, 0]
  assert tokenizer.digest != tokenizers.CharTokenizer.train(["abc"]).digest


@pytest.mark.parametrize("text", ["", "d", "aaZb\U0010ffffZ"])
def test_characters_that_are_unknown(text):
  tokenizer = tokenizers.CharTokenizer("abc")
  if not text:
    assert tokenizer.encode(text).shape == (0,)
    return
  shown = {"d": "'d'"}.get(text, r"'Z\\U0010ffff'")
  with pytest.raises(ValueError, match=f"the text has {shown}, none of the 3 characters"):
    tokenizer.encode(text)


def test_bad_alphabets():
  for characters in ("", "ba", "aab"):
    with pytest.raises(ValueError, match="different, sorted"):
      tokenizers.CharTokenizer(characters)
  with pytest.raises(ValueError, match="found no character"):
    tokenizers.CharTokenizer.train([""])
  with pytest.raises(ValueError, match="characters=3 is no string"):
    tokenizers.from_dict({"kind": "chars", "characters": 3})


def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "tokenizer.json")
  loaded = tokenizers.load(tmp_path / "tokenizer.json")
  assert loaded.digest == tokenizer.digest
  np.testing.assert_array_equal(loaded.encode(TEXT), tokenizer.encode(TEXT))
  assert (loaded.bos_id, loaded.pad_id) == (tokenizer.bos_id, tokenizer.pad_id)
  assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_pieces_do_not_change_the_encoding(bpe, monkeypatch):
  whole = bpe.encode(TEXT)
  monkeypatch.setattr(tokenizers, "_PIECE_CHARS", 16)
  assert len(list(tokenizers._pieces(TEXT))) > 20
  assert "".join(tokenizers._pieces(TEXT)) == TEXT
  np.testing.assert_array_equal(bpe.encode(TEXT), whole)


def test_training_is_deterministic_across_processes(bpe):
  code = (
    "from latentlab.data import tokenizers; import sys; "
    "print(tokenizers.BPETokenizer.train([sys.argv[1], 'print(range(10))'], 300).digest)"
  )
  out = subprocess.run(
    [sys.executable, "-c", code, TEXT],
    capture_output=True,
    text=True,
    check=True,
    env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
  )
  assert out.stdout.strip() == bpe.digest


def test_reads_a_file_of_another_release(tmp_path):
  """GPT-2's layout: one special token, for the start and for padding."""
  model = hf.Tokenizer(hf.models.BPE())
  model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = hf.decoders.ByteLevel()
  model.train_from_iterator(
    [TEXT],
    hf.trainers.BpeTrainer(
      vocab_size=280,
      special_tokens=["<|endoftext|>"],
      show_progress=False,
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  model.save(str(tmp_path / "gpt2.json"))
  tokenizer = tokenizers.load(tmp_path / "gpt2.json")
  assert tokenizer.bos_id == tokenizer.pad_id == 0
  assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"decoder": None}, "byte-level BPE"),
    ({"normalizer": {"type": "NFC"}}, "changes the text"),
    ({"added_tokens": []}, "no special token"),
  ],
)
def test_refuses_what_is_not_lossless(bpe, tmp_path, change, message):
  path = tmp_path / "other.json"
  path.write_text(json.dumps(bpe.to_dict() | change))
  with pytest.raises(ValueError, match=message):
    tokenizers.load(path)


def test_errors(tmp_path):
  with pytest.raises(ValueError, match="vocab_size=257 is too small"):
    tokenizers.BPETokenizer.train([TEXT], 257)
  with pytest.raises(ValueError, match="more tokens than the corpus can teach"):
    tokenizers.BPETokenizer.train(["ab"], 5000)
  with pytest.raises(ValueError, match="data.tokenizer='nowhere.json' cannot be read"):
    tokenizers.load("nowhere.json")
  (tmp_path / "bad.json").write_text("{")
  with pytest.raises(ValueError, match="is not json"):
    tokenizers.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[1]", "bad.json' is no tokenizer"),
    ('{"vocab": {}}', "bad.json' is no tokenizer"),
    ('{"model": 3}', "bad.json' cannot be read by the tokenizers library"),
    (
      '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}',
      "bad.json' .*Token `b` out of vocabulary",
    ),
  ],
)
def test_broken_files_are_named(tmp_path, text, message):
  (tmp_path / "bad.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    tokenizers.load(tmp_path / "bad.json")
