"""The peers, with our weights, in PyTorch: transformers' Llama and DiffLlama, torchscale's RetNet.

An export is linear in the parameters, so it maps gradients as it maps weights. torch, transformers
and torchscale are imported where they are used.
"""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from latentlab.interop import StateDict, diffllama, export_weights, torchscale
from latentlab.layers import BlockConfig
from latentlab.models import LanguageModelConfig
from latentlab.typing import Params


def llama(config: LanguageModelConfig) -> "transformers.LlamaForCausalLM":
  """Makes the Llama of equal sizes, at its best: SDPA, and no key/value cache."""
  import transformers

  block = _block(config)
  mixer = block.mixer
  _demand(
    config,
    rms=block.norm,
    swiglu=block.feed_forward.kind,
    causal=mixer.mask.kind,
    rope=mixer.positions.kind,
    half=mixer.positions.layout,
  )
  sizes = transformers.LlamaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.decoder.embed_dim,
    intermediate_size=block.feed_forward.mlp_dim,
    num_hidden_layers=config.decoder.num_layers,
    num_attention_heads=mixer.num_heads,
    num_key_value_heads=mixer.kv_heads,
    head_dim=mixer.head_dim,
    rms_norm_eps=config.decoder.norm_eps,
    rope_parameters=dict(rope_type="default", rope_theta=mixer.positions.base),
    tie_word_embeddings=False,
    use_cache=False,
    attn_implementation="sdpa",
  )
  return transformers.LlamaForCausalLM(sizes)


def diff_llama(config: LanguageModelConfig) -> "transformers.DiffLlamaForCausalLM":
  """Makes the DiffLlama of equal sizes: SDPA, and no key/value cache; see `set_attention`."""
  import transformers

  sizes = diffllama.make_config(config)
  for name in ("architectures", "model_type"):
    sizes.pop(name)
  options = dict(use_cache=False, attn_implementation="sdpa")
  return transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**sizes, **options))


def set_attention(module: "transformers.PreTrainedModel", implementation: str) -> None:
  """Switches a model of transformers to `sdpa` or `eager` attention."""
  module.set_attn_implementation(implementation)


def torchscale_retnet(config: LanguageModelConfig) -> "torch.nn.Module":
  """Makes torchscale's RetNet of equal sizes, in its parallel form; see `set_chunk_size`."""
  import torch

  stand_in_for_unused_imports()
  from torchscale.architecture.config import RetNetConfig
  from torchscale.architecture.retnet import RetNetDecoder

  block = _block(config)
  mixer = block.mixer
  _demand(
    config,
    rms=block.norm,
    swiglu=block.feed_forward.kind,
    pow2=mixer.decay,
    rope=mixer.positions.kind,
    linspace=mixer.positions.grid,
    interleaved=mixer.positions.layout,
  )
  args = RetNetConfig(
    vocab_size=config.vocab_size,
    decoder_embed_dim=config.decoder.embed_dim,
    decoder_value_embed_dim=mixer.num_heads * mixer.value_head_dim,
    decoder_retention_heads=mixer.num_heads,
    decoder_ffn_embed_dim=block.feed_forward.mlp_dim,
    decoder_layers=config.decoder.num_layers,
    activation_fn="swish",
    layernorm_eps=config.decoder.norm_eps,
    subln=False,
  )
  embedding = torch.nn.Embedding(config.vocab_size, config.decoder.embed_dim)
  decoder = RetNetDecoder(args, embed_tokens=embedding)
  for layer in decoder.layers:
    layer.retention.group_norm.eps = mixer.head_norm_eps
  return decoder


def set_chunk_size(retnet: "torch.nn.Module", chunk_size: int | None) -> None:
  """Switches torchscale's RetNet to its chunkwise form, or to the parallel one with `None`."""
  retnet.chunkwise_recurrent = chunk_size is not None
  retnet.retnet_rel_pos.recurrent_chunk_size = retnet.recurrent_chunk_size = chunk_size


def llama_weights(params: Params) -> StateDict:
  """Our Transformer's parameters (or their gradients) by Llama's names."""
  weights = {
    "model.embed_tokens.weight": params["embedder"]["embedding"],
    "model.norm.weight": params["decoder"]["final_norm"]["scale"],
    "lm_head.weight": _linear(params["head"]),
  }
  for i, block in _layers(params):
    mixer, feed_forward = block["mixer"], block["feed_forward"]
    weights |= {
      f"model.layers.{i}.{name}.weight": x
      for name, x in {
        "input_layernorm": block["mixer_norm"]["scale"],
        "self_attn.q_proj": _linear(mixer["q_proj"]),
        "self_attn.k_proj": _linear(mixer["k_proj"]),
        "self_attn.v_proj": _linear(mixer["v_proj"]),
        "self_attn.o_proj": _linear(mixer["out_proj"], num_contracted=2),
        "post_attention_layernorm": block["feed_forward_norm"]["scale"],
        "mlp.gate_proj": _linear(feed_forward["gate_proj"]),
        "mlp.up_proj": _linear(feed_forward["in_proj"]),
        "mlp.down_proj": _linear(feed_forward["out_proj"]),
      }.items()
    }
  return _as_numpy(weights)


