"""LatentLM, its head alone, and the DiT beside it, by the names of their original release.

https://arxiv.org/abs/2412.08635; microsoft/unilm, `LatentLM/models/Transformer.py` and `DiT.py`.
On images the release maps latents into the model by a convolution with a bias, whose patch must be
one latent here; on flat latents by a matrix without one. The weights carry over as they are, but
for the scales of our norms, which the release has not: they come as ones, and go into the matrices
behind them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from latentlab.interop.weights import (
  Entry,
  StateDict,
  check_same,
  check_told,
  count_layers,
  export_weights,
  import_weights,
  mixer_kinds,
  sizes_from,
)
from latentlab.layers import DiffusionHeadConfig, Shared, initializers
from latentlab.layers.feed_forward import ratio_width
from latentlab.models.dit import DiT, DiTConfig, grid_positions
from latentlab.models.latentlm import (
  RELEASE,
  LatentLM,
  LatentLMConfig,
  ModalityConfig,
  SpecialTokens,
  empty_items,
)
from latentlab.models.transformer import transformer
from latentlab.typing import Params

_MODEL, _HEAD, _DIT = (f"the {x} of LatentLM's release" for x in ("Transformer", "head", "DiT"))
_IN_HEAD, _IN = "noisy_x_embedder", "x_embedder"
_OF_HEAD = (_IN_HEAD, "t_embedder", "condition_layer", "diffusion_blocks", "final_layer")
_POSITIONS = "pos_embed"
_CLASSES = "y_embedder.embedding_table.weight"
_BLOCKS = "blocks"
_LAYERS = "language/decoder/stage_0/block_0"
_EMBEDDING = "language/embedder/embedding"
_SOFTMAX = "language/head/kernel"
_IMAGE = "image"


@dataclasses.dataclass(frozen=True)
class ImportedHead:
  """A head from elsewhere.

  Attributes:
    config: The head; what it predicts, and at which noise, no weights tell.
    embed_dim: Width of its hidden vectors.
    dim: Channels of its latents.
    params: Its parameters.
  """

  config: DiffusionHeadConfig
  embed_dim: int
  dim: int
  params: Params


@dataclasses.dataclass(frozen=True)
class ImportedModel:
  """A model of latents by class from elsewhere.

  Attributes:
    config: The model; what its head predicts, and at which noise, no weights tell.
    params: Its parameters.
  """

  config: LatentLMConfig
  params: Params


@dataclasses.dataclass(frozen=True)
class ImportedDiT:
  """A DiT from elsewhere.

  Attributes:
    config: The model; what it predicts, and at which noise, no weights tell.
    params: Its parameters.
  """

  config: DiTConfig
  params: Params


def head_entries(depth: int, *, input_bias: bool = False) -> tuple[Entry, ...]:
  """The table of a head's names.

  Args:
    depth: Its layers.
    input_bias: Whether the map from latents has a bias.
  """
  layers = [
    entry
    for i in range(depth)
    for entry in (
      _matrix(f"diffusion_blocks.{i}.adaLN_modulation.1", f"layers_{i}/modulation"),
      *_feed_forward(f"diffusion_blocks.{i}.mlp", f"layers_{i}/feed_forward"),
    )
  ]
  condition = _matrix("condition_layer.linear", "condition_proj")
  return (*_ends(_IN_HEAD, "noisy_proj", input_bias), condition, *layers)


def dit_entries(*, input_bias: bool = False) -> tuple[Entry, ...]:
  """The table of a DiT's names, its fused projection split into `q`, `k` and `v`.

  Args:
    input_bias: Whether the map from latents has a bias.
  """
  block, stacked = _BLOCKS + ".{layer}.", dict(stack=_BLOCKS)
  return (
    *_ends(_IN, "latent_proj", input_bias),
    Entry(_CLASSES, "classes"),
    _matrix(block + "adaLN_modulation.1", "modulation", **stacked),
    *(_matrix(f"{block}attn.{x}", f"attention/{x}_proj", **stacked) for x in "qkv"),
    _matrix(block + "attn.proj", "attention/out_proj", contracted=2, **stacked),
    *_feed_forward(block + "mlp", "feed_forward", **stacked),
  )


def import_head(state: StateDict, fields: Mapping[str, Any] | None = None) -> ImportedHead:
  """The head out of a whole model's state dict, or out of its part of one.

  Args:
    state: The weights.
    fields: Fields of `DiffusionHeadConfig` that weights do not tell, such as `diffusion`.

  Raises:
    ValueError: names or shapes are not those of such a head, or its patch is not one latent.
  """
  state = {name: x for name, x in state.items() if name.split(".")[0] in _OF_HEAD}
  state, bias = _flat_input(state, _IN_HEAD)
  names = dict(out="final_layer.linear.weight", mlp="diffusion_blocks.0.mlp.fc1.weight")
  found = sizes_from(_HEAD, state, names)
  (dim, embed_dim), mlp_dim = found["out"].shape, len(found["mlp"])
  sizes = dict(depth=count_layers(state, "diffusion_blocks."), mlp_dim=mlp_dim, input_bias=bias)
  config = DiffusionHeadConfig(**sizes | dict(fields or {}))
  table = head_entries(config.depth, input_bias=bias)
  params = import_weights(table, state, head_shapes(config, embed_dim, dim))
  return ImportedHead(config, embed_dim, dim, params)


def export_head(config: DiffusionHeadConfig, params: Params) -> StateDict:
  """A head by the release's names, its map from latents a convolution where it has a bias.

  Raises:
    ValueError: the release has no such head.
  """
  _check_head(config)
  table = head_entries(config.depth, input_bias=config.input_bias)
  return _unflat_input(export_weights(table, params), _IN_HEAD)


def _check_head(config: DiffusionHeadConfig) -> None:
  if config.norm_gain or not config.condition_proj or config.norm_eps != 1e-6:
    raise ValueError(
      f"{_HEAD} has norms without a gain, an epsilon of 1e-6 and a condition_proj, not "
      f"norm_gain={config.norm_gain}, norm_eps={config.norm_eps}, "
      f"condition_proj={config.condition_proj}"
    )


def head_shapes(config: DiffusionHeadConfig, embed_dim: int, dim: int) -> Params:
  """Shapes and dtypes of a head's parameters."""
  init = initializers.make("linear", num_layers=1, embed_dim=embed_dim)
  head = config.module(Shared(embed_dim, np.float32, init), dim)
  rows = lambda *shape: jax.ShapeDtypeStruct((1, *shape), np.float32)
  variables = jax.eval_shape(head.init, jax.random.key(0), rows(dim), rows(), rows(embed_dim))
  return nn.unbox(variables)["params"]


