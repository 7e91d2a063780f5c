import jax
import jax.numpy as jnp
import latent_cases as cases
import numpy as np
import pytest

from experiments.configs.latentlm import common
from latentlab import sample
from latentlab.data import latent_store, mixed
from latentlab.data.latent_store import LatentItem
from latentlab.layers.latent_heads import SolverSettings
from latentlab.models.latentlm import SpecialTokens
from latentlab.sample.codes import CodeTokens, generate_codes
from latentlab.train import latents, vq_task
from latentlab.train.state import unbox
from latentlab.train.step import init_state, make_step

_SIZE = 5
_VECTORS = np.random.default_rng(3).normal(size=(_SIZE, cases.DIM)).astype(np.float32)


def _config(condition="class", stop="fixed", **latents_):
  c = common.vq(None)
  c.model.update(num_layers=1, embed_dim=16, num_heads=2)
  c.data.condition = condition
  c.latents.update(stop=stop, **latents_)
  c.batch_size, c.train_steps, c.optimizer.warmup_steps = 4, 10, 1
  return c


def _rows(path, condition="class", stop="fixed", counts=(4,) * 6, **fields):
  """Codes in the place of the shared cases' latents."""
  made, rng = cases.store(path / "means", counts), np.random.default_rng(1)

  def items(split):
    for i in range(len(split)):
      item = split.item(i)
      codes = rng.integers(0, _SIZE, len(item.means))
      yield LatentItem(_VECTORS[codes], item.label, item.caption, None, codes)

  noise = dict(kind="none", std=0.0, per="example", on_sphere=False)
  meta = dict(made.meta) | dict(codebook_size=_SIZE, noise=noise)
  splits = {name: items(split) for name, split in made.splits.items()}
  store = latent_store.write(path / "codes", splits, meta)
  config = mixed.LatentDataConfig(condition=condition, **fields)
  return mixed.build(config, store, cases.tokens(condition), stop, 4)


_made = {}


def _case(tmp_path, condition="class", stop="fixed", **fields):
  """A task, its parameters with nothing at zero, its data, and a batch."""
  rows = _rows(tmp_path, condition, stop, **fields)
  task = vq_task.build(_config(condition, stop), rows.summary)
  if condition not in _made:
    params = jax.jit(lambda k: unbox(task.init(k)))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    _made[condition] = jax.tree.unflatten(tree, moved)
  batch = jax.tree.map(jnp.asarray, dict(next(rows.train_iterator(0))))
  return task, _made[condition], rows, batch


def _stand_in(monkeypatch, num_latents=4):
  """A tokenizer of the vectors above that shows latents as they are."""
  shape = type("C", (), dict(num_latents=num_latents, dim=cases.DIM, codebook_size=_SIZE))
  tokenizer = latents.TrainedTokenizer(type("M", (), {"config": shape})(), {}, 4)
  tokenizer.__dict__["decode"] = lambda z: np.asarray(z)[:, :, None]
  tokenizer.__dict__["code_vectors"] = lambda codes: _VECTORS[codes]
  monkeypatch.setattr(latents, "load_tokenizer", lambda run: tokenizer)


@pytest.mark.parametrize(
  ("condition", "stop", "counted"),
  [
    ("class", "fixed", 4),  # z1 .. z4
    ("class", "token", 5),  # and <end>
    ("text", "fixed", None),
  ],
)
def test_rows_and_what_is_counted(tmp_path, condition, stop, counted):
  task, params, rows, batch = _case(tmp_path, condition, stop)
  inputs, targets, weights = (np.asarray(x) for x in task.rows(batch))
  special, first = task.codes.special, task.codes.first
  here, following = np.asarray(batch["kinds"]) > 0, np.asarray(batch["next_kinds"]) > 0
  vectors = {"inputs": (inputs, here, "latents"), "targets": (targets, following, "next_latents")}
  for name, (tokens, places, of) in vectors.items():
    np.testing.assert_array_equal(_VECTORS[tokens[places] - first], batch[f"{of}/image"][places])
    np.testing.assert_array_equal(tokens[~places], batch[name][~places])
  assert first == special.vocab_size == 258 + 4 + 3 * (condition == "class")
  assert (weights[following] == 1).all() and following.sum() == 4 * 4
  if counted is None:  # Texts, what opens the run, and what is behind it; the end comes by itself.
    counted = (np.asarray(batch["weights"]) > 0).sum() / 4 + 4
    assert not weights[targets == special.end(0)].any()
  sums, count = jax.jit(task.sums)(params, batch, jax.random.key(0))
  assert count["tokens"] == 4 * counted and np.isfinite(sums["tokens"])


