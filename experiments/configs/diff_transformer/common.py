"""What the Differential Transformer's tables share: models, recipes, and one `get_config`.

A run is a model under a recipe: `diff_3b` is the paper's main model, `diff_ablation` that of table
6. Tables name the runs of their rows, so that tables of one recipe share what they train.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments import runs as runs_lib
from experiments.configs import common
from latentlab.layers.feed_forward import default_width

RUNS = "runs"

# What a model differs in, and how many heads it has of a Transformer's.
MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
  "transformer": ("Transformer", dict(name="transformer"), 1),
  "transformer_wide": (
    "Transformer, half of the heads and each twice as wide",
    dict(name="transformer"),
    0.5,
  ),
  "transformer_norm": (
    "the same, with a norm of each head",
    dict(name="transformer", head_norm=True),
    0.5,
  ),
  "diff": ("Differential Transformer", dict(name="diff_transformer"), 0.5),
  "diff_no_norm": (
    "no norm of each head, nor its factor",
    dict(name="diff_transformer", head_norm=False),
    0.5,
  ),
  "diff_init_0.8": ("lambda_init 0.8", dict(name="diff_transformer", lambda_init=0.8), 0.5),
  "diff_init_0.5": ("lambda_init 0.5", dict(name="diff_transformer", lambda_init=0.5), 0.5),
  # Its queries are twice as many; a narrower feed-forward makes up for them.
  "diff_v2": ("its successor V2", dict(name="diff_transformer_v2"), 1),
}

# Those whose logits are quantised and looked at, and that have the synthetic tasks.
_MEASURED = ("transformer", "diff", "diff_v2")
BITS = (16, 8, 6, 4)

# Layers, width and a Transformer's heads; what the paper calls them.
SIZES = {
  "830m": (24, 1536, 16),
  "1b4": (24, 2048, 16),
  "2b8": (32, 2560, 20),
  "6b8": (32, 4096, 32),
  "13b1": (40, 5120, 40),
  "3b": (28, 3072, 24),
}

# Sections 3.1, 3.2 and 3.8, tables 9 and 11, appendix C. A step has 0.25M, 4M or 1M tokens:
# runs are of 10B (scaling), 350B or 1T (3B), 1.5B (64K), 20B and 2B (mathematics).
_SCALING = dict(size="1b4", seq_length=2048, step=2**18, steps=40_000, b2=0.98, weight_decay=0.05)
_MAIN = dict(size="3b", seq_length=4096, step=2**22, steps=83_446, b2=0.95, weight_decay=0.1)
_MAIN |= dict(peak_lr=3.2e-4, warmup=1000, end=0.04)
# Warm-up and decay of what follows are unknown: there is none here.
_FURTHER = dict(warmup=0, end=1.0, after="3b")
PAPER: dict[str, dict[str, Any]] = {
  "ablation": _SCALING | dict(peak_lr=1.5e-4, warmup=375, end=0.0),
  **{
    size: _SCALING | dict(size=size, peak_lr=lr, warmup=375, end=0.0)
    for size, lr in (("830m", 1.5e-4), ("2b8", 1.5e-4), ("6b8", 7.5e-5), ("13b1", 7.5e-5))
  },
  "3b": _MAIN,
  "needles": _MAIN,
  "3b_1t": _MAIN | dict(steps=238_419),
  "64k": _MAIN | _FURTHER | dict(seq_length=65_536, steps=358, peak_lr=8e-5, rope_base=640_000.0),
  "math": _MAIN | _FURTHER | dict(steps=4_768, peak_lr=8e-5),
  "reasoning": _MAIN | _FURTHER | dict(step=2**20, steps=1_907, peak_lr=1e-5, after="math"),
}

# Layers, width, heads; window, rows, steps, rate.
SMALL: dict[str, tuple[int, int, int, int, int, int, float]] = {
  "ablation": (3, 64, 8, 128, 8, 600, 3e-3),
  "needles": (3, 64, 8, 64, 16, 1_500, 4e-3),
  "shots": (3, 64, 8, 32, 32, 3_000, 4e-3),
}
SMALL["scaled"] = SMALL["ablation"]  # But for the size of embeddings, as in all but the first.

SCALES = {
  "paper": "The paper's recipe; corpus and tokenizer are not public, and whether 3B shares keys "
  "among heads is unknown.",
  "small": "160k parameters (without embeddings) on bytes of Python's standard library, 600 steps "
  "of 8 windows of 128. Losses are nats per byte; AR-hit is of bytes that end a pair of the "
  "context.",
}

NEEDLES_SMALL = (
  "160k parameters (without embeddings), 1500 steps of 16 rows of 64 bytes of a synthetic task. "
  "Six needles of a mark, a letter and two digits, all of which are asked for."
)
SHOTS_SMALL = (
  "160k parameters (without embeddings), 3000 steps of 32 rows of 32 bytes of a synthetic task. "
  "Eight items of a letter, of four classes."
)

NEEDLES = {1: 1, 2: 2, 4: 2, 6: 2}
"""Table 2: needles, and how many are asked for."""
NEEDLE_LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64)
"""Figure 5: thousands of tokens."""

COLUMN, LOSS, UNKNOWN = common.COLUMN, common.LOSS, common.UNKNOWN
paper_alone = common.paper_alone


def harness(*accuracies: float, shots: int = 0) -> dict[str, float | None]:
  """Accuracies of tables 1 and 8, which are not measured here."""
  names = ("ARC-C", "ARC-E", "BoolQ", "HellaSwag", "OBQA", "PIQA", "WinoG", "average")
  names = (f"{name}, {shots} examples" for name in names)
  return UNKNOWN | dict(zip(names, accuracies, strict=True))


def runs() -> dict[str, tuple[str, str]]:
  """The model and the recipe of each run."""
  pairs = {"ablation": MODELS}
  pairs |= dict.fromkeys(("needles", "shots"), _MEASURED)
  pairs["scaled"] = ("transformer", "diff")
  pairs |= {recipe: ("transformer", "diff") for recipe in PAPER if recipe not in pairs}
  return {f"{m}_{recipe}": (m, recipe) for recipe, models in pairs.items() for m in models}


def row(model: str, recipe: str, expected: Mapping[str, float | None], **fields: Any) -> dict:
  """A row of a table: a model under a recipe."""
  return runs_lib.row(MODELS, model, recipe, expected) | fields


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """A run, with the arguments `row`, `scale`, `smoke` and `seed`."""
  arg = common.parse_arg(arg, row=tuple(runs()), scale=tuple(SCALES), smoke=False, seed=0)
  name, recipe = runs()[arg.row]
  known = PAPER if arg.scale == "paper" else SMALL
  if recipe not in known:
    raise ValueError(f"row={arg.row!r} has no scale={arg.scale!r}; choose another")
  c = common.language_model(seed=arg.seed)
  _, fields, heads = MODELS[name]
  if arg.scale == "paper":
    num_layers, embed_dim, num_heads = _paper(c, known[recipe], name)
  else:
    num_layers, embed_dim, num_heads = _small(c, known[recipe])
    # A normalised head of unit size drowns embeddings of the size that they begin with otherwise.
    fields = fields | dict(scale_embeddings=recipe in ("needles", "scaled", "shots"))
  # The original release's layers; its epsilon.
  sizes = dict(num_layers=num_layers, embed_dim=embed_dim, num_heads=int(num_heads * heads))
  c.model = common.model(**fields, **sizes, feed_forward="swiglu", init="linear", norm_eps=1e-5)
  if name == "diff_v2":
    c.model.mlp_dim = default_width("swiglu", embed_dim) - embed_dim // 3
  if arg.scale == "paper":
    c.model.update(dtype="bfloat16", remat="full")
    c.model.rope_base = known[recipe].get("rope_base", 10_000.0)
  _EVALS.get(recipe, runs_lib.evaluate_text)(c, arg.scale)
  if recipe == "ablation" and name in _MEASURED:
    _measure(c)
  if arg.smoke:
    seq_length = c.data.seq_length
    common.smoke(c)
    c.init_from = ""
    if recipe == "needles" and arg.scale == "small":  # Shorter rows do not hold its needles.
      c.data.seq_length = seq_length
  return c


def _paper(c: ml_collections.ConfigDict, r: Mapping[str, Any], model: str) -> tuple[int, int, int]:
  c.data.update(tokenizer="bpe", vocab_size=100_288, seq_length=r["seq_length"])
  c.batch_size = r["step"] // r["seq_length"]
  c.optimizer.update(name="adamw", peak_lr=r["peak_lr"], warmup_steps=r["warmup"])
  c.optimizer.update(schedule="linear", end_lr_ratio=r["end"])
  c.optimizer.update(b1=0.9, b2=r["b2"], weight_decay=r["weight_decay"])
  c.train_steps, c.log_steps, c.checkpoint_steps = r["steps"], 50, 500
  if "after" in r:  # `experiments.tables` looks for it in its workdir.
    home = runs_lib.folder("diff_transformer", RUNS, "paper")
    c.init_from = str(home / f"{model}_{r['after']}/seed{c.seed}")
  return SIZES[r["size"]]


def _small(c: ml_collections.ConfigDict, sizes: tuple) -> tuple[int, int, int]:
  *model, seq_length, batch_size, steps, peak_lr = sizes
  c.data.update(tokenizer="bytes", vocab_size=0, seq_length=seq_length)
  c.batch_size = batch_size
  c.optimizer.update(name="adamw", peak_lr=peak_lr, warmup_steps=steps // 20)
  c.optimizer.update(schedule="linear", end_lr_ratio=0.0, b1=0.9, b2=0.98, weight_decay=0.05)
  c.train_steps, c.log_steps, c.checkpoint_steps = steps, 20, steps // 4
  return tuple(model)


def _measure(c: ml_collections.ConfigDict) -> None:
  """Table 5 and figure 8, of a quarter of the text."""
  options = dict(split="validation", max_batches=c.evals.validation.max_batches // 4)
  options["every_steps"] = c.train_steps
  c.evals.activations = dict(type="activations", **options)
  c.evals.bits_all = dict(type="perplexity", **options)
  for bits in BITS:
    c.evals[f"bits_{bits}"] = c.evals.bits_all.to_dict() | dict(model=dict(logit_bits=bits))


def _needles(c: ml_collections.ConfigDict, scale: str) -> None:
  """Table 2; at the small scale table 3, and the task that is trained."""
  options = dict(type="needles", num_samples=50, every_steps=c.train_steps)
  if scale == "paper":
    runs_lib.evaluate_text(c, scale)
    options["hay"] = "text"
  else:
    c.data.update(source="synthetic", task="multi_needle")
    c.data.task_options.update(num_needles=6, num_queries=6, key_length=1, value_length=2)
    # As many needles as in training; table 3 does not tell its number.
    c.evals = dict(attention=dict(type="attention_mass", every_steps=c.train_steps))
  for needles, queries in NEEDLES.items():
    c.evals[f"needles_{needles}"] = options | dict(num_needles=needles, num_queries=queries)


def _long(c: ml_collections.ConfigDict, scale: str) -> None:
  """Figures 4 and 5."""
  runs_lib.evaluate_text(c, scale)
  c.evals.validation.num_buckets = 8
  options = dict(type="needles", hay="text", num_needles=8, num_samples=50)
  for k in NEEDLE_LENGTHS:
    c.evals[f"needles_{k}k"] = options | dict(seq_length=1024 * k, every_steps=c.train_steps)


def _shots(c: ml_collections.ConfigDict, scale: str) -> None:
  """Figures 6, 7 and 11."""
  del scale
  c.data.update(source="synthetic", task="many_shot")
  c.data.task_options.update(num_items=8, num_classes=4, item_length=1)
  options = dict(type="many_shot", num_samples=8, every_steps=c.train_steps)
  c.evals = dict(shots=options, shots_in_turn=options | dict(order="alternating"))
  c.evals.shots_longer = options | dict(seq_length=2 * c.data.seq_length)


_EVALS = {"needles": _needles, "64k": _long, "shots": _shots}
