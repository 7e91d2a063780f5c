"""A tokenizer's task: its losses against their formulas, its adversary, and a run's picture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs.latentlm import common as latentlm
from experiments.configs.latentlm import tokenizers
from latentlab.data import media
from latentlab.train import perceptual, tokenizer_task
from latentlab.train.state import unbox
from latentlab.train.step import init_state, make_step
from latentlab.train.tokenizer_losses import Losses, Objective

_SIZES = dict(image_size=8, channels=1, patch_size=4, num_layers=1, embed_dim=16, num_heads=2)


def _config(name="vit_tokenizer", task=None, **model):
  sizes = _SIZES | dict(init="fan_in") if name == "vit_tokenizer" else {}
  c = latentlm.latent_tokenizer(name, **(sizes | dict(dim=3) | model))
  c.task.update(task or {})
  c.train_steps, c.batch_size, c.optimizer.warmup_steps = 10, 4, 0
  return c


def _speech(task=None, **model):
  sizes = dict(num_samples=60, width=4, strides=(2, 5), depths=(1, 0, 0), layer_scale=0.3)
  c = _config("speech_tokenizer", task, init_std=0.0, **(sizes | model))
  c.data.sample_rate = 8000
  return tokenizer_task.build(c)


def _batch(shape=(8, 8, 1), rows=4, seed=0):
  rng = np.random.default_rng(seed)
  weights = np.array([1, 2, 0.5, 0], np.float32)[:rows]
  return {
    "media": jnp.array(rng.uniform(-1, 1, (rows, *shape)), jnp.float32),
    "labels": jnp.zeros(rows, jnp.int32),
    "weights": jnp.array(weights),
  }


@functools.cache
def _params(model):
  """What `init_state` of the first key gives the model."""
  key, _ = jax.random.split(jax.random.key(0))
  media = jnp.zeros((1, *model.config.media_shape))
  return jax.jit(lambda key: unbox(model.init(key, media)["params"]))(key)


def _loss(task, batch, key):
  """A task's loss, the means of its metrics, and what its model makes of the batch."""

  @jax.jit
  def run(params, batch):
    out = task.model.apply({"params": params}, batch["media"], key)
    return task.loss(params, batch, key), out

  terms, out = run(_params(task.model), batch)
  return terms, {name: float(x / w) for name, (x, w) in terms.metrics.items()}, out


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bottleneck", ["sigma_gaussian", "plain", "vq"])
def test_losses_are_their_formulas(bottleneck, reduction, key):
  beta = 0.0 if bottleneck == "vq" else 0.3
  model = dict(bottleneck=bottleneck, codebook_size=5 if bottleneck == "vq" else 0)
  fields = dict(reconstruction="l1" if reduction == "sum" else "l2", reduction=reduction, beta=beta)
  task, batch = tokenizer_task.build(_config(task=fields, **model)), _batch()
  terms, got, out = _loss(task, batch, key)
  out = jax.tree.map(lambda x: np.asarray(x, np.float64), out)
  weights = np.asarray(batch["weights"], np.float64)
  reduce = lambda x: getattr(x.reshape(4, -1), reduction)(1)
  mean = lambda x: (weights * x).sum() / weights.sum()
  difference = out.reconstruction - np.asarray(batch["media"])
  losses = reduce(np.abs(difference) if reduction == "sum" else difference**2)
  np.testing.assert_allclose(got["reconstruction"], mean(losses), rtol=1e-4)
  np.testing.assert_allclose(got["mse"], mean((difference**2).reshape(4, -1).mean(1)), rtol=1e-4)
  mu = out.means
  if bottleneck == "vq":
    term = reduce(1.25 * (mu - out.code_vectors) ** 2)
    np.testing.assert_allclose(got["codes"], mean(term), rtol=1e-4)
    assert 1 <= got["code_perplexity"] <= 5 and 0 < got["code_usage"] <= 1
  else:
    log_variances = out.log_variances
    term = mu**2
    if bottleneck == "plain":
      term = (mu**2 + np.exp(log_variances) - 1 - log_variances) / 2
    term = reduce(term)
    np.testing.assert_allclose(got["bottleneck"], mean(term), rtol=1e-4)
    level = 0.75 if bottleneck != "plain" else mean(np.exp(log_variances / 2).mean((1, 2)))
    first = mean(mu.mean((1, 2)))
    std = np.sqrt(mean(((mu - first) ** 2).mean((1, 2))))
    np.testing.assert_allclose(got["latent_std"], std, rtol=1e-4)
    np.testing.assert_allclose(got["noise_ratio"], level / std, rtol=1e-4)
  total = losses + (term if bottleneck == "vq" else beta * term)
  np.testing.assert_allclose(terms.total / terms.weight, mean(total), rtol=1e-4)


