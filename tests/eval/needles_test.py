"""Needles are counted as found when they are, at the depth where they lie."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab import sample
from latentlab.data import synthetic
from latentlab.eval import haystack, needles
from latentlab.models import LanguageModel, build_config

LENGTH = 96


class Reader(nn.Module):
  """Copies what follows the best match of the last symbols among the last `reach` tokens.

  A model as far as the evaluator needs one, and one that answers every query it can see.
  """

  reach: int = LENGTH
  config = types.SimpleNamespace(context_limit=4 * LENGTH)

  def hidden(self, tokens):
    same = jnp.where(tokens == ord("?"), ord("#"), tokens)  # A query looks like its needle.
    matches = jnp.ones((*tokens.shape, tokens.shape[1]), int)
    run = jnp.ones_like(matches, bool)
    for back in range(5):
      shifted = jnp.roll(same, back, axis=1)
      run &= shifted[:, :, None] == shifted[:, None, :]
      matches += run
    t = jnp.arange(tokens.shape[1])
    seen = (t < t[:, None]) & (t > t[:, None] - self.reach)
    best = jnp.where(seen, matches, 0).argmax(-1)
    return jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), best, axis=1)[..., None], None

  def logits(self, hidden):
    return jax.nn.one_hot(hidden[..., 0], 258)


def _symbols(**options):
  section = dict(source="synthetic", task="multi_needle", task_options=options, seq_length=LENGTH)
  return data_lib.build(section, batch_size=8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text")
  for i in range(20):
    (path / f"{i}.txt").write_text(f"Document {i} is\nabout hay and nothing else. " * 9)
  return data_lib.build(
    dict(path=str(path), include=("*.txt",), cache_dir=str(path / "cache"), seq_length=400), 4
  )


@pytest.mark.parametrize("options", [{}, dict(key_length=1, value_length=3, mixed=True)], ids=str)
def test_a_model_that_answers_finds_everything(options):
  task = types.SimpleNamespace(model=Reader())
  got = dict(needles.Evaluator(task, _symbols(**options), jax.jit, num_samples=7).run({}))
  assert list(got) == [
    "accuracy",
    "accuracy_all",
    *(f"accuracy_depth_{d}" for d in (0, 25, 50, 75, 100)),
  ]
  assert set(got.values()) == {1.0}


def test_a_model_that_sees_the_end_finds_what_lies_there():
  task = types.SimpleNamespace(model=Reader(reach=50))
  options = dict(num_samples=20, depths=(0.1, 0.9), num_needles=3, num_queries=2, seed=3)
  data = _symbols()
  got = dict(needles.Evaluator(task, data, jax.jit, **options).run({}))
  assert got["accuracy_depth_10"] < 0.2  # Two digits may be guessed.
  assert got["accuracy_depth_90"] == 1
  assert got["accuracy_all"] < got["accuracy"] < 1
  found = []
  for depth, i in [(d, i) for d in (0.1, 0.9) for i in range(20)]:
    row = synthetic.MultiNeedle(num_needles=3).haystack(
      np.random.default_rng((3, i)), LENGTH, depth
    )
    tokens = np.concatenate([[256], row.symbols[:-1]])[None]
    hidden, _ = Reader(reach=50).apply({}, jnp.asarray(tokens), method="hidden")
    predicted = np.asarray(hidden)[0, :, 0]
    found.append([(predicted[a] == row.symbols[a]).all() for a in row.answers])
  assert got["accuracy"] == pytest.approx(np.mean(found))
  assert got["accuracy_all"] == pytest.approx(np.all(found, axis=1).mean())
  assert got["accuracy_depth_10"] == pytest.approx(np.mean(found[:20], axis=0)[0])
  again = dict(needles.Evaluator(task, data, jax.jit, **options).run({}))
  other = dict(needles.Evaluator(task, data, jax.jit, **options | dict(seed=4)).run({}))
  assert again == got != other


def test_prompts_of_text(text):
  hay = haystack.TextHaystack(text.split_tokens("train"), text.tokenizer, 4, 2, 380)
  pattern = re.compile(r"\nThe secret number of (\w+) is (\d+)\.\n")
  contexts = set()
  for depth in (0.0, 0.3, 1.0):
    prompts, answers = hay.prompts(np.random.default_rng(5), depth)
    assert len(prompts) == len(answers) == 2
    texts = [text.tokenizer.decode(prompt) for prompt in prompts]
    cities = []
    for prompt, written, answer in zip(prompts, texts, answers, strict=True):
      assert prompt[0] == text.tokenizer.bos_id and len(prompt) <= 380
      context, question = written.rsplit("\nWhat is", 1)
      contexts.add(context)
      memory = dict(pattern.findall(context))
      assert len(memory) == 4 and all(1 <= int(n) <= 50_000 for n in memory.values())
      city = re.fullmatch(
        r" the secret number of (\w+)\? The secret number of \1 is", question
      ).group(1)
      assert memory[city] == answer
      cities.append(city)
    assert cities[0] != cities[1] and max(map(len, prompts)) == 380
    first = context.index(f"of {cities[0]} is")
    before = len(pattern.sub("", context[: first - len("\nThe secret number ")]))
    size = len(pattern.sub("", context))
    assert abs(before - depth * size) <= 10  # No further than a word away.
    words = set(pattern.sub("", context).split())
    known = set(text.tokenizer.decode(text.split_tokens("train")).split())
    assert len(words - known) <= 2  # None but those that the hay's ends cut.
  assert len(contexts) == 3


def test_numbers_are_found_in_what_the_model_writes(text):
  """The answer by hand of what is compiled: right for needles in the second half of a prompt."""

  def compile(_):
    def answer(_, batch):
      out = np.full((len(batch["prompts"]), 9), text.tokenizer.pad_id)
      for row, prompt, length in zip(out, batch["prompts"], batch["lengths"], strict=True):
        written = text.tokenizer.decode(prompt[:length])
        if written:
          city = written.split()[-2]
          place = written.index(f"of {city} is")
          number = re.match(r" is (\d+)", written[place + 3 + len(city) :]).group(1)
          said = f" {number}." if place > len(written) / 2 else " 0."
          row[: len(said)] = text.tokenizer.encode(said)
      return out

    return answer

  model = LanguageModel(build_config(SIZES, 258))
  options = dict(hay="text", num_needles=3, num_queries=2, num_samples=5, depths=(0, 1))
  task = types.SimpleNamespace(model=model)
  got = dict(needles.Evaluator(task, text, compile, split="train", **options).run({}))
  assert got["accuracy_depth_0"] == 0 and got["accuracy_depth_100"] == 1
  assert 0 < got["accuracy_all"] < got["accuracy"] < 1


SIZES = dict(name="transformer", num_layers=1, embed_dim=16, num_heads=2)


def test_text_is_continued_as_by_generate(text):
  model = LanguageModel(build_config(SIZES, 258))
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  drawn = []

  def compile(fn):
    compiled = jax.jit(fn)

    def record(params, batch):
      out = compiled(params, batch)
      drawn.append((batch, np.asarray(out)))
      return out

    return record

  options = dict(hay="text", num_samples=3, depths=(0.5, 1), max_new_tokens=6, split="train")
  evaluator = needles.Evaluator(types.SimpleNamespace(model=model), text, compile, **options)
  assert 0 <= dict(evaluator.run(params))["accuracy"] <= 1
  assert [len(out) for _, out in drawn] == [4, 4]  # Six samples, and two rows that fill.
  lengths = np.concatenate([batch["lengths"] for batch, _ in drawn])
  assert (lengths[6:] == 0).all()
  prompts = np.concatenate([batch["prompts"] for batch, _ in drawn])[:6]
  want = sample.generate(
    model,
    params,
    prompts,
    lengths[:6],
    sampler=sample.token_sampler(greedy=True),
    key=jax.random.key(1),
    max_new_tokens=6,
    stop_tokens=(256,),
    pad_id=257,
  )
  np.testing.assert_array_equal(np.concatenate([out for _, out in drawn])[:6], want.tokens)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(hay="grass"), "hay='grass' of a needles evaluation must be 'synthetic' or 'text'"),
    (dict(num_samples=0), "num_samples=0"),
    (dict(seed=-1), "seed=-1"),
    (dict(depths=(0.5, 1.5)), r"depths=\(0.5, 1.5\) must be parts"),
    (dict(depths=(0.5, 0.501)), "differ by a hundredth"),
    (dict(depths=()), "at least one"),
    (dict(seq_length=20), "seq_length=20 .* too short for .* needs at least 30"),
    (dict(num_queries=5), "num_queries=5 asks for more than num_needles=4"),
    (dict(seq_length=400), "seq_length=400 .* longer than the 384"),
    (dict(hay="text"), "'synthetic' has no tokens of its own"),
  ],
  ids=str,
)
def test_bad_fields(fields, message):
  section = dict(type="needles", every_steps=1) | fields
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": section}, types.SimpleNamespace(model=Reader()), _symbols(), jax.jit)


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_needles=51), "num_needles=51 .* no more needles than 50 cities"),
    (dict(num_queries=2), "no more queries than needles"),
    (dict(seq_length=120), "do not fit into the 100 that seq_length leaves"),
    (dict(split="test"), "split='test'"),
  ],
  ids=str,
)
def test_bad_fields_of_text(text, fields, message):
  section = dict(type="needles", every_steps=1, hay="text", seq_length=300) | fields
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": section}, types.SimpleNamespace(model=Reader()), text, jax.jit)


def test_symbols_are_bytes(text):
  data = dataclasses.replace(text, tokenizer=data_lib.CharTokenizer("ab"))
  with pytest.raises(ValueError, match="made of bytes, and this model's tokens are 'chars'"):
    needles.Evaluator(types.SimpleNamespace(model=Reader()), data, jax.jit, seq_length=64)
