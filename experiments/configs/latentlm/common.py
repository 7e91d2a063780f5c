"""What configs of latents share: media, tokenizers, and models over their latents."""

import dataclasses
from typing import Any

import ml_collections
from ml_collections import config_dict

from experiments.configs import common
from latentlab.data import mixed
from latentlab.data.media import MediaConfig
from latentlab.data.mixed import LatentDataConfig
from latentlab.layers.diffusion_head import Diffusion
from latentlab.models.latent_tokenizer import fields as latent_tokenizer_fields
from latentlab.train import dit_task
from latentlab.train.latent_task import head_fields, plain_fields
from latentlab.train.tokenizer_losses import Objective


def media(source: str, **values: Any) -> ml_collections.ConfigDict:
  """`config.data` of a tokenizer, or `config.data.media` of a model over its latents."""
  fields = {f.name: f.default for f in dataclasses.fields(MediaConfig)}
  return ml_collections.ConfigDict(fields | {"source": source} | values)


def latent_tokenizer(name: str, *, seed: int = 0, **values: Any) -> ml_collections.ConfigDict:
  """Defaults of a tokenizer's training run on digits.

  Args:
    name: Of its body, as `config.model.name`.
    seed: Of the run.
    **values: Fields of `config.model`.
  """
  c = common.run(seed=seed)
  c.task = dict(type="latent_tokenizer", trainable=(".*",), **dataclasses.asdict(Objective()))
  c.model = ml_collections.ConfigDict(dict(name=name, preset=config_dict.placeholder(str)))
  for field, (kind, default) in latent_tokenizer_fields(name).items():
    c.model[field] = config_dict.placeholder(kind) if default is None else default
  c.model.update(values)
  c.data = media("digits")
  c.sample = dict(num_samples=16)
  c.optimizer.update(peak_lr=2e-3, weight_decay=0.0, warmup_steps=50)
  c.batch_size = 64
  return common.lock(c)


def latentlm(
  tokenizer: ml_collections.ConfigDict | None, *, seed: int = 0, head: str = "diffusion"
) -> ml_collections.ConfigDict:
  """Defaults of a LatentLM over a tokenizer's latents, of small size.

  Args:
    tokenizer: Config of the tokenizer's run, which is trained first, in `tokenizer/` of the
      workdir; `None` where `data.tokenizer_run` will name one that is trained.
    seed: Of both runs.
    head: Kind of the head.
  """
  c = _over_latents(tokenizer, "latentlm", seed)
  c.model = _backbone()
  c.latents = _drawn_by(head)
  c.latents.prompt_dropout = 0.1
  c.others = ml_collections.ConfigDict()
  return common.lock(c)


def add_modality(
  c: ml_collections.ConfigDict,
  name: str,
  tokenizer: ml_collections.ConfigDict,
  *,
  head: str = "diffusion",
  **data: Any,
) -> ml_collections.ConfigDict:
  """Adds a kind of latents to a `latentlm`, in `c.others`; returns its section.

  Its tokenizer is trained first, in `tokenizer_<name>/` of the workdir.

  Args:
    c: Config of the run.
    name: Of the modality.
    tokenizer: Config of its tokenizer's run.
    head: Kind of its head.
    **data: Fields of the section's `data`.
  """
  section = ml_collections.ConfigDict(dict(latents=_drawn_by(head), tokenizer=tokenizer))
  section.data = _of_latents(tokenizer)
  for field in mixed.OF_ROWS:  # Rows are those of all modalities.
    del section.data[field]
  section.data.update(dict(modality=name, repeats=1) | data)
  with c.unlocked():
    c.others[name] = section
    c.data.repeats = c.data.get("repeats", 1)
  common.lock(c)
  return c.others[name]


def _drawn_by(head: str) -> ml_collections.ConfigDict:
  """`latents` of a modality: its head, and what is asked of it."""
  kinds = {name: config_dict.placeholder(kind) for name, kind in head_fields(head).items()}
  fields = dict(stop="fixed", loss_weight=1.0, input="sample", target="sample")
  return ml_collections.ConfigDict(dict(head={"kind": head} | kinds) | fields)


def dit(
  tokenizer: ml_collections.ConfigDict | None, *, seed: int = 0, **values: Any
) -> ml_collections.ConfigDict:
  """Defaults of a DiT over a tokenizer's latents, about as large as `latentlm`'s model.

  Args:
    tokenizer: As of `latentlm`.
    seed: Of both runs.
    **values: Fields of `config.model`.
  """
  c = _over_latents(tokenizer, "dit", seed)
  c.model = ml_collections.ConfigDict(dict(name="dit", preset=config_dict.placeholder(str)))
  for field, kind in dit_task.model_fields().items():
    c.model[field] = config_dict.placeholder(kind)
  c.model.update(dict(num_layers=3, embed_dim=64, num_heads=4, init="fan_in") | values)
  c.latents = dict(diffusion=_diffusion(), stop="fixed", prompt_dropout=0.1, target="sample")
  return common.lock(c)


def vq(tokenizer: ml_collections.ConfigDict | None, *, seed: int = 0) -> ml_collections.ConfigDict:
  """Defaults of a language model over a tokenizer's codes, with `latentlm`'s backbone.

  Args:
    tokenizer: As of `latentlm`, with codes.
    seed: Of both runs.
  """
  c = _over_latents(tokenizer, "vq", seed)
  c.model = _backbone()
  c.latents = dict(stop="fixed", prompt_dropout=0.1)
  return common.lock(c)


