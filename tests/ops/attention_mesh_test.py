"""Attention along a sequence that eight simulated devices share equals that on one of them."""

import collections
import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from latentlab import ops

LAYERS, BATCH, LENGTH, HEADS, KEY_HEADS, SIZE = 3, 2, 24, 4, 2, 4
MAPS = {"flash": ((), ()), "diff": ((2,), (2,)), "diff_shared": ((2,), ())}  # Of queries, of keys.
DOCUMENTS = [[1] * 6 + [2] * 6 + [1] * 2 + [3] * 10, [0] * 24]  # One begins with a device's tokens.


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 2, 2), ("data", "tensor", "seq"), axis_types=(AxisType.Auto,) * 3)


def _inputs(op):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q_maps, k_maps = MAPS[op]
  args = dict(
    q=draw(LAYERS, BATCH, LENGTH, HEADS, *q_maps, SIZE),
    k=draw(BATCH, LENGTH, KEY_HEADS, *k_maps, SIZE),
    v=draw(BATCH, LENGTH, KEY_HEADS, SIZE * len(q_maps + (1,))),
  )
  if op != "flash":
    args |= dict(lam=draw(LAYERS, BATCH, LENGTH, HEADS), gain=1 + 0.1 * draw(args["v"].shape[-1]))
  return args


def _layers(op, spec=None, *, gather=False, scan=True, segment_ids=None, **options):
  """Layers whose queries hold the outputs before, all over the same keys; loss and outputs."""
  attention = ops.flash_attention if op == "flash" else ops.diff_attention

  def loss(args):
    args, kv_ids = dict(args), segment_ids
    k, v, gain = args.pop("k"), args.pop("v"), args.pop("gain", None)
    if gather:
      k, v, kv_ids = ops.gather_sequence(k, v, segment_ids, spec=spec)

    def layer(x, rows):
      q, extra = rows.pop("q"), rows
      if op != "flash":
        extra |= dict(gain=gain, eps=1e-5, post_scale=0.8)
      ids = dict(segment_ids=segment_ids, kv_segment_ids=kv_ids)
      return x + attention(q + x.reshape(q.shape), k, v, **extra, **ids, spec=spec, **options), None

    x = jnp.zeros((BATCH, LENGTH, HEADS, v.shape[-1]))
    if scan:
      x, _ = jax.lax.scan(layer, x, args)
    else:
      for i in range(LAYERS):
        x, _ = layer(x, {name: rows[i] for name, rows in args.items()})
    return jnp.sum(jnp.sin(x)), x

  return loss


def _run(*args, **options):
  return jax.jit(jax.value_and_grad(_layers(*args, **options), has_aux=True))


def _rows(padded):
  if not padded:
    return {}
  return dict(lengths=jnp.array([23, 10]), segment_ids=jnp.array(DOCUMENTS))


@functools.cache
def _one_device(op, padded, window):
  return _run(op, **_rows(padded), window=window)(_inputs(op))


def _assert_same(got, want):
  for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    name, largest = jax.tree_util.keystr(path), np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, largest), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
  "op,spec,padded,window",
  [
    ("flash", P("data", "seq", "tensor"), True, None),
    ("flash", P("data", None, "tensor"), True, None),  # The sequence is whole: one copy.
    ("flash", P(None, ("data", "tensor", "seq")), False, 7),
    ("diff", P("data", "seq", "tensor"), True, None),
    ("diff", P(None, "seq", ("data", "tensor")), False, None),  # More devices than key heads.
    ("diff_shared", P(None, ("data", "seq"), "tensor"), True, 7),
  ],
  ids=str,
)
def test_yoco_09_layers_over_keys_gathered_once(mesh, op, spec, padded, window):
  """Outputs, and gradients of queries, of what all layers share, of lambda and of the gain."""
  want = _one_device(op, padded, window)
  with jax.set_mesh(mesh):
    got = _run(op, spec, gather=True, **_rows(padded), window=window)(_inputs(op))
  _assert_same(got, want)


