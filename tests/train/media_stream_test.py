"""Speech end to end: a tokenizer of short parts, a LatentLM of whole words, sounds that grow."""

import dataclasses
import json
import types

import jax
import latent_cases
import numpy as np
import pytest
from absl import flags as flags_lib
from absl.testing import flagsaver
from flax import linen as nn

from experiments import generate_media
from experiments.configs.latentlm import speech
from latentlab import sample
from latentlab.data import audio
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latent_tokenizer import LatentTokenizer, build_config
from latentlab.train import latents, media_stream
from latentlab.train.latents import TrainedTokenizer
from latentlab.train.state import unbox
from latentlab.train.tasks import build_task

_SAMPLES, _SEGMENT = 2400, 640


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """An untrained model over an untrained tokenizer's latents, nothing of it at zero."""
  config = speech.get_config("smoke")
  config.data.update(cache_dir=str(tmp_path_factory.mktemp("cache")), tokenizer_run="t")
  config.data.media.num_samples = _SAMPLES
  built = build_config(config.tokenizer.model.to_dict() | dict(init_std=0.3))
  model = LatentTokenizer(built)
  params = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, _SEGMENT, 1)))["params"]
  tokenizer = TrainedTokenizer(model, nn.unbox(params), 64)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(latents, "load_tokenizer", lambda run: tokenizer)
    data = latents.build_data(config)
    task = build_task(config, data.tokenizer.vocab_size, data.summary)
    fresh = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(1))
    leaves, tree = jax.tree.flatten_with_path(fresh)
    moved = [
      x if "normalizer" in str(path) else x + 0.2 * np.random.default_rng(i).normal(size=x.shape)
      for i, (path, x) in enumerate(leaves)
    ]
    moved = [jax.numpy.asarray(x, "float32") for x in moved]
    yield task.generator(jax.tree.unflatten(tree, moved), data), config