def test_the_loss_is_cross_entropy(tmp_path):
  task, params, _, batch = _case(tmp_path)
  inputs, targets, _ = task.rows(batch)
  apply = lambda p, b: task.model.apply({"params": p}, inputs, segment_ids=b["segment_ids"]).logits
  logits = np.asarray(jax.jit(apply)(params, batch), np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  want = -np.take_along_axis(log_probs, np.asarray(targets)[..., None], -1).sum()
  sums = jax.jit(lambda *args: task.sums(*args, deterministic=True)[0])
  got = sums(params, batch, jax.random.key(0))["tokens"]
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_it_trains(tmp_path):
  task, _, _, batch = _case(tmp_path)
  state = jax.jit(lambda key: init_state(task, key))(jax.random.key(0))
  step, losses = jax.jit(make_step(task)), []
  for _ in range(20):
    state, metrics = step(state, batch)
    losses.append(float(metrics["token_loss"]))
  assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
  ("guidance", "kind"), [(1.0, "constant"), (2.5, "constant"), (2.5, "linear")]
)
def test_draws_are_those_of_one_passs_guided_logits(tmp_path, monkeypatch, guidance, kind):
  """Cached streams, step by step, against one pass over each stream's whole sequence."""
  _stand_in(monkeypatch)
  task, params, rows, _ = _case(tmp_path)
  settings = SolverSettings(guidance=guidance, temperature=0.8, guidance_kind=kind)
  generator = task.generator(params, rows)
  prompts, labels = generator.prompts(3)
  drawn = generator(prompts, settings, jax.random.key(7))
  special, first = task.codes.special, task.codes.first
  codes = np.stack([[np.abs(_VECTORS - z).sum(1).argmin() for z in run] for run in drawn.latents])
  heads = np.stack([special.class_token(labels), np.full(3, special.null)])
  streams = np.concatenate([heads[..., None], np.stack([codes + first] * 2)], axis=-1)
  apply = jax.jit(lambda tokens: task.model.apply({"params": params}, tokens).logits)
  said, null = (np.asarray(apply(jnp.asarray(s[:, :4], jnp.int32))) for s in streams)
  keys = sample.row_keys(jax.random.key(7), np.arange(3))
  for t in range(4):
    scale = guidance if kind == "constant" else 1 + (guidance - 1) * (t + 1) / 4
    guided = null[:, t] + scale * (said[:, t] - null[:, t])
    for row in range(3):
      here = jax.random.fold_in(keys[row], t)
      masked = np.full(task.codes.vocab_size, -np.inf, np.float32)
      masked[first:] = guided[row, first:] / 0.8
      assert int(jax.random.categorical(here, masked)) - first == codes[row, t]
  assert drawn.lengths == [4] * 3 and drawn.media[0].shape == (4, 1, cases.DIM)


def test_a_run_ends_where_the_model_says(tmp_path, monkeypatch):
  _stand_in(monkeypatch)
  task, params, rows, _ = _case(tmp_path, "class", "token", counts=(2, 4, 3) * 2)
  generator = task.generator(params, rows)
  prompts, _ = generator.prompts(6)
  # No score of its own: what is added to the end's decides alone.
  even = params | {"head": {"kernel": jnp.zeros_like(params["head"]["kernel"])}}
  end, generator = task.codes.special.end(0), vq_task.Generator(task, even, rows)
  lengths = {}
  for name, value in (("never", -1e3), ("at once", 1e3)):
    bias = jnp.zeros(task.codes.vocab_size).at[end].set(value)
    tokens = sample.TokenSampler((sample.logits.LogitBias(bias),))
    lengths[name] = generator(prompts, SolverSettings(), jax.random.key(0), tokens=tokens).lengths
  assert lengths == {"never": [4] * 6, "at once": [1] * 6}  # No media have no code.


