import functools

import jax
import jax.numpy as jnp
import latent_cases as cases
import numpy as np
import pytest
from flax import linen as nn

from latentlab import sample
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latentlm import LatentLM, empty_items
from latentlab.sample import latent

_SETTINGS = SolverSettings(num_steps=3)


@functools.cache
def _model(condition="class", stop="fixed", backbone="transformer"):
  config = cases.config(condition, stop, backbone, num_layers=2 if backbone == "yoco" else 1)
  return LatentLM(config), _params(config)


@functools.cache
def _params(config):
  """Parameters with nothing at zero; some conditions differ in their rows alone."""

  @jax.jit
  def make(key):
    params = nn.unbox(LatentLM(config).init(key, empty_items(config)))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)

  return make(jax.random.key(0))


def _prompts(model, *tokens):
  return [latent.prompt_items(model.config, np.asarray(t)) for t in tokens]


def _classes(model, *labels):
  return _prompts(model, *[[model.config.tokens.class_token(c)] for c in labels])


def _generate(model, params, prompts, key=7, max_items=5, settings=_SETTINGS, **options):
  key = jax.random.key(key) if isinstance(key, int) else key
  return latent.generate_items(
    model, params, prompts, key=key, max_items=max_items, settings=settings, **options
  )


def _runs(*args, **options):
  return latent.drawn_latents(_generate(*args, **options), "image")


def test_a_class_gives_a_run_of_the_fixed_length():
  model, params = _model()
  drawn = _generate(model, params, _classes(model, 0, 2, 1))
  runs = latent.drawn_latents(drawn, "image")
  assert [len(run) for run in runs] == [4] * 3 and np.asarray(drawn.finished).all()
  assert all(np.isfinite(run).all() and run.std() > 0 for run in runs)
  assert all((tokens == []).all() for tokens in latent.drawn_tokens(drawn))


