"""From the fields of `config.data` to a token file: find the corpus, its tokenizer, and encode.

Everything made here is named by a digest of what went into it, so a second call finds the first
one's work, and a killed one loses at most the step it was in.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tqdm

from latentlab.data import sources, token_file, tokenizers

logger = logging.getLogger(__name__)

SOURCES = ("standard_library", "path", "synthetic")
PACKINGS = ("segments", "stream")
LEARNED = ("bpe", "chars")
"""Tokenizers that are made from the corpus."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The fields of `config.data`.

  Attributes:
    source: "standard_library" (the embedded corpus), "path", or "synthetic" (tasks made in memory).
    path: A text, jsonl, Parquet or Arrow file, a folder of these, a data set that `datasets` saved
      to a disk, or a token file made by `experiments/prepare.py`. Once set, it takes the place of
      the embedded corpus.
    include: Patterns of file names to use in a folder.
    task: The synthetic task.
    task_options: Fields of that task's class in `data/synthetic.py`: `dict(num_needles=6)`, say.
    tokenizer: "bytes"; "chars", the characters of all splits; "bpe", trained on the training split;
      or the path of a tokenizer's json. Empty accepts whichever a token file was made with.
    vocab_size: Of "bpe"; elsewhere 0, or what the tokenizer has.
    seq_length: Tokens of a training window.
    packing: "segments" restarts positions and segment ids where a document starts; "stream" lets
      a window be one segment.
    validation_fraction: Part of the documents, or of a single document's characters, held out.
    max_train_bytes: Limits the training split to a random subset of this size; 0 takes all.
    cache_dir: Where tokenizers and token files are kept; empty means `$XDG_CACHE_HOME/latentlab`
      or `~/.cache/latentlab`.
  """

  source: str = "standard_library"
  path: str = ""
  include: Sequence[str] = ("*",)
  task: str = "copy"
  task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer: str = "bytes"
  vocab_size: int = 0
  seq_length: int = 256
  packing: str = "segments"
  validation_fraction: float = 0.05
  max_train_bytes: int = 0
  cache_dir: str = ""

  def __post_init__(self):
    if self.source not in SOURCES:
      raise ValueError(f"data.source={self.source!r} is unknown; choose from {SOURCES}.")
    if self.packing not in PACKINGS:
      raise ValueError(f"data.packing={self.packing!r} is unknown; choose from {PACKINGS}.")
    if self.seq_length < 1:
      raise ValueError(f"data.seq_length={self.seq_length} must be at least 1.")
    if isinstance(self.include, str):
      raise ValueError(f"data.include={self.include!r} must be a list of patterns, ('*.py',) say.")
    if self.source == "path" and not self.path:
      raise ValueError("data.source='path' needs data.path, a text file, folder or token file.")
    if self.source == "synthetic" and self.path:
      raise ValueError(
        f"data.path={self.path!r} has no meaning with data.source='synthetic'; "
        "leave one of them out."
      )
    if self.source != "synthetic" and self.task_options:
      raise ValueError(
        f"data.task_options={dict(self.task_options)} are of a synthetic task, and "
        f"data.source={self.source!r}; leave them out, or use data.source='synthetic'."
      )

  @classmethod
  def of(cls, fields) -> "DataConfig":
    """From a mapping, for instance an `ml_collections.ConfigDict`."""
    if isinstance(fields, cls):
      return fields
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
      raise ValueError(f"config.data has no field {unknown}; choose from {known}.")
    return cls(**fields)


def cache_dir(configured: str = "") -> pathlib.Path:
  """Where things made once are kept: `config.data.cache_dir`, or the user's own place for such."""
  if configured:
    return pathlib.Path(configured).expanduser()
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "latentlab"


def prepare(
  config: DataConfig,
  output: str | os.PathLike | None = None,
  progress: bool = True,
) -> token_file.TokenFile:
  """Makes the token file that `config` describes, or finds it made.

  Args:
    config: Its source is a corpus, not "synthetic".
    output: The token file; a name in the cache folder, made from the digest, if `None`.
    progress: Show progress bars where standard error is a terminal.
  """
  if config.path and token_file.is_token_file(config.path):
    return _ready(config, output)
  if output is not None:
    token_file.check_output(output)
  corpus = _corpus(config)
  cache = cache_dir(config.cache_dir)
  key = _key(corpus, config)
  path = cache / f"{corpus.name}-{key}.bin" if output is None else pathlib.Path(output)
  made = _find(path, key, verify=output is not None)
  if made is not None:
    return made
  tokenizer = _tokenizer(config, corpus, cache, key, progress)
  logger.info("Encoding %s with %s into %s.", corpus.name, tokenizer.kind, path)
  texts = {name: _texts(corpus, name, f"encoding {name}", progress) for name in corpus.splits}
  return token_file.write(
    path,
    tokenizer,
    texts,
    {"key": key, "corpus": corpus.name, "corpus_digest": corpus.digest, "skipped": corpus.skipped},
  )


