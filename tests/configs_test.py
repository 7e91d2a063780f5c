"""Every config: all rows and scales build, at full size and abstractly; one row a file trains."""

import dataclasses
import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import tables
from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab.data import media, media_files, mixed
from latentlab.models import latent_tokenizer
from latentlab.models.language_model import num_params
from latentlab.train import latents, loop, metrics, optim
from latentlab.train.tasks import build_task

_CONFIGS = pathlib.Path(__file__).parent.parent / "experiments/configs"
_FILES = sorted(
  p.relative_to(_CONFIGS).with_suffix("")
  for p in _CONFIGS.rglob("*.py")
  if p.stem not in ("__init__", "common")
)


def _module(file):
  return importlib.import_module(".".join(["experiments.configs", *file.parts]))


def _arguments(file):
  """What can stand behind the colon, `smoke` and `seed` aside."""
  module = _module(file)
  if not hasattr(module, "ROWS"):
    return [""]
  runs = dict.fromkeys(row.run for row in tables.describe(module).rows.values())
  return [f"row={run},scale={scale}" for run, scale in itertools.product(runs, module.SCALES)]


# Once where tables share their runs.
_EVERY = list(
  {
    (_module(file).get_config, argument): (file, argument)
    for file in _FILES
    for argument in _arguments(file)
  }.values()
)
_traced = set()  # Kinds of models whose parameters and losses this process has traced.
_each = pytest.mark.parametrize("file, argument", _EVERY, ids=[f"{f}:{a}" for f, a in _EVERY])


def _config(file, argument="", *more):
  return _module(file).get_config(",".join(filter(None, (argument, *more))))


def _vocab_size(config):
  return config.data.vocab_size or data_lib.ByteTokenizer().vocab_size


def _task(config):
  """The task of a config, whose data need not be there."""
  kind = config.task.type
  if kind == "latent_tokenizer":
    if config.data.source.endswith("folder"):  # The user's.
      config.data.path = "media"
    media.MediaConfig.of(config.data.to_dict())
    return build_task(config, 0)
  if kind != "language_model":
    return build_task(config, 0, _summary(config))
  if config.data.source == "path":  # The user's.
    config.data.path = "text.txt"
  data_lib.DataConfig.of(config.data.to_dict())
  assert config.data.vocab_size or config.data.tokenizer in ("bytes", "chars")
  return build_task(config, _vocab_size(config))


def _summary(config):
  """What the data of latents would say of itself, of equal runs of one class in ten."""
  first, *others = latents.modalities(config).values()
  length = config.data.seq_length or 8 + max(
    latent_tokenizer.build_config(part.tokenizer.model.to_dict()).num_latents
    for part in (first, *others)
  )
  more = dict(text_vocab_size=258, seq_length=length, documents_per_row=1)
  return _of_latents(first) | more | dict(others={p.data.modality: _of_latents(p) for p in others})


def _of_latents(part):
  mixed.LatentDataConfig.of(part.data.to_dict())
  c = latent_tokenizer.build_config(part.tokenizer.model.to_dict())
  return dict(
    dim=c.dim,
    num_latents=c.num_latents,
    equal_lengths=True,
    num_classes=10,
    noise=dataclasses.asdict(c.noise),
    mean=0.0,
    std=1.0,
    media_shape=list(c.media_shape),
    codebook_size=c.codebook_size,
  )


def _batch(config, task):
  """The shapes of a batch."""
  ints = lambda shape, *names: dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
  floats = lambda shape, *names: dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.float32))
  rows = config.batch_size
  if config.task.type == "latent_tokenizer":
    media_shape = (rows, *task.model.config.media_shape)
    return floats(media_shape, "media") | floats((rows,), "weights") | ints((rows,), "labels")
  length = config.data.seq_length
  if config.task.type != "language_model":
    length = task.config.data.seq_length
  shape = (rows, length)
  batch = ints(shape, "inputs", "targets", "segment_ids") | floats(shape, "weights")
  if config.task.type == "language_model":
    return batch | ints(shape, "positions")
  for name, part in latents.modalities(config).items():
    of_part = _of_latents(part)
    fields = ["latents", "scales"] if of_part["noise"]["kind"] == "learned" else ["latents"]
    names = [f"{n}{field}/{name}" for field in fields for n in ("", "next_")]
    batch |= floats((*shape, of_part["dim"]), *names)
    if of_part["codebook_size"]:
      batch |= ints(shape, f"codes/{name}", f"next_codes/{name}")
  batch |= ints(shape, "kinds", "next_kinds", "modes")
  return batch | {"droppable": jax.ShapeDtypeStruct(shape, jnp.bool_)}


