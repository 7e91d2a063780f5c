"""Latents, documents and models of a few numbers, for tests of what is trained on them."""

import numpy as np

from latentlab.data import latent_store, mixed
from latentlab.data.latent_store import LatentItem
from latentlab.layers.diffusion_head import DiffusionHeadConfig
from latentlab.models import latentlm
from latentlab.models.latentlm import ModalityConfig, SpecialTokens
from latentlab.models.registry import build_config

NUM_CLASSES, DIM = 3, 2
HEAD = DiffusionHeadConfig(depth=1, mlp_ratio=2.0, num_draws=2)
NOISE = dict(kind="gaussian_scale", std=0.5, per="example", on_sphere=False)


def store(
  path, counts=(4,) * 6, noise=None, scales=False, name="image", dim=DIM
) -> latent_store.LatentStore:
  """Items of the given lengths; a fourth as many are held out."""
  rng = np.random.default_rng(0)

  def items(counts):
    for i, count in enumerate(counts):
      means = rng.normal(2.0, 3.0, (count, dim)).astype(np.float32)
      extra = np.abs(means) * 0.1 if scales else None
      yield LatentItem(means, i % NUM_CLASSES, ["a", "bcd", "ef"][i % 3], extra)

  meta = dict(
    key=f"key of {name}",
    modality=name,
    dim=dim,
    noise=noise or NOISE,
    num_latents=max(counts),
    num_classes=NUM_CLASSES,
    class_names=["x", "y", "z"],
    media_shape=[4, 4, 1],
    corpus="made",
    sample_rate=0,
  )
  splits = {"train": items(counts), "validation": items(counts[: max(1, len(counts) // 4)])}
  return latent_store.write(path, splits, meta)


def tokens(condition: str) -> SpecialTokens:
  classes = {"class": NUM_CLASSES, "none": 1}.get(condition, 0)
  return SpecialTokens(258, 1, classes)


def data(path, condition="class", stop="fixed", batch_size=2, counts=(4,) * 6, **fields):
  """Rows of documents over such items."""
  options = {"noise": fields.pop("noise", None), "scales": fields.pop("scales", False)}
  config = mixed.LatentDataConfig(condition=condition, **fields)
  made = store(path, counts, **options)
  return mixed.build(config, made, tokens(condition), stop, batch_size)


def config(
  condition="class", stop="fixed", backbone="transformer", head=HEAD, num_latents=4, **fields
) -> latentlm.LatentLMConfig:
  """A model over such rows."""
  sizes = dict(name=backbone, num_layers=2, embed_dim=16, num_heads=2) | fields
  special = tokens(condition)
  language = build_config(sizes, vocab_size=special.vocab_size)
  modality = ModalityConfig("image", DIM, head, num_latents, stop, mean=0.5, std=2.0)
  return latentlm.LatentLMConfig(language, (modality,), 258, special.num_classes)


def check_resume(data) -> None:
  """Asserts that an iterator goes on from another's state with the same batches."""
  whole = [b for b, _ in zip(data.train_iterator(3), range(7), strict=False)]
  iterator = data.train_iterator(3)
  for _ in range(3):
    next(iterator)
  other = data.train_iterator(3)
  other.set_state(iterator.get_state())
  for want in whole[3:]:
    got = next(other)
    assert all((got[name] == x).all() for name, x in want.items())
