"""Differential attention under a mesh of eight simulated devices equals that without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from latentlab import ops


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2, 2, 2), ("data", "tensor", "seq"), axis_types=(AxisType.Auto,) * 3)


def _inputs(lam="head", shared=False):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  maps = () if shared else (2,)
  lam_shape = {"scalar": (), "head": (4,), "token": (2, 24, 4)}[lam]
  q, k, v = draw(2, 24, 4, 2, 5), draw(2, 24, 2, *maps, 5), draw(2, 24, 2, 6)
  return q, k, v, draw(*lam_shape), 1 + 0.1 * draw(6)


def _outputs_and_gradients(spec, **options):
  def loss(q, k, v, lam, gain):
    out, lse = ops.diff_attention(
      *(q, k, v, lam), gain=gain, eps=1e-5, post_scale=0.8, return_lse=True, spec=spec, **options
    )
    seen = jnp.where(lse == -jnp.inf, 0, lse)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(seen)), (out, lse)

  return jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))


@functools.cache
def _unsharded(lam, padded, window):
  args, options = _inputs(lam, shared=padded), {}
  if padded:
    options["lengths"] = jnp.array([23, 10])
    options["segment_ids"] = jnp.array([[1] * 6 + [2] * 6 + [1] * 2 + [3] * 10, [0] * 24])
  if window:
    options["window"] = 7
  return args, options, _outputs_and_gradients(None, **options)(*args)


@pytest.mark.parametrize(
  "spec,lam,padded,window",
  [
    (P("data", None, "tensor"), "head", True, False),
    (P("data", None, "tensor"), "scalar", False, True),
    (P("data", "seq", "tensor"), "token", True, False),
    (P("data", "seq", "tensor"), "scalar", False, True),
    (P(None, ("data", "tensor", "seq")), "head", True, True),
    # Four devices, which the two key heads are repeated for.
    (P(None, "seq", ("data", "tensor")), "token", True, False),
    (P(None, None, ("data", "tensor")), "head", False, True),
  ],
  ids=str,
)
def test_diff_09_sharded_equals_unsharded(mesh, spec, lam, padded, window):
  """Outputs, and the gradients of lambda and of the gain, to which every device adds."""
  args, options, want = _unsharded(lam, padded, window)
  with jax.set_mesh(mesh):
    got = _outputs_and_gradients(spec, **options)(*args)
  names = (("loss", ("out", "lse")), ("dq", "dk", "dv", "dlam", "dgain"))
  for name, a, b in zip(
    jax.tree.leaves(names), jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    largest = np.abs(np.asarray(b)[np.isfinite(b)]).max()  # A row without keys has lse -inf.
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, largest), err_msg=name)


def test_batch_and_heads_are_not_gathered(mesh):
  spec = P("data", None, "tensor")
  with jax.set_mesh(mesh):
    specs = (spec, spec, spec, P("tensor"), P())
    shard = lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s))
    args = [shard(x, s) for x, s in zip(_inputs(), specs, strict=True)]
    compiled = _outputs_and_gradients(spec).lower(*args).compile()
    (_, (out, _)), _ = compiled(*args)
  assert out.sharding.spec == spec
  assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
  assert "all-reduce" in compiled.as_text()  # Of the loss: the text does name collectives.


def test_queries_stay_where_keys_are_gathered(mesh):
  spec = P(None, ("data", "tensor", "seq"))
  with jax.set_mesh(mesh):
    args = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in _inputs("token")[:3]]
    op = jax.jit(lambda *a: ops.diff_attention(*a, jnp.float32(0.4), causal=False, spec=spec))
    compiled = op.lower(*args).compile()
  shapes = [line.split()[2] for line in compiled.as_text().splitlines() if " all-gather(" in line]
  assert len(shapes) == 2 and all(",2,4," not in x and "24" in x for x in shapes)
  assert compiled(*args).sharding.spec[1] == spec[1]


@pytest.mark.parametrize("heads", ["tensor", ("data", "tensor")])
def test_decoding_over_batch_and_heads(mesh, heads):
  q, k, v, lam, gain = _inputs()
  op = lambda spec: jax.jit(
    functools.partial(ops.diff_attention_decode, eps=1e-5, window=9, spec=spec)
  )
  arrays = dict(lengths=jnp.array([20, 3]), gain=gain)
  want = op(None)(q[:, 0], k, v, lam, **arrays)
  with jax.set_mesh(mesh):
    spec = P("data" if heads == "tensor" else None, None, heads)
    got = op(spec)(q[:, 0], k, v, lam, **arrays)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_tpu_kernels_run_on_parts(tpu_mesh):
  mesh, spec = tpu_mesh("v5e:2x2", data=2, tensor=2), P("data", None, "tensor")
  with jax.set_mesh(mesh):
    shapes = [(2, 256, 4, 2, 64), (2, 256, 2, 2, 64), (2, 256, 2, 128), (4,)]
    specs = (spec, spec, spec, P("tensor"))
    args = [
      jax.ShapeDtypeStruct(x, jnp.float32, sharding=jax.NamedSharding(mesh, s))
      for x, s in zip(shapes, specs, strict=True)
    ]
    op = functools.partial(ops.diff_attention, spec=spec, implementation="pallas_tpu")
    step = jax.grad(lambda *a: jnp.sum(op(*a)), range(4))
    text = jax.jit(step).lower(*args).compile().as_text()
  assert "diff_attention_fwd" in text and "diff_attention_bwd" in text
  assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize(
  "spec,match",
  [
    (P(None, None, ("data", "tensor", "seq")), r"N=4 .*tensor"),
    (P(("data", "seq")), r"B=2 .*seq"),
    (P(None, None, None, "data"), r"stays whole"),
  ],
  ids=str,
)
def test_rejects_layouts_that_do_not_fit(mesh, spec, match):
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=match):
    ops.diff_attention(*_inputs()[:4], spec=spec)
