import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import latent_cases as cases
import ml_collections
import numpy as np
import optax
import pytest
from flax import linen as nn

from experiments.configs import quickstart_latent
from experiments.configs.latentlm import common
from latentlab.layers.diffusion_head import DiffusionHeadConfig
from latentlab.layers.latent_heads import MixtureHeadConfig, RegressionHeadConfig, SolverSettings
from latentlab.layers.mar_head import MarHeadConfig
from latentlab.ops.latents import Noise
from latentlab.train import latent_rows, latent_task, latents, media_sample, partition
from latentlab.train.state import unbox
from latentlab.train.step import init_state, make_step
from latentlab.train.task import Batch
from latentlab.typing import Params


def _config(condition="class", stop="fixed", head="diffusion", **latents):
  c = common.latentlm(None, head=head)
  c.model.update(num_layers=1, embed_dim=16, num_heads=2)
  c.data.condition = condition
  if head == "diffusion":
    c.latents.head.update(depth=1, mlp_ratio=2.0, num_draws=2)
  c.latents.update(stop=stop, **latents)
  c.batch_size, c.train_steps, c.optimizer.warmup_steps = 4, 10, 1
  return c


@dataclasses.dataclass(frozen=True)
class _Case:
  """A task, its parameters with nothing at zero, and a batch."""

  task: latent_task.LatentLMTask
  params: Params
  batch: Batch

  @functools.cached_property
  def grads(self):
    """Loss and gradient of parameters and a batch."""
    return jax.jit(jax.value_and_grad(lambda p, batch: _loss(self.task, p, batch)))

  @functools.cached_property
  def draw(self):
    """Latents that are read and predicted, of a key."""
    draw = jax.jit(lambda key: self.task.draw_latents(self.params, self.batch, key))
    return lambda key: tuple(latents["image"] for latents in draw(key))

  @functools.cached_property
  def state(self):
    return jax.jit(lambda key: init_state(self.task, key))(jax.random.key(0))

  @functools.cached_property
  def step(self):
    return jax.jit(make_step(self.task))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """Makes cases, each once; parameters are made once for a model, whose moments alone differ."""
  made, moved = {}, {}

  def params(task):
    (modality,) = task.model.config.modalities
    plain = dataclasses.replace(modality, mean=0.0, std=1.0)
    config = dataclasses.replace(task.model.config, modalities=(plain,))
    if config not in moved:
      moved[config] = _shaken(jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0)))
    moments = dict(mean=np.float32(modality.mean), std=np.float32(modality.std))
    return moved[config] | {"image_normalizer": moments}

  def make(condition="class", stop="fixed", head="diffusion", data=None, **latents):
    name = repr((condition, stop, head, data, latents))
    if name not in made:
      config = _config(condition, stop, head, **latents)
      path = tmp_path_factory.mktemp("case")
      rows = cases.data(path, condition, stop, batch_size=4, **(data or {}))
      task = latent_task.build(config, rows.summary)
      batch = jax.tree.map(jnp.asarray, dict(next(rows.train_iterator(0))))
      made[name] = _Case(task, params(task), batch)
    return made[name]

  return make


@jax.jit
def _shaken(params):
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(tree, leaves)


def _loss(task, params, batch):
  key = jax.random.key(5)
  terms = task.loss(params, batch, key, task.count(batch))
  return terms.total / terms.weight


def _size(tree):
  return float(optax.tree.norm(tree))


def test_latentlm_05_losses_at_the_start(tmp_path):
  """A zero head predicts nothing: the loss is the target's variance, 1 of normalised latents."""
  rows = cases.data(tmp_path / "s", batch_size=4, counts=(64,) * 48)
  task = latent_task.build(_config(prompt_dropout=0.0), rows.summary)
  params = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0))
  batch = jax.tree.map(jnp.asarray, dict(next(rows.train_iterator(0))))
  loss = jax.jit(functools.partial(_loss, task))(params, batch)
  assert loss == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("condition", ["text", "both"])
def test_latentlm_11_each_loss_trains_its_own_head(case, condition):
  here = case(condition, "token", data=dict(counts=(2,) * 6))
  batch = here.batch
  heads = lambda g: (_size(g["image_head"]), _size(g["language"]["head"]))
  text_only = batch | {"next_kinds": jnp.zeros_like(batch["next_kinds"])}
  latents_only = batch | {"weights": jnp.zeros_like(batch["weights"])}
  for part, trained, still in ((text_only, 1, 0), (latents_only, 0, 1)):
    loss, grads = here.grads(here.params, part)
    assert np.isfinite(loss) and heads(grads)[still] == 0 and heads(grads)[trained] > 0
    assert np.isfinite(_size(grads)) and _size(grads["language"]["decoder"]) > 0


