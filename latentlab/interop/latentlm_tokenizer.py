"""The image tokenizer of LatentLM's release, by its names (microsoft/unilm, `tokenizer_models`).

Its encoder is BEiT-3 as torchscale has it, or a ViT; its decoder is that ViT. Rows of pixels are in
torch's order, channels first. What nothing reads, BEiT-3's mask token and the two rows in front of
its places, comes out as zeros.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from latentlab.interop.weights import (
  Entry,
  StateDict,
  check_told,
  count_layers,
  export_weights,
  import_weights,
  sizes_from,
)
from latentlab.models import latent_tokenizer
from latentlab.models.beit_body import BeitBody
from latentlab.models.latent_tokenizer import LatentTokenizer, LatentTokenizerConfig
from latentlab.typing import Params

_LIBRARY = "the image tokenizer of LatentLM's release"
_BEIT, _VIT = "encoder.vision_embed.proj.weight", "encoder.patch_embed.proj.weight"
_LATENTS, _PIXELS = "decoder.patch_embed.proj.weight", "decoder_post_processor.fc2"
_PLACES = "encoder.encoder.embed_positions.weight"
_FAIRSEQ_ROWS = 2  # Before the first place.
_MASK = "encoder.vision_embed.mask_token"


@dataclasses.dataclass(frozen=True)
class ImportedTokenizer:
  """An image tokenizer from elsewhere.

  Attributes:
    model: The `config.model` section that builds it.
    params: Its parameters.
  """

  model: dict[str, Any]
  params: Params


def entries(encoder_kind: str) -> tuple[Entry, ...]:
  """The table of the tokenizer's names, with matrices for its convolutions.

  Args:
    encoder_kind: `beit3` or `vit`.
  """
  return (
    *(_beit if encoder_kind == "beit3" else _vit)("encoder"),
    *_dense("encoder_post_processor.dense", "encoder/head"),
    *_vit("decoder"),
    *_dense("decoder_post_processor.fc1", "decoder/head_in"),
    *_dense(_PIXELS, "decoder/head_out"),
  )


def import_tokenizer(state: StateDict, fields: Mapping[str, Any]) -> ImportedTokenizer:
  """A tokenizer from a state dict.

  Args:
    state: The weights.
    fields: Fields of `config.model` that weights do not tell: `num_heads`; and, where the release's
      defaults were not kept, `bottleneck` and `std`.

  Raises:
    ValueError: a field is untold or is one that weights tell, or names or shapes are not those of
      such a tokenizer.
  """
  check_told(_LIBRARY, fields, dict(num_heads="12 of its `vit-base` and `beit3-base`"))
  kind = "beit3" if _BEIT in state else "vit"
  patches, places = (_BEIT, _PLACES) if kind == "beit3" else (_VIT, "encoder.pos_embed")
  if missing := [name for name in (patches, places) if name not in state]:
    raise ValueError(f"the weights are not those of {_LIBRARY}: {missing} are missing")
  convolution, side = state[patches], _side(state[places], kind)
  if convolution.ndim != 4 or convolution.shape[2] != convolution.shape[3]:
    raise ValueError(f"{patches} is {convolution.shape}, which is no convolution of square patches")
  names = dict(mlp="decoder.blocks.0.mlp.fc1.weight", head="encoder_post_processor.dense.weight")
  found = sizes_from(_LIBRARY, state, names)
  layers = "encoder.encoder.layers." if kind == "beit3" else "encoder.blocks."
  width, channels, patch_size, _ = convolution.shape
  sizes = dict(
    image_size=side * patch_size,
    channels=channels,
    patch_size=patch_size,
    encoder_kind=kind,
    num_layers=count_layers(state, layers),
    decoder_layers=count_layers(state, "decoder.blocks."),
    embed_dim=width,
    mlp_dim=len(found["mlp"]),
    dim=len(found["head"]),
  )
  if told := sorted((sizes.keys() | {"name"}) & fields.keys()):
    raise ValueError(f"{told} are told by the weights; leave them out")
  model = dict(name="beit_tokenizer", **sizes, **fields)
  config = latent_tokenizer.build_config(model)
  params = import_weights(entries(kind), _flat(state, config.body), tokenizer_shapes(config))
  return ImportedTokenizer(model, params)


def import_like(state: StateDict, config: LatentTokenizerConfig) -> Params:
  """Parameters from a state dict for a tokenizer that is known.

  Args:
    state: The weights.
    config: The tokenizer, which tells what weights do not.

  Raises:
    ValueError: the release has no such tokenizer, or the weights are of another.
  """
  body = _check(config)
  known = {"beit3": _BEIT, "vit": _VIT}
  kind = next((kind for kind, name in known.items() if name in state), body.encoder_kind)
  if kind != body.encoder_kind:
    raise ValueError(f"the weights' encoder is a {kind}, and the model has {body.encoder_kind!r}")
  # As matrices, other patches of as many numbers would fit too.
  p, patches = body.patches.size, known[kind]
  want = (body.embed_dim, body.media_shape[2], p, p)
  if patches in state and state[patches].shape != want:
    raise ValueError(f"{patches} is {state[patches].shape}, and the model has {want}")
  return import_weights(entries(kind), _flat(state, body), tokenizer_shapes(config))


def export_model(config: LatentTokenizerConfig, params: Params) -> StateDict:
  """A tokenizer by the release's names; an adversary's parameters beside it stay behind.

  Raises:
    ValueError: the release has no such tokenizer.
  """
  body = _check(config)
  own = {name: params[name] for name in ("encoder", "decoder")}
  return _unflat(export_weights(entries(body.encoder_kind), own), body)


def tokenizer_shapes(config: LatentTokenizerConfig) -> Params:
  """Shapes and dtypes of a tokenizer's parameters."""
  media = jax.ShapeDtypeStruct((1, *config.media_shape), np.float32)
  variables = jax.eval_shape(LatentTokenizer(config).init, jax.random.key(0), media)
  return nn.unbox(variables)["params"]