def torchscale_weights(params: Params) -> StateDict:
  """Our RetNet's parameters (or their gradients) by torchscale's names."""
  return export_weights(torchscale.entries(), params)


def diff_llama_weights(params: Params) -> StateDict:
  """Our parameters (or their gradients) by DiffLlama's names, in its own layout of heads."""
  from experiments.benchmarks import specs
  from latentlab.models import build_config

  # Of a mixer, the table asks for layouts and sizes alone, which the kernels tell.
  q, k = (
    params["decoder"]["stage_0"]["block_0"]["mixer"][f"{x}_proj"]["kernel"].shape for x in "qk"
  )
  sizes = dict(num_layers=1, embed_dim=q[1], num_heads=q[3], num_kv_heads=k[3], head_dim=q[4])
  fields = dict(name="diff_transformer") | sizes | specs.MODELS["diff_transformer"]
  mixer = build_config(fields, 1).decoder.stages[0].pattern[0].mixer
  return _as_numpy(export_weights(diffllama.entries(mixer), params))


@dataclasses.dataclass(frozen=True)
class Peer:
  """A public model.

  Attributes:
    name: Of it and its library.
    make: Makes it from our configuration.
    weights: Our parameters by its names.
  """

  name: str
  make: Callable[[LanguageModelConfig], "torch.nn.Module"]
  weights: Callable[[Params], StateDict]


PEERS = {
  "transformer": Peer("transformers Llama", llama, llama_weights),
  "diff_transformer": Peer("transformers DiffLlama", diff_llama, diff_llama_weights),
  "retnet": Peer("torchscale RetNet", torchscale_retnet, torchscale_weights),
}


def load(module: "torch.nn.Module", weights: StateDict) -> None:
  """Overwrites all parameters of a peer; one that is missing, or too many, is an error."""
  import torch

  with torch.no_grad():
    parameters = dict(module.named_parameters())
    if parameters.keys() != weights.keys():
      raise ValueError(f"names differ: {sorted(parameters.keys() ^ weights.keys())}")
    for name, parameter in parameters.items():
      if parameter.shape != weights[name].shape:
        raise ValueError(f"{name} is {tuple(parameter.shape)}, ours is {weights[name].shape}")
      parameter.copy_(torch.from_numpy(weights[name]))


def _block(config: LanguageModelConfig) -> BlockConfig:
  (stage,) = config.decoder.stages
  (block,) = stage.pattern
  return block


def _demand(config: LanguageModelConfig, **found: str) -> None:
  wrong = {want: value for want, value in found.items() if want != value}
  if wrong or config.tie_embeddings or config.scale_embeddings or config.positions != "none":
    raise ValueError(f"the peer has no such model; wanted: found = {wrong}, {config=}")


def _layers(params: Params) -> Iterator[tuple[int, Any]]:
  """The blocks of a decoder with one stage of one block, each without the stack's axis."""
  import jax

  stacked = params["decoder"]["stage_0"]["block_0"]
  for i in range(stacked["mixer_norm"]["scale"].shape[0]):
    yield i, jax.tree.map(lambda x, i=i: np.asarray(x)[i], stacked)


def _linear(projection: Params, num_contracted: int = 1) -> np.ndarray:
  """`nn.Linear.weight`, `[out, in]`, of a kernel whose first axes are contracted."""
  kernel = np.asarray(projection["kernel"])
  return kernel.reshape(np.prod(kernel.shape[:num_contracted]), -1).T


def _as_numpy(weights: dict[str, Any]) -> StateDict:
  # A copy, since torch takes no array that is read-only, and jax gives no other.
  return {name: np.array(x, np.float32, order="C") for name, x in weights.items()}


def stand_in_for_unused_imports() -> None:
  """Lets torchscale import without fairscale and timm.

  It takes three names from them, for sharding, checkpointing and stochastic depth, none of which
  is in use here, and which cost a second torch's worth of dependencies.
  """
  for name, attributes in (
    ("fairscale.nn", ("checkpoint_wrapper", "wrap")),
    ("timm.models.layers", ("drop_path",)),
  ):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
      sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(parts[i - 1]))
    for attribute in attributes:
      if not hasattr(sys.modules[name], attribute):
        setattr(sys.modules[name], attribute, None)