def test_codes_are_drawn_to_means_and_less_so_the_other_way():
  config = _config(task=dict(beta=0.0), bottleneck="vq", codebook_size=5, unit_codes=False)
  task = tokenizer_task.build(config)
  batch = _batch()

  def codes(params):
    out = task.model.apply({"params": params}, batch["media"])
    return task.losses.of_latents(out)[0].sum(), out

  grads, out = jax.jit(jax.grad(codes, has_aux=True))(_params(task.model))
  want = np.zeros((5, 3))
  pull = 2 * (np.asarray(out.code_vectors) - np.asarray(out.means)) / (4 * 3)
  np.add.at(want, np.asarray(out.codes).ravel(), pull.reshape(-1, 3))
  np.testing.assert_allclose(grads["codebook"], want, rtol=1e-3, atol=1e-5)
  bias = grads["encoder"]["head"]["bias"]
  np.testing.assert_allclose(bias, -0.25 * pull.sum((0, 1)), rtol=1e-3, atol=1e-5)


def test_padding_of_sounds_counts_nowhere(key):
  task = _speech(dict(spectral_weight=0.5, spectral_windows=(32,), reconstruction="l1"))
  batch = _batch((60, 1)) | {"lengths": jnp.array([60, 25, 10, 0], jnp.int32)}
  padded = jnp.arange(60) < batch["lengths"][:, None]
  batch["media"] = jnp.where(padded[..., None], batch["media"], 0.0)
  terms, got, out = _loss(task, batch, key)
  assert np.isfinite(float(terms.total)) and got["spectral"] > 0
  errors = np.abs(np.asarray(out.reconstruction - batch["media"], np.float64))[..., 0]
  rows = [errors[i, :n].mean() for i, n in enumerate((60, 25, 10))]
  means = [np.asarray(out.means, np.float64)[i, :n] for i, n in enumerate((6, 3, 1))]
  weigh = lambda x: (np.array([1, 2, 0.5]) * x).sum() / 3.5
  np.testing.assert_allclose(got["reconstruction"], weigh(rows), rtol=1e-4)
  np.testing.assert_allclose(got["bottleneck"], weigh([(m**2).mean() for m in means]), rtol=1e-4)
  each = np.repeat([1, 2, 0.5], [6, 3, 1])[:, None] * np.ones(3)
  mu = np.concatenate(means)
  first = (each * mu).sum() / each.sum()
  std = np.sqrt((each * (mu - first) ** 2).sum() / each.sum())
  np.testing.assert_allclose(got["latent_std"], std, rtol=1e-4)