def _check(config: LatentTokenizerConfig) -> BeitBody:
  """The body, if the release has such a tokenizer; otherwise a `ValueError` says what is not so."""
  if not isinstance(config.body, BeitBody) or config.bottleneck != "sigma_gaussian":
    raise ValueError(
      f"{_LIBRARY} is a beit_tokenizer with bottleneck='sigma_gaussian', not a "
      f"{type(config.body).__name__} with {config.bottleneck!r}"
    )
  return config.body


def _side(places: np.ndarray, kind: str) -> int:
  """Patches of height and width, from the table of places."""
  if places.ndim != (2 if kind == "beit3" else 3):
    raise ValueError(f"the table of the encoder's places is {places.shape}")
  count = len(places) - _FAIRSEQ_ROWS if kind == "beit3" else places.shape[1]
  side = round(max(count - 1, 0) ** 0.5)
  if side < 1 or side**2 != count - 1:
    raise ValueError(f"{count} places of the encoder are no square and a class token")
  return side


def _dense(theirs: str, ours: str, **options: Any) -> tuple[Entry, ...]:
  matrix = Entry(f"{theirs}.weight", f"{ours}/kernel", contracted=1, **options)
  return matrix, Entry(f"{theirs}.bias", f"{ours}/bias", **options)


def _norm(theirs: str, ours: str, **options: Any) -> tuple[Entry, ...]:
  scale = Entry(f"{theirs}.weight", f"{ours}/scale", **options)
  return scale, Entry(f"{theirs}.bias", f"{ours}/bias", **options)


def _beit(part: str) -> Iterable[Entry]:
  layer, stacked = f"{part}.encoder.layers.{{layer}}.", dict(stack=f"{part}/layers/block")
  for name in "qkv":
    yield from _dense(f"{layer}self_attn.{name}_proj", f"{name}_proj", **stacked)
  yield from _dense(f"{layer}self_attn.out_proj", "out_proj", **stacked)
  yield from _dense(f"{layer}ffn.fc1", "mlp_in", **stacked)
  yield from _dense(f"{layer}ffn.fc2", "mlp_out", **stacked)
  for theirs, ours in (
    ("self_attn_layer_norm", "attention_norm"),
    ("self_attn.inner_attn_ln", "attention_sub_norm"),
    ("final_layer_norm", "mlp_norm"),
    ("ffn.ffn_layernorm", "mlp_sub_norm"),
  ):
    yield from _norm(layer + theirs, ours, **stacked)
  yield from _norm(f"{part}.encoder.layer_norm", f"{part}/layers/norm")
  yield from _dense(f"{part}.vision_embed.proj", f"{part}/patch_embed")
  yield Entry(f"{part}.vision_embed.cls_token", f"{part}/layers/class_token")
  yield Entry(f"{part}.encoder.embed_positions.weight", f"{part}/layers/position_embedding")


