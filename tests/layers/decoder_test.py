"""The decoder: what composes, what is refused, and what may change without changing a value."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct

from latentlab.layers import (
  AttentionConfig,
  BlockConfig,
  Cache,
  Decoder,
  DecoderConfig,
  FeedForwardConfig,
  HeadNorm,
  PositionConfig,
  RetentionConfig,
  Stage,
)

ATTENTION = AttentionConfig(num_heads=4, head_dim=8, num_kv_heads=2)
RETENTION = RetentionConfig(num_heads=2, head_dim=8, value_head_dim=16)


def _block(mixer, feed_forward="swiglu", norm="rms"):
  return BlockConfig(mixer, FeedForwardConfig(24, feed_forward), norm)


MIXED = DecoderConfig(
  embed_dim=16,
  stages=(Stage((_block(RETENTION), _block(ATTENTION, "gelu", "layer")), 2),),
  unroll=1,
)
TWO_STAGES = dataclasses.replace(
  MIXED, stages=(*MIXED.stages, Stage((_block(ATTENTION, "geglu"),), 3))
)


def _init(config, key, shape=(2, 7, 16)):
  x = jax.random.normal(key, shape)
  variables = jax.jit(Decoder(config).init)(key, x)
  return nn.unbox(variables)["params"], nn.get_partition_spec(variables)["params"], x


def _grads(config, params, x):
  loss = lambda p: jnp.sum(Decoder(config).apply({"params": p}, x)[0] ** 2)
  return jax.jit(jax.grad(loss))(params)


def test_stages_are_stacked_and_logically_partitioned(key):
  params, specs, _ = _init(TWO_STAGES, key)
  kernel = params["stage_0"]["block_1"]["mixer"]["k_proj"]["kernel"]
  assert kernel.shape == (2, 16, 2, 8)
  spec = specs["stage_0"]["block_1"]["mixer"]["k_proj"]["kernel"]
  assert tuple(spec) == ("layers", "embed", "kv_heads", "head_dim")
  assert params["stage_1"]["block_0"]["feed_forward"]["gate_proj"]["kernel"].shape == (3, 16, 24)
  # Every leaf has a name for each of its axes.
  jax.tree.map(lambda p, s: len(s) == p.ndim or pytest.fail(f"{s} for {p.shape}"), params, specs)
  # Repeats of a stage are not copies of one another.
  assert np.abs(kernel[0] - kernel[1]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(remat="full"), dict(remat="dots", unroll=None)], ids=str)
def test_execution_choices_change_no_value(key, change):
  params, _, x = _init(MIXED, key)
  other = dataclasses.replace(MIXED, **change)
  shapes = jax.eval_shape(Decoder(other).init, key, x)["params"]
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, nn.unbox(shapes))
  want, got = _grads(MIXED, params, x), _grads(other, params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_bfloat16_keeps_float32_parameters(key):
  config = dataclasses.replace(MIXED, dtype=jnp.bfloat16)
  params, _, x = _init(config, key)
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  got = jax.jit(Decoder(config).apply)({"params": params}, x)[0]
  want = jax.jit(Decoder(MIXED).apply)({"params": params}, x)[0]
  assert got.dtype == jnp.bfloat16
  # Seven layers of 8-bit mantissas.
  assert np.linalg.norm(got.astype(np.float32) - want) < 0.05 * np.linalg.norm(want)


def test_dropout_needs_a_key_and_changes_with_it(key):
  config = dataclasses.replace(MIXED, dropout_rate=0.5)
  params, _, x = _init(config, key)
  run = jax.jit(
    lambda seed: Decoder(config).apply(
      {"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )[0]
  )
  assert np.abs(run(0) - run(1)).max() > 0.1
  np.testing.assert_array_equal(run(0), run(0))
  still, without = (jax.jit(Decoder(c).apply)({"params": params}, x)[0] for c in (config, MIXED))
  np.testing.assert_allclose(still, without, rtol=1e-6)


@pytest.mark.parametrize("positions", ["alibi", "xpos"])
def test_pairs_without_meaning_are_refused(positions):
  with pytest.raises(ValueError, match=f"'retention' with positions '{positions}'"):
    _block(dataclasses.replace(RETENTION, positions=PositionConfig(positions)))
  _block(dataclasses.replace(ATTENTION, positions=PositionConfig(positions)))


@pytest.mark.parametrize(
  "make, field",
  [
    (lambda: FeedForwardConfig(8, "tanh"), "feed_forward"),
    (lambda: _block(ATTENTION, norm="batch"), "norm"),
    (lambda: PositionConfig("t5"), "position"),
    (lambda: AttentionConfig(num_heads=3, head_dim=4, num_kv_heads=2), "num_kv_heads=2"),
    (lambda: dataclasses.replace(RETENTION, head_norm="batch"), "head_norm"),
    (lambda: dataclasses.replace(RETENTION, decay="learned"), "decay"),
    (lambda: dataclasses.replace(RETENTION, normalization="softmax"), "normalization"),
    (lambda: dataclasses.replace(MIXED, remat="some"), "remat"),
    (lambda: dataclasses.replace(MIXED, dropout_rate=1.0), "dropout_rate"),
    (lambda: dataclasses.replace(MIXED, init="zeros").initializers, "init"),
    (lambda: Stage((), 1), "stage"),
  ],
)
def test_bad_choices_name_their_field(make, field):
  with pytest.raises(ValueError, match=field):
    make()


def test_packed_documents_and_a_cache_do_not_mix(key):
  params, _, x = _init(MIXED, key)
  with pytest.raises(ValueError, match="one document a row"):
    Decoder(MIXED).apply(
      {"params": params}, x, None, jnp.zeros((2, 7), jnp.int32), MIXED.init_cache(2, 7)
    )


@struct.dataclass
class _Sum(Cache):
  total: jax.Array
  count: jax.Array


class _Mean(nn.Module):
  """Mixes tokens by the mean of all so far."""

  @nn.compact
  def __call__(self, x, context, cache=None):
    total, count = jnp.cumsum(x, axis=1), jnp.arange(1.0, x.shape[1] + 1)[:, None]
    if cache is not None:
      total, count = total + cache.total[:, None], count + cache.count[:, None, None]
      cache = _Sum(total[:, -1], cache.count + x.shape[1])
    return total / count, cache


@dataclasses.dataclass(frozen=True)
class _MeanConfig:
  kind: ClassVar[str] = "mean"
  positions: PositionConfig = PositionConfig("none")

  def module(self, shared, *, name):
    return _Mean(name=name)

  def init_cache(self, batch_size, max_length, dtype):
    return _Sum(jnp.zeros((batch_size, 16), dtype), jnp.zeros((batch_size,)))

  def flops_per_token(self, embed_dim, seq_length):
    return embed_dim


def test_a_mixer_from_outside_needs_no_change_in_here(key):
  config = dataclasses.replace(
    MIXED, stages=(Stage((_block(_MeanConfig()), _block(RETENTION)), 2),)
  )
  params, _, x = _init(config, key)
  run = jax.jit(lambda p, x, cache: Decoder(config).apply({"params": p}, x, cache=cache))
  want, _ = run(params, x, None)
  first, cache = run(params, x[:, :3], config.init_cache(2, 7))
  rest, _ = run(params, x[:, 3:], cache)
  np.testing.assert_allclose(jnp.concatenate([first, rest], 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["rms", "group"])
def test_head_norm_sees_one_head_of_one_token(key, kind):
  x = np.asarray(jax.random.normal(key, (2, 3, 2, 8)) * 3 + 1, np.float64)
  want = x - x.mean(-1, keepdims=True) if kind == "group" else x
  want = want / np.sqrt((want**2).mean(-1, keepdims=True))
  got = HeadNorm(kind, eps=0.0).apply({}, jnp.float32(x))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
