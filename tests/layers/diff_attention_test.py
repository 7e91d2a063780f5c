"""The Differential Transformer's layer: its definition, its lambda, its forms, and its cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from latentlab import ops
from latentlab.layers import (
  AttentionConfig,
  BlockConfig,
  Context,
  Decoder,
  DecoderConfig,
  DiffAttentionConfig,
  FeedForwardConfig,
  PositionConfig,
  Shared,
  Stage,
  lambda_schedule,
)

WIDTH, LENGTH = 16, 11
V1 = DiffAttentionConfig(num_heads=4, head_dim=6, num_kv_heads=2)
V2 = DiffAttentionConfig(
  num_heads=4,
  head_dim=6,
  num_kv_heads=2,
  value_head_dim=6,
  lambda_mode="token",
  key_pairing="shared",
  head_norm=False,
)
VARIANTS = {
  "v1": V1,
  "v2": V2,
  "multi_query": dataclasses.replace(V1, num_kv_heads=1),
  "groups_of_three": dataclasses.replace(V1, num_heads=6),
  "shared_keys": dataclasses.replace(V1, key_pairing="shared"),
  "halves": dataclasses.replace(V1, head_layout="halves"),
  "constant": dataclasses.replace(V1, lambda_mode="constant", lambda_init=0.5),
  "no_norm": dataclasses.replace(V1, head_norm=False),
  "half_rotation": dataclasses.replace(V1, positions=PositionConfig("rope", layout="half")),
  "window": dataclasses.replace(V1, mask=ops.Mask("sliding_window", 3)),
}


def _decoder(mixer, **fields):
  block = BlockConfig(mixer, FeedForwardConfig(24, "swiglu"))
  return DecoderConfig(
    embed_dim=WIDTH, stages=(Stage((block,), 2),), init="fan_in", unroll=1, **fields
  )


def _init(config, batch=2, length=LENGTH):
  x = jax.random.normal(jax.random.key(3), (batch, length, WIDTH))
  shapes = nn.unbox(jax.eval_shape(Decoder(config).init, jax.random.key(4), x))["params"]
  # Scales and lambdas of their own; attention that prefers some keys.
  rng = np.random.default_rng(5)
  draw = lambda path, p: rng.normal(float("scale" in jax.tree_util.keystr(path)), 0.3, p.shape)
  params = jax.tree.map_with_path(lambda *a: jnp.asarray(draw(*a), jnp.float32), shapes)
  return params, x


def _written_out(c, params, x, depth):
  """Section 2's equations for one layer, head by head, in float64."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  x, n = np.asarray(x, np.float64), c.num_heads
  batch, length, _ = x.shape
  project = lambda name: np.tensordot(x, params[name]["kernel"], 1)
  q, k, v = (project(f"{name}_proj") for name in "qkv")
  if c.head_layout == "halves":
    q, k, v = (np.stack([a[:, :, 0], a[:, :, 1]], axis=3) for a in (q, k, v))
    v = v.reshape(batch, length, c.kv_heads, -1)
  if c.key_pairing == "shared":
    k = np.stack([k, k], axis=3)

  def turn(a):  # Of pairs, by angles n base^(-2i/d).
    half, angles = c.head_dim // 2, np.zeros((length, c.head_dim // 2))
    for i in range(half):
      angles[:, i] = np.arange(length) * 10_000.0 ** (-2 * i / c.head_dim)
    cos, sin = (f(angles)[None, :, None, None] for f in (np.cos, np.sin))
    if c.positions.layout == "half":
      one, two = a[..., :half], a[..., half:]
      return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    one, two = a[..., ::2], a[..., 1::2]
    return np.stack([one * cos - two * sin, two * cos + one * sin], axis=-1).reshape(a.shape)

  q, k = turn(q), turn(k)
  lambda_init = 0.8 - 0.6 * np.exp(-0.3 * depth) if c.lambda_init is None else c.lambda_init
  if c.lambda_mode == "token":
    lam = 1 / (1 + np.exp(-project("lambda_proj")))
  elif c.lambda_mode == "constant":
    lam = np.full((batch, length, n), lambda_init)
  else:
    dot = lambda i: np.exp(params[f"lambda_q{i}"] @ params[f"lambda_k{i}"])
    lam = np.full((batch, length, n), dot(1) - dot(2) + lambda_init)
  reach = c.mask.size or length
  out = np.zeros((batch, length, n, c.value_dim))
  for b in range(batch):
    for head in range(n):
      group = head // (n // c.kv_heads)
      for t in range(length):
        keys = slice(max(0, t - reach + 1), t + 1)
        maps = []
        for m in (0, 1):
          scores = k[b, keys, group, m] @ q[b, t, head, m] / np.sqrt(c.head_dim)
          weights = np.exp(scores - scores.max())
          maps.append(weights / weights.sum())
        out[b, t, head] = (maps[0] - lam[b, t, head] * maps[1]) @ v[b, keys, group]
  if c.head_norm:
    out /= np.sqrt((out**2).mean(-1, keepdims=True) + c.head_norm_eps)
    out *= params["head_norm"]["scale"] * (1 - lambda_init)
  return np.tensordot(out, params["out_proj"]["kernel"], 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_is_its_definition(variant):
  config = _decoder(VARIANTS[variant])
  params, x = _init(config)
  layers = params["stage_0"]["block_0"]
  mixer = VARIANTS[variant]
  shared = Shared(WIDTH, jnp.float32, config.initializers)
  module, positions = mixer.module(shared, name="mixer"), jnp.arange(LENGTH)[None]

  @jax.jit
  def run(params, x, depth):  # As a scan over layers has it.
    return module.apply({"params": params}, x, Context(positions, layer=depth, in_place=True))[0]

  for depth in (0, 1):
    own = jax.tree.map(lambda p, depth=depth: p[depth], layers["mixer"])
    want = _written_out(mixer, own, x, depth)
    np.testing.assert_allclose(run(own, x, depth), want, rtol=2e-4, atol=2e-4)


def test_diff_02_pairs_of_the_second_version_are_neighbours():
  """A layout by halves would give other outputs."""
  params, x = _init(_decoder(V2))
  own = jax.tree.map(lambda p: p[0], params["stage_0"]["block_0"]["mixer"])
  kernel = own["q_proj"]["kernel"]  # D N 2 H
  halves = kernel.reshape(WIDTH, 2, 4, 6).swapaxes(1, 2)
  right, wrong = (
    _written_out(V2, own | dict(q_proj=dict(kernel=k)), x, 0) for k in (kernel, halves)
  )
  assert np.abs(right - wrong).max() > 0.05


FORMS = ("xla", "two_call", "four_call")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1", "v2", "window"])
def test_forms_and_routes_agree_in_outputs_and_all_gradients(variant):
  """The op's implementations; positions given, which takes attention's road; and the maps."""
  base = _decoder(VARIANTS[variant])
  params, x = _init(base)
  weight = jax.random.normal(jax.random.key(8), x.shape)
  positions = jnp.broadcast_to(jnp.arange(LENGTH), x.shape[:2])

  def outputs(form, positions=None, **options):
    mixer = dataclasses.replace(VARIANTS[variant], implementation=form)

    def loss(params, x):
      out = Decoder(_decoder(mixer)).apply({"params": params}, x, positions, **options)
      out = out[0][0] if options else out[0]
      return jnp.sum(out * weight), out

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return out, grads

  want = outputs("naive")
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(want[1]))
  # Forms see a mask in the op's own tests.
  others = [outputs(form) for form in (FORMS[:1] if variant == "window" else FORMS)]
  others += [outputs("xla", positions), outputs("xla", mutable=["maps"])]
  for got in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * np.abs(b).max() + 1e-6),
      got,
      want,
    )


