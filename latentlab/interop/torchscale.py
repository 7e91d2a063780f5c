"""RetNets of torchscale (`torchscale/architecture/retnet.py`, release 0.3.0), by its own names.

Logits are equal in all three of its forms, each of which divides the rows of retention by something
else before the head norm. To reproduce them at any epsilon takes `normalization="paper"` for its
parallel form, `"decay"` for the recurrent one, and `"torchscale"` with a `chunk_size` for the
chunkwise one. Under an epsilon of zero every normalization, `"none"` among them, gives all three.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from latentlab import ops
from latentlab.interop.weights import (
  Entry,
  Imported,
  StateDict,
  check_told,
  count_layers,
  export_weights,
  import_weights,
  parameter_shapes,
  tied_head,
  without_prefix,
)
from latentlab.models import LanguageModelConfig, build_config, retnet
from latentlab.typing import Params

_LAYER = "layers.{layer}."
_REL_POS = "retnet_rel_pos."
_EMBEDDING, _HEAD, _FINAL_NORM = (
  Entry("embed_tokens.weight", "embedder/embedding"),
  Entry("output_projection.weight", "head/kernel", contracted=1),
  Entry("layer_norm.weight", "decoder/final_norm/scale"),
)
_BLOCK = (
  Entry(_LAYER + "retention_layer_norm.weight", "mixer_norm/scale"),
  Entry(_LAYER + "retention.q_proj.weight", "mixer/q_proj/kernel", contracted=1),
  Entry(_LAYER + "retention.k_proj.weight", "mixer/k_proj/kernel", contracted=1),
  Entry(_LAYER + "retention.v_proj.weight", "mixer/v_proj/kernel", contracted=1),
  Entry(_LAYER + "retention.g_proj.weight", "mixer/gate_proj/kernel", contracted=1),
  Entry(_LAYER + "retention.out_proj.weight", "mixer/out_proj/kernel", contracted=2),
  Entry(_LAYER + "final_layer_norm.weight", "feed_forward_norm/scale"),
  # The one that is activated, and the one that multiplies it.
  Entry(_LAYER + "ffn.fc1.weight", "feed_forward/gate_proj/kernel", contracted=1),
  Entry(_LAYER + "ffn.gate.weight", "feed_forward/in_proj/kernel", contracted=1),
  Entry(_LAYER + "ffn.fc2.weight", "feed_forward/out_proj/kernel", contracted=1),
)

_UNTOLD = {
  "feed_forward": "'swiglu' for activation_fn swish, which its language models have, 'geglu' for "
  "gelu, the default of its RetNetConfig",
  "scale_embeddings": "true for its language models, false for no_scale_embedding, the default of "
  "its RetNetConfig",
}


def entries(*, tied: bool = False, deepnorm: bool = False) -> tuple[Entry, ...]:
  """The table of names.

  Args:
    tied: Whether the head is the embedding.
    deepnorm: Whether norms are behind the branches, so that none is at the end.
  """
  head = () if tied else (_HEAD,)
  return (_EMBEDDING, *head, *_BLOCK, *(() if deepnorm else (_FINAL_NORM,)))


def import_model(state: StateDict, fields: Mapping[str, Any]) -> Imported:
  """A RetNet from a state dict.

  Args:
    state: The decoder's, by torchscale's names, with or without `decoder.` in front.
    fields: Fields of `config.model`. Weights tell neither the activation nor whether embeddings are
      scaled: `feed_forward` and `scale_embeddings` must be among them.

  Returns:
    The model, with `normalization="none"` unless `fields` say otherwise.

  Raises:
    ValueError: a field is untold; names or shapes are not those of such a model.
  """
  check_told("torchscale", fields, _UNTOLD)
  state = without_prefix(state, "decoder.")
  section = {"name": "retnet", **_sizes(state), **fields}
  if _FINAL_NORM.theirs not in state and section.get("residual") != "deepnorm":
    raise ValueError(
      f"{_FINAL_NORM.theirs} is missing, as it is after training with --deepnorm alone; give "
      "residual=deepnorm if this was"
    )
  section.setdefault("residual", "pre")
  tied, state = tied_head(state, _EMBEDDING, _HEAD, section.get("tie_embeddings"))
  section["tie_embeddings"], vocab_size = tied, len(state[_EMBEDDING.theirs])
  config = build_config(section, vocab_size)
  table = entries(tied=tied, deepnorm=section["residual"] == "deepnorm")
  weights = {name: x for name, x in state.items() if not name.startswith(_REL_POS)}
  return Imported(section, vocab_size, import_weights(table, weights, parameter_shapes(config)))


def export_model(config: LanguageModelConfig, params: Params) -> StateDict:
  """A RetNet's state dict by torchscale's names, its buffers included.

  Raises:
    ValueError: torchscale has no such model.
  """
  check(config)
  mixer = config.decoder.stages[0].pattern[0].mixer
  deepnorm = config.decoder.residual == "deepnorm"
  state = export_weights(entries(tied=config.tie_embeddings, deepnorm=deepnorm), params)
  if config.tie_embeddings:
    state[_HEAD.theirs] = state[_EMBEDDING.theirs].copy()
  return state | {
    f"{_REL_POS}decay": np.array(mixer.log_decay, np.float32),
    f"{_REL_POS}angle": _angles(mixer.head_dim, mixer.positions.base),
  }


def check(config: LanguageModelConfig) -> None:
  """Raises a `ValueError` that names what torchscale's RetNet does not have."""
  patterns = [stage.pattern for stage in config.decoder.stages]
  if len(patterns) != 1 or len(patterns[0]) != 1:
    raise ValueError(f"torchscale's layers are alike, not {len(patterns)} stages of {patterns}")
  block = patterns[0][0]
  mixer = block.mixer
  found = {
    "a mixer": (mixer.kind, "retention"),
    "norm": (block.norm, "rms"),
    "feed_forward": (block.feed_forward.kind, ("swiglu", "geglu")),
    "positions": (mixer.positions.kind, "rope"),
    "positions of the embedding": (config.positions, "none"),
  }
  if mixer.kind == "retention":
    found |= {
      "rope_base": (mixer.positions.base, 10_000.0),
      "rope_grid": (mixer.positions.grid, "linspace"),
      "rope_layout": (mixer.positions.layout, "interleaved"),
      "decay": (mixer.decay, ("pow2", "custom")),
      "gate": (mixer.gate, True),
      "head_norm": (mixer.head_norm, "rms"),
      "head_norm_affine": (mixer.head_norm_affine, False),
      "num_kv_heads": (mixer.kv_heads, mixer.num_heads),
    }
  wrong = {
    name: f"{value!r} instead of {wanted!r}"
    for name, (value, wanted) in found.items()
    if value not in (wanted if isinstance(wanted, tuple) else (wanted,))
  }
  if wrong:
    raise ValueError(f"torchscale's RetNet has no such model: {wrong}")


