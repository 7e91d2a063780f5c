import jax
import jax.numpy as jnp
import latent_cases as cases
import numpy as np
import pytest

from experiments.configs.latentlm import common
from latentlab import sample
from latentlab.layers.latent_heads import SolverSettings
from latentlab.train import dit_task, latents
from latentlab.train.state import unbox
from latentlab.train.step import init_state, make_step

_NOISELESS = dict(kind="none", std=0.0, per="example", on_sphere=False)


def _config(condition="class", **changes):
  c = common.dit(None, num_layers=1, embed_dim=16, num_heads=2)
  c.data.condition = condition
  c.batch_size, c.train_steps, c.optimizer.warmup_steps = 4, 10, 1
  for name, value in changes.items():
    c.latents[name] = value
  return c


def _case(tmp_path, condition="class", **data):
  """A task, its parameters with nothing at zero, its data, and a batch."""
  config = _config(condition)
  rows = cases.data(tmp_path / "s", condition, batch_size=4, **data)
  task = dit_task.build(config, rows.summary)
  params = _params(task, condition)
  batch = jax.tree.map(jnp.asarray, dict(next(rows.train_iterator(0))))
  return task, params, rows, batch


_made = {}


def _params(task, condition):
  if condition not in _made:
    params = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params["dit"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    _made[condition] = params | {"dit": jax.tree.unflatten(tree, moved)}
  return _made[condition]


def _stand_in(monkeypatch):
  """A tokenizer that shows latents as they are."""
  shape = type("C", (), dict(num_latents=4, dim=cases.DIM))
  tokenizer = latents.TrainedTokenizer(type("M", (), {"config": shape})(), {}, 4)
  tokenizer.__dict__["decode"] = lambda z: np.asarray(z)[:, :, None]
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: tokenizer)


@pytest.mark.parametrize("condition", ["class", "none"])
def test_rows_are_images_with_their_classes(tmp_path, condition):
  """Two documents a row, of which the last row has one only; means come through as they are."""
  data = dict(seq_length=9, documents_per_row=2, noise=_NOISELESS, counts=(4,) * 7)
  task, params, rows, _ = _case(tmp_path, condition, **data)
  split, items = rows.splits["train"], rows.store.splits["train"]
  batch = jax.tree.map(jnp.asarray, dict(split.rows(np.arange(4))))
  found, labels, valid = jax.jit(task.images)(params, batch, jax.random.key(0))
  assert valid.tolist() == [True] * 7 + [False]
  want = [items.item(i) for i in range(7)]
  means = task.denormalize(params, found[:7])
  np.testing.assert_allclose(means, [item.means for item in want], rtol=1e-4, atol=1e-4)
  classes = [item.label if condition == "class" else 0 for item in want]
  assert labels[:7].tolist() == classes and not np.asarray(found[7]).any()
  sums, weights = jax.jit(task.sums)(params, batch, jax.random.key(0))
  assert weights == {"latents": 28} and np.isfinite(sums["latents"])
  assert task.items_per_step == 4 * 2 * 4


def test_the_loss_is_the_models(tmp_path):
  task, params, _, batch = _case(tmp_path, noise=_NOISELESS)
  images, labels, _ = jax.jit(task.images)(params, batch, jax.random.key(3))
  _, loss_key = jax.random.split(jax.random.key(5))
  t_key, noise_key, _ = jax.random.split(loss_key, 3)
  t = task.model.config.diffusion.timesteps(t_key, (4,))
  noise = jax.random.normal(noise_key, images.shape)
  each = task.model.apply({"params": params["dit"]}, images, labels, t, noise, method="losses_at")
  sums, weights = task.sums(params, batch, jax.random.key(5), deterministic=True)
  np.testing.assert_allclose(sums["latents"] / weights["latents"], each.mean(), rtol=1e-5)