@pytest.mark.parametrize(
  "op,spec,padded,window",
  [
    ("flash", P("data", "seq", "tensor"), True, 7),
    ("flash", P("data", "seq", "tensor"), False, 1),  # No key but a query's own.
    ("flash", P(None, ("data", "tensor", "seq")), True, 7),  # From the two devices before.
    ("flash", P(None, ("data", "tensor", "seq")), False, 22),  # From all the devices before.
    ("flash", P(None, "seq", ("data", "tensor")), False, 14),  # More than these have: gathered.
    ("diff", P("data", "seq", "tensor"), True, 7),
    ("diff_shared", P(None, ("data", "seq"), "tensor"), False, 7),
  ],
  ids=str,
)
def test_yoco_09_windows_over_devices(mesh, op, spec, padded, window):
  want = _one_device(op, padded, window)
  with jax.set_mesh(mesh):
    got = _run(op, spec, **_rows(padded), window=window)(_inputs(op))
  _assert_same(got, want)


def _collectives(text, least=BATCH * LENGTH * KEY_HEADS * SIZE // 8):
  """A compiled program's, by kind: of arrays with as many numbers as the keys of one device."""
  kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
  counts = collections.Counter()
  for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
    sizes = [math.prod(map(int, x.split(","))) for x in re.findall(r"\w\[([\d,]+)\]", shapes)]
    counts[kind] += max(sizes, default=1) >= least
  return +counts  # Those that are not zero.


def _lowered(mesh, op, spec, *, backward, **options):
  """The layers' program over arrays that lie as they are computed with."""
  layout = lambda *dims: jax.NamedSharding(mesh, P(*dims))
  layouts = dict(q=layout(None, *spec), k=layout(*spec), v=layout(*spec))
  layouts |= dict(lam=layout(None, *spec), gain=layout())
  args = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layouts[name])
    for name, x in _inputs(op).items()
  }
  loss = _layers(op, spec, **options)
  grad = jax.grad(lambda args: loss(args)[0])
  keep = {name: layouts[name] for name in args}
  step = jax.jit(grad, out_shardings=keep) if backward else jax.jit(lambda args: loss(args)[1])
  return step.lower(args)


@pytest.mark.parametrize("op", MAPS)
@pytest.mark.parametrize("scan", [False, True], ids=["written out", "scanned"])
def test_yoco_09_one_gather_and_one_scatter(mesh, op, scan):
  spec = P("data", "seq", "tensor")
  with jax.set_mesh(mesh):
    forward = _lowered(mesh, op, spec, backward=False, gather=True, scan=scan)
    backward = _lowered(mesh, op, spec, backward=True, gather=True, scan=scan)
    assert _collectives(forward.compile().as_text()) == {"all-gather": 1}
    assert _collectives(backward.compile().as_text()) == {"all-gather": 1, "reduce-scatter": 1}
  texts = forward.as_text(), backward.as_text()
  assert [x.count("stablehlo.all_gather") for x in texts] == [1, 1]
  assert [x.count("stablehlo.reduce_scatter") for x in texts] == [0, 1]


def test_layers_that_gather_for_themselves(mesh):
  """What the counts above are held against: they do see a collective of a layer."""
  spec = P("data", "seq", "tensor")
  with jax.set_mesh(mesh):
    text = _lowered(mesh, "flash", spec, backward=True, scan=False).as_text()
  count = [text.count(f"stablehlo.{x}") for x in ("all_gather", "reduce_scatter")]
  assert count == [2 * LAYERS] * 2