def test_diff_03_lambda_at_the_start():
  """The schedule of section 2.1, and a spread of about sqrt(2 d) std^2 around it."""
  table = [0.2, 0.3555, 0.4707, 0.5561, 0.6193, 0.6661, 0.7008, 0.7265, 0.7456, 0.7597, 0.7701]
  np.testing.assert_allclose([lambda_schedule(i) for i in range(11)], table, atol=6e-5)
  assert abs(lambda_schedule(27) - 0.7998) < 5e-5
  for head_dim, std in ((128, 0.16), (64, 0.11)):
    q1, k1, q2, k2 = 0.1 * jax.random.normal(jax.random.key(0), (4, 4000, head_dim))
    lam = jnp.exp((q1 * k1).sum(-1)) - jnp.exp((q2 * k2).sum(-1))
    np.testing.assert_allclose(lam.std(), std, rtol=0.08)


def test_diff_03_rows_of_the_difference_sum_to_one_minus_lambda():
  params, x = _init(_decoder(V1))
  _, sown = jax.jit(lambda p, x: Decoder(_decoder(V1)).apply({"params": p}, x, mutable=["maps"]))(
    params, x
  )
  (maps,) = sown["maps"]["stage_0"]["block_0"]["mixer"]["maps"]
  own = params["stage_0"]["block_0"]["mixer"]
  dot = lambda i: jnp.exp((own[f"lambda_q{i}"] * own[f"lambda_k{i}"]).sum(-1))
  lam = dot(1) - dot(2) + jnp.stack([lambda_schedule(0), lambda_schedule(1)])
  rows = maps.weights.sum(-1)  # L B N T
  np.testing.assert_allclose(
    rows, jnp.broadcast_to((1 - lam)[:, None, None, None], rows.shape), atol=1e-5
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lam", [0.999999, 1.7])
def test_diff_09_extreme_logits_and_lambdas_have_finite_gradients(dtype, lam):
  mixer = dataclasses.replace(V1, lambda_mode="constant", lambda_init=lam)
  config = _decoder(mixer, dtype=jnp.dtype(dtype))
  params, x = _init(config)
  own = params["stage_0"]["block_0"]["mixer"]
  for name in ("q_proj", "k_proj"):
    own[name]["kernel"] = own[name]["kernel"] * 100.0  # Scores of about +-1e4.
  loss = lambda p, x: jnp.sum(Decoder(config).apply({"params": p}, x)[0].astype(jnp.float32) ** 2)
  grads = jax.jit(jax.grad(loss, (0, 1)))(params, x)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["v1", "v2", "groups_of_three", "window"])