def model_entries(
  depth: int, *, name: str = "image", input_bias: bool = False
) -> tuple[Entry, ...]:
  """The table of a whole model's names, its fused projection split into `q`, `k` and `v`.

  Not in it are the classes, which are rows of an embedding of ours, and what the release has not:
  scales of norms, the latents' moments, tokens.

  Args:
    depth: Layers of the head.
    name: Of the modality.
    input_bias: Whether the maps from latents have a bias.
  """
  block, stacked = _BLOCKS + ".{layer}.", dict(stack=_LAYERS)
  head = head_entries(depth, input_bias=input_bias)
  return (
    *_latents_in(_IN, f"{name}_input", input_bias),
    *(_matrix(f"{block}attn.{x}", f"mixer/{x}_proj", **stacked) for x in "qkv"),
    _matrix(block + "attn.proj", "mixer/out_proj", contracted=2, **stacked),
    *_feed_forward(block + "mlp", "feed_forward", **stacked),
    *(dataclasses.replace(entry, ours=f"{name}_head/{entry.ours}") for entry in head),
  )


def import_model(state: StateDict, fields: Mapping[str, Any]) -> ImportedModel:
  """A model of latents by class from a state dict.

  Args:
    state: The weights.
    fields: What weights do not tell: `num_heads` and `num_latents`; `mean` and `std` of latents
      (beside its weights the release keeps `bias_factor`, minus the one, and `scaling_factor`, one
      over the other); and, where the release's defaults were not kept, `rope_base` and fields of
      `DiffusionHeadConfig`, such as `diffusion`.

  Raises:
    ValueError: a field is untold; names or shapes are not those of such a model, or its patch is
      not one latent.
  """
  hints = dict(num_heads="of its constructor", num_latents="its input_size squared")
  hints |= dict(mean="minus its bias_factor", std="one over its scaling_factor")
  check_told(_MODEL, fields, hints)
  of_head = {n: x for n, x in fields.items() if n not in hints and n != "rope_base"}
  head = import_head(state, of_head)
  state, bias = _flat_input(_flat_input(dict(state), _IN_HEAD)[0], _IN)
  if bias != head.config.input_bias:
    raise ValueError(f"of {_IN} and {_IN_HEAD}, one is a convolution and the other is none")
  names = dict(
    classes=_CLASSES, mlp=f"{_BLOCKS}.0.mlp.fc1.weight", qkv=f"{_BLOCKS}.0.attn.qkv.weight"
  )
  found = sizes_from(_MODEL, state, names)
  classes, width = state.pop(_CLASSES), head.embed_dim
  sizes = dict(
    num_layers=count_layers(state, f"{_BLOCKS}."),
    embed_dim=width,
    num_heads=fields["num_heads"],
    num_kv_heads=_kv_heads(found["qkv"], width, fields["num_heads"]),
    mlp_dim=len(found["mlp"]),
    rope_base=fields.get("rope_base", 10_000.0),
  )
  special = SpecialTokens(0, 1, len(classes) - 1)
  language = transformer(vocab_size=special.vocab_size, **sizes, **RELEASE)
  modality = ModalityConfig(
    _IMAGE, head.dim, head.config, fields["num_latents"], "fixed", fields["mean"], fields["std"]
  )
  config = LatentLMConfig(language, (modality,), 0, special.num_classes)
  shapes = _flat(model_shapes(config))
  table = model_entries(head.config.depth, input_bias=bias)
  theirs = {entry.path: shapes.pop(entry.path) for entry in table}
  params = import_weights(
    table, _split(state, width), traverse_util.unflatten_dict(theirs, sep="/")
  )
  ours = {path: np.ones(x.shape, np.float32) for path, x in shapes.items()}
  ours |= {f"{_IMAGE}_normalizer/{n}": np.float32(fields[n]) for n in ("mean", "std")}
  ours[_EMBEDDING] = _embedding(special, classes)
  return ImportedModel(config, traverse_util.unflatten_dict(_flat(params) | ours, sep="/"))


