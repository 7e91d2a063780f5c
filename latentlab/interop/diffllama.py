"""DiffLlama, the Differential Transformer of transformers, by its names (release 5).

https://arxiv.org/abs/2410.05258 in another layout than the original release's: query heads `i` and
`i + N` are a pair, keys likewise, values `g` and `g + K` are halves of one, and features `j` and
`j + H/2` of queries and keys rotate together. A model can be imported as it is
(`head_layout="halves"`, `rope_layout="half"`), or with rows in our own order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import traverse_util

from latentlab.interop.weights import (
  Entry,
  Imported,
  StateDict,
  check_same,
  check_told,
  count_layers,
  export_weights,
  import_weights,
  mixer_kinds,
  number,
  parameter_shapes,
  sizes_from,
  tied_head,
)
from latentlab.layers import DiffAttentionConfig
from latentlab.models import LanguageModelConfig, build_config
from latentlab.typing import Int, Params

_NAME = "DiffLlama"
_LAYER = "model.layers.{layer}."
_EMBEDDING, _HEAD = (
  Entry("model.embed_tokens.weight", "embedder/embedding"),
  Entry("lm_head.weight", "head/kernel", contracted=1),
)
_GAIN = "decoder/stage_0/block_0/mixer/head_norm/scale"
_OUT = "decoder/stage_0/block_0/mixer/out_proj/kernel"

_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu"}
_UNTOLD = {
  "feed_forward": "'swiglu' for hidden_act silu, its default, 'geglu' for gelu",
  "rope_base": "rope_theta of its config.json; 10000.0 by default",
  "norm_eps": "rms_norm_eps there; 1e-5 by default",
}


def entries(mixer: DiffAttentionConfig, *, tied: bool = False) -> tuple[Entry, ...]:
  """The table of names.

  Args:
    mixer: Our layer, whose layouts tell the order of its rows.
    tied: Whether the head is the embedding.
  """
  q, k = (_rows(mixer, heads, mixer.head_dim) for heads in (mixer.num_heads, mixer.kv_heads))
  v = _rows(mixer, mixer.kv_heads, mixer.value_dim // 2, rotated=False)
  attention, mlp = _LAYER + "self_attn.", _LAYER + "mlp."
  return (
    _EMBEDDING,
    *(() if tied else (_HEAD,)),
    Entry("model.norm.weight", "decoder/final_norm/scale"),
    Entry(_LAYER + "input_layernorm.weight", "mixer_norm/scale"),
    Entry(attention + "q_proj.weight", "mixer/q_proj/kernel", contracted=1, rows=q),
    Entry(attention + "k_proj.weight", "mixer/k_proj/kernel", contracted=1, rows=k),
    Entry(attention + "v_proj.weight", "mixer/v_proj/kernel", contracted=1, rows=v),
    Entry(attention + "o_proj.weight", "mixer/out_proj/kernel", contracted=2),
    *(Entry(f"{attention}lambda_{x}", f"mixer/lambda_{x}") for x in ("q1", "k1", "q2", "k2")),
    Entry(_LAYER + "post_attention_layernorm.weight", "feed_forward_norm/scale"),
    Entry(mlp + "gate_proj.weight", "feed_forward/gate_proj/kernel", contracted=1),
    Entry(mlp + "up_proj.weight", "feed_forward/in_proj/kernel", contracted=1),
    Entry(mlp + "down_proj.weight", "feed_forward/out_proj/kernel", contracted=1),
  )


def import_model(state: StateDict, fields: Mapping[str, Any]) -> Imported:
  """A Differential Transformer from a state dict of `DiffLlamaForCausalLM`.

  Args:
    state: The weights.
    fields: Fields of `config.model`, such as `config_fields` makes them. Weights tell neither
      `feed_forward` nor `rope_base` nor `norm_eps`. `head_layout="neighbour"` and
      `rope_layout="interleaved"`, each on its own, put rows in the order of our models; without
      them all weights stay as they are.

  Raises:
    ValueError: a field is untold; names or shapes are not those of such a model.
  """
  sizes = _sizes(state)
  check_told(_NAME, fields, _UNTOLD)
  section = dict(
    name="diff_transformer",
    rope_layout="half",
    head_layout="halves",
    head_norm_affine=False,
    head_norm_eps=fields["norm_eps"],
  )
  section |= sizes | dict(fields)
  tied, state = tied_head(state, _EMBEDDING, _HEAD, section.get("tie_embeddings"))
  section["tie_embeddings"], vocab_size = tied, len(state[_EMBEDDING.theirs])
  config = build_config(section, vocab_size)
  table = entries(config.decoder.stages[0].pattern[0].mixer, tied=tied)
  params = import_weights(table, state, parameter_shapes(config))
  return Imported(section, vocab_size, params)


def export_model(config: LanguageModelConfig, params: Params) -> StateDict:
  """A state dict of `DiffLlamaForCausalLM`, from either layout.

  DiffLlama's head norm has no scale: one of ours goes into the rows of `o_proj` that it scales.

  Raises:
    ValueError: DiffLlama has no such model.
  """
  made = make_config(config)  # Raises where it cannot.
  flat = traverse_util.flatten_dict(nn.unbox(params), sep="/")
  if _GAIN in flat:
    gain = np.asarray(flat.pop(_GAIN))  # Of each layer.
    flat[_OUT] = np.asarray(flat[_OUT]) * gain[:, None, :, None]
  mixer = config.decoder.stages[0].pattern[0].mixer
  table = entries(mixer, tied=made["tie_word_embeddings"])
  return export_weights(table, traverse_util.unflatten_dict(flat, sep="/"))


def config_fields(found: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `config.model` that a `config.json` tells.

  Raises:
    ValueError: it is of another architecture, or of a variant that we do not have.
  """
  kind, act = found.get("model_type"), found.get("hidden_act", "silu")
  if kind != "diffllama":
    raise ValueError(f"model_type={kind!r} is not 'diffllama'")
  if act not in _ACTIVATIONS:
    raise ValueError(f"hidden_act={act!r} is none of {sorted(_ACTIVATIONS)}")
  if found.get("attention_bias"):
    raise ValueError("attention_bias=true: our projections have no biases")
  rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
  if not isinstance(rope, Mapping):
    raise ValueError(f"rope_parameters={rope!r} is no table of a rotation's parameters")
  scaling = rope.get("rope_type", rope.get("type", "default"))
  if scaling != "default":
    raise ValueError(
      f"rope_type={scaling!r} scales the rotation in a way that we do not have; 'default' does not"
    )
  heads, kv_heads = (
    number(found, name, int) for name in ("num_attention_heads", "num_key_value_heads")
  )
  for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
    if count is not None and count % 2:
      raise ValueError(f"{name}={count!r} is no count of heads that are halves of pairs")
  base = number(found, "rope_theta", float)
  fields = dict(
    num_layers=number(found, "num_hidden_layers", int),
    embed_dim=number(found, "hidden_size", int),
    num_heads=heads and heads // 2,
    num_kv_heads=kv_heads and kv_heads // 2,
    head_dim=number(found, "head_dim", int),
    mlp_dim=number(found, "intermediate_size", int),
    feed_forward=_ACTIVATIONS[act],
    rope_base=number(rope, "rope_theta", float, base),
    norm_eps=number(found, "rms_norm_eps", float),
    tie_embeddings=found.get("tie_word_embeddings"),
    lambda_std=number(found, "lambda_std_dev", float),
  )
  return {name: x for name, x in fields.items() if x is not None}