def test_diff_07_pieces_of_any_size_are_one_pass(variant):
  """Prefill of ragged rows, then slices, then tokens; a window wraps around several times."""
  config = _decoder(VARIANTS[variant])
  params, x = _init(config, length=23)
  run = jax.jit(
    lambda x, cache=None, **k: Decoder(config).apply({"params": params}, x, cache=cache, **k)
  )
  want = run(x)[0]
  lengths = jnp.array([9, 5])
  out, cache = run(x[:, :9], config.init_cache(2, 23), lengths=lengths)
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(out[row, :n], want[row, :n], atol=2e-5)
  for size in (4, 1, 1, 4, 1, 1, 1):
    piece = jnp.stack([x[r, n : n + size] for r, n in enumerate(lengths)])
    out, cache = run(piece, cache)
    for row, n in enumerate(lengths):
      np.testing.assert_allclose(out[row], want[row, n : n + size], atol=5e-5)
    lengths = lengths + size


def test_diff_07_cache_bytes_are_a_transformers():
  """`4 d h_kv` numbers a token and layer, as of twice the key heads of size d."""
  cache = jax.eval_shape(lambda: V1.init_cache(3, 50, jnp.bfloat16))
  held = sum(a.size * a.dtype.itemsize for a in (cache.k, cache.v))
  assert held == 3 * 50 * 4 * V1.head_dim * V1.kv_heads * 2
  twin = AttentionConfig(num_heads=8, head_dim=6, num_kv_heads=4)
  twin = jax.eval_shape(lambda: twin.init_cache(3, 50, jnp.bfloat16))
  assert held == sum(a.size * a.dtype.itemsize for a in (twin.k, twin.v))