@_each
def test_builds(file, argument):
  config = _config(file, argument)
  task = _task(config)
  assert optim.make_schedule(config.optimizer, config.train_steps)(0) > 0
  # Rows that differ in sizes alone have one program; names and switches say what they are made of.
  made_of = {k: x for k, x in config.model.items() if isinstance(x, str | bool) or x is None}
  kind = (str(config.task.type), *sorted((k, str(x)) for k, x in made_of.items() if k != "preset"))
  tokenizer = (config.get("tokenizer") or {}).get("model", {}).get("bottleneck")
  kind += (
    bool(config.get("others")),
    tokenizer,
    config.get("latents", {}).get("head", {}).get("kind"),
  )
  if kind in _traced:
    return
  _traced.add(kind)
  params = jax.eval_shape(task.init, jax.random.key(0))
  batch = _batch(config, task)
  for group in task.groups:
    args = () if group.count is None else (jax.eval_shape(group.count, batch),)
    grads, terms = jax.eval_shape(
      jax.grad(lambda p, *args, f=group.loss: ((t := f(p, *args)).total, t), has_aux=True),
      params,
      batch,
      jax.random.key(0),
      *args,
    )
    assert terms.total.shape == terms.weight.shape == ()
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


@_each
def test_seed_and_smoke_are_arguments(file, argument):
  assert _config(file, argument, "seed=3").seed == 3
  small = _config(file, argument, "smoke")
  assert small.train_steps <= 20 and _task(small)


@pytest.mark.parametrize("file", _FILES, ids=str)
def test_an_unknown_argument_is_refused(file):
  with pytest.raises(ValueError, match="unknown config argument 'smok'"):
    _config(file, _arguments(file)[0], "smok")


def _flat(fields, prefix=""):
  """`{"model.mask": "causal", ...}` of nested fields."""
  return {
    name: x
    for field, value in fields.items()
    for name, x in (
      _flat(value, f"{prefix}{field}.") if isinstance(value, dict) else {prefix + field: value}
    ).items()
  }


def _one_of_each_kind(configs):
  """Their evaluations, without those that differ from one before them in numbers alone.

  Those that draw are dear: one of each type, and none where others draw it.
  """
  seen, evals = set(), {}
  for number, config in enumerate(configs):
    for name, fields in config.evals.to_dict().items():
      kind = tuple((f, x if isinstance(x, str) else None) for f, x in sorted(_flat(fields).items()))
      if fields["type"] in ("captions", "generation", "speech"):
        kind = fields["type"]
        if config.get("others"):
          continue
      if kind not in seen:
        seen.add(kind)
        evals[f"{name}_of_{number}" if name in evals else name] = fields
  return evals


def _kind_of_run(config):
  """What of a run no test of a task, a model or a source has by itself: that they fit together."""
  data, captions = config.data, config.data.get("condition") in ("caption", "both")
  of_latents = data.get("modality"), captions, bool(config.get("others"))
  return config.task.type, config.model.name, data.source, *of_latents


