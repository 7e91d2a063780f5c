"""YOCO by the names of its original release (microsoft/unilm, `YOCO/yoco/models/decoder/yoco.py`).

https://arxiv.org/abs/2405.05254. Its kernels scale keys where our modules do, and it rotates
neighbouring features on the `linspace` grid, as our preset does: weights carry over as they are.
"""

from collections.abc import Mapping
from typing import Any

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
  without_prefix,
)
from latentlab.models import LanguageModelConfig, build_config
from latentlab.typing import Params

_NAME = "the release of YOCO"
# Of the trainer's model, of its decoder, and of what either wraps.
_PREFIXES = ("decoder.model.", "decoder.", "model.")
_SELF, _CROSS = (f"{half}_decoder.layers." for half in ("self", "cross"))
_EMBEDDING, _HEAD = (
  Entry("embed_tokens.weight", "embedder/embedding"),
  Entry("output_projection.weight", "head/kernel", contracted=1),
)
_SHARED_KEYS = Entry("cross_decoder.k_proj.weight", "decoder/shared_kv/k_proj/kernel", contracted=1)

_UNTOLD = {
  "num_heads": "n_attn_heads of its params.json",
  "rope_base": "rope_theta there; 10000.0 by default",
}
_UNTOLD_OF_WINDOW = {"num_self_heads": "n_self_heads there", "window": "sliding_window there"}


def entries(*, self_attention: str = "gated_retention", tied: bool = False) -> tuple[Entry, ...]:
  """The table of names.

  Args:
    self_attention: `gated_retention` or `sliding_window`, of the self-decoder.
    tied: Whether the head is the embedding.
  """
  mixer = dict(q_proj="q_proj", k_proj="k_proj", v_proj="v_proj")
  if self_attention == "gated_retention":
    mixer |= dict(g_proj="gate_proj", gt_proj="decay_proj")
  return (
    _EMBEDDING,
    *(() if tied else (_HEAD,)),
    Entry("layer_norm.weight", "decoder/final_norm/scale"),
    *_block(_SELF, 0, mixer),
    Entry("cross_decoder.kv_layer_norm.weight", "decoder/shared_kv/norm/scale"),
    _SHARED_KEYS,
    Entry("cross_decoder.v_proj.weight", "decoder/shared_kv/v_proj/kernel", contracted=1),
    *_block(_CROSS, 1, dict(q_proj="q_proj")),
  )


def import_model(state: StateDict, fields: Mapping[str, Any]) -> Imported:
  """A YOCO from a state dict.

  Args:
    state: The weights, with what the release's trainer puts in front of their names or without.
    fields: Fields of `config.model`, such as `config_fields` makes them. Weights tell neither
      `num_heads` nor `rope_base`, nor, of a self-decoder of sliding windows, `num_self_heads` and
      `window`.

  Raises:
    ValueError: a field is untold; names or shapes are not those of such a model.
  """
  state = without_prefix(state, *_PREFIXES)
  section = dict(name="yoco") | _sizes(state, fields) | dict(fields)
  tied, state = tied_head(state, _EMBEDDING, _HEAD, section.get("tie_embeddings"))
  section["tie_embeddings"], vocab_size = tied, len(state[_EMBEDDING.theirs])
  config = build_config(section, vocab_size)
  table = entries(self_attention=section["self_attention"], tied=tied)
  params = import_weights(table, state, parameter_shapes(config))
  return Imported(section, vocab_size, params)


def export_model(config: LanguageModelConfig, params: Params) -> StateDict:
  """A state dict by the release's names, a tied head included.

  Raises:
    ValueError: the release has no such model.
  """
  window = make_config(config)["sliding_window"]  # Raises where it cannot.
  self_attention = "gated_retention" if window is None else "sliding_window"
  table = entries(self_attention=self_attention, tied=config.tie_embeddings)
  state = export_weights(table, params)
  if config.tie_embeddings:
    state[_HEAD.theirs] = state[_EMBEDDING.theirs].copy()
  return state


