import jax
import jax.numpy as jnp
import latent_cases as cases
import numpy as np
import pytest

from experiments.configs.latentlm import common
from latentlab import sample
from latentlab.layers.diffusion_head import Diffusion
from latentlab.layers.latent_heads import SolverSettings
from latentlab.train import latents, transfusion_task
from latentlab.train.state import unbox
from latentlab.train.step import init_state, make_step


def _config(condition="class", **changes):
  c = common.transfusion(None)
  c.model.update(num_layers=1, embed_dim=16, num_heads=2)
  c.data.condition = condition
  c.batch_size, c.train_steps, c.optimizer.warmup_steps = 4, 20, 1
  for name, value in changes.items():
    c.latents[name] = value
  return c


_made = {}


def _case(tmp_path, condition="class", **data):
  """A task, its parameters with nothing at zero, its data, and a batch."""
  rows = cases.data(tmp_path / "s", condition, "token", batch_size=4, **data)
  task = transfusion_task.build(_config(condition), rows.summary)
  if condition not in _made:
    params = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params["transfusion"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    _made[condition] = params | {"transfusion": jax.tree.unflatten(tree, moved)}
  batch = jax.tree.map(jnp.asarray, dict(next(rows.train_iterator(0))))
  return task, _made[condition], rows, batch


def _stand_in(monkeypatch):
  """A tokenizer that shows latents as they are."""
  shape = type("C", (), dict(num_latents=4, dim=cases.DIM))
  tokenizer = latents.TrainedTokenizer(type("M", (), {"config": shape})(), {}, 4)
  tokenizer.__dict__["decode"] = lambda z: np.asarray(z)[:, :, None]
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: tokenizer)


def _pass(task, params):
  """Predictions of one pass over a whole row."""

  @jax.jit
  def predict(tokens, is_latent, noisy, t, segment_ids=None):
    variables = {"params": params["transfusion"]}
    return task.model.apply(variables, tokens, is_latent, noisy, t, segment_ids)

  return predict


def test_an_image_sees_itself_and_what_is_before_it(tmp_path):
  """`t t z z z t t t z`, of which the last two items are another document."""
  task, params, _, _ = _case(tmp_path, "text")
  is_latent = jnp.array([[0, 0, 1, 1, 1, 0, 0, 0, 1]], bool)
  ids = jnp.array([[1] * 7 + [2] * 2])
  predict, rng = _pass(task, params), np.random.default_rng(0)
  tokens = jnp.arange(9)[None] + 97
  noisy = jnp.asarray(rng.normal(size=(1, 9, cases.DIM)), jnp.float32)
  t = jnp.full((1, 9), 400)
  plain, _ = predict(tokens, is_latent, noisy, t, ids)
  sees = np.zeros((9, 9), bool)
  for j in range(9):
    latent = bool(is_latent[0, j])
    other = (tokens, noisy.at[0, j].add(1.0)) if latent else (tokens.at[0, j].add(1), noisy)
    changed, _ = predict(other[0], is_latent, other[1], t, ids)
    sees[:, j] = np.abs(changed - plain)[0].max(-1) > 1e-5
  want = np.tril(np.ones((9, 9), bool))
  want[2:5, 2:5] = True
  want[7:, :7] = False
  np.testing.assert_array_equal(sees, want)


def test_losses_and_what_they_count(tmp_path):
  task, params, _, batch = _case(tmp_path)
  counts = task.count(batch)
  assert counts == {"latents": 16, "tokens": 0}
  both = jax.jit(lambda *args: (task.sums(*args), task.loss(*args, counts)))
  (sums, weights), terms = both(params, batch, jax.random.key(0))
  assert weights == {"latents": 16} and np.isfinite(sums["latents"])
  np.testing.assert_allclose(terms.total, 5 * sums["latents"] / 16, rtol=1e-4)
  assert terms.weight == 1


def test_text_is_predicted_up_to_an_image_and_behind_it(tmp_path):
  task, params, _, batch = _case(tmp_path, "text", counts=(4,) * 12)
  end = task.tokens.end(0)
  scored = np.asarray(transfusion_task._token_weights(batch)) > 0
  targets, begins = np.asarray(batch["targets"]), np.asarray(batch["targets"])[scored]
  assert not scored[targets == end].any() and not scored[np.asarray(batch["next_kinds"]) > 0].any()
  documents = int(np.asarray(batch["segment_ids"]).max(1).sum())
  assert (begins == task.tokens.begin(0)).sum() == documents
  sums, weights = jax.jit(task.sums)(params, batch, jax.random.key(0))
  assert weights["tokens"] == scored.sum() and weights["latents"] == 4 * documents
  assert np.isfinite(sums["tokens"]) and sums["tokens"] > 0