def _runs():
  """Files in groups whose last rows are of one kind, by the first file's name."""
  groups = {}
  for file in {_module(file).get_config: file for file in _FILES}.values():
    config = _config(file, _arguments(file)[-1], "smoke")
    # One of each of these is trained in latentlm_models_test.py, from models.py.
    if config.task.type not in ("dit", "vq"):
      groups.setdefault(_kind_of_run(config), []).append(file)
  return {str(files[-1]): files for files in groups.values()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """A place for the classifiers that samples are looked at with: one for all configs of a media."""
  return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("files", _runs().values(), ids=_runs())
def test_one_row_trains(files, cache, tmp_path):
  """One run for files of one task over one kind of data, with every kind of their evaluations."""
  (tmp_path / "text.txt").write_text("Nobody expects the quick brown fox to jump again. " * 400)
  configs = [_config(file, _arguments(file)[-1], "smoke") for file in files]
  config = configs[-1]
  if config.task.type == "language_model":
    config.data.path = str(tmp_path / "text.txt")
  elif config.data.source == "wav_folder":
    sound = np.sin(np.arange(2 * config.data.num_samples) / 9)
    for name in ("a", "b", "c", "d"):
      media_files.write_wav(tmp_path / f"sounds/{name}.wav", sound, config.data.sample_rate)
    config.data.update(path=str(tmp_path / "sounds"), split_pattern="d")
  if "cache_dir" in config.data:
    config.data.cache_dir = str(cache)
  for part in [config, *(config.get("others") or {}).values()]:
    if part.get("tokenizer"):
      part.tokenizer.train_steps = part.tokenizer.checkpoint_steps = 2
      part.tokenizer.evals = {}
      config.sample.num_samples = part.tokenizer.sample.num_samples = 0  # Tested elsewhere.
  config.train_steps = config.checkpoint_steps = 2
  evals = _one_of_each_kind(configs)
  config.evals = ml_collections.ConfigDict(evals)
  loop.train(config, tmp_path / "run")
  last = metrics.read_metrics(tmp_path / "run/metrics.jsonl")[-1]
  assert last["step"] == 2 and last["train/loss"] > 0
  assert all(any(k.startswith(f"eval/{name}/") for k in last) for name in evals)


@pytest.mark.parametrize("file", [f for f in _FILES if hasattr(_module(f), "ROWS")], ids=str)
def test_a_table_measures_what_it_says(file, tmp_path):
  table = tables.describe(_module(file))
  columns = {column for row in table.rows.values() for column in row.expected}
  assert columns & set(table.metrics)
  for row in table.rows.values():
    assert row.about and all(x is None or x > 0 for x in row.expected.values())
  for scale in table.scales:  # Each metric has an evaluation.
    tables.make_cells(table, tmp_path, scale=scale, seeds=["0"])


def _body_params(config: ml_collections.ConfigDict) -> int:
  task = build_task(config, _vocab_size(config))
  params = jax.eval_shape(task.init, jax.random.key(0))
  return sum(
    x.size
    for path, x in jax.tree.leaves_with_path(params)
    if x.ndim > 2 and "decoder" in jax.tree_util.keystr(path)
  )


@pytest.mark.parametrize("scale, width, layers", [("paper", 1024, 16), ("small", 64, 3)])
def test_ablations_have_equal_sizes(scale, width, layers):
  file = pathlib.Path("retnet/table6_ablations")
  rows = _module(file).ROWS
  sizes = {row: _body_params(_config(file, f"row={row},scale={scale}")) for row in rows}
  assert set(sizes.values()) == {12 * layers * width**2}, sizes


def test_ablations_see_the_same_text_at_both_lengths():
  config = _config(pathlib.Path("retnet/table6_ablations"), "scale=small")
  short, long = config.evals.validation, config.evals.validation_4x
  assert long.seq_length == 512 == 4 * config.data.seq_length
  assert short.max_batches * config.data.seq_length == long.max_batches * long.seq_length


@pytest.mark.parametrize("setting, size", [("cpu", 796_160), ("gpu", 10_647_552)])
def test_nanogpts_benchmark_compares_equal_sizes(setting, size):
  file = pathlib.Path("nanogpt") / setting
  totals = {}
  for row in _module(file).ROWS:
    config = _config(file, f"row={row}")
    task = build_task(config, vocab_size=65 + 2)
    totals[row] = num_params(task.model.config)["total"]
  learned = config.model.max_length * config.model.embed_dim
  assert totals == {"transformer": size, "retnet": size, "gpt2": size + learned}


def test_evaluates_at_another_length(tmp_path):
  (tmp_path / "text.txt").write_text("Nobody expects the quick brown fox to jump again. " * 400)
  data = data_lib.build(
    dict(path=str(tmp_path / "text.txt"), cache_dir=str(tmp_path), seq_length=16), batch_size=4
  )
  short, long = (list(data.eval_batches("validation", seq_length=n)) for n in (None, 64))
  assert short[0]["inputs"].shape == (4, 16) and long[0]["inputs"].shape == (4, 64)
  assert sum(b["weights"].sum() for b in short) == sum(b["weights"].sum() for b in long)
  assert (long[0]["inputs"][0] == short[0]["inputs"].ravel()).all()
  for fields, message in (
    (dict(seq_length=-1), "seq_length=-1 of an evaluation"),
    (dict(seq_len=8), "unknown fields"),
  ):
    with pytest.raises(ValueError, match=message):
      eval_lib.build(
        {"x": dict(type="perplexity", every_steps=1, **fields)},
        type("Task", (), {"model": None}),
        data,
        lambda f: f,
      )