def test_the_loop_is_what_is_drawn_step_by_step():
  """One stream, by hand: hidden vectors of one pass, the head with the loop's keys."""
  model, params = _model()
  (prompt,) = _classes(model, 1)
  keys = sample.row_keys(jax.random.key(7), np.arange(1))
  run = _runs(model, params, [prompt])[0]
  tokens = np.array([*prompt.tokens, *[model.config.tokens.latent(0)] * 4])
  items = latent.prompt_items(model.config, tokens, {"image": run})
  items = jax.tree.map(lambda x: jnp.asarray(x)[None], items)

  @jax.jit
  def draw(t):
    hidden, _ = model.apply({"params": params}, items, method="hidden")
    here = jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, t), 1))(keys)
    args = ("image", hidden[:, t], None, here, _SETTINGS)
    return model.apply({"params": params}, *args, method="draw")

  for t in range(4):
    np.testing.assert_allclose(run[t], draw(t)[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", ["transformer", "yoco"])
def test_latentlm_08_both_streams_see_what_they_should(backbone):
  """Guidance 0 draws from the null prompt alone, 1 from the prompt alone, in one batch of both."""
  model, params = _model(backbone=backbone)
  prompts = _classes(model, 2)
  at = lambda guidance, prompts, **options: _runs(
    model, params, prompts, settings=SolverSettings(guidance, num_steps=3), **options
  )[0]
  alone = at(1.0, prompts)
  np.testing.assert_allclose(at(1.0, prompts, guided=True), alone, rtol=1e-4, atol=1e-4)
  strong = at(3.0, prompts)
  assert np.abs(strong - alone).max() > 1e-3
  other = at(3.0, _classes(model, 0))
  np.testing.assert_allclose(at(0.0, prompts), at(0.0, _classes(model, 0)), rtol=1e-3, atol=1e-3)
  assert np.abs(strong - other).max() > 1e-3


def test_a_row_does_not_depend_on_its_batch():
  model, params = _model()
  keys = sample.row_keys(jax.random.key(3), np.arange(3))
  three = _runs(model, params, _classes(model, 0, 1, 2), keys)
  one = _runs(model, params, _classes(model, 1), keys[1:2])
  np.testing.assert_allclose(three[1], one[0], rtol=1e-5, atol=1e-5)


def test_latentlm_12_a_forced_end_ends_a_run_at_once_but_for_its_least_length():
  model, params = _model("text", "token")
  special = model.config.tokens
  prompts = _prompts(model, [256, 97, special.begin(0)], [256, special.begin(0)])
  # Both tokens' scores come from one feature, of whatever sign: their difference has to be forced.
  kernel = params["language"]["head"]["kernel"] * 0
  even = params | {"language": params["language"] | {"head": {"kernel": kernel}}}
  lengths = lambda **options: [
    len(run) for run in _runs(model, even, prompts, max_items=8, **options)
  ]
  # At even odds the threshold alone decides.
  assert lengths(threshold=0.49, min_latents=3) == [3, 3]
  assert lengths(threshold=0.49) == [0, 0]
  assert lengths(threshold=0.51, max_latents=5) == [5, 5]
  assert lengths(threshold=0.51) == [8, 8]


def test_latentlm_12_finished_rows_stay_as_they_are():
  model, params = _model("text", "token")
  special = model.config.tokens
  prompts = _prompts(model, [256, 97, special.begin(0)], [256, special.begin(0)])
  drawn = _generate(model, params, prompts, max_items=8, max_latents=6, threshold=0.5)
  item, lengths = jax.device_get(drawn.tokens), np.asarray(drawn.lengths)
  for row, length in enumerate(lengths):
    assert not item.token[row, length:].any() and not item.latents["image"][row, length:].any()
    assert item.last[row].sum() == (length < 8 or item.last[row, -1])
    if item.last[row].any():
      assert item.token[row, length - 1] == special.end(0)


def test_latentlm_12_batches_of_different_lengths_equal_single_runs():
  model, params = _model("text", "token")
  special = model.config.tokens
  tokens = [[256, 97, special.begin(0)], [256, special.begin(0)]]
  keys = sample.row_keys(jax.random.key(3), np.arange(2))
  options = dict(max_items=8, max_latents=7)
  both = _runs(model, params, _prompts(model, *tokens), keys, **options)
  for row in range(2):
    single = _generate(model, params, _prompts(model, tokens[row]), keys[row : row + 1], **options)
    np.testing.assert_allclose(
      both[row], latent.drawn_latents(single, "image")[0], atol=1e-4, rtol=1e-3
    )


def test_text_goes_on_behind_a_run_and_never_draws_what_is_no_text():
  model, params = _model("both", "token")
  special = model.config.tokens
  prompts = _prompts(model, [256, special.begin(0)], [256, 97])
  drawn = _generate(model, params, prompts, max_items=24, max_latents=3, ends_with_run=False)
  item = jax.device_get(drawn.tokens)
  assert drawn.lengths.tolist() == [24, 24]
  for row in range(2):
    kinds, tokens = item.kind[row], item.token[row]
    text = tokens[kinds == 0]
    allowed = (text < special.text_vocab_size) | np.isin(text, [special.begin(0), special.end(0)])
    assert allowed.all() and (tokens[kinds > 0] == special.latent(0)).all()
    # Runs begin behind their opening token, and are closed.
    begins = np.flatnonzero((kinds[1:] > 0) & (kinds[:-1] == 0)) + 1
    assert all(tokens[b - 1] == special.begin(0) for b in begins)
    ends = np.flatnonzero((kinds[:-1] > 0) & (kinds[1:] == 0)) + 1
    assert (tokens[ends] == special.end(0)).all()


def test_a_stop_token_ends_a_row_of_text():
  model, params = _model("caption", "token")
  prompts = _prompts(model, [256, 97])
  stops = tuple(range(258))
  drawn = _generate(model, params, prompts, max_items=9, ends_with_run=False, stop_tokens=stops)
  item = jax.device_get(drawn.tokens)
  first = np.flatnonzero(item.token[0] < 258)[0]
  assert drawn.lengths.tolist() == [first + 1] and drawn.finished.all()


def test_a_prompt_that_ends_in_a_run_goes_on_with_it():
  model, params = _model()
  special = model.config.tokens
  tokens = np.array([special.class_token(1), special.latent(0), special.latent(0)])
  prompt = latent.prompt_items(model.config, tokens, {"image": np.ones((2, cases.DIM))})
  drawn = _generate(model, params, [prompt])
  assert drawn.lengths.tolist() == [2]  # Of four, two are there.


def test_a_run_that_is_split_goes_on_as_if_it_were_not():
  """Without the solver's noise a row is its items alone, in both streams of guidance."""
  model, params = _model("text", "token")
  special = model.config.tokens
  tokens = [[256, 97, 98, special.begin(0)], [256, special.begin(0)]]
  settings = SolverSettings(3.0, temperature=0.0, num_steps=3)
  options = dict(settings=settings, threshold=1.0)  # Lengths are tested above.
  whole = _runs(model, params, _prompts(model, *tokens), max_items=6, max_latents=5, **options)
  assert np.abs(whole[0][2:] - whole[1][2:]).max() > 1e-2
  prompts = [
    latent.begun(model.config, np.array(t), run[:n])
    for t, run, n in zip(tokens, whole, (2, 3), strict=True)
  ]
  rest = _runs(model, params, prompts, max_items=6, max_latents=5, **options)
  for run, count, again in zip(whole, (2, 3), rest, strict=True):
    np.testing.assert_allclose(again, run[count:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block_size", [2, 5])
def test_blocks_are_the_whole(block_size):
  model, params = _model("text", "token")
  special = model.config.tokens
  (prompt,) = _prompts(model, [256, 97, special.begin(0)])
  # The second row ends two items before the first.
  prompts = [prompt, latent.begun(model.config, prompt.tokens, np.ones((2, cases.DIM)))]
  options = dict(settings=_SETTINGS, max_items=7, max_latents=6, threshold=1.0)
  whole = _generate(model, params, prompts, **options)
  assert whole.lengths.tolist() == [7, 5]
  key = jax.random.key(7)
  blocks = list(
    latent.stream_items(model, params, prompts, key=key, block_size=block_size, **options)
  )
  assert [block.log_probs.shape[1] for block in blocks] == {2: [2, 2, 2, 1], 5: [5, 2]}[block_size]
  names = ("latents", "token", "kind")
  for row, length in enumerate(whole.lengths):
    got, want = (
      [
        np.concatenate([jax.tree.leaves(getattr(b.tokens, name))[0][row] for b in parts])[:length]
        for name in names
      ]
      for parts in (blocks, [whole])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
  assert sum(block.lengths for block in blocks).tolist() == whole.lengths.tolist()
  assert blocks[-1].finished.tolist() == whole.finished.tolist()


def test_new_settings_compile_nothing(empty_jit_cache):
  model, params = _model()
  sizes = []
  for guidance, temperature in ((1.5, 1.0), (2.0, 0.9), (3.0, 0.8)):
    settings = SolverSettings(guidance, temperature, num_steps=3)
    _generate(model, params, _classes(model, 0), settings=settings)
    sizes.append(sample.begin._cache_size())
  assert sizes == [1, 1, 1]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (dict(max_items=0), "max_items=0 must be at least 1"),
    (dict(prompts=[]), "every row needs a prompt"),
  ],
)
def test_bad_calls(call, message):
  model, params = _model()
  prompts = call.pop("prompts", _classes(model, 0))
  with pytest.raises(ValueError, match=message):
    _generate(model, params, prompts, **call)


def test_bad_prompts():
  config = _model()[0].config
  with pytest.raises(ValueError, match="are not all in a vocabulary"):
    latent.prompt_items(config, np.array([9999]))
  with pytest.raises(ValueError, match="1 places for latents of 'image' with 2 channels"):
    latent.prompt_items(config, np.array([config.tokens.latent(0)]))
  with pytest.raises(ValueError, match="open no run of latents"):
    latent.begun(config, np.array([97]), np.zeros((1, cases.DIM)))
  with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
    options = dict(key=jax.random.key(0), max_items=2, settings=_SETTINGS, block_size=0)
    latent.stream_items(*_model(), _classes(_model()[0], 0), **options)