def test_it_learns_and_leaves_its_normaliser_alone(tmp_path):
  task, _, _, batch = _case(tmp_path)
  state = jax.jit(lambda key: init_state(task, key))(jax.random.key(0))
  old, step, losses = state, jax.jit(make_step(task)), []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["latent_loss"]))
  # A zero head says nothing: the loss is the target's variance.
  assert losses[0] == pytest.approx(1.0, abs=0.5) and np.mean(losses[-8:]) < np.mean(losses[:8])
  same = jax.tree.map(np.array_equal, state.params, old.params)
  assert all(same["image_normalizer"].values()) and not all(jax.tree.leaves(same["transfusion"]))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_samples_are_those_of_a_plain_loop(tmp_path, monkeypatch, guidance):
  """Prompts of two lengths behind a cache, against whole rows without one, one by one."""
  _stand_in(monkeypatch)
  task, params, rows, _ = _case(tmp_path, "text")
  settings = SolverSettings(guidance=guidance, num_steps=3, solver="ddim")
  texts = ["abc", ""]
  prompts = [rows.documents.prompt(text=text) for text in texts]
  drawn = task.generator(params, rows)(prompts, settings, jax.random.key(7))
  assert [len(p) for p in prompts] == [5, 2] and drawn.lengths == [4, 4]
  diffusion, predict = task.model.config.diffusion, _pass(task, params)
  table, keys = settings.table(diffusion.levels), sample.row_keys(jax.random.key(7), np.arange(2))
  for row, prompt in enumerate(prompts):
    null = np.array([prompt[0], *[task.tokens.null] * len(texts[row]), prompt[-1]])
    x = np.asarray(jax.random.normal(jax.random.split(keys[row])[0], (4, cases.DIM)))
    is_latent = jnp.arange(len(prompt) + 4)[None] >= len(prompt)
    for i, t in enumerate(np.asarray(table.t)):
      noisy = jnp.asarray(np.concatenate([np.zeros((len(prompt), cases.DIM), np.float32), x])[None])
      times = jnp.full(is_latent.shape, t, jnp.float32)
      streams = [jnp.asarray(np.concatenate([p, [0] * 4]), jnp.int32)[None] for p in (prompt, null)]
      said, guide = (
        np.asarray(predict(s, is_latent, noisy, times)[1])[0, len(prompt) :] for s in streams
      )
      v = guide + guidance * (said - guide)
      alpha, sigma = (float(np.asarray(a)[i]) for a in (table.alpha, table.sigma))
      clean, noise = alpha * x - sigma * v, sigma * x + alpha * v
      after = np.asarray(table.t)[i + 1] if i + 1 < len(table.t) else None
      a, s = (1.0, 0.0) if after is None else diffusion.levels.at(jnp.array(int(after)))
      x = float(a) * clean + float(s) * noise
    want = task.denormalize(params, jnp.asarray(x))
    np.testing.assert_allclose(drawn.latents[row], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.latents.update(caption_noise=1.5), "config.latents.caption_noise=1.5 is the part"),
    (lambda c: c.latents.update(stop="fixed"), "config.latents.stop='fixed' of a Transfusion"),
    (lambda c: c.latents.update(loss_weight=0.0), "config.latents.loss_weight=0.0 must be"),
    (lambda c: c.model.update(mask="sliding_window", mask_size=4), "causal softmax attention"),
  ],
)
def test_bad_fields(tmp_path, change, message):
  config = _config()
  change(config)
  rows = cases.data(tmp_path / "s", "class", "token")
  with pytest.raises(ValueError, match=message):
    transfusion_task.build(config, rows.summary)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_an_image_with_a_caption_behind_it_is_under_less_noise(tmp_path, monkeypatch, share):
  _, params, rows, batch = _case(tmp_path, "both", counts=(4,) * 12)
  task = transfusion_task.build(_config("both", caption_noise=share), rows.summary)
  seen, noisy = [], Diffusion.noisy
  full = jnp.full((4, batch["inputs"].shape[1] + 1), 900)
  monkeypatch.setattr(Diffusion, "timesteps", lambda self, key, shape: full)
  monkeypatch.setattr(
    Diffusion, "noisy", lambda self, x, noise, t: seen.append(t) or noisy(self, x, noise, t)
  )
  sums, counts = task.sums(params, batch, jax.random.key(0))
  begins = np.asarray(batch["inputs"])[:, 1] == task.tokens.begin(0)
  is_latent = np.asarray(batch["kinds"]) > 0
  for row, captioned in enumerate(begins):
    assert (np.asarray(seen[0])[row, is_latent[row]] == (900 * share if captioned else 900)).all()
  assert begins.any() and not begins.all() and np.isfinite(sums["tokens"])
  assert counts["latents"] == 16


def test_captions_are_the_best_tokens_behind_images(tmp_path, monkeypatch):
  """A cache behind the image, against whole rows without one."""
  _stand_in(monkeypatch)
  task, params, rows, _ = _case(tmp_path, "both")
  means = np.random.default_rng(3).normal(2, 3, (2, 4, cases.DIM)).astype(np.float32)
  generator = task.generator(params, rows)
  generator.tokenizer.__dict__["posterior"] = lambda media: (means, None)
  drawn = generator.captions(
    np.zeros((2, 4, 4, 1)), jax.random.key(0), 3, sample.token_sampler(greedy=True)
  )
  predict, special = _pass(task, params), task.tokens
  variables = {"params": params["transfusion"]}
  score = jax.jit(
    lambda h: task.model.apply(variables, h, method=lambda m, h: m.language.logits(h))
  )
  for mean, text in zip(means, drawn, strict=True):
    tokens = [256, special.begin(0), *[special.latent(0)] * 4, special.end(0)]
    noisy = np.zeros((1, 10, cases.DIM), np.float32)
    noisy[0, 2:6] = task.normalize(params, jnp.asarray(mean))
    for place in range(7, 10):
      padded = jnp.asarray(np.pad(tokens, (0, 10 - len(tokens))))[None]
      hidden, _ = predict(
        padded, padded == special.latent(0), jnp.asarray(noisy), jnp.zeros((1, 10))
      )
      best = int(np.asarray(score(hidden))[0, place - 1, :258].argmax())
      if best == 256:
        break
      tokens.append(best)
    assert text == rows.tokenizer.decode(np.array(tokens[7:]))