def test_latentlm_11_nothing_masked_gets_through(case):
  here = case("text", "token", data=dict(counts=(2,) * 6))
  batch = here.batch
  want = here.grads(here.params, batch)
  bad = dict(batch)
  for name, kinds in (("latents/image", "kinds"), ("next_latents/image", "next_kinds")):
    bad[name] = jnp.where(batch[kinds][..., None] > 0, batch[name], jnp.nan)
  got = here.grads(here.params, bad)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_normalisers_are_not_trained(case):
  here = case("class", "token", data=dict(counts=(2, 4, 3) * 2))
  _, grads = here.grads(here.params, here.batch)
  assert _size(grads["image_normalizer"]) == 0
  state = here.state
  for _ in range(2):
    new, _ = here.step(state, here.batch)
    old, state = state, new
  jax.tree.map(
    np.testing.assert_array_equal,
    state.params["image_normalizer"],
    old.params["image_normalizer"],
  )
  assert _size(jax.tree.map(jnp.subtract, state.params, old.params)) > 0


def test_an_item_has_one_noise_where_it_is_read_and_where_it_is_drawn(case):
  draw = case(input="sample", target="sample").draw
  here, following = map(np.asarray, draw(jax.random.key(2)))
  np.testing.assert_array_equal(here[:, 1:], following[:, :-1])
  again = np.asarray(draw(jax.random.key(3))[0])
  assert np.abs(again - here)[:, 1:].max() > 0.01


def test_latentlm_13_a_document_has_one_scale(case):
  """Two documents of a row: noise of each divided by its own root mean square is a normal one."""
  data = dict(counts=(256,) * 8, documents_per_row=2, seq_length=512)
  here = case(data=data)
  mean, std = (float(here.params["image_normalizer"][n]) for n in ("mean", "std"))
  found = []
  for i in range(40):
    _, z = here.draw(jax.random.key(i))
    noise = np.asarray(z) * std + mean - np.asarray(here.batch["next_latents/image"])
    found.append(np.sqrt(np.square(noise).mean(-1)).reshape(4, 2, 256))
  scales = np.sqrt(np.square(np.stack(found)).mean(-1)).ravel()
  assert np.abs(scales).mean() == pytest.approx(0.5 * 0.9974, rel=0.1)
  assert scales.std() > 0.2  # Of one scale for all it would be hundredths.


@pytest.mark.parametrize(("input_", "target"), [("mean", "sample"), ("sample", "mean")])
def test_means_may_be_read_or_predicted(case, input_, target):
  here = case(input=input_, target=target)
  mean, std = (here.params["image_normalizer"][n] for n in ("mean", "std"))
  names = ("latents/image", "next_latents/image")
  clean = [(np.asarray(here.batch[name]) - mean) / std for name in names]
  drawn = here.draw(jax.random.key(2))
  same = [np.allclose(a, b, atol=1e-6) for a, b in zip(drawn, clean, strict=True)]
  assert same == [input_ == "mean", target == "mean"]


def test_learned_scales_are_the_encoders(case):
  noise = dict(kind="learned", std=0.0, per="example", on_sphere=False)
  here = case(data=dict(noise=noise, scales=True))
  std = float(here.params["image_normalizer"]["std"])
  draws = [np.asarray(here.draw(jax.random.key(i))[1]) for i in range(200)]
  got = np.std(np.stack(draws), axis=0) * std
  np.testing.assert_allclose(got, here.batch["next_scales/image"], rtol=0.35)


def test_a_dropped_prompt_is_null_as_a_whole(tmp_path):
  rows = cases.data(tmp_path / "s", "text", "token", batch_size=4)
  batch = jax.tree.map(jnp.asarray, dict(next(rows.train_iterator(0))))
  dropped = jax.jit(lambda key: latent_rows.dropped_prompts(batch, 0.5, key))
  drop = np.asarray(dropped(jax.random.key(1)))
  droppable = np.asarray(batch["droppable"])
  assert not drop[~droppable].any()
  rows = [set(d[m].tolist()) for d, m in zip(drop, droppable, strict=True)]
  assert all(len(r) == 1 for r in rows)
  seen = [np.asarray(dropped(jax.random.key(i)))[0].any() for i in range(60)]
  assert 10 < sum(seen) < 50