def test_it_learns_and_leaves_its_normaliser_alone(tmp_path):
  task, _, _, batch = _case(tmp_path)
  state = jax.jit(lambda key: init_state(task, key))(jax.random.key(0))
  old, step, losses = state, jax.jit(make_step(task)), []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics["latent_loss"]))
  # A zero model says nothing: the loss is the target's variance.
  assert losses[0] == pytest.approx(1.0, abs=0.5) and np.mean(losses[-10:]) < np.mean(losses[:10])
  same = jax.tree.map(np.array_equal, state.params, old.params)
  assert all(same["image_normalizer"].values()) and not all(jax.tree.leaves(same["dit"]))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_samples_are_those_of_a_plain_loop(tmp_path, monkeypatch, guidance):
  _stand_in(monkeypatch)
  task, params, rows, _ = _case(tmp_path)
  settings = SolverSettings(guidance=guidance, num_steps=3, solver="ddim", temperature=0.9)
  generator = task.generator(params, rows)
  prompts, labels = generator.prompts(5)
  assert labels.tolist() == [0, 1, 2, 0, 1]
  drawn = generator(prompts, settings, jax.random.key(7))
  table = settings.table(task.model.config.diffusion.levels)
  apply = jax.jit(lambda x, t, y: task.model.apply({"params": params["dit"]}, x, t, y))
  keys = sample.row_keys(jax.random.key(7), np.arange(5))
  x = np.stack([jax.random.normal(jax.random.split(k)[0], (4, cases.DIM)) for k in keys]) * 0.9
  for i, t in enumerate(np.asarray(table.t)):
    t = jnp.full(5, t, jnp.float32)
    said = apply(x, t, jnp.asarray(labels, jnp.int32))
    null = apply(x, t, jnp.full(5, -1, jnp.int32))
    v = np.asarray(null + guidance * (said - null))
    alpha, sigma = (float(np.asarray(a)[i]) for a in (table.alpha, table.sigma))
    clean, noise = alpha * x - sigma * v, sigma * x + alpha * v
    after = np.asarray(table.t)[i + 1] if i + 1 < len(table.t) else None
    a, s = (
      (1.0, 0.0) if after is None else task.model.config.diffusion.levels.at(jnp.array(int(after)))
    )
    x = float(a) * clean + float(s) * noise
  want = task.denormalize(params, jnp.asarray(x))
  np.testing.assert_allclose(np.stack(drawn.latents), want, rtol=1e-3, atol=1e-3)
  assert drawn.lengths == [4] * 5 and drawn.media[0].shape == (4, 1, cases.DIM)


def test_a_sample_does_not_depend_on_its_batch(tmp_path, monkeypatch):
  _stand_in(monkeypatch)
  task, params, rows, _ = _case(tmp_path)
  settings, key = SolverSettings(num_steps=2), jax.random.key(1)
  generator = task.generator(params, rows)
  prompts, _ = generator.prompts(3)
  small = dit_task.Generator(task, params, rows, batch_size=2)
  whole, parts = (np.stack(g(prompts, settings, key).latents) for g in (generator, small))
  np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("shape", "count", "want"),
  [((8, 8, 1), 16, (4, 4)), ((8, 16, 3), 8, (2, 4)), ((640, 1), 32, (1, 32))],
)
def test_grids(shape, count, want):
  assert dit_task.grid(shape, count) == want


def test_grids_are_of_squares():
  with pytest.raises(ValueError, match="12 latents of images of 8 x 8 are no grid of squares"):
    dit_task.grid((8, 8, 1), 12)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.data.update(condition="text"), "data.condition='text' of a DiT"),
    (lambda c: c.latents.update(stop="token"), "config.latents.stop='token' of a DiT"),
    (lambda c: c.latents.update(target="code"), "config.latents.target='code' must be"),
    (lambda c: c.latents.update(prompt_dropout=1.0), r"prompt_dropout=1.0 is not in \[0, 1\)"),
    (lambda c: c.model.update(name="unet"), "config.model.name='unet'"),
    (lambda c: c.model.update(num_layers=None), r"config.model lacks \['num_layers'\]"),
  ],
)
def test_bad_fields(tmp_path, change, message):
  config = _config()
  change(config)
  with pytest.raises(ValueError, match=message):
    dit_task.build(config, cases.data(tmp_path / "s").summary)


def test_guidance_that_follows_the_latents_drawn(tmp_path):
  task, _, rows, _ = _case(tmp_path)
  with task.config.unlocked():
    task.config.sample.guidance_kind = "linear"
  with pytest.raises(ValueError, match="config.sample.guidance_kind='linear'"):
    task.check_sample(rows)
