"""The evaluator of captions, with a task whose losses and captions are given."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latentlab.data import Data, media
from latentlab.data.tokenizers import ByteTokenizer
from latentlab.eval import captions, metrics, runner

_TEXTS = ["a red cat", "a dog that runs", "two birds", "one blue fish", "a cat"]
_FIELDS = dict(split="train")


class _Data(Data):
  """Twelve images, two captions of each, in rows of four; an image is as bright as its number."""

  def __init__(self, condition="both", equal_lengths=True):
    names = [f"image {i // 2}" for i in range(24)]
    texts = [_TEXTS[(i // 2 + 3 * (i % 2)) % 5] for i in range(24)]
    pixels = np.repeat(np.linspace(-1, 1, 12, dtype=np.float32), 2)
    images = np.broadcast_to(pixels[:, None, None, None], (24, 4, 4, 1))
    fields = dict(validation_fraction=0.0)
    self.__dict__.update(
      media=media.build_arrays(images, None, texts, batch_size=4, names=names, fields=fields),
      documents=types.SimpleNamespace(condition=condition, max_text=64),
      tokenizer=ByteTokenizer(),
      summary=dict(equal_lengths=equal_lengths),
    )

  def eval_batches(self, split, max_batches=None, **windows):
    batches = [dict(text=jnp.arange(4) + i, caption=jnp.ones(4) * i) for i in range(3)]
    return batches[:max_batches]


class _Task:
  """Says of each image what `said` has for its number; counts what it is asked for."""

  def __init__(self, said):
    self.said, self.asked = said, []

  def text_losses(self, params, batch):
    raise AssertionError("sums are asked for")

  def text_sums(self, params, batch):
    sums = {name: params["scale"] * batch[name].sum() for name in ("text", "caption")}
    return sums, {"text": jnp.float32(8), "caption": jnp.float32(2)}

  def generator(self, params, data):
    del params, data
    return types.SimpleNamespace(batch_size=5, captions=self._captions)

  def _captions(self, images, key, max_tokens, tokens):
    assert tokens.greedy and len(images) == 5
    numbers = np.round((images[:, 0, 0, 0] + 1) / 2 * 11).astype(int)
    self.asked.append((numbers.tolist(), max_tokens))
    return [self.said[i] for i in numbers]


def _scale(value):
  return {"scale": jnp.float32(value)}


def _references(i):
  return [_TEXTS[i % 5], _TEXTS[(i + 3) % 5]]


def test_numbers_are_those_of_losses_and_captions():
  # Every third image gets a caption of its own, the others one of their neighbour's.
  said = [_references(i)[i % 2] if i % 3 == 0 else "a red dog" for i in range(12)]
  task, data = _Task(said), _Data()
  got = dict(captions.Evaluator(task, data, jax.jit, **_FIELDS).run(_scale(0.5)))
  assert got["text_loss"] == pytest.approx(0.5 * sum(range(4)) * 3 / 24 + 0.5 * 4 * 3 / 24)
  assert got["caption_loss"] == pytest.approx(0.5 * 4 * (0 + 1 + 2) / 6)
  assert got["text_perplexity"] == pytest.approx(np.exp(got["text_loss"]))
  assert got["caption_perplexity"] == pytest.approx(np.exp(got["caption_loss"]))
  assert got["exact"] == pytest.approx(4 / 12)
  each = metrics.cider(said, [_references(i) for i in range(12)])
  assert got["cider"] == pytest.approx(each.mean())
  # Each image once, and no caption longer than the longest with its end.
  seen = [i for numbers, _ in task.asked for i in numbers]
  assert set(seen) == set(range(12)) and len(seen) == 15
  assert {count for _, count in task.asked} == {len("a dog that runs") + 1}


def test_the_first_media_alone():
  task = _Task(["two birds"] * 12)
  fields = _FIELDS | dict(max_media=5, max_tokens=3, max_batches=1)
  got = dict(captions.Evaluator(task, _Data(), jax.jit, **fields).run(_scale(1.0)))
  ((numbers, count),) = task.asked
  assert len(set(numbers)) == 5 and count == 3
  assert got["exact"] == np.mean(["two birds" in _references(i) for i in numbers])
  assert got["caption_loss"] == 0 and got["text_loss"] == pytest.approx(6 / 8)


@pytest.mark.parametrize(
  ("condition", "fields", "message"),
  [
    ("class", {}, "config.evals.x: data.condition='class' trains no captions"),
    ("both", dict(max_batches=-1), "config.evals.x: max_batches=-1 must not be negative"),
    ("both", dict(max_media=-2), "max_media=-2 must not be negative"),
    ("both", dict(max_tokens=-3), "max_tokens=-3 must not be negative"),
  ],
)
def test_bad_fields(condition, fields, message):
  section = dict(type="captions", every_steps=1) | _FIELDS | fields
  with pytest.raises(ValueError, match=message):
    runner.build({"x": section}, _Task([]), _Data(condition), jax.jit)


def test_padding_of_sounds_is_not_captioned():
  with pytest.raises(ValueError, match="data.media has sounds of several, whose padding"):
    captions.Evaluator(_Task([]), _Data(equal_lengths=False), jax.jit)


def test_models_without_text_have_no_captions():
  with pytest.raises(ValueError, match="captions are of a model over latents with text"):
    captions.Evaluator(types.SimpleNamespace(model=None), _Data(), jax.jit)


def test_a_split_without_captions_is_an_error():
  task = _Task([])
  task.text_sums = lambda params, batch: (dict(text=params["scale"], caption=jnp.float32(0)),) * 2
  evaluator = captions.Evaluator(task, _Data(), jax.jit, **_FIELDS)
  with pytest.raises(ValueError, match="Split 'train' has no caption"):
    dict(evaluator.run(_scale(1.0)))