def test_the_head_runs_for_latents_alone(case):
  """Fewer places than the row has: the same sum, counted on the shapes that the head is given."""
  data = dict(counts=(3,) * 6, documents_per_row=1, seq_length=16)
  here = case("text", "token", data=data)
  shapes = []

  def spy(next_fun, args, kwargs, context):
    if context.method_name == "latent_losses":
      shapes.append(args[1].shape)
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(spy):
    jax.eval_shape(functools.partial(_loss, here.task), here.params, here.batch)
  assert shapes == [(4, 3, 16)] and here.task.seq_length == 16


def test_mars_head_trains_as_others_do(tmp_path):
  """Its loss, its share of the flops, and its parameters, on the shapes alone."""
  config = _config(head="mar")
  config.latents.head.update(depth=1, width=8)
  rows = cases.data(tmp_path / "s", batch_size=4)
  task = latent_task.build(config, rows.summary)
  params = jax.eval_shape(lambda k: unbox(task.init(k)), jax.random.key(0))
  batch = jax.tree.map(jnp.asarray, dict(next(rows.train_iterator(0))))
  grads = jax.eval_shape(jax.grad(lambda p: _loss(task, p, batch)), params)
  head, dim = task.modality.head, task.modality.dim
  assert sum(x.size for x in jax.tree.leaves(grads["image_head"])) == head.num_params(16, dim)
  config.latents.head.num_draws = 8
  more = latent_task.build(config, rows.summary).flops_per_item - task.flops_per_item
  assert more == 3 * 4 * head.flops_per_row(16, dim)


def test_accumulation_divides_each_loss_by_its_own_count(case):
  """Uneven rows: microbatches hold different shares of tokens and latents."""
  here = case("text", "token", prompt_dropout=0.0, head="regression")
  task, batch = here.task, here.batch
  # Microbatches draw other noise; without any, they are parts of the whole.
  task = dataclasses.replace(task, noises={"image": Noise("none", 0.0)})
  weights = batch["weights"].at[0].set(0.0)
  batch = batch | {"weights": weights}
  state = jax.jit(lambda key: init_state(task, key))(jax.random.key(0))
  whole, a = jax.jit(make_step(task))(state, batch)
  parts, b = jax.jit(make_step(task, accumulate_steps=2))(state, batch)
  for name in ("loss", "token_loss", "latent_loss", "grad_norm"):
    np.testing.assert_allclose(a[name], b[name], rtol=1e-4)


def test_latentlm_17_sharded_training_equals_one_device(case):
  here = case("text", "token", data=dict(counts=(2,) * 6))
  task, batch = here.task, jax.tree.map(np.asarray, here.batch)
  results = []
  for sizes, count in ((dict(data=1), 1), (dict(data=4), 4), (dict(fsdp=2, tensor=2), 4)):
    config = ml_collections.ConfigDict(task.config.to_dict())
    config.mesh = sizes
    trainer = partition.make_trainer(task, config, jax.devices()[:count])
    state = trainer.init(jax.random.key(0))
    for _ in range(3):
      state, metrics = trainer.step(state, trainer.place(batch))
    results.append(jax.device_get((state.params, metrics)))
  equal = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)
  for sharded in results[1:]:
    jax.tree.map(equal, sharded, results[0])


@pytest.mark.parametrize("stop", ["token", "classifier"])
def test_where_a_run_ends_is_learnt(case, stop):
  here = case("class", stop, data=dict(counts=(2, 4, 3) * 2))
  batch, state = here.batch, here.state
  count = jax.jit(lambda *args: here.task.sums(*args, deterministic=True)[1])
  weights = count(here.params, batch, jax.random.key(0))
  kind = "tokens" if stop == "token" else "stops"
  lengths = (np.asarray(batch["next_kinds"]) > 0).sum(1)
  assert weights[kind] == (lengths + 1).sum() and weights["latents"] == lengths.sum()
  first = None
  for _ in range(12):
    state, metrics = here.step(state, batch)
    loss = float(metrics["token_loss" if stop == "token" else "stop_loss"])
    first = loss if first is None else first
  assert loss < first


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_samples=-1), "config.sample.num_samples=-1 must not be negative"),
    (dict(solver="euler"), "config.sample: unknown solver='euler'"),
    (dict(solver="flow_euler"), "config.sample: solver='flow_euler' goes along straight paths"),
    (dict(num_steps=1000), "config.sample: num_steps=1000 of a sampler must be in 1 ... 999"),
    ({}, "asks for sounds, and their sample rate is unknown; set data.sample_rate"),
  ],
)
def test_samples_that_cannot_be_drawn_are_told_before_training(tmp_path, change, message):
  rows = cases.data(tmp_path / "s")
  if not change:
    rows.summary["media_shape"] = [8, 1]
  config = _config()
  config.sample.update(change)
  with pytest.raises(ValueError, match=message):
    latent_task.build(config, rows.summary).check_sample(rows)