def test_a_tokenizer_of_parts_encodes_whole_sounds(case):
  generator, _ = case
  tokenizer, store = generator.tokenizer, generator.data.store
  assert store.meta["num_latents"] == _SAMPLES // 20
  assert tokenizer.model.config.num_latents == _SEGMENT // 20
  split = store.splits["validation"]
  assert 1 < len(set(split.lengths.tolist())) and split.lengths.max() == 120
  rows = generator.data.media.splits["validation"]
  short = int(split.lengths.argmin())
  batch = rows.rows(np.array([short]))
  length = batch["lengths"][0]
  want, _ = tokenizer.posterior(jax.numpy.asarray(batch["media"][:, : -(-length // 20) * 20]))
  np.testing.assert_allclose(split.item(short).means, want[0], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def drawn(case):
  """What is drawn at once: rows that the model ends at different places."""
  generator, _ = case
  settings, key = SolverSettings(1.5, num_steps=2), jax.random.key(5)
  prompts = [generator.data.documents.prompt(text=text) for text in "aei"]
  options = dict(max_items=12, max_latents=11)
  whole = generator(prompts, settings, key, **options)
  assert max(whole.lengths) > 1
  return whole, (prompts, settings, key), options


@pytest.mark.parametrize("block_size", [3, 12])
def test_sounds_that_grow_are_those_drawn_at_once(case, drawn, block_size):
  whole, arguments, options = drawn
  pieces = list(media_stream.stream(case[0], *arguments, block_size=block_size, **options))
  assert len(pieces) == -(-max(min(n + 1, 12) for n in whole.lengths) // block_size)
  assert all(len(p) <= 20 * block_size for parts in pieces for p in parts)
  for row, sound in enumerate(whole.media):
    grown = np.concatenate([parts[row] for parts in pieces])
    assert grown.shape == sound.shape == (20 * whole.lengths[row], 1) and sound.std() > 1e-4
    np.testing.assert_allclose(grown, sound, rtol=1e-3, atol=1e-4 * np.abs(sound).max())


def test_a_stream_is_put_back_on_its_sphere(case, drawn, monkeypatch):
  tokenizer, (_, arguments, options) = case[0].tokenizer, drawn
  config = dataclasses.replace(tokenizer.model.config, bottleneck="spherical")
  other = dataclasses.replace(tokenizer, model=LatentTokenizer(config))
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: other)
  whole = case[0].decode(drawn[0].latents)
  pieces = list(media_stream.stream(case[0], *arguments, block_size=3, **options))
  for row, (sound, plain) in enumerate(zip(whole, drawn[0].media, strict=True)):
    assert np.abs(sound - plain).max() > 0.1 * np.abs(plain).max()
    grown = np.concatenate([parts[row] for parts in pieces])
    np.testing.assert_allclose(grown, sound, rtol=1e-3, atol=1e-4 * np.abs(sound).max())


def test_only_sounds_of_a_latentlm_stream(case, drawn, tmp_path, monkeypatch):
  sizes = dict(image_size=8, patch_size=4, num_layers=1, embed_dim=16, num_heads=2)
  of_images = LatentTokenizer(build_config(dict(name="vit_tokenizer", dim=3) | sizes))
  other = dataclasses.replace(case[0].tokenizer, model=of_images)
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: other)
  with pytest.raises(ValueError, match="a LatentGenerator with a VitBody streams nothing"):
    media_stream.stream(case[0], *drawn[1])
  with pytest.raises(ValueError, match="--stream: only sounds that a LatentLM draws"):
    _write(case, tmp_path, True)


def _write(case, folder, stream, **flags):
  generator, config = case
  task = types.SimpleNamespace(generator=lambda *_: generator, diffusion=generator.task.diffusion)
  task.of = lambda modality: task
  run = types.SimpleNamespace(
    task=task,
    config=config,
    params=None,
    data=generator.data,
    step=7,
  )
  options = dict(num_tokens=1, tokens=sample.token_sampler(), temperature=None, seed=0)
  with flagsaver.flagsaver():
    flags_lib.FLAGS.mark_as_parsed()
    for name, value in (dict(num_steps=2) | flags).items():
      flags_lib.FLAGS[name].value = value
    generate_media.main(
      run,
      "run",
      prompts=["a", "i"],
      num_samples=1,
      output=str(folder),
      stream=stream,
      **options,
    )
  lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
  rate, sounds = zip(
    *[audio.decode((folder / f"{i}.wav").read_bytes(), f"{i}.wav") for i in range(2)], strict=True
  )
  assert set(rate) == {8000}
  return lines, sounds


def test_files_that_grow_are_those_written_at_the_end(case, tmp_path):
  """All that the commands write, for a model whose end is its own to draw."""
  lines, sounds = _write(case, tmp_path / "grown", None, block_size=30)
  other, at_once = _write(case, tmp_path / "whole", False)
  assert lines == other and [len(x) for x in sounds] == [20 * line["latents"] for line in lines]
  for a, b in zip(sounds, at_once, strict=True):
    np.testing.assert_allclose(a, b, atol=1.5 / 32768)  # The last bit of 16.
  with pytest.raises(ValueError, match="--block_size=4 is of sounds that grow"):
    _write(case, tmp_path / "bad", False, block_size=4)


@pytest.mark.parametrize(
  "flags, message",
  [
    (dict(guidance=float("nan")), "--guidance=nan must be finite"),
    (dict(num_steps=5000), "--lambda_min or --temperature: .*5000"),
    (dict(classes=["1"]), "this model draws from texts; give --prompt"),
  ],
)
def test_what_cannot_be_drawn_is_said_before(case, tmp_path, flags, message):
  with pytest.raises(ValueError, match=message):
    _write(case, tmp_path / "bad", None, **flags)
  assert not (tmp_path / "bad").exists()


def test_what_fails_leaves_the_sounds_before_it(case, tmp_path, monkeypatch):
  (tmp_path / "0.wav").write_bytes(b"of before")

  def refuse(*args, **options):
    raise ValueError("no such block")

  monkeypatch.setattr(media_stream, "stream", refuse)
  with pytest.raises(ValueError, match="no such block"):
    _write(case, tmp_path, None)
  assert (tmp_path / "0.wav").read_bytes() == b"of before"


def test_a_folder_that_is_a_file(case, tmp_path):
  (tmp_path / "taken").touch()
  with pytest.raises(ValueError, match="taken' is a file; give a folder"):
    _write(case, tmp_path / "taken", None)


def test_no_class_is_asked_for(tmp_path):
  with flagsaver.flagsaver():
    flags_lib.FLAGS.mark_as_parsed()
    flags_lib.FLAGS.classes = []
    with pytest.raises(ValueError, match="--classes= names none; choose among"):
      generate_media._asked(latent_cases.data(tmp_path / "rows"), [])