def _vit(part: str) -> Iterable[Entry]:
  layer, stacked = f"{part}.blocks.{{layer}}.", dict(stack=f"{part}/layers/block")
  for name in "qkv":
    yield Entry(f"{layer}attn.{name}.weight", f"{name}_proj/kernel", contracted=1, **stacked)
  for name in "qv":
    yield Entry(f"{layer}attn.{name}_bias", f"{name}_proj/bias", **stacked)
  yield from _dense(f"{layer}attn.proj", "out_proj", **stacked)
  yield from _dense(f"{layer}mlp.fc1", "mlp_in", **stacked)
  yield from _dense(f"{layer}mlp.fc2", "mlp_out", **stacked)
  yield from _norm(f"{layer}norm1", "attention_norm", **stacked)
  yield from _norm(f"{layer}norm2", "mlp_norm", **stacked)
  yield from _norm(f"{part}.fc_norm", f"{part}/layers/norm")
  name = "patch_embed" if part == "encoder" else "latent_embed"
  yield from _dense(f"{part}.patch_embed.proj", f"{part}/{name}")
  yield Entry(f"{part}.cls_token", f"{part}/layers/class_token")
  yield Entry(f"{part}.pos_embed", f"{part}/layers/position_embedding")


def _flat(state: StateDict, body: BeitBody) -> StateDict:
  """The weights as the table has them.

  Convolutions are matrices, pixels have channels last, queries, keys and values are apart, and what
  nothing reads is gone.
  """
  flat = {}
  for name, x in state.items():
    if name.endswith(".attn.qkv.weight"):
      parts = np.array_split(x, 3)
      flat |= {name.replace("qkv", part): y for part, y in zip("qkv", parts, strict=True)}
    elif name != _MASK:
      flat[name] = x
  for name in (_BEIT, _VIT, _LATENTS):
    if name in flat and flat[name].ndim == 4:
      x = flat[name].transpose(0, 2, 3, 1)
      flat[name] = x.reshape(len(x), -1)
  for name in (f"{_PIXELS}.weight", f"{_PIXELS}.bias"):
    if name in flat and len(flat[name]) == body.patches.features:
      flat[name] = flat[name][_channels_last(body)]
  for name, x in flat.items():
    if name.endswith(("cls_token", "pos_embed")) and x.ndim == 3:
      flat[name] = x[0]
  if _PLACES in flat:
    flat[_PLACES] = flat[_PLACES][_FAIRSEQ_ROWS:]
  return flat


def _unflat(state: StateDict, body: BeitBody) -> StateDict:
  """The inverse of `_flat`."""
  p, state = body.patches.size, dict(state)
  for name in [name for name in state if name.endswith(".attn.q.weight")]:
    parts = [state.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
    state[name.replace(".q.", ".qkv.")] = np.concatenate(parts)
  for name, size in ((_BEIT, p), (_VIT, p), (_LATENTS, 1)):
    if name in state:
      x = state[name].reshape(len(state[name]), size, size, -1)
      state[name] = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
  for name in (f"{_PIXELS}.weight", f"{_PIXELS}.bias"):
    state[name] = state[name][np.argsort(_channels_last(body))]
  for name in state:
    if name.endswith(("cls_token", "pos_embed")):
      state[name] = state[name][None]
  if _PLACES in state:
    state[_PLACES] = np.pad(state[_PLACES], ((_FAIRSEQ_ROWS, 0), (0, 0)))
    state[_MASK] = np.zeros((1, 1, body.embed_dim), np.float32)
  return state


def _channels_last(body: BeitBody) -> np.ndarray:
  """Of each number of our patches, its place in theirs."""
  p, channels = body.patches.size, body.media_shape[2]
  return np.arange(channels * p * p).reshape(channels, p, p).transpose(1, 2, 0).ravel()
