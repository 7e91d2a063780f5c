"""What latents are kept under: everything that they, their classes and their texts depend on."""

import json
import types
from unittest import mock

import jax
import numpy as np
import pytest

from experiments.configs.latentlm import common
from latentlab import data
from latentlab.data import mixed
from latentlab.models import latent_tokenizer
from latentlab.models.latent_tokenizer import LatentTokenizer
from latentlab.train import latents, loop, tokenizer_task
from latentlab.train.state import unbox

_SIZES = dict(image_size=4, channels=1, patch_size=2, num_layers=1, embed_dim=8, num_heads=1)


@pytest.fixture(scope="module")
def tokenizer():
  config = latent_tokenizer.build_config(dict(name="vit_tokenizer", dim=2, **_SIZES))
  model = LatentTokenizer(config)
  params = unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4, 4, 1))))["params"]
  return latents.TrainedTokenizer(model, params, batch_size=8)


@pytest.fixture
def prepared(tmp_path, tokenizer, monkeypatch):
  """Latents of eight images of two classes, given fields of `config.data.media`."""
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: tokenizer)
  pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 6), np.uint8)
  path = tmp_path / "media.npz"
  np.savez(path, media=pixels, labels=np.array(["a", "b"] * 4), names=list("stuvwxyz"))

  def make(**fields):
    media = dict(source="arrays", path=str(path), size=4, validation_fraction=0.2) | fields
    config = mixed.LatentDataConfig(media=media, tokenizer_run="run", cache_dir=str(tmp_path))
    return latents.prepare(config)

  return make


def test_a_tokenizer_is_loaded_without_what_it_was_trained_by(tmp_path):
  config = common.latent_tokenizer("vit_tokenizer", **_SIZES, dim=2)
  config.task.update(adversarial_weight=0.1, discriminator_width=2, discriminator_depth=1)
  task = tokenizer_task.build(config)
  params = jax.jit(lambda key: unbox(task.init(key)))(jax.random.key(3))
  # Features that another program has registered.
  config.task.update(perceptual="another's", perceptual_weight=1.0)
  loop.save(tmp_path / "run", config, data.ByteTokenizer(), params)
  loaded = latents.load_tokenizer(str(tmp_path / "run"))
  del params[tokenizer_task.DISCRIMINATOR]
  jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_what_was_drawn_beside_the_sphere_is_put_back():
  config = latent_tokenizer.build_config(
    dict(name="vit_tokenizer", dim=3, bottleneck="spherical", **_SIZES)
  )
  model = LatentTokenizer(config)
  params = unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4, 4, 1))))["params"]
  loaded = latents.TrainedTokenizer(model, params, batch_size=8)
  means, _ = loaded.posterior(np.random.default_rng(0).normal(size=(2, 4, 4, 1)))
  np.testing.assert_allclose(np.square(means).sum(-1), 3, rtol=1e-5)
  off = means * np.array([0.5, 2.0, 3.0, 0.1])[:, None]
  np.testing.assert_allclose(loaded.decode(off), loaded.decode(means), atol=1e-5)


def test_a_tokenizers_own_media_are_encoded_for_models(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 4), np.uint8)
  np.savez(tmp_path / "media.npz", media=pixels)
  config = common.latent_tokenizer("vit_tokenizer", **_SIZES, dim=2)
  config.data.update(source="arrays", path=str(tmp_path / "media.npz"), validation_fraction=0.25)
  params = jax.jit(lambda key: unbox(tokenizer_task.build(config).init(key)))(jax.random.key(3))
  run = str(tmp_path / "run")
  loop.save(run, config, data.ByteTokenizer(), params)
  store = latents.prepare_run(run, str(tmp_path / "cache"))
  assert {name: len(x) for name, x in store.splits.items()} == {"train": 7, "validation": 1}
  # A model's config finds them.
  media = config.data.copy_and_resolve_references()
  c = common.latentlm(None)
  c.data.update(media=media, tokenizer_run=run, condition="none", cache_dir=str(tmp_path / "cache"))
  latents.load_tokenizer(run).__dict__["posterior"] = None  # Nothing is encoded again.
  assert latents.prepare(mixed.LatentDataConfig.of(c.data.to_dict())).path == store.path