def import_like(state: StateDict, config: LatentLMConfig) -> Params:
  """Parameters from a state dict for a model that is known.

  Args:
    state: The weights.
    config: The model, which tells what weights do not.

  Raises:
    ValueError: the release has no such model, or the weights are of another.
  """
  _check_model(config)
  (block,), (m,) = config.language.decoder.stages[0].pattern, config.modalities
  of_weights = {"depth", "mlp_dim", "mlp_ratio", "input_bias"}
  fields = {f.name: getattr(m.head, f.name) for f in dataclasses.fields(m.head)}
  fields = {name: x for name, x in fields.items() if name not in of_weights}
  fields |= dict(num_heads=block.mixer.num_heads, rope_base=block.mixer.positions.base)
  back = import_model(state, fields | dict(num_latents=m.num_latents, mean=m.mean, std=m.std))
  want, got = (_flat(model_shapes(c)) for c in (config, back.config))
  ours = {path.replace(f"{m.name}_", f"{_IMAGE}_", 1): x.shape for path, x in want.items()}
  theirs = {path: x.shape for path, x in got.items()}
  for path in (_SOFTMAX, _EMBEDDING):  # Tokens of texts, of which this model has more.
    ours.pop(path, None), theirs.pop(path, None)
  if config.num_classes != back.config.num_classes:
    raise ValueError(
      f"the weights have {back.config.num_classes} classes, and the model {config.num_classes}"
    )
  if wrong := sorted(p for p in ours | theirs if ours.get(p) != theirs.get(p)):
    listed = "; ".join(f"{p} {theirs.get(p)} instead of {ours.get(p)}" for p in wrong[:5])
    raise ValueError(f"the weights are of another model: {listed}")
  params = {p.replace(f"{_IMAGE}_", f"{m.name}_", 1): x for p, x in _flat(back.params).items()}
  params[_EMBEDDING] = _embedding(config.tokens, state[_CLASSES])
  if _SOFTMAX in want:
    params[_SOFTMAX] = np.zeros(want[_SOFTMAX].shape, np.float32)
  return traverse_util.unflatten_dict(params, sep="/")