def test_diff_08_parameters_and_flops_are_a_transformers_and_a_little():
  own, twin = (
    nn.unbox(jax.eval_shape(Decoder(_decoder(m)).init, jax.random.key(0), jnp.zeros((1, 2, WIDTH))))
    for m in (V1, AttentionConfig(num_heads=8, head_dim=6, num_kv_heads=4))
  )
  count = lambda tree: sum(p.size for p in jax.tree.leaves(tree))
  assert count(own) - count(twin) == 2 * (4 * 6 + 2 * 6)
  # Two maps of d against values of 2d: 12 N^2 d to a pair of plain heads' 8, of which half is seen.
  mixing = lambda m, n: m.flops_per_token(0, n) / (n / 2)
  plain = AttentionConfig(num_heads=8, head_dim=6)
  assert mixing(dataclasses.replace(V1, num_kv_heads=4), 64) / mixing(plain, 64) == 12 / 8


@pytest.mark.parametrize("kind", ["xpos", "alibi", "rope", "none"])
def test_every_position_scheme_composes(kind):
  """At lambda zero the second maps are of no influence; and no token sees a later one."""
  mixer = dataclasses.replace(V1, positions=PositionConfig(kind), head_norm=False)
  mixer = dataclasses.replace(mixer, lambda_mode="constant", lambda_init=0.0)
  config = _decoder(mixer)
  params, x = _init(config)
  run = jax.jit(lambda p, x: Decoder(config).apply({"params": p}, x)[0])
  got = run(params, x)
  own = params["stage_0"]["block_0"]["mixer"]
  own["q_proj"]["kernel"] = own["q_proj"]["kernel"].at[:, :, :, 1].set(7.0)
  np.testing.assert_allclose(run(params, x), got, atol=2e-5)
  own["q_proj"]["kernel"] = own["q_proj"]["kernel"].at[:, :, :, 0].set(7.0)
  assert np.abs(run(params, x) - got).max() > 1e-2
  same = run(params, x.at[:, 7:].add(1.0))
  np.testing.assert_array_equal(same[:, :7], run(params, x)[:, :7])


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_diff_06_both_maps_see_distances_alone(layout):
  """All positions moved by as much change nothing; the same tokens at other distances do."""
  mixer = dataclasses.replace(V1, positions=PositionConfig("rope", layout=layout))
  config = _decoder(mixer)
  params, x = _init(config)

  @jax.jit
  def run(positions):
    (out, _), sown = Decoder(config).apply({"params": params}, x, positions, mutable=["maps"])
    maps = sown["maps"]["stage_0"]["block_0"]["mixer"]["maps"][0]
    return out, jnp.where(maps.visible, maps.logits, 0).swapaxes(0, 2)  # Heads of both maps first.

  positions = jnp.broadcast_to(jnp.arange(LENGTH), x.shape[:2])
  (want, logits), (moved, _), (_, stretched) = (
    run(p) for p in (positions, positions + 1000, 2 * positions)
  )
  np.testing.assert_allclose(moved, want, atol=2e-4)
  assert len(logits) == 2 * V1.num_heads
  assert (np.abs(logits - stretched).max((1, 2, 3, 4)) > 1e-2).all()


@pytest.mark.parametrize(
  "fields, message",
  [
    (dict(num_kv_heads=3), "num_kv_heads=3"),
    (dict(lambda_mode="learned"), "lambda_mode='learned'"),
    (dict(lambda_mode="token"), "head_norm=True"),
    (dict(key_pairing="none"), "key_pairing='none'"),
    (dict(head_layout="thirds"), "head_layout='thirds'"),
    (dict(head_layout="halves", value_head_dim=7), "value_head_dim=7"),
    (dict(shared_kv=True, mask=ops.Mask("sliding_window", 3)), "shared_kv"),
    (dict(logit_bits=1), "logit_bits=1"),
    (dict(lambda_std=-1.0), "lambda_std"),
    (dict(head_norm_eps=-1e-5), "head_norm_eps"),
  ],
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(V1, **fields)