def make_config(config: LanguageModelConfig) -> dict[str, Any]:
  """What a `config.json` for `transformers.DiffLlamaForCausalLM` holds; ids of tokens are left out.

  Raises:
    ValueError: DiffLlama has no such model.
  """
  if (kinds := mixer_kinds(config)) != ["diff_attention"]:
    raise ValueError(
      f"{_NAME} is one stage of diff_attention, not stages of {kinds or 'unlike layers'}"
    )
  block = config.decoder.stages[0].pattern[0]
  mixer = block.mixer
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  made = dict(
    architectures=["DiffLlamaForCausalLM"],
    model_type="diffllama",
    vocab_size=config.vocab_size,
    hidden_size=config.decoder.embed_dim,
    intermediate_size=block.feed_forward.mlp_dim,
    num_hidden_layers=config.decoder.num_layers,
    num_attention_heads=2 * mixer.num_heads,
    num_key_value_heads=2 * mixer.kv_heads,
    head_dim=mixer.head_dim,
    hidden_act=activations.get(block.feed_forward.kind, "silu"),
    rms_norm_eps=config.decoder.norm_eps,
    rope_parameters=dict(rope_type="default", rope_theta=mixer.positions.base),
    attention_bias=False,
    attention_dropout=0.0,
    lambda_std_dev=mixer.lambda_std,
    tie_word_embeddings=config.tie_embeddings,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    dtype="float32",
  )
  layouts = dict(
    head_layout=mixer.head_layout,
    rope_layout=mixer.positions.layout,
    head_norm_affine=mixer.head_norm_affine,
    head_norm_eps=config.decoder.norm_eps,
  )
  section = dict(name="diff_transformer") | config_fields(made) | layouts
  check_same(_NAME, config, build_config(section, config.vocab_size))
  return made


def _rows(
  mixer: DiffAttentionConfig, heads: int, dim: int, *, rotated: bool = True
) -> Int[np.ndarray, "rows"] | None:
  """Which row of a projection's matrix is which of ours."""
  interleaved = rotated and mixer.positions.layout == "interleaved"
  if mixer.head_layout == "halves" and not interleaved:
    return None
  rows = np.arange(2 * heads * dim).reshape(2, heads, dim)
  if interleaved:  # Features 2j and 2j + 1, where theirs are j and j + H/2.
    rows = rows.reshape(2, heads, 2, dim // 2).swapaxes(2, 3).reshape(2, heads, dim)
  if mixer.head_layout == "neighbour":
    rows = rows.swapaxes(0, 1)
  return rows.reshape(-1)


def _sizes(state: StateDict) -> dict[str, Any]:
  """Fields of `config.model` that shapes and names tell."""
  names = dict(embedding=_EMBEDDING.theirs)
  attention = _LAYER.format(layer=0) + "self_attn."
  names |= dict(q=attention + "q_proj.weight", k=attention + "k_proj.weight")
  names |= dict(lam=attention + "lambda_q1", mlp=_LAYER.format(layer=0) + "mlp.gate_proj.weight")
  found = sizes_from(_NAME, state, names)
  head_dim = found["lam"].size
  heads = {x: found[x].shape[0] // (2 * head_dim) for x in ("q", "k")}
  for x, count in heads.items():
    if count < 1 or found[x].shape[0] != 2 * count * head_dim:
      raise ValueError(
        f"{names[x]} has {found[x].shape[0]} rows, not those of pairs of heads of the "
        f"{head_dim} features of {names['lam']}"
      )
  return dict(
    num_layers=count_layers(state, "model.layers."),
    embed_dim=found["embedding"].shape[1],
    num_heads=heads["q"],
    num_kv_heads=heads["k"],
    head_dim=head_dim,
    mlp_dim=found["mlp"].shape[0],
  )