def transfusion(
  tokenizer: ml_collections.ConfigDict | None, *, seed: int = 0
) -> ml_collections.ConfigDict:
  """Defaults of a Transfusion over a tokenizer's latents, with `latentlm`'s backbone.

  Args:
    tokenizer: As of `latentlm`.
    seed: Of both runs.
  """
  c = _over_latents(tokenizer, "transfusion", seed)
  c.model = _backbone()
  # A token behind a run, so that all of its latents are read.
  options = dict(stop="token", loss_weight=5.0, caption_noise=0.5)
  options |= dict(prompt_dropout=0.1, target="sample")
  c.latents = dict(diffusion=_diffusion(), **options)
  return common.lock(c)


def _diffusion() -> ml_collections.ConfigDict:
  fields = plain_fields(Diffusion)
  return ml_collections.ConfigDict({n: config_dict.placeholder(k) for n, k in fields.items()})


def _over_latents(
  tokenizer: ml_collections.ConfigDict | None, task: str, seed: int
) -> ml_collections.ConfigDict:
  """What runs over a tokenizer's latents have in common, whatever is trained on them."""
  c = common.run(seed=seed)
  c.task = dict(type=task, trainable=(".*",))
  c.data = _of_latents(tokenizer)
  c.sample = dict(num_samples=40, solver="dpm_2m", num_steps=20, guidance=1.0, temperature=1.0)
  c.sample.update(guidance_kind="constant", guidance_interval=(0.0, 1.0))
  c.sample.lambda_min = config_dict.placeholder(float)
  c.tokenizer = ml_collections.ConfigDict() if tokenizer is None else tokenizer
  c.optimizer.update(peak_lr=2e-3, weight_decay=0.01, ema_decay=0.999, warmup_steps=100)
  c.batch_size = 64
  c.evals.validation = dict(type="items", split="validation", every_steps=500, max_batches=0)
  return c


def _of_latents(tokenizer: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
  """`config.data` over the latents of a tokenizer's own media."""
  left_out = "media", "repeats"  # Repeats are of runs on several modalities.
  fields = {f.name: f.default for f in dataclasses.fields(LatentDataConfig)}
  fields = {name: default for name, default in fields.items() if name not in left_out}
  found = media("digits") if tokenizer is None else tokenizer.data.copy_and_resolve_references()
  return ml_collections.ConfigDict(fields | dict(media=found))


def _backbone() -> ml_collections.ConfigDict:
  return common.model(
    "transformer", num_layers=3, embed_dim=64, num_heads=4, feed_forward="swiglu", init="fan_in"
  )


def generation(every_steps: int, **values: Any) -> dict[str, Any]:
  """An evaluation of samples, with every field that it has."""
  fields = dict(num_samples=500, features="classifier", split="train", reconstruction=False, seed=0)
  return dict(type="generation", every_steps=every_steps) | fields | solver_fields() | values


def solver_fields() -> dict[str, Any]:
  """Fields of an evaluation that draws latents."""
  solver = dict(solver="dpm_2m", num_steps=20, guidance=1.0, temperature=1.0)
  return solver | dict(lambda_min=config_dict.placeholder(float))


def smoke(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Shrinks a LatentLM's run, its tokenizer's included, to seconds on a CPU."""
  if c.tokenizer:
    smoke_tokenizer(c.tokenizer)
    c.data.media = c.tokenizer.data.copy_and_resolve_references()
  sizes = dict(num_layers=1, embed_dim=32, num_heads=2)
  c.model.update({field: size for field, size in sizes.items() if field in c.model})
  if "depth" in c.latents.get("head", {}):
    c.latents.head.depth = 1
  c.batch_size = 8
  c.optimizer.warmup_steps = 2
  c.train_steps, c.log_steps, c.checkpoint_steps = 8, 2, 4
  for evaluation in c.evals.values():
    draws = evaluation.type in ("generation", "speech")
    small = dict(num_samples=10, num_steps=2) if draws else {}
    evaluation.update(every_steps=4, **(small or dict(max_batches=2)))
  c.sample.update(num_samples=min(c.sample.num_samples, 4), num_steps=2)
  return c


_SMOKE_VIT = dict(
  image_size=8,
  channels=1,
  patch_size=2,
  num_layers=1,
  decoder_layers=1,
  embed_dim=32,
  num_heads=2,
)
_SMOKE = {
  "beit_tokenizer": _SMOKE_VIT,
  "vit_tokenizer": _SMOKE_VIT,
  "conv_tokenizer": dict(
    image_size=8, channels=1, width=8, multipliers=(1, 2), strides=(2,), depth=1
  ),
  "speech_tokenizer": dict(num_samples=640, width=4, strides=(4, 5), depths=(1, 1, 1)),
}


def smoke_tokenizer(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Shrinks a tokenizer's run to one that trains in seconds on a CPU; images become digits."""
  c.model.update(_SMOKE[c.model.name])
  if c.model.name == "speech_tokenizer":
    c.data.update(num_samples=c.model.num_samples)
    c.task.spectral_windows = (64, 256)
  else:
    c.data = media("digits")
  c.batch_size = 8
  c.optimizer.warmup_steps = 2
  c.train_steps, c.log_steps, c.checkpoint_steps = 8, 2, 4
  for evaluation in c.evals.values():
    evaluation.update(every_steps=4, max_batches=2)
  c.sample.num_samples = min(c.sample.num_samples, 4)
  return c