@pytest.mark.parametrize(
  "op,spec,sizes",
  [
    ("flash", P("data", "seq", "tensor"), {6}),  # Of the 12 keys of a device.
    ("flash", P(None, ("data", "tensor", "seq")), {2, 3}),  # Of 3: those of one device and more.
    ("diff", P("data", "seq", "tensor"), {6}),
  ],
  ids=str,
)
def test_yoco_09_windows_are_passed_on(mesh, op, spec, sizes):
  window = sum(sizes) + 1
  with jax.set_mesh(mesh):
    program = functools.partial(_lowered, mesh, op, spec, scan=False, window=window)
    texts = [program(backward=x).compile().as_text() for x in (False, True)]
  for text in texts:
    assert "all-gather" not in text and "reduce-scatter" not in text
    assert set(_collectives(text)) == {"collective-permute"}
    passed = re.findall(r"= f32\[\d+,(\d+),[\d,]+\]\S* collective-permute\(", text)
    assert {int(x) for x in passed} == sizes


@pytest.mark.parametrize("gather,kv_length", [(True, 32), (False, 32), (False, 29)])
def test_keys_before_the_queries(mesh, gather, kv_length):
  """Lengths apart, which of keys need not divide over devices when a call gathers them."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  args = draw(2, 24, 4, 4), draw(2, kv_length, 2, 4), draw(2, kv_length, 2, 4)
  ids = jnp.asarray(np.arange(24)[None] // 9 * np.array([[1], [0]]), jnp.int32)
  kv_ids = jnp.pad(ids, ((0, 0), (kv_length - 24, 0)))

  def run(spec):
    def loss(q, k, v):
      ids_of_keys = kv_ids
      if gather:
        k, v, ids_of_keys = ops.gather_sequence(k, v, kv_ids, spec=spec)
      offset = jnp.array([kv_length - 24, 1])
      options = dict(segment_ids=ids, kv_segment_ids=ids_of_keys, q_offset=offset, window=9)
      out, lse = ops.flash_attention(q, k, v, return_lse=True, spec=spec, **options)
      return jnp.sum(jnp.sin(out)), (out, lse)

    return jax.jit(jax.value_and_grad(loss, range(3), has_aux=True))(*args)

  want = run(None)
  with jax.set_mesh(mesh):
    _assert_same(run(P("data", "seq", "tensor")), want)


@pytest.mark.parametrize("window", [None, 129])
def test_tpu_kernels_on_keys_of_other_devices(tpu_mesh, window):
  """The real compiler's program: keys gathered once, or 128 of them passed on by every layer."""
  mesh, spec = tpu_mesh("v5e:2x2", seq=2, tensor=2), P(None, "seq", "tensor")
  with jax.set_mesh(mesh):
    part = jax.NamedSharding(mesh, spec)
    shapes = [(1, 512, 4, 2, 64), (1, 512, 2, 2, 64), (1, 512, 2, 128)]
    args = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=part) for x in shapes]
    options = dict(window=window, spec=spec, implementation="pallas_tpu")

    def loss(q, k, v):
      if window is None:
        k, v, _ = ops.gather_sequence(k, v, spec=spec)
      for _ in range(2):
        out = ops.diff_attention(q, k, v, jnp.float32(0.5), **options)
        q += out.reshape(q.shape)
      return jnp.sum(q.astype(jnp.float32))

    step = jax.jit(jax.grad(loss, range(3)), out_shardings=(part,) * 3)
    text = step.lower(*args).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') >= 4  # Forward and backward.
  found = _collectives(text, least=64 * 128)
  if window is None:
    assert found == {"all-gather": 1, "reduce-scatter": 1}
  else:
    assert set(found) == {"collective-permute"}


def test_rejects_keys_of_another_layout(mesh):
  args = _inputs("flash")
  q, k, v = args["q"][0], args["k"], args["v"]
  spec = P("data", "seq", "tensor")
  flash = inspect.unwrap(ops.flash_attention)
  gathered = ops.gather_sequence(k, v, spec=None)
  with jax.set_mesh(mesh):
    with pytest.raises(ValueError, match=r"k has 1 copies, and its sequence 2 devices"):
      flash(q, *gathered[:2], spec=spec)
    with pytest.raises(ValueError, match=r"k and v both"):
      flash(q, gathered[0], v, spec=spec)
    with pytest.raises(ValueError, match=r"T=23 .*seq"):
      ops.gather_sequence(k[:, 1:], v[:, 1:], spec=spec)