def test_perceptual_loss_is_of_the_registered_features(key):
  name = "test_halves"
  perceptual.register(name, lambda shape: lambda x: [x[:, : shape[0] // 2], x[:, ::2, ::2]])
  task = tokenizer_task.build(_config(task=dict(perceptual=name, perceptual_weight=2.0)))
  terms, got, _ = _loss(task, _batch(), key)
  want = got["reconstruction"] + 1e-2 * got["bottleneck"] + 2.0 * got["perceptual"]
  np.testing.assert_allclose(terms.total / terms.weight, want, rtol=1e-5)
  assert got["perceptual"] > 0
  with pytest.raises(ValueError, match="registered already"):
    perceptual.register(name, lambda shape: None)
  features = perceptual.make_features("random_convolutions", (8, 8, 1))
  shapes = [x.shape for x in jax.eval_shape(features, _batch()["media"])]
  assert shapes == [(4, 8, 8, 16), (4, 4, 4, 32), (4, 2, 2, 64)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_adversary_and_the_tokenizer_step_together(adaptive, key):
  fields = dict(adversarial_weight=0.5, adaptive=adaptive, discriminator_width=4)
  fields |= dict(discriminator_depth=2, discriminator_lr=1e-2)
  task, batch = tokenizer_task.build(_config(task=fields)), _batch()
  assert [g.name for g in task.groups] == ["model", "discriminator"]
  state = jax.jit(lambda key: init_state(task, key))(key)
  # The tokenizer is initialised as it is without an adversary.
  own = {k: v for k, v in state.params.items() if k != "discriminator"}
  jax.tree.map(np.testing.assert_array_equal, own, _params(task.model))
  assert not any(
    "discriminator" in str(p) for p, _ in jax.tree.leaves_with_path(state.opt_states["model"])
  ) and jax.tree.leaves(state.opt_states["discriminator"])
  new, metrics = jax.jit(make_step(task))(state, batch)
  for part in ("encoder", "decoder", "discriminator"):
    moved = jax.tree.map(
      lambda a, b: np.abs(np.asarray(a) - b).max(), new.params[part], state.params[part]
    )
    assert max(jax.tree.leaves(moved)) > 0, part
  assert float(metrics["discriminator/lr"]) > float(metrics["model/lr"]) > 0
  # The adversary tells real from made: its loss falls by its own gradient, at the same draws.
  loss = lambda p: (t := task.discriminator_loss(p, batch, key)).total / t.weight
  loss = jax.jit(jax.value_and_grad(loss))
  before, grads = loss(state.params)
  assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads["decoder"]))
  descended = lambda x, g: np.asarray(x) - np.float32(1e-2) * np.asarray(g)
  after, _ = loss(jax.tree.map(descended, state.params, grads))
  assert after < before
  # And the tokenizer is told what the adversary thinks.
  parts = {k.removeprefix("model/"): float(x) for k, x in metrics.items()}
  want = parts["reconstruction"] + 1e-2 * parts["bottleneck"]
  if not adaptive:
    np.testing.assert_allclose(parts["loss"], want + 0.5 * parts["adversarial"], rtol=1e-4)
  else:
    assert abs(parts["loss"] - want) > 1e-6


def test_the_adaptive_scale_balances_gradients():
  config = tokenizer_task.build(_config()).model.config
  losses = Losses(Objective(adaptive=True), config)
  media, made = _batch()["media"], _batch(seed=1)["media"]
  verdict = lambda x: (3.0 * x).reshape(4, -1).sum(1)
  got = jax.jit(lambda *a: losses.adversarial_scale(*a, None, verdict))(media, made)
  want = np.linalg.norm(2 * (made - media) / 64) / (3 * np.sqrt(media.size))
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_sounds_have_an_adversary_too(key):
  task = _speech(dict(adversarial_weight=1.0, discriminator_width=2, discriminator_depth=2))
  batch = _batch((60, 1)) | {"lengths": jnp.array([60, 60, 30, 0], jnp.int32)}

  @jax.jit
  def gradient(key):
    loss = lambda p: task.discriminator_loss(p, batch, key).total
    return jax.grad(loss)(unbox(task.init(key)))["discriminator"]

  found = jax.tree.leaves_with_path(gradient(key))
  norms = [np.abs(g).max() for path, g in found if "kernel" in str(path)]
  assert len(norms) == 5 * 3 and min(norms) > 0


def test_microbatches_add_up(key):
  fields = dict(perceptual_weight=0.1)
  task = tokenizer_task.build(_config(task=fields, bottleneck="mean"))  # Without draws.

  @jax.jit
  def metrics(key, batch):
    state = init_state(task, key)
    return [make_step(task, accumulate_steps=n)(state, batch)[1] for n in (1, 2)]

  a, b = metrics(key, _batch())
  np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
  np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)


def test_sigma_keeps_its_noise_where_a_plain_vae_loses_it(key):
  """On one data set: the plain VAE's ratio falls with beta, the sigma-VAE's is imposed."""
  rng = np.random.default_rng(0)
  factors = rng.normal(size=(64, 3))
  images = np.tanh(factors @ rng.normal(size=(3, 64))).reshape(-1, 8, 8, 1)
  batch = {"media": jnp.array(images, jnp.float32), "weights": jnp.ones(64)}

  def ratio(bottleneck, beta):
    config = _config(task=dict(beta=beta), bottleneck=bottleneck, patch_size=8, dim=4)
    config.optimizer.update(peak_lr=5e-3, schedule="constant")
    task = tokenizer_task.build(config)
    step = make_step(task)

    @jax.jit
    def train(key):
      _, metrics = jax.lax.scan(lambda s, _: step(s, batch), init_state(task, key), length=300)
      return metrics

    metrics = jax.device_get(train(key))
    return metrics["noise_ratio"][-1], metrics["mse"][-1]

  (loose, _), (tight, mse) = (ratio("plain", beta) for beta in (1e-1, 1e-4))
  sigma, sigma_mse = ratio("sigma_gaussian", 1e-1)
  assert tight < 0.1 * loose and tight < 0.05, (loose, tight)
  assert sigma > 0.2 and sigma > 5 * tight, (sigma, tight)
  assert mse < sigma_mse < 0.5  # The price.


def test_rows_of_the_table_step_twice(key):
  """Every kind of row at smoke size; further rows differ in numbers alone."""
  rows = ("digits_sigma_token", "digits_fixed", "digits_spherical", "digits_vq", "digits_conv")
  data = media.build(dict(source="digits"), 8)
  batch = {k: jnp.asarray(v) for k, v in next(data.train_iterator(0)).items()}
  for row in rows:
    task = tokenizer_task.build(tokenizers.get_config(f"row={row},smoke"))

    @jax.jit
    def train(key, batch, task=task):
      step = make_step(task)
      return jax.lax.scan(lambda s, _: step(s, batch), init_state(task, key), length=2)

    state, metrics = train(key, batch)
    losses = np.asarray(metrics["loss"])
    assert np.isfinite(losses).all() and int(state.total_skipped) == 0, (row, losses)


def test_a_run_ends_with_a_picture(tmp_path, capsys):
  config = _config()
  config.sample.num_samples = 3
  task = tokenizer_task.build(config)
  data = media.build_arrays(np.asarray(_batch()["media"]).repeat(5, 0), batch_size=4)
  task.check_sample(data)
  task.show_sample(_params(task.model), data, tmp_path)
  assert "samples/reconstructions.png" in capsys.readouterr().out
  assert (tmp_path / "samples/reconstructions.png").stat().st_size > 100
  assert task.items_per_step == 4 * 4 and task.flops_per_item > 0
  with pytest.raises(ValueError, match="examples of shape"):
    tokenizer_task.build(_config(channels=3)).check_sample(data)
  config.sample.num_samples = -1
  with pytest.raises(ValueError, match="num_samples=-1"):
    task.check_sample(data)


@pytest.mark.parametrize(
  "task, model, message",
  [
    (dict(reconstruction="l3"), {}, "reconstruction='l3'"),
    (dict(beta=-1.0), {}, "beta=-1.0 must not be negative"),
    (dict(weight=1.0), {}, r"unknown fields \['weight'\]"),
    (dict(perceptual_weight=1.0, perceptual="vgg"), {}, "perceptual='vgg' is no feature"),
    (dict(spectral_weight=1.0), {}, "spectral_weight=1.0 is of sounds"),
    (dict(adversarial_weight=1.0, discriminator_depth=0), {}, "discriminator_depth=0"),
    (dict(spectral_windows=(40,)), {}, "multiples of 16"),
    ({}, dict(bottleneck="spherical"), "beta=0.01 weighs nothing"),
  ],
)
def test_bad_fields(task, model, message):
  with pytest.raises(ValueError, match=message):
    tokenizer_task.build(_config(task=task, **model))


def test_images_and_sounds_have_losses_of_their_own():
  with pytest.raises(ValueError, match="perceptual_weight=1.0 is of images"):
    _speech(dict(perceptual_weight=1.0))
  assert {f.name for f in dataclasses.fields(Objective)} <= set(
    latentlm.latent_tokenizer("vit_tokenizer", image_size=8).task
  )
