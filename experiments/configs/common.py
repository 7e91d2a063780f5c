"""What configs share: arguments of a config file, defaults of a language model, the smoke size."""

import types
from typing import Any

import ml_collections
from ml_collections import config_dict

from latentlab.models import registry

# Of tables of which the loss alone is measured here, and of which the paper has no such figure.
COLUMN = "validation loss"
LOSS = {COLUMN: "validation/loss"}
UNKNOWN: dict[str, float | None] = {COLUMN: None}


def parse_arg(arg: str | None, **fields: Any) -> types.SimpleNamespace:
  """Parses what stands behind the colon of `--config=<file>.py:row=1b3,smoke`.

  Args:
    arg: Comma-separated `name=value`; a bare `name` switches a flag on.
    **fields: The names that are known: a tuple lists the choices, of which the first is the
      default; any other value is the default, and its type the value's.

  Returns:
    The values by name.

  Raises:
    ValueError: a name is unknown, a value is none of the choices or of another type.
  """
  values = {k: v[0] if isinstance(v, tuple) else v for k, v in fields.items()}
  for item in filter(None, (arg or "").split(",")):
    name, equals, text = item.partition("=")
    if name not in fields:
      raise ValueError(f"unknown config argument {name!r}; choose among {sorted(fields)}")
    default = fields[name]
    if not equals and not isinstance(default, bool):
      raise ValueError(f"config argument {name!r} needs a value: {name}=...")
    if isinstance(default, tuple):
      choices = {str(choice): choice for choice in default}
    elif isinstance(default, bool):
      choices = {"": True, "true": True, "false": False}
    else:
      try:
        values[name] = type(default)(text)
      except ValueError as e:
        raise ValueError(f"config argument {name}={text!r} is no {type(default).__name__}") from e
      continue
    if text not in choices:
      raise ValueError(f"unknown {name}={text!r}; choose one of {[c for c in choices if c]}")
    values[name] = choices[text]
  return types.SimpleNamespace(**values)


def run(*, seed: int = 0) -> ml_collections.ConfigDict:
  """What every training run has, whatever its task: optimiser, mesh, periods, checkpoints.

  Fields that no code reads cannot be added, so that a misspelt one is an error. Open are `task`,
  `evals` and `expected`.
  """
  c = ml_collections.ConfigDict()
  c.seed = seed
  c.task = ml_collections.ConfigDict()
  c.batch_size = 32
  c.optimizer = dict(
    name="adamw",
    peak_lr=1e-3,
    b1=0.9,
    b2=0.98,
    eps=1e-8,
    weight_decay=0.01,
    clip_norm=1.0,
    schedule="cosine",
    warmup_steps=100,
    end_lr_ratio=0.1,
    power=1.0,
    decay_embeddings=True,
    ema_decay=0.0,
    accumulate_steps=1,
  )
  c.mesh = dict(data=-1, fsdp=1, tensor=1, seq=1)
  c.parallelism = "jit"
  c.axis_rules = ()
  c.train_steps, c.log_steps, c.checkpoint_steps = 1_000, 20, 200
  c.checkpoint = dict(keep_last=2, keep_best="", best_mode="min")
  c.resume = c.init_from = ""
  c.init_rename = c.init_new = ()
  c.evals = ml_collections.ConfigDict()
  c.max_skipped_steps = 10
  c.logging = dict(tensorboard=False)
  c.expected = ml_collections.ConfigDict()
  return c


def lock(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Closes a config to unknown fields, but for sections that hold names of their own."""
  c.lock()
  for section in (c.task, c.evals, c.expected):
    section.unlock()
  return c


def language_model(*, seed: int = 0) -> ml_collections.ConfigDict:
  """Defaults of a language model's training run; `data.task_options` is open too."""
  c = run(seed=seed)
  c.task = dict(type="language_model", trainable=(".*",))
  c.model = model("transformer", num_layers=4, embed_dim=256, num_heads=4)
  c.data = dict(
    source="standard_library",
    path="",
    include=("*",),
    task="copy",
    task_options=ml_collections.ConfigDict(),
    tokenizer="bytes",
    vocab_size=0,
    seq_length=256,
    packing="segments",
    validation_fraction=0.05,
    max_train_bytes=0,
    cache_dir="",
  )
  c.evals = dict(
    validation=dict(
      type="perplexity", split="validation", every_steps=200, max_batches=16, num_buckets=4
    )
  )
  # What the end of training draws for the eye; 0 tokens for none.
  c.sample = dict(prompt="", num_tokens=0, temperature=0.8, top_p=0.95)
  lock(c).data.task_options.unlock()
  return c


def model(name: str, **values: Any) -> ml_collections.ConfigDict:
  """A model's section with every field that the model has, so that a flag can override each."""
  section = ml_collections.ConfigDict(dict(name=name, preset=config_dict.placeholder(str)))
  for field, (kind, default) in registry.fields(name).items():
    section[field] = config_dict.placeholder(kind) if default is None else default
  section.update(values)
  return section


SMOKE_EVALS = {
  "attention_mass": dict(num_samples=2),
  "many_shot": dict(num_samples=1, num_permutations=2, num_queries=2),
  "needles": dict(num_samples=2),
}
"""What is small about evaluations that read no split; of the others, two batches."""


def paper_alone(about: str) -> dict[str, str]:
  """`SCALES` of a table that has no small scale."""
  return dict(paper=f"{about} Corpus and tokenizer are not public.")


def smoke(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Shrinks a run to one that trains in seconds on a CPU, whatever its table is."""
  sizes = dict(num_layers=2, embed_dim=32, num_heads=2)
  c.model.update({field: size for field, size in sizes.items() if field in c.model})
  c.data.update(tokenizer="bytes", vocab_size=0, seq_length=32)
  c.batch_size = 8
  c.optimizer.warmup_steps = 2
  c.train_steps, c.log_steps, c.checkpoint_steps = 8, 2, 4
  for evaluation in c.evals.values():
    evaluation.update(every_steps=4, **SMOKE_EVALS.get(evaluation.type, dict(max_batches=2)))
  c.sample.num_tokens = min(c.sample.num_tokens, 16)
  return c