@pytest.mark.parametrize("stop", ["token", "classifier"])
def test_media_are_of_a_latent_at_least(tmp_path, monkeypatch, stop):
  shape = types.SimpleNamespace(num_latents=4, dim=cases.DIM)
  model = types.SimpleNamespace(config=shape)
  tokenizer = latents.TrainedTokenizer(model, {}, 4)
  tokenizer.__dict__["decode"] = lambda z: np.asarray(z)[:, :, :1]
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: tokenizer)
  rows = cases.data(tmp_path / "s", "class", stop, counts=(2, 4, 3) * 2)
  task = latent_task.build(_config("class", stop), rows.summary)
  params = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0))
  generator = task.generator(params, rows)
  prompts, labels = generator.prompts(3)
  assert labels.tolist() == [0, 1, 2]
  # A threshold of nothing ends each run where it may.
  drawn = generator(prompts, SolverSettings(num_steps=1), jax.random.key(0), threshold=0.0)
  assert drawn.lengths == [1] * 3 and [len(x) for x in drawn.media] == [1] * 3


@pytest.mark.parametrize("condition", ["none", "caption"])
def test_prompts_that_ask_for_no_class(tmp_path, condition):
  rows = cases.data(tmp_path / "s", condition, "token", counts=(2,) * 6)
  task = latent_task.build(_config(condition, "token"), rows.summary)
  prompts, labels = task.generator({}, rows).prompts(2)
  assert labels.tolist() == [-1, -1] and prompts[0].tolist() == prompts[1].tolist()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(input="noise"), "config.latents.input='noise' must be 'sample' or 'mean'"),
    (dict(prompt_dropout=1.0), r"config.latents.prompt_dropout=1.0 is not in \[0, 1\)"),
    (dict(loss_weight=0.0), "config.latents.loss_weight=0.0 must be positive"),
    (dict(stop="bell"), "stop='bell'"),
  ],
)
def test_bad_fields(tmp_path, change, message):
  rows = cases.data(tmp_path / "s")
  with pytest.raises(ValueError, match=message):
    latent_task.build(_config(**change), rows.summary)


def test_heads_by_name():
  head = latent_task.build_head(dict(kind="diffusion", depth=2, prediction="epsilon", t_mean=None))
  assert head == DiffusionHeadConfig(depth=2, diffusion=head.diffusion)
  assert head.diffusion.prediction == "epsilon"
  assert isinstance(latent_task.build_head(dict(kind="regression")), RegressionHeadConfig)
  assert isinstance(latent_task.build_head(dict(kind="mixture")), MixtureHeadConfig)
  assert latent_task.build_head(dict(kind="mar", width=64)) == MarHeadConfig(width=64)
  with pytest.raises(ValueError, match="config.latents.head.kind='gan' is unknown"):
    latent_task.build_head(dict(kind="gan"))
  with pytest.raises(ValueError, match=r"fields that kind='regression' does not: \['schedule'\]"):
    latent_task.build_head(dict(kind="regression", schedule="cosine"))


def test_samples_are_drawn_as_the_config_says():
  config = quickstart_latent.get_config("smoke")
  assert media_sample.settings(config.sample) == SolverSettings(guidance=1.5, num_steps=2)
  config.sample.update(guidance_kind="linear", guidance_interval=(0.1, 0.7), lambda_min=-5.0)
  want = dict(guidance_kind="linear", guidance_interval=(0.1, 0.7), lambda_min=-5.0)
  assert media_sample.settings(config.sample) == SolverSettings(guidance=1.5, num_steps=2, **want)
  config.sample.guidance_interval = (0.7, 0.1)
  with pytest.raises(ValueError, match=r"config.sample: guidance_interval=.* must ascend"):
    media_sample.settings(config.sample)
