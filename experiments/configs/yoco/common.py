"""What YOCO's tables share: models, recipes, and one `get_config`.

A run is a model under a recipe: `yoco_gret_160m` is that of tables 5 and 6, `yoco_gret_3b` the
paper's main model. Tables name the runs of their rows, so that tables of one recipe share what they
train.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from experiments import runs as runs_lib
from experiments.configs import common

RUNS = "runs"

_GRET = dict(name="yoco", self_attention="gated_retention")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  "retnet": ("RetNet", dict(name="retnet", head_norm="rms")),
  "h3": ("H3 in all layers; the paper's is a hybrid with two of attention", dict(name="h3")),
  "gretnet": (
    "gRetNet: gated retention in all layers",
    dict(name="retnet", head_norm="rms", decay="gated", value_factor=1.0),
  ),
  "transformer": ("Transformer", dict(name="transformer")),
  "sparse_transformer": (
    "Transformer with a window in all layers",
    dict(name="transformer", mask="sliding_window"),
  ),
  "yoco_swa": ("YOCO with a sliding window", dict(name="yoco", self_attention="sliding_window")),
  "yoco_gret": ("YOCO with gated retention", _GRET),
  "yoco_3_1": ("three quarters of self-decoder, [3:1]", _GRET | dict(self_share=0.75)),
  "yoco_1_3": ("a quarter of self-decoder, [1:3]", _GRET | dict(self_share=0.25)),
  "yoco_0_1": ("no self-decoder, [0:1]", _GRET | dict(self_share=0.0)),
  "yoco_unstacked": (
    "its cross-decoder begins with the embeddings",
    _GRET | dict(layout="unstacked"),
  ),
  "yoco_interleaved": (
    "layers of both kinds in turn, without a shared cache",
    _GRET | dict(layout="interleaved"),
  ),
}
COMPARED = ("transformer", "yoco_swa", "yoco_gret")
LAYOUTS = tuple(name for name in MODELS if name.startswith("yoco_"))

# Layers, width, and heads of softmax attention; those of gated retention are 256 wide.
SIZES = {
  "160m": (12, 768, 12),
  "400m": (24, 1024, 16),
  "830m": (24, 1536, 12),
  "1b4": (24, 2048, 16),
  "2b7": (32, 2560, 20),
  "6b8": (32, 4096, 32),
  "13b": (40, 5120, 40),
  "3b": (26, 3072, 24),
}

# Section 5.1 with appendix D, 5.2 with E, 5.3 with F; tokens of a step and steps.
_SCALING = dict(seq_length=2048, step=2**18, steps=40_000, b2=0.98, weight_decay=0.05)
_SCALING |= dict(warmup=375, end=0.0)
_MAIN = dict(size="3b", step=2**22, b2=0.95, weight_decay=0.1, warmup=1000, end=0.04)
# Warm-up and decay of the extensions, and their batch, are unknown.
_LONGER = _MAIN | dict(warmup=0, end=1.0)
PAPER: dict[str, dict[str, Any]] = {
  **{
    size: _SCALING | dict(size=size, peak_lr=lr)
    for size, lr in (
      *dict.fromkeys(("160m", "400m", "830m", "1b4"), 1.5e-4).items(),
      *dict.fromkeys(("2b7", "6b8", "13b"), 7.5e-5).items(),
    )
  },
  "160m_16k": _SCALING
  | dict(
    size="160m", seq_length=16_384, steps=7_629, peak_lr=1.5e-4, warmup=0, after="160m", window=2048
  ),
  # A schedule of 5T tokens, of which the paper has trained 1.6T: 400k steps.
  "3b": _MAIN | dict(seq_length=4096, steps=1_192_093, peak_lr=3.2e-4),
  "3b_64k": _LONGER
  | dict(seq_length=2**16, steps=1_431, peak_lr=8e-5, rope_base=640e3, after="3b"),
  "3b_256k": _LONGER
  | dict(seq_length=2**18, steps=954, peak_lr=4e-5, rope_base=5e6, after="3b_64k"),
  "3b_1m": _LONGER
  | dict(seq_length=2**20, steps=358, peak_lr=2e-5, rope_base=80e6, after="3b_256k"),
}

LONG, LONG_BASE = 512, 160_000.0
"""What small models are extended to, and with which RoPE base: 16 times as large for four times the
tokens, where the paper has 64 times for 16 times."""
SMALL: dict[str, dict[str, Any]] = {
  "160m": dict(seq_length=128, steps=600, peak_lr=3e-3),
  "window": dict(seq_length=64, batch_size=16, steps=3_000, peak_lr=4e-3, window=8),
  "longer": dict(seq_length=LONG, steps=60, peak_lr=1e-3, rope_base=LONG_BASE, after="160m"),
}

WINDOW_SMALL = (
  "0.2M parameters (without embeddings), 3000 steps of 16 rows of 64 bytes of a synthetic task: "
  "six needles of a mark, a letter and a digit, all asked for. A window has 8 tokens, so "
  "four layers reach 28 back."
)

SCALES = {
  "paper": "The paper's shapes in the recipe of its scaling curves: that of the 160M models is "
  "unknown but for their shape, and corpus and tokenizer are not public.",
  "small": "0.2M parameters (without embeddings) on bytes of Python's standard library, 600 steps "
  "of 8 windows of 128; windows of attention are half of that. Losses are nats per byte; AR-hit is "
  "of bytes that end a pair of the context.",
}

# Columns of tables 5 and 6.
BY_RECALL = {
  "valid": "validation/loss",
  "AR-hit": "validation/recall_loss",
  "first-occur": "validation/other_loss",
}

COLUMN, LOSS, UNKNOWN = common.COLUMN, common.LOSS, common.UNKNOWN
paper_alone = common.paper_alone

NEEDLES = (1, 2, 4, 8)
"""Table 4."""
NEEDLE_LENGTHS = tuple(range(128, 1025, 128))
"""Figure 4: thousands of tokens."""


def runs() -> dict[str, tuple[str, str]]:
  """The model and the recipe of each run."""
  pairs = dict.fromkeys(PAPER, COMPARED) | {"160m": tuple(MODELS), "longer": COMPARED}
  pairs["window"] = ("sparse_transformer", "yoco_swa", "yoco_gret")
  pairs["160m_16k"] = ("h3", "sparse_transformer", *COMPARED)
  pairs |= dict.fromkeys(("3b", "3b_64k", "3b_256k", "3b_1m"), ("yoco_gret",))
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
  r = known[recipe]
  c = common.language_model(seed=arg.seed)
  sizes = _paper(c, r) if arg.scale == "paper" else _small(c, r)
  if after := r.get("after"):  # `experiments.tables` looks for it in its workdir.
    home = runs_lib.folder("yoco", RUNS, arg.scale)
    c.init_from = str(home / f"{name}_{after}/seed{c.seed}")
  c.model = _model(name, recipe, **sizes, rope_base=r.get("rope_base", 10_000.0))
  if arg.scale == "paper":
    c.model.update(dtype="bfloat16", remat="full")
  _EVALS.get(recipe, runs_lib.evaluate_text)(c, arg.scale)
  if arg.scale == "small" and recipe == "160m" and name in COMPARED:
    _extend(c)
  if arg.smoke:
    common.smoke(c)
    c.init_from = ""
    if name in LAYOUTS:
      c.model.update(num_self_layers=min(c.model.num_self_layers, 1), num_self_heads=2)
      c.model.num_kv_heads = 2
  return c


def _model(
  name: str,
  recipe: str,
  num_layers: int,
  embed_dim: int,
  num_heads: int,
  num_state_heads: int,
  window: int,
  rope_base: float,
) -> ml_collections.ConfigDict:
  fields = dict(MODELS[name][1])
  self_share = fields.pop("self_share", 0.5)
  m = common.model(**fields, num_layers=num_layers, embed_dim=embed_dim, feed_forward="swiglu")
  m.update(norm="rms", norm_eps=1e-5, scale_embeddings=True)
  m.tie_embeddings = recipe.startswith("160m") or recipe in SMALL
  if "rope_base" in m:
    m.rope_base = rope_base
  if m.name == "h3":
    m.update(num_heads=embed_dim // 8, init="linear")
    if embed_dim < 512:
      m.state_dim = 16  # As in RetNet's table 5.
  elif m.name == "retnet":
    m.num_heads = num_state_heads
  elif m.name == "transformer":
    m.update(num_heads=num_heads, init="linear")
    if m.mask == "sliding_window":
      m.mask_size = window
  else:
    layers = round(self_share * num_layers)
    m.update(num_heads=num_heads, num_self_layers=layers, window=window)
    m.num_self_heads = num_heads if name == "yoco_swa" else num_state_heads
    if recipe.startswith("3b"):
      m.update(num_kv_heads=8, mlp_dim=8192)
  return m


def _paper(c: ml_collections.ConfigDict, r: Mapping[str, Any]) -> dict[str, int]:
  c.data.update(tokenizer="bpe", vocab_size=100_288, seq_length=r["seq_length"])
  c.batch_size = r["step"] // r["seq_length"]
  _optimise(c, r["steps"], r["peak_lr"], r["warmup"], r["end"])
  c.optimizer.update(b2=r["b2"], weight_decay=r["weight_decay"])
  c.log_steps, c.checkpoint_steps = 50, 500
  num_layers, embed_dim, num_heads = SIZES[r["size"]]
  return dict(
    num_layers=num_layers,
    embed_dim=embed_dim,
    num_heads=num_heads,
    num_state_heads=num_heads if r["size"] == "3b" else embed_dim // 256,
    window=r.get("window", 1024),
  )


def _small(c: ml_collections.ConfigDict, r: Mapping[str, Any]) -> dict[str, int]:
  c.data.update(tokenizer="bytes", vocab_size=0, seq_length=r["seq_length"])
  c.batch_size = r.get("batch_size", 1024 // r["seq_length"])
  _optimise(c, r["steps"], r["peak_lr"], r["steps"] // 20, 0.0)
  c.optimizer.update(b2=0.98, weight_decay=0.05)
  c.log_steps, c.checkpoint_steps = 20, r["steps"] // 3
  return dict(
    num_layers=4, embed_dim=64, num_heads=4, num_state_heads=2, window=r.get("window", 64)
  )


def _optimise(
  c: ml_collections.ConfigDict, steps: int, peak_lr: float, warmup: int, end: float
) -> None:
  c.train_steps = steps
  c.optimizer.update(name="adamw", schedule="linear", end_lr_ratio=end, b1=0.9)
  c.optimizer.update(peak_lr=peak_lr, warmup_steps=warmup)


def _extend(c: ml_collections.ConfigDict) -> None:
  """The same text in longer windows, without and with the larger RoPE base."""
  options = dict(type="perplexity", split="validation", every_steps=c.train_steps)
  options |= dict(seq_length=LONG, max_batches=64 * c.data.seq_length // LONG)
  c.evals.long = options
  c.evals.long_base = options | dict(model=dict(rope_base=LONG_BASE))


def _long(c: ml_collections.ConfigDict, scale: str) -> None:
  """Table 4, and figures 4 and 5."""
  runs_lib.evaluate_text(c, scale)
  c.evals.validation.num_buckets = 8
  options = dict(type="needles", hay="text", num_queries=1, every_steps=c.train_steps)
  elevenths = options | dict(seq_length=2**17, num_samples=5)
  elevenths["depths"] = tuple(k / 11 for k in range(1, 11))
  for n in NEEDLES:
    c.evals[f"needles_{n}"] = elevenths | dict(num_needles=n, seed=42)
  tenths = options | dict(num_samples=10, depths=tuple(k / 10 for k in range(11)))
  for k in NEEDLE_LENGTHS:
    c.evals[f"needle_{k}k"] = tenths | dict(num_needles=1, seq_length=1024 * k)


def _window(c: ml_collections.ConfigDict, scale: str) -> None:
  del scale
  c.data.update(source="synthetic", task="multi_needle")
  c.data.task_options.update(num_needles=6, num_queries=6, key_length=1, value_length=1)
  c.evals = dict(needles=dict(type="needles", every_steps=c.train_steps))


_EVALS = {"3b_1m": _long, "window": _window}