def test_a_run_goes_on_with_its_latents_tokenizer_alone(
  prepared, tokenizer, tmp_path, monkeypatch, caplog
):
  made, again = prepared(), prepared()
  assert made.meta["latent_tokenizer"] == again.meta["latent_tokenizer"]
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / loop.CORPUS).write_text(json.dumps(dict(made.meta)))
  params = jax.tree.map(lambda x: x + 1, tokenizer.params)
  other = latents.TrainedTokenizer(tokenizer.model, params, batch_size=8)
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: other)
  config = common.latentlm(None)
  config.data.update(tokenizer_run="other", cache_dir=str(tmp_path))
  config.data.media.update(source="arrays", path=str(tmp_path / "media.npz"), size=4)
  config.data.media.validation_fraction, config.resume = 0.2, str(tmp_path / "run")
  now = prepared().meta["latent_tokenizer"]
  digests = rf"{made.meta['latent_tokenizer']}, .*='other' is {now}: the parameters know other lat"
  with pytest.raises(ValueError, match=digests):
    loop.train(config, tmp_path / "next")
  # Its parameters may begin a run on other latents, which is told.
  config.resume, config.init_from = "", str(tmp_path / "run")
  with pytest.raises(ValueError, match="no checkpoint"):
    loop.train(config, tmp_path / "begun")
  assert f"init_from={config.init_from} was trained on latents of the" in caplog.text


def test_tokenizers_are_compared_modality_by_modality(tmp_path):
  """Whichever comes first, and where a run had fewer."""
  image = dict(modality="image", latent_tokenizer="i")
  speech = dict(modality="speech", latent_tokenizer="s")
  where = types.SimpleNamespace(tokenizer_run="there")

  def changes(before, now):
    (tmp_path / loop.CORPUS).write_text(json.dumps(before))
    part = lambda name: types.SimpleNamespace(summary=now["others"][name], config=where)
    found = mock.Mock(spec=mixed.LatentData, summary=now, of=part, config=where)
    return loop._other_latents(tmp_path, found)

  both = image | dict(others={"speech": speech})
  assert not changes(speech, both) and not changes(both, speech)
  assert not changes(both, speech | dict(others={"image": image}))
  found = changes(speech | dict(latent_tokenizer="t"), both)
  where = "others.speech.data.tokenizer_run='there'"
  assert found == [f"latents of the tokenizer t, and that of {where} is s"]


def test_a_stop_in_a_tokenizers_last_step_stops_the_run(tmp_path, monkeypatch):
  config = common.latentlm(common.latent_tokenizer("vit_tokenizer", **_SIZES, dim=2))
  path = tmp_path / "media.npz"
  np.savez(path, media=np.zeros((8, 4, 4), np.uint8))
  config.tokenizer.update(train_steps=1, batch_size=8, data=common.media("arrays", path=str(path)))
  config.tokenizer.sample.num_samples = config.tokenizer.optimizer.warmup_steps = 0
  monkeypatch.setattr(loop._Preemption, "reached", lambda self, step: True)
  trained = lambda self, state, batch: (state, {"loss": 1.0})  # Compiles nothing.
  monkeypatch.setattr(loop.partition.JitTrainer, "step", trained)
  with pytest.raises(loop.Preempted) as e:
    loop.train(config, tmp_path / "run")
  assert e.value.step == 0
  assert [p.name for p in (tmp_path / "run").iterdir()] == [latents.TOKENIZER]
  assert not latents.missing_tokenizers(config, tmp_path / "run")


def test_latents_are_found_again(prepared):
  assert prepared().path == prepared().path


def test_latents_follow_what_they_are_made_of(prepared):
  store = prepared(class_names=("a", "b"))
  whole = prepared(resize=6)  # Of other pixels.
  assert whole.splits["train"].item(0).means.shape == store.splits["train"].item(0).means.shape
  assert not np.allclose(whole.splits["train"].means, store.splits["train"].means)
  turned = prepared(class_names=("b", "a"))
  assert turned.meta["class_names"] == ["b", "a"]
  np.testing.assert_array_equal(turned.splits["train"].labels, 1 - store.splits["train"].labels)
  told = prepared(class_captions=("an a", "a b"))
  assert set(told.splits["train"].captions) == {"an a", "a b"}
  other = prepared(class_captions=("one", "two"))
  assert set(other.splits["train"].captions) == {"one", "two"}
  held_out = [prepared(split_pattern=p).splits["validation"] for p in ("s", "t")]
  assert held_out[0].labels.tolist() != held_out[1].labels.tolist()