def test_the_null_prompt_keeps_what_frames_it():
  codes = CodeTokens(SpecialTokens(258, 1, 0), 5)
  null = codes.null_of(256)
  prompt = np.array([256, 97, 98, codes.special.begin(0), codes.first, codes.first + 4])
  want = [256, 258, 258, codes.special.begin(0), codes.first, codes.first + 4]
  assert null[prompt].tolist() == want


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(max_codes=0), "max_codes=0 to be positive"),
    (dict(prompts=[np.array([], np.int32)]), "rows need a prompt of a token"),
    (dict(prompts=[np.array([999])]), "not all in a vocabulary of 270 tokens"),
  ],
)
def test_bad_prompts(tmp_path, change, message):
  task, params, _, _ = _case(tmp_path)
  options = dict(prompts=[np.array([262])], max_codes=2) | change
  with pytest.raises(ValueError, match=message):
    generate_codes(
      task.model,
      params,
      codes=task.codes,
      bos_id=256,
      key=jax.random.key(0),
      settings=SolverSettings(),
      **options,
    )


@pytest.mark.parametrize(
  ("stop", "codebook_size", "message"),
  [
    ("classifier", _SIZE, "config.latents.stop='classifier' of codes"),
    ("fixed", 0, "config.model.bottleneck='vq'"),
  ],
)
def test_bad_fields(tmp_path, stop, codebook_size, message):
  summary = dict(_rows(tmp_path).summary) | {"codebook_size": codebook_size}
  with pytest.raises(ValueError, match=message):
    vq_task.build(_config(stop=stop), summary)


def test_losses_of_text_are_of_text_alone(tmp_path):
  """By the documents, which are told apart by their items, from logits of a plain pass."""
  task, params, _, batch = _case(tmp_path, "both", seq_length=30, documents_per_row=2)
  inputs, targets, _ = (np.asarray(x) for x in task.rows(batch))
  ids = batch["segment_ids"]
  apply = lambda p: task.model.apply({"params": p}, task.rows(batch)[0], segment_ids=ids).logits
  logits = np.asarray(jax.jit(apply)(params), np.float64)
  nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  want, counts = dict(text=0.0, caption=0.0), dict(text=0, caption=0)
  ids, begin, end = np.asarray(ids), task.special.begin(0), task.special.end(0)
  for row, number in {(i, j) for i in range(len(ids)) for j in ids[i] if j}:
    (at,) = np.nonzero(ids[row] == number)
    caption_first = inputs[row, at[1]] != begin
    behind = np.cumsum(inputs[row, at] == end) > 0
    for place, is_behind in zip(at, behind, strict=True):
      said = targets[row, place] < 256 or (targets[row, place] == 256 and not caption_first)
      for name in ["text"] * int(said) + ["caption"] * int(said and is_behind):
        want[name] += nll[row, place]
        counts[name] += 1
  sums, found = jax.jit(task.text_sums)(params, batch)
  assert found == counts and 0 < counts["caption"] < counts["text"]
  for name, value in want.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-5)


def test_no_text_behind_images_is_none(tmp_path):
  task, params, _, batch = _case(tmp_path, "text")
  _, found = jax.jit(task.text_sums)(params, batch)
  assert found["caption"] == 0 and found["text"] == (np.asarray(batch["targets"]) < 256).sum()


def test_captions_are_the_best_tokens_behind_codes(tmp_path, monkeypatch):
  _stand_in(monkeypatch)
  task, params, rows, _ = _case(tmp_path, "both")
  codes = np.random.default_rng(5).integers(0, _SIZE, (3, 4))
  generator = task.generator(params, rows)
  generator.tokenizer.__dict__["codes"] = lambda media: codes
  greedy = sample.token_sampler(greedy=True)
  drawn = generator.captions(np.zeros((3, 4, 4, 1)), jax.random.key(0), 3, greedy)
  first, special = task.codes.first, task.special
  apply = jax.jit(lambda tokens: task.model.apply({"params": params}, tokens).logits[0])
  for row, text in zip(codes, drawn, strict=True):
    tokens = [256, special.begin(0), *(first + row), special.end(0)]
    for place in range(len(tokens), len(tokens) + 3):
      padded = np.pad(tokens, (0, 10 - len(tokens)))
      best = int(np.asarray(apply(jnp.asarray(padded)[None]))[place - 1, :258].argmax())
      if best == 256:
        break
      tokens.append(best)
    assert text == rows.tokenizer.decode(np.array(tokens[7:]))
  with pytest.raises(ValueError, match="data.condition='text' trains no captions"):
    task, params, rows, _ = _case(tmp_path / "t", "text")
    task.generator(params, rows).captions(np.zeros((1, 4, 4, 1)), jax.random.key(0), 3)