def _ready(config: DataConfig, output: str | os.PathLike | None) -> token_file.TokenFile:
  """Opens a token file given as `data.path`, if it is what the other fields ask for."""
  if output is not None:
    raise ValueError(f"data.path={config.path!r} is a token file already; give the text.")
  if config.max_train_bytes:
    raise ValueError(
      f"data.max_train_bytes={config.max_train_bytes} cannot limit a token file; set"
      " it to 0, or prepare the text with it."
    )
  file = token_file.read(config.path)
  made_with = file.tokenizer
  if len(file.tokens) and (largest := int(file.tokens.max())) >= made_with.vocab_size:
    raise ValueError(
      f"data.path={config.path!r} holds the id {largest}, but its tokenizer has "
      f"{made_with.vocab_size} tokens; make it again with experiments/prepare.py."
    )
  remedy = (
    f"set data.tokenizer={made_with.kind!r} and data.vocab_size={made_with.vocab_size}, or "
    "make the token file again with experiments/prepare.py"
  )
  if config.vocab_size not in (0, made_with.vocab_size):
    raise ValueError(
      f"data.vocab_size={config.vocab_size}, but {str(file.path)!r} was made with a "
      f"vocabulary of {made_with.vocab_size}; {remedy}."
    )
  if config.tokenizer in ("", made_with.kind):
    return file
  learned = config.tokenizer in LEARNED
  wanted = config.tokenizer if learned else tokenizers.load(config.tokenizer).digest
  if wanted != made_with.digest:
    raise ValueError(
      f"data.tokenizer={config.tokenizer!r}, but {str(file.path)!r} was made with "
      f"{made_with.kind!r} of digest {made_with.digest[:12]}; {remedy}."
    )
  return file


def _corpus(config: DataConfig) -> sources.Corpus:
  skipped = 0
  if config.path:
    documents, name = sources.files(config.path, config.include), pathlib.Path(config.path).stem
  else:
    documents, skipped = sources.standard_library()
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
  return sources.split(name, documents, config.validation_fraction, config.max_train_bytes, skipped)


def _key(corpus: sources.Corpus, config: DataConfig) -> str:
  """Names what `prepare` makes: contents, split and limit (all in the digest), and tokenizer."""
  tokenizer = config.tokenizer or "bytes"
  if tokenizer not in ("bytes", *LEARNED):
    tokenizer = tokenizers.load(tokenizer).digest
  parts = [token_file.VERSION, corpus.digest, tokenizer, config.vocab_size]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _find(path: pathlib.Path, key: str, verify: bool) -> token_file.TokenFile | None:
  """The token file at `path` if it is whole and made from the same things."""
  if not token_file.paths(path)[1].exists():
    return None
  try:
    file = token_file.read(path, verify=verify)
  except ValueError as e:
    logger.warning("Making %s again: %s", path, e)
    return None
  return file if file.metadata.get("key") == key else None


def _tokenizer(
  config: DataConfig,
  corpus: sources.Corpus,
  cache: pathlib.Path,
  key: str,
  progress: bool,
) -> tokenizers.Tokenizer:
  if config.tokenizer == "bpe":
    path = cache / f"bpe-{key}.json"
    if path.exists():
      return tokenizers.load(path)
    logger.info("Training a BPE of %d tokens on %s.", config.vocab_size, corpus.name)
    texts = _texts(corpus, "train", "training BPE", progress)
    tokenizer = tokenizers.BPETokenizer.train(texts, config.vocab_size)
    tokenizer.save(path)
    return tokenizer
  if config.tokenizer == "chars":
    # Of validation too: a character that training never shows is still one that may be asked for.
    texts = (_texts(corpus, name, "characters", progress) for name in corpus.splits)
    tokenizer = tokenizers.CharTokenizer.train(itertools.chain.from_iterable(texts))
  else:
    tokenizer = tokenizers.load(config.tokenizer or "bytes")
  if config.vocab_size not in (0, tokenizer.vocab_size):
    raise ValueError(
      f"data.vocab_size={config.vocab_size}, but data.tokenizer="
      f"{config.tokenizer!r} has {tokenizer.vocab_size} tokens; set it to 0."
    )
  return tokenizer


def _texts(corpus: sources.Corpus, split: str, title: str, progress: bool) -> Iterator[str]:
  bar = tqdm.tqdm(
    total=corpus.num_bytes[split],
    desc=title,
    unit="B",
    unit_scale=True,
    leave=False,
    disable=None if progress else True,
  )
  with bar:
    for document in corpus.splits[split]:
      text = document.read()
      yield text
      bar.update(len(text.encode("utf-8")))
