"""One model of two kinds of latents: its rows, its losses, and what it draws."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import latent_cases as cases
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import generate_media
from experiments.configs.latentlm import common
from latentlab import eval as eval_lib
from latentlab.data import files, latent_store, mixed
from latentlab.data.latent_store import LatentItem
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latentlm import SpecialTokens
from latentlab.sample import latent
from latentlab.train import latent_task, latents, loop, workdir_files
from latentlab.train.state import unbox

SOUND_DIM = 3


def _config(head="diffusion", stop="token", condition="text"):
  c = common.latentlm(None)
  c.model.update(num_layers=1, embed_dim=16, num_heads=2)
  c.data.condition, c.latents.stop, c.latents.loss_weight = "text", "token", 2.0
  tokenizer = common.latent_tokenizer("vit_tokenizer")
  part = common.add_modality(c, "sound", tokenizer, head=head, condition=condition)
  part.latents.update(stop=stop, loss_weight=3.0)
  for section in (c.latents, part.latents):
    if section.head.kind == "diffusion":
      section.head.update(depth=1, mlp_ratio=2.0, num_draws=2)
  c.batch_size, c.train_steps, c.optimizer.warmup_steps = 4, 10, 1
  return c


def _data(path, stop="token", batch_size=4, images=(4,) * 6, sounds=(5, 2, 3), **fields):
  image = mixed.LatentDataConfig(condition="text", **fields)
  sound = mixed.LatentDataConfig(condition="text", modality="sound", repeats=2)
  store = cases.store(path / "image", images)
  other = cases.store(path / "sound", sounds, name="sound", dim=SOUND_DIM)
  special = SpecialTokens(258, 2, 0)
  others = (mixed.Part(sound, other, stop),)
  return mixed.build(image, store, special, "token", batch_size, others=others)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """A task, its parameters and its data, each made once."""

  @functools.cache
  def make(head="diffusion", stop="token"):
    data = _data(tmp_path_factory.mktemp("several"), stop)
    task = latent_task.build(_config(head, stop), data.summary)
    params = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return task, jax.tree.unflatten(tree, moved), data

  return make


def test_documents_of_two_kinds_take_turns(tmp_path):
  data = _data(tmp_path, documents_per_row=2, seq_length=32)
  rows = data.splits["train"].rows(np.arange(data.training.num_rows))
  special = data.documents.tokens
  assert data.training.num_documents == 6 + 2 * 3 and data.summary["train_rows"] == 6
  assert rows["latents/image"].shape == (6, 32, cases.DIM)
  assert rows["latents/sound"].shape == (6, 32, SOUND_DIM)
  for kinds, inputs in zip(rows["kinds"], rows["inputs"], strict=True):
    assert set(kinds.tolist()) == {0, 1, 2}  # A document of each in every row.
    for i in range(2):
      assert set(inputs[kinds == i + 1].tolist()) == {special.latent(i)}
      assert (inputs == special.begin(i)).sum() == 1
  # Each item as often as it should be, with its own latents.
  for name, repeats in (("image", 1), ("sound", 2)):
    number = ("image", "sound").index(name) + 1
    got = rows[f"latents/{name}"][rows["kinds"] == number]
    items = data.of(name).store.splits["train"]
    want = np.concatenate([items.item(i).means for i in range(len(items))] * repeats)
    np.testing.assert_array_equal(np.sort(got, axis=0), np.sort(want, axis=0))
    assert not rows[f"latents/{name}"][rows["kinds"] != number].any()


def test_each_kind_alone_has_places_for_the_other(tmp_path):
  data = _data(tmp_path)
  for number, name in enumerate(("image", "sound")):
    part = data.of(name)
    batch = next(part.train_iterator(0))
    assert set(np.unique(batch["next_kinds"])) == {0, number + 1}
    assert set(batch) == set(next(data.train_iterator(0))) and part.config.modality == name
    assert part.documents.modality == number and part.splits["validation"].num_documents == 1
  with pytest.raises(ValueError, match="modality='smell' is unknown"):
    data.of("smell")


def test_the_iterator_resumes(tmp_path):
  cases.check_resume(_data(tmp_path, batch_size=2))


def test_all_kinds_have_the_same_splits(tmp_path):
  image = cases.store(tmp_path / "image")
  items = [LatentItem(np.zeros((2, SOUND_DIM), np.float32), 0, "a")]
  meta = dict(key="k", dim=SOUND_DIM, noise=cases.NOISE)
  sound = latent_store.write(tmp_path / "sound", {"train": items}, meta)
  config = mixed.LatentDataConfig(condition="text")
  others = (mixed.Part(dataclasses.replace(config, modality="sound"), sound, "token"),)
  with pytest.raises(ValueError, match=r"of splits \['validation'\], some modalities have media"):
    mixed.build(config, image, SpecialTokens(258, 2, 0), "token", 4, others=others)


def test_the_loss_is_the_sum_of_all_kinds_with_their_weights(case):
  task, params, data = case(stop="classifier")
  batch = jax.tree.map(jnp.asarray, dict(next(data.train_iterator(0))))
  key = jax.random.key(5)
  counts = task.count(batch)
  terms = jax.jit(lambda p: task.loss(p, batch, key, counts))(params)
  got = {name: float(total / weight) for name, (total, weight) in terms.metrics.items()}
  assert set(got) == {
    "latent_loss_image",
    "latent_loss_sound",
    "stop_loss_sound",
    "token_loss",
  }
  want = 2 * got["latent_loss_image"] + 3 * got["latent_loss_sound"]
  want += got["token_loss"] + got["stop_loss_sound"]
  assert float(terms.total / terms.weight) == pytest.approx(want, rel=1e-5)
  for i, name in enumerate(("image", "sound")):
    assert counts[f"latents/{name}"] == (np.asarray(batch["next_kinds"]) == i + 1).sum()


@pytest.mark.parametrize("name", ["image", "sound"])
def test_latents_of_one_kind_leave_the_other_heads_alone(case, name):
  task, params, data = case()
  batch = jax.tree.map(jnp.asarray, dict(next(data.of(name).train_iterator(0))))

  @jax.jit
  def grads(batch):
    return jax.grad(lambda p: task.loss(p, batch, jax.random.key(5), task.count(batch)).total)(
      params
    )

  got = grads(batch)
  other = {"image": "sound", "sound": "image"}[name]
  size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
  for part in ("head", "input"):
    assert size(got[f"{name}_{part}"]) > 0 and size(got[f"{other}_{part}"]) == 0
  # What lies in the other kind's places is never read.
  noisy = batch | {
    f"{n}/{other}": jnp.full_like(batch[f"{n}/{other}"], jnp.nan)
    for n in ("latents", "next_latents")
  }
  jax.tree.map(np.testing.assert_array_equal, grads(noisy), got)


def test_heads_of_two_kinds_in_one_model(case):
  task, params, data = case("regression")
  batch = jax.tree.map(jnp.asarray, dict(next(data.train_iterator(0))))
  sums, weights = jax.jit(lambda p: task.sums(p, batch, jax.random.key(0)))(params)
  assert {n: np.isfinite(x) for n, x in sums.items()} == dict.fromkeys(sums, True)
  assert weights["latents/sound"] > 0 and task.of("sound").diffusion is None
  assert task.of("image").diffusion is not None


@pytest.mark.parametrize("name", ["image", "sound"])
def test_what_is_drawn_is_what_was_asked_for(case, name):
  """A prompt's opening token chooses the kind; the other's head rests."""
  task, params, data = case()
  part, its = task.of(name), data.of(name)
  generator = part.generator(params, its)
  prompts, _ = generator.prompts(2)
  number = ("image", "sound").index(name)
  assert all(p[-1] == its.documents.tokens.begin(number) for p in prompts)
  items = [latent.prompt_items(task.model.config, p) for p in prompts]
  options = generator.limits | dict(settings=SolverSettings(num_steps=1), key=jax.random.key(0))
  drawn = latent.generate_items(task.model, params, items, threshold=0.0, **options)
  runs = latent.drawn_latents(drawn, name, number)
  assert [run.shape for run in runs] == [(1, its.summary["dim"])] * 2
  other = ("sound", "image")[number]
  assert not np.asarray(drawn.tokens.latents[other]).any()
  # A run that has begun goes on with its own kind.
  begun = generator.begun(prompts[0], runs[0])
  assert begun.kinds.tolist() == [0] * len(prompts[0]) + [number + 1]


def test_evaluations_of_one_kind_have_to_name_it(case):
  task, params, data = case()
  build = lambda fields: eval_lib.build({"e": fields | {"every_steps": 1}}, task, data, jax.jit)
  (whole,) = build(dict(type="items"))
  assert {"e/latent_loss_image", "e/latent_loss_sound"} <= set(whole.run(params))
  (one,) = build(dict(type="items", modality="sound"))
  assert "e/latent_loss_image" not in one.run(params)
  with pytest.raises(ValueError, match=r"config.evals.e: type='generation' is of one modality"):
    build(dict(type="generation"))
  with pytest.raises(ValueError, match=r"modality='smell' is unknown; choose one of \['image', 's"):
    build(dict(type="items", modality="smell"))


def test_the_config_of_one_kind_has_its_sections(case):
  task, _, data = case()
  part = task.of("sound")
  assert part.config.data.modality == "sound" and part.config.latents.loss_weight == 3.0
  assert part.config.latents.prompt_dropout == task.config.latents.prompt_dropout
  assert part.config.data.seq_length == data.summary["seq_length"] and not part.config.others
  assert task.of("image").config.latents.loss_weight == 2.0


def test_tokenizers_of_all_kinds_are_trained_first(tmp_path):
  config = _config()
  config.tokenizer = common.latent_tokenizer("vit_tokenizer")
  missing = latents.missing_tokenizers(config, tmp_path)
  assert [place for _, place in missing] == [
    str(tmp_path / "tokenizer"),
    str(tmp_path / "tokenizer_sound"),
  ]
  (tmp_path / "tokenizer/checkpoints/300").mkdir(parents=True)
  config.tokenizer.train_steps = 300
  config.others.sound.data.tokenizer_run = "runs/of_another"
  assert latents.missing_tokenizers(config, tmp_path) == []
  resolved = latents.resolved(config, tmp_path)
  assert resolved.data.tokenizer_run == str(tmp_path / "tokenizer")
  assert resolved.others.sound.data.tokenizer_run == "runs/of_another"


def test_rows_of_another_kind_do_not_go_on(tmp_path):
  config = _config()
  (tmp_path / workdir_files.CONFIG).write_text(config.to_json())
  loop._check_batches(config, tmp_path)
  config.others.sound.data.repeats = 5
  with pytest.raises(ValueError, match="batches: config.others.sound.data.repeats: .* -> 5"):
    loop._check_batches(config, tmp_path)


def test_a_modality_more_or_less_does_not_go_on(tmp_path):
  config = _config()
  (tmp_path / workdir_files.CONFIG).write_text(config.to_json())
  config.others = {}
  with pytest.raises(ValueError, match=r"batches: .*config.others: \['sound'\] -> \[\]"):
    loop._check_batches(config, tmp_path)


def test_runs_on_one_modality_have_the_fields_that_they_had():
  """So that those of before there were several go on."""
  config = common.latentlm(None)
  assert "repeats" not in config.data and not config.others
  part = common.add_modality(config, "sound", common.latent_tokenizer("vit_tokenizer"))
  assert part.data.repeats == config.data.repeats == 1 and "seq_length" not in part.data


def test_samples_of_all_modalities_lie_apart(tmp_path, monkeypatch, capsys):
  model = lambda dim: types.SimpleNamespace(config=types.SimpleNamespace(num_latents=4, dim=dim))
  found = {}
  for name, dim in (("image", cases.DIM), ("sound", SOUND_DIM)):
    found[name] = latents.TrainedTokenizer(model(dim), {}, 4)
    found[name].__dict__["decode"] = lambda z: np.zeros((len(z), 4, 4, 1))
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: found[run])
  data = _data(tmp_path / "data")
  config = _config()
  config.data.tokenizer_run, config.others.sound.data.tokenizer_run = "image", "sound"
  config.sample.update(num_samples=2, num_steps=1)
  task = latent_task.build(config, data.summary)
  task.check_sample(data)
  params = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0))
  task.show_sample(params, data, tmp_path)
  pictures = [f"samples/{name}/images.png" for name in ("image", "sound")]
  assert all((tmp_path / p).stat().st_size for p in pictures)
  assert capsys.readouterr().out.split("Samples: ")[1:] == [
    f"{pictures[0]}\n\n",
    f"{pictures[1]}\n",
  ]


def test_one_is_chosen_by_its_name(case):
  task, params, data = case()
  run = types.SimpleNamespace(task=task, data=data)
  with flagsaver.flagsaver():
    flags.FLAGS.mark_as_parsed()
    assert generate_media._of_modality(run)[2] == "image"
    flags.FLAGS.modality = "sound"
    chosen, its, name = generate_media._of_modality(run)
    assert (chosen.modality.name, its.config.modality, name) == ("sound",) * 3
    flags.FLAGS.modality = "smell"
    with pytest.raises(ValueError, match=r"--modality='smell' is unknown; choose one of \['image'"):
      generate_media._of_modality(run)


def test_latents_of_another_tokenizer_do_not_go_on(tmp_path):
  """Of the second kind as of the first, whose check has a test of its own."""
  data = _data(tmp_path / "data")
  summary = data.summary | {"others": {"sound": data.summary["others"]["sound"]}}
  summary["others"]["sound"] = summary["others"]["sound"] | {"latent_tokenizer": "another"}
  files.write_json(tmp_path / workdir_files.CORPUS, summary)
  loop._check_latents(tmp_path, data)  # What is not known is not compared.
  data.parts["sound"].summary["latent_tokenizer"] = "its own"
  with pytest.raises(ValueError, match="of the tokenizer another, and that of .* is its own"):
    loop._check_latents(tmp_path, data)


def test_bad_sections(tmp_path, case):
  config = _config()
  config.others.sound.data.modality = "image"
  with pytest.raises(ValueError, match="config.others.sound.data.modality='image' must be its"):
    latents.modalities(config)
  config = _config()
  config.data.modality = "sound"
  with pytest.raises(ValueError, match="config.others.sound is of the first modality's name"):
    latents.modalities(config)
  config = _config()
  config.task.type = "dit"
  with pytest.raises(ValueError, match="config.task.type='dit' is of one modality"):
    latents.missing_tokenizers(config, tmp_path)
  config = _config()
  config.others.sound.latents.loss_weight = 0.0
  data = case()[2]
  with pytest.raises(ValueError, match="config.others.sound.latents.loss_weight=0.0 must be posi"):
    latent_task.build(config, data.summary)
  config = _config(condition="class")
  with pytest.raises(ValueError, match="config.others.sound.data.condition='class': classes are"):
    latents.build_data(config)
  with pytest.raises(ValueError, match="data.repeats=0 must be at least 1"):
    mixed.LatentDataConfig(repeats=0)