def _sizes(state: StateDict) -> dict[str, Any]:
  """Fields of `config.model` that shapes, names and buffers tell."""
  query, value, fc1 = (_BLOCK[i].theirs.format(layer=0) for i in (1, 3, 7))
  decay, angle = (f"{_REL_POS}{name}" for name in ("decay", "angle"))
  needed = (_EMBEDDING.theirs, query, value, fc1, decay, angle)
  if missing := [name for name in needed if name not in state]:
    raise ValueError(
      f"the weights are not those of torchscale's RetNet: {missing} are missing among "
      f"{sorted(state)[:20]}"
    )
  num_heads, (width, embed_dim) = len(state[decay]), state[query].shape
  head_dim, (values, _) = width // num_heads, state[value].shape
  if width % num_heads or values % num_heads:
    raise ValueError(f"{query}, {width} rows, and {value}, {values}, are not of {num_heads} heads")
  if not np.allclose(state[angle], _angles(head_dim), rtol=1e-5, atol=0):
    raise ValueError(f"{angle} is not what torchscale rotates by; other rotations are not known")
  return dict(
    num_layers=count_layers(state, "layers."),
    embed_dim=embed_dim,
    num_heads=num_heads,
    head_dim=head_dim,
    value_factor=values / width,
    mlp_dim=state[fc1].shape[0],
    **{k: v for k, v in retnet.TORCHSCALE.items() if k not in _UNTOLD and k != "decay"},
    **_decay(state[decay]),
  )


def _decay(log_decay: np.ndarray) -> dict[str, Any]:
  usual = ops.log_decay_rates(len(log_decay), "pow2")
  if np.allclose(log_decay, usual, rtol=1e-5, atol=0):
    return dict(decay="pow2")
  # From the 21st head on, its float32 has no decay at all.
  values = tuple(np.exp(log_decay.astype(np.float64)).tolist())
  return dict(decay="custom", decay_values=values)


def _angles(head_dim: int, base: float = 10_000.0) -> np.ndarray:
  angles = ops.rope_frequencies(head_dim, base=base, grid="linspace")
  return np.repeat(np.array(angles, np.float32), 2)