def export_model(config: LatentLMConfig, params: Params) -> StateDict:
  """A model of latents by class by the release's names.

  The latents' moments stay behind: the release keeps them beside its weights.

  Raises:
    ValueError: the release has no such model.
  """
  _check_model(config)
  (modality,), special = config.modalities, config.tokens
  name, bias = modality.name, modality.input_bias
  flat = {path: np.asarray(x) for path, x in _flat(params).items()}
  for norm, behind in (
    (f"{_LAYERS}/mixer_norm/scale", [f"{_LAYERS}/mixer/{x}_proj/kernel" for x in "qkv"]),
    (
      f"{_LAYERS}/feed_forward_norm/scale",
      [f"{_LAYERS}/feed_forward/{x}_proj/kernel" for x in ("gate", "in")],
    ),
    ("language/decoder/final_norm/scale", [f"{name}_head/condition_proj/kernel"]),
  ):
    scale = flat[norm]
    for path in behind:
      axes = flat[path].ndim - scale.ndim
      flat[path] = flat[path] * scale.reshape(*scale.shape, *[1] * axes)
  table = model_entries(modality.head.depth, name=name, input_bias=bias)
  theirs = {entry.path: flat[entry.path] for entry in table}
  state = export_weights(table, traverse_util.unflatten_dict(theirs, sep="/"))
  state = _fuse(state, config.language.decoder.num_layers)
  classes = flat[_EMBEDDING][special.class_token(0) :]
  state[_CLASSES] = np.concatenate([classes, flat[_EMBEDDING][[special.null]]])
  return _unflat_input(_unflat_input(state, _IN_HEAD), _IN)


def model_shapes(config: LatentLMConfig) -> Params:
  """Shapes and dtypes of a model's parameters."""
  variables = jax.eval_shape(LatentLM(config).init, jax.random.key(0), empty_items(config))
  return nn.unbox(variables)["params"]


def _check_model(config: LatentLMConfig) -> None:
  """Raises a `ValueError` that says what of a model the release has not."""
  language, kinds = config.language, [(type(m.head).__name__, m.stop) for m in config.modalities]
  if kinds != [(DiffusionHeadConfig.__name__, "fixed")] or not config.num_classes:
    raise ValueError(
      f"{_MODEL} draws runs of one length by class, with a diffusion head; this one has "
      f"{config.num_classes} classes and {kinds}"
    )
  _check_head(config.modalities[0].head)
  if mixer_kinds(language) != ["attention"]:
    raise ValueError(f"{_MODEL} is of equal layers of attention, and this one is not")
  (block,) = language.decoder.stages[0].pattern
  theirs = transformer(
    vocab_size=config.tokens.vocab_size,
    num_layers=language.decoder.num_layers,
    embed_dim=language.decoder.embed_dim,
    num_heads=block.mixer.num_heads,
    num_kv_heads=block.mixer.num_kv_heads,
    mlp_dim=block.feed_forward.mlp_dim,
    rope_base=block.mixer.positions.base,
    # Its softmax, of which latents by class make no use, stays behind.
    **RELEASE | dict(tie_embeddings=language.tie_embeddings),
  )
  check_same(_MODEL, language, theirs)