def config_fields(found: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `config.model` that a `params.json` tells; what it leaves out is as in the release.

  Raises:
    ValueError: it is of no such model.
  """
  sizes = dict(
    n_layers="num_layers",
    dim="embed_dim",
    hidden_dim="mlp_dim",
    n_self_heads="num_self_heads",
    n_attn_heads="num_heads",
    n_attn_kv_heads="num_kv_heads",
  )
  if missing := [name for name in sizes if name not in found]:
    raise ValueError(f"{missing} are missing among {sorted(found)}")
  fields = {ours: number(found, theirs, int) for theirs, ours in sizes.items()}
  fields = {name: x for name, x in fields.items() if x is not None}
  fields["rope_base"] = number(found, "rope_theta", float, 10_000.0)
  fields["norm_eps"] = number(found, "norm_eps", float, 1e-5)
  window = found.get("sliding_window")
  if window is None:
    return fields | dict(self_attention="gated_retention")
  if isinstance(window, bool) or not isinstance(window, int) or window < 1:
    raise ValueError(f"sliding_window={window!r} is neither null nor a count of tokens")
  return fields | dict(self_attention="sliding_window", window=window)


def make_config(config: LanguageModelConfig) -> dict[str, Any]:
  """What a `params.json` for the release's `YOCOArgs` holds.

  Raises:
    ValueError: the release has no such model.
  """
  kinds, shared = mixer_kinds(config), config.decoder.shared_kv
  if kinds not in (["retention", "attention"], ["attention", "attention"]) or shared is None:
    raise ValueError(
      f"{_NAME} is of two stages, gated retention or a window and then attention over shared keys "
      f"and values, not of {kinds or 'unlike layers'} with {shared}"
    )
  (self_block,), (cross_block,) = (stage.pattern for stage in config.decoder.stages)
  made = dict(
    dim=config.decoder.embed_dim,
    n_layers=config.decoder.num_layers,
    hidden_dim=self_block.feed_forward.mlp_dim,
    n_self_heads=self_block.mixer.num_heads,
    n_attn_heads=cross_block.mixer.num_heads,
    n_attn_kv_heads=cross_block.mixer.kv_heads,
    vocab_size=config.vocab_size,
    rope_theta=shared.positions.base,
    norm_eps=config.decoder.norm_eps,
    sliding_window=None if kinds[0] == "retention" else self_block.mixer.mask.size,
  )
  section = dict(name="yoco", tie_embeddings=config.tie_embeddings) | config_fields(made)
  check_same(_NAME, config, build_config(section, config.vocab_size))
  return made


def _block(prefix: str, stage: int, mixer: Mapping[str, str]) -> tuple[Entry, ...]:
  """A half's layers, whose mixer projects inputs by these names (theirs to ours)."""
  layer, matrix = prefix + "{layer}.", dict(contracted=1, stage=stage)
  return (
    Entry(layer + "mixer_layer_norm.weight", "mixer_norm/scale", stage=stage),
    *(
      Entry(f"{layer}mixer.{theirs}.weight", f"mixer/{ours}/kernel", **matrix)
      for theirs, ours in mixer.items()
    ),
    Entry(layer + "mixer.out_proj.weight", "mixer/out_proj/kernel", contracted=2, stage=stage),
    Entry(layer + "final_layer_norm.weight", "feed_forward_norm/scale", stage=stage),
    # The one that is activated, and the one that multiplies it.
    Entry(layer + "ffn.fc1.weight", "feed_forward/gate_proj/kernel", **matrix),
    Entry(layer + "ffn.gate.weight", "feed_forward/in_proj/kernel", **matrix),
    Entry(layer + "ffn.fc2.weight", "feed_forward/out_proj/kernel", **matrix),
  )


def _sizes(state: StateDict, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `config.model` that shapes and names tell, beside those that they do not."""
  names = dict(embedding=_EMBEDDING.theirs, mlp=f"{_SELF}0.ffn.fc1.weight", k=_SHARED_KEYS.theirs)
  found = sizes_from(_NAME, state, names)
  gates = state.get(f"{_SELF}0.mixer.gt_proj.weight")
  check_told(_NAME, fields, _UNTOLD | (_UNTOLD_OF_WINDOW if gates is None else {}))
  layers = {prefix: count_layers(state, prefix) for prefix in (_SELF, _CROSS)}
  if len(set(layers.values())) > 1:
    raise ValueError(f"the weights have {layers}, which should be as many of each")
  num_heads, embed_dim, keys = fields["num_heads"], found["embedding"].shape[1], len(found["k"])
  head_dim = embed_dim // max(num_heads, 1)
  if head_dim < 1 or embed_dim != num_heads * head_dim or keys % head_dim:
    raise ValueError(
      f"num_heads={num_heads} does not divide a width of {embed_dim} into heads of which "
      f"{names['k']}, {keys} rows, has some"
    )
  sizes = dict(
    num_layers=sum(layers.values()),
    embed_dim=embed_dim,
    num_kv_heads=keys // head_dim,
    mlp_dim=len(found["mlp"]),
  )
  if gates is None:
    return sizes | dict(self_attention="sliding_window")
  return sizes | dict(self_attention="gated_retention", num_self_heads=len(gates))
