"""Shares of attention against a count, token by token, over maps that are given."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import data as data_lib
from latentlab import eval as eval_lib
from latentlab import ops
from latentlab.data.synthetic import MultiNeedle
from latentlab.eval import attention_mass
from latentlab.models import LanguageModel, build_config

LENGTH, SAMPLES, DEPTHS = 40, 3, (0.0, 0.8)
SIZES = dict(num_layers=2, embed_dim=16, num_heads=2)


def _model(name, **fields):
  return LanguageModel(build_config(SIZES | dict(name=name) | fields, 258))


class Given(nn.Module):
  """Hands out signed maps that hang on the tokens: two layers in a stack, and one of more heads."""

  config = _model("transformer").config

  def hidden(self, tokens):
    for name, shape in (("stack", (2, 3)), ("single", (5,))):
      weights = jnp.stack([_weights(i, tokens) for i in range(np.prod(shape))], axis=1)
      if len(shape) == 2:
        weights = weights.reshape(len(tokens), *shape, LENGTH, LENGTH).swapaxes(0, 1)
      visible = jnp.ones_like(weights[..., :1, :, :], bool)
      self.sow("maps", name, ops.AttentionMaps(weights, weights, visible))
    return tokens, None


def _weights(head, tokens):
  """A row of the map for each token; the answer and the tokens behind the hay get their share."""
  salt = jnp.sin(1.3 * head + tokens[:, None, :] + 0.1 * jnp.arange(LENGTH)[:, None])
  digits = (tokens >= ord("0")) & (tokens <= ord("9"))
  return 0.6 * salt + 0.01 * jnp.arange(LENGTH) + 0.3 + digits[:, None, :] * head


def _data(batch_size=4, **options):
  options |= dict(num_needles=3, num_queries=2)
  section = dict(source="synthetic", task="multi_needle", task_options=options, seq_length=LENGTH)
  return data_lib.build(section, batch_size)


def _parts(symbols):
  """Places of a row's parts, with `<bos>` at 0, read from its text."""
  text = " " + "".join(map(chr, symbols))  # The last digit is predicted, and not read.
  query = text.index("?")
  needle = text.index("#" + text[query + 1 : query + 3])
  parts = dict(
    bos=[0],
    needle=list(range(needle, needle + 3)),
    answer=list(range(needle + 3, needle + 5)),
    query=list(range(query, LENGTH)),
  )
  taken = sum(parts.values(), [])
  return parts | dict(noise=[i for i in range(LENGTH) if i not in taken])


def test_matches_a_count_of_given_maps():
  data = _data()
  options = dict(num_samples=SAMPLES, depths=DEPTHS, seed=2)
  task = types.SimpleNamespace(model=Given())
  got = dict(attention_mass.Evaluator(task, data, jax.jit, **options).run({}))
  makes = MultiNeedle(num_needles=3, num_queries=1)
  sums = {}  # way, part, depth, head
  for depth in DEPTHS:
    for i in range(SAMPLES):
      symbols = makes.haystack(np.random.default_rng((2, i)), LENGTH, depth).symbols
      tokens = jnp.asarray([[256, *symbols[:-1]]])
      maps = [_weights(i, tokens) for i in range(6)] + [_weights(i, tokens) for i in range(5)]
      for head, weights in enumerate(maps):
        for query in (LENGTH - 2, LENGTH - 1):  # Their targets are the two digits.
          row = np.asarray(weights[0, query], np.float64)
          for part, places in _parts(symbols).items():
            for way, x in (("signed", row), ("absolute", np.abs(row))):
              key = (way, part, depth, head)
              sums[key] = sums.get(key, 0) + x[places].sum()
  share = lambda way, part, depths: np.mean(
    [
      sum(sums[way, part, d, head] for d in depths)
      / sum(sums[way, p, d, head] for p in attention_mass.PARTS for d in depths)
      for head in range(11)
    ]
  )
  want = {}
  for way in ("signed", "absolute"):
    for part in attention_mass.PARTS:
      want[f"{part}_{way}"] = share(way, part, DEPTHS)
    for part in ("answer", "noise"):
      for depth in DEPTHS:
        want[f"{part}_{way}_depth_{round(100 * depth)}"] = share(way, part, [depth])
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name] == pytest.approx(value, rel=1e-4), name
  assert abs(got["noise_signed"] - got["noise_absolute"]) > 1e-3
  assert abs(got["answer_signed_depth_0"] - got["answer_signed_depth_80"]) > 1e-3


@pytest.mark.parametrize("name", ["transformer", "diff_transformer"])
def test_of_models(name):
  """Shares are whole; a softmax' are the same both ways, those of a difference are not."""
  # A lambda so large that some weights are negative, whatever the draw.
  model = _model(name, **dict(lambda_init=0.9) if name == "diff_transformer" else {})
  params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
  params = jax.tree.map(lambda x: 9 * x if x.ndim > 2 else x, params)
  task = types.SimpleNamespace(model=model)
  options = dict(num_samples=SAMPLES, depths=(0.5,))
  got = dict(attention_mass.Evaluator(task, _data(8), jax.jit, **options).run(params))
  for way in ("signed", "absolute"):
    shares = [got[f"{part}_{way}"] for part in attention_mass.PARTS]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert got[f"noise_{way}"] == pytest.approx(got[f"noise_{way}_depth_50"])
  apart = max(abs(got[f"{p}_signed"] - got[f"{p}_absolute"]) for p in attention_mass.PARTS)
  assert apart < 1e-5 if name == "transformer" else apart > 1e-3


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_samples=0), "num_samples=0"),
    (dict(depths=(2,)), r"depths=\(2,\)"),
    (dict(seq_length=12), "seq_length=12 .* needs at least 20"),
    (dict(num_needles=700), "num_needles=700"),
  ],
  ids=str,
)
def test_bad_fields(fields, message):
  section = dict(type="attention_mass", every_steps=1) | fields
  task = types.SimpleNamespace(model=Given())
  with pytest.raises(ValueError, match=message):
    eval_lib.build({"x": section}, task, _data(), jax.jit)


def test_a_model_without_softmax_is_refused():
  task = types.SimpleNamespace(model=_model("retnet"))
  with pytest.raises(
    ValueError, match=re.escape("attention_mass needs softmax attention; this model has ['ret")
  ):
    attention_mass.Evaluator(task, _data(), jax.jit)