def import_dit(state: StateDict, fields: Mapping[str, Any]) -> ImportedDiT:
  """A DiT from a state dict.

  Args:
    state: The weights.
    fields: Fields of `DiTConfig` that weights do not tell: `num_heads`; and, of a grid that is no
      square, `grid`.

  Raises:
    ValueError: a field is untold; names or shapes are not those of such a model; its positions are
      not the fixed ones; its patch is not one latent.
  """
  state, bias = _flat_input(dict(state), _IN)
  names = dict(
    out="final_layer.linear.weight",
    mlp=f"{_BLOCKS}.0.mlp.fc1.weight",
    qkv=f"{_BLOCKS}.0.attn.qkv.weight",
    classes=_CLASSES,
    positions=_POSITIONS,
  )
  found = sizes_from(_DIT, state, names)
  check_told(_DIT, fields, dict(num_heads="of its constructor"))
  (dim, embed_dim), num_heads = found["out"].shape, fields["num_heads"]
  positions = state.pop(_POSITIONS)
  _, length, _ = positions.shape
  side = round(length**0.5)
  sizes = dict(
    num_layers=count_layers(state, f"{_BLOCKS}."),
    embed_dim=embed_dim,
    dim=dim,
    # On flat latents, positions count along one line.
    grid=(side, side) if bias and side**2 == length else (1, length),
    num_classes=len(found["classes"]) - 1,
    mlp_ratio=_ratio(len(found["mlp"]), embed_dim),
    input_bias=bias,
  )
  num_kv_heads = _kv_heads(found["qkv"], embed_dim, num_heads)
  config = DiTConfig(**sizes | dict(num_kv_heads=num_kv_heads) | dict(fields))
  want = grid_positions(config.grid, embed_dim)
  if positions.shape[1:] != want.shape or not np.allclose(positions[0], want, atol=1e-5):
    raise ValueError(f"{_POSITIONS} are not the fixed ones of grid={config.grid}; give grid")
  params = import_weights(
    dit_entries(input_bias=bias), _split(state, embed_dim), dit_shapes(config)
  )
  return ImportedDiT(config, params)


def export_dit(config: DiTConfig, params: Params) -> StateDict:
  """A DiT by the release's names, with its positions.

  Raises:
    ValueError: the release has no such model.
  """
  square = config.grid[0] == config.grid[1]
  if not (square and config.input_bias or config.grid[0] == 1 and not config.input_bias):
    raise ValueError(
      f"{_DIT} has a square grid with input_bias, or a line without, not grid={config.grid} and "
      f"input_bias={config.input_bias}"
    )
  state = export_weights(dit_entries(input_bias=config.input_bias), params)
  state = _fuse(state, config.num_layers)
  positions = grid_positions(config.grid, config.embed_dim)
  state[_POSITIONS] = positions[None].astype(np.float32)
  return _unflat_input(state, _IN)


def dit_shapes(config: DiTConfig) -> Params:
  """Shapes and dtypes of a DiT's parameters."""
  latents = jax.ShapeDtypeStruct((1, config.num_latents, config.dim), np.float32)
  t, labels = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (np.float32, np.int32))
  variables = jax.eval_shape(DiT(config).init, jax.random.key(0), latents, t, labels)
  return nn.unbox(variables)["params"]


def _matrix(theirs: str, ours: str, contracted: int = 1, **options: Any) -> Entry:
  return Entry(f"{theirs}.weight", f"{ours}/kernel", contracted=contracted, **options)


def _feed_forward(theirs: str, ours: str, **options: Any) -> tuple[Entry, ...]:
  # The one that is activated, and the one that multiplies it.
  names = dict(fc1="gate_proj", gate="in_proj", fc2="out_proj")
  return tuple(_matrix(f"{theirs}.{a}", f"{ours}/{b}", **options) for a, b in names.items())


def _ends(theirs: str, ours: str, bias: bool) -> tuple[Entry, ...]:
  """What the head and the DiT have alike: latents in, the timestep, latents out."""
  return (
    *_latents_in(theirs, ours, bias),
    _matrix("t_embedder.mlp.0", "time/in_proj"),
    _matrix("t_embedder.mlp.2", "time/out_proj"),
    _matrix("final_layer.adaLN_modulation.1", "final/modulation"),
    _matrix("final_layer.linear", "final/out_proj"),
  )


def _latents_in(theirs: str, ours: str, bias: bool) -> tuple[Entry, ...]:
  matrix = _matrix(theirs, f"{ours}/proj")
  return (matrix, Entry(f"{theirs}.bias", f"{ours}/bias")) if bias else (matrix,)


def _flat_input(state: StateDict, name: str) -> tuple[StateDict, bool]:
  """The map from latents as a matrix, and whether it has a bias."""
  convolution = state.pop(f"{name}.proj.weight", None)
  if convolution is None:
    return state, False
  if convolution.shape[2:] != (1, 1):
    raise ValueError(
      f"{name}.proj.weight is {convolution.shape}: only patches of one latent can be imported"
    )
  if (bias := state.pop(f"{name}.proj.bias", None)) is None:
    raise ValueError(f"{name}.proj.bias is missing beside {name}.proj.weight")
  return state | {f"{name}.weight": convolution[:, :, 0, 0], f"{name}.bias": bias}, True


def _unflat_input(state: StateDict, name: str) -> StateDict:
  """The inverse of `_flat_input`."""
  if f"{name}.bias" not in state:
    return state
  matrix, bias = state.pop(f"{name}.weight"), state.pop(f"{name}.bias")
  return state | {f"{name}.proj.weight": matrix[:, :, None, None], f"{name}.proj.bias": bias}


def _split(state: StateDict, embed_dim: int) -> StateDict:
  """Fused projections as `q`, `k` and `v`."""
  split = {}
  for name, x in state.items():
    if not name.endswith(".attn.qkv.weight"):
      split[name] = x
      continue
    bounds = [embed_dim, (embed_dim + len(x)) // 2]
    split |= {
      name.replace("qkv", part): rows for part, rows in zip("qkv", np.split(x, bounds), strict=True)
    }
  return split


def _fuse(state: StateDict, num_layers: int) -> StateDict:
  """The inverse of `_split`."""
  for i in range(num_layers):
    names = [f"{_BLOCKS}.{i}.attn.{x}.weight" for x in "qkv"]
    state[f"{_BLOCKS}.{i}.attn.qkv.weight"] = np.concatenate([state.pop(name) for name in names])
  return state


def _kv_heads(fused: np.ndarray, embed_dim: int, num_heads: int) -> int:
  """Heads of keys, as a fused projection's rows tell."""
  rest, head_dim = len(fused) - embed_dim, embed_dim // max(num_heads, 1)
  if head_dim < 1 or rest < 2 or rest % (2 * head_dim):
    raise ValueError(
      f"num_heads={num_heads} of {head_dim} features do not make attn.qkv.weight, {fused.shape}"
    )
  return rest // (2 * head_dim)


def _embedding(special: SpecialTokens, classes: np.ndarray) -> np.ndarray:
  """The table of an embedding: zeros but for classes, and for their lack, which comes last."""
  rows = np.zeros((special.vocab_size, classes.shape[1]), np.float32)
  rows[special.null], rows[special.class_token(0) :] = classes[-1], classes[:-1]
  return rows


def _flat(params: Params) -> dict[str, Any]:
  return traverse_util.flatten_dict(nn.unbox(params), sep="/")


def _ratio(mlp_dim: int, embed_dim: int) -> float:
  """A ratio that gives this width of feed-forward layers: the release's, or the middle of all."""
  usual = DiTConfig.mlp_ratio
  if ratio_width(embed_dim, usual) == mlp_dim:
    return usual
  return (mlp_dim + 32) * 1.5 / embed_dim
