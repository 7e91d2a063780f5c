"""Retention under a mesh of eight simulated devices equals retention without; and decay rates."""

import functools
import inspect

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


def _inputs(per_token=False):
  rng = np.random.default_rng(0)
  batch, length, heads, kv_heads = 2, 24, 4, 2
  shapes = (
    (batch, length, heads, 5),
    (batch, length, kv_heads, 5),
    (batch, length, kv_heads, 7),
    (batch, heads, 5, 7),
  )
  q, k, v, state = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  log_decay = -rng.exponential(0.2, (batch, length, heads) if per_token else heads)
  log_decay[..., 1] = -np.inf if per_token else 0
  return q, k, v, jnp.asarray(log_decay, jnp.float32), state


def _outputs_and_grads(spec, **options):
  op = lambda *a: ops.retention(*a[:4], initial_state=a[4], chunk_size=4, spec=spec, **options)

  def loss(*args):
    out, state = op(*args)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(2 * state)), (out, state)

  return jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))


@functools.cache
def _unsharded(per_token, padded, packed):
  args = _inputs(per_token)
  options = {}
  if padded:
    options["lengths"] = jnp.array([23, 10])  # The second row ends before the last shard.
  if packed:  # A boundary on a shard's first token, an id that returns, a row of one document.
    options["segment_ids"] = jnp.array([[1] * 6 + [2] * 6 + [1] * 2 + [3] * 10, [0] * 24])
  return args, options, _outputs_and_grads(None, **options)(*args)


@pytest.mark.parametrize(
  "spec,per_token,padded,packed",
  [
    (P("data", None, "tensor"), False, True, True),
    (P("data", None, "tensor"), True, True, True),
    (P("data", "seq", "tensor"), False, False, False),
    (P("data", "seq", "tensor"), False, True, True),
    (P(None, "seq"), True, True, True),
    (P(None, "seq", ("data", "tensor")), False, True, True),  # More devices than key heads.
    (P(None, ("data", "tensor", "seq")), False, True, True),
    (P(None, ("data", "tensor", "seq")), True, False, False),
  ],
  ids=str,
)
def test_retnet_11_sharded_equals_unsharded(mesh, spec, per_token, padded, packed):
  args, options, want = _unsharded(per_token, padded, packed)
  with jax.set_mesh(mesh):
    got = _outputs_and_grads(spec, **options)(*args)
  names = (("loss", ("out", "state")), ("dq", "dk", "dv", "dlog_decay", "dstate"))
  for name, a, b in zip(
    jax.tree.leaves(names), jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()), err_msg=name)


def test_batch_and_heads_are_not_gathered(mesh):
  args = _inputs()
  with jax.set_mesh(mesh):
    spec = P("data", None, "tensor")
    specs = (P("data", None, "tensor"),) * 3 + (P("tensor"), P("data", "tensor"))
    args = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)]
    compiled = _outputs_and_grads(spec).lower(*args).compile()
    (_, (out, state)), _ = compiled(*args)
  assert out.sharding.spec == P("data", None, "tensor") and out.shape[1] == 24
  assert state.sharding.spec == P("data", "tensor")
  assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
  assert "all-reduce" in compiled.as_text()  # Of the loss: the text does name collectives.


def test_manual_axes_are_left_to_their_owner(mesh):
  q, k, v, log_decay, state = _inputs()
  want, _ = ops.retention(q, k, v, log_decay)
  spec = P("data", None, "tensor")
  op = lambda q, k, v, g: ops.retention(q, k, v, g, spec=spec)[0]
  got = jax.pmap(op, axis_name="data")(*(jnp.stack([x, x]) for x in (q, k, v, log_decay)))
  np.testing.assert_allclose(got[1], want, atol=1e-5)
  with jax.set_mesh(mesh):
    mapped = jax.shard_map(
      op, in_specs=(P("data"),) * 3 + (P(),), out_specs=P("data"), axis_names={"data"}
    )
    np.testing.assert_allclose(jax.jit(mapped)(q, k, v, log_decay), want, atol=1e-5)


@pytest.mark.parametrize(
  "spec,match",
  [
    (P(None, None, ("data", "tensor", "seq")), r"N=4 .*tensor"),
    (P(("data", "seq")), r"B=2 .*seq"),
    (P("model"), r"model"),
    (P(None, None, None, "data"), r"H stays whole"),
    (P(None, ("seq", "data")), r"mesh's order"),
  ],
  ids=str,
)
def test_rejects_layouts_that_do_not_fit(mesh, spec, match):
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=match):
    ops.retention(*_inputs()[:4], spec=spec)


def test_retnet_10_decay_rates():
  pow2 = np.asarray(ops.log_decay_rates(32), np.float64)
  np.testing.assert_allclose(1 - np.exp(pow2[:8]), 2.0 ** -np.arange(5, 13), rtol=1e-4)
  assert (pow2 < 0).all()  # Float32's 1 - 2^-k is 1 from head 20 on.
  np.testing.assert_allclose(pow2[20:], -(2.0 ** -np.arange(25, 37)), rtol=1e-6)
  span = -np.expm1(np.asarray(ops.log_decay_rates(5, "linspace"), np.float64))
  np.testing.assert_allclose(span, np.geomspace(1 / 32, 1 / 512, 5), rtol=1e-5)
  np.testing.assert_array_equal(ops.log_decay_rates(3, "one"), np.zeros(3))
  const = ops.log_decay_rates(2, "const", 127 / 128)
  np.testing.assert_allclose(np.exp(const), 127 / 128, rtol=1e-6)
  for arguments in (("const",), ("pow2", 0.5), ("const", 1.5), ("learned",)):
    with pytest.raises(ValueError, match="="):
      inspect.unwrap(ops.log_decay_rates)(2, *arguments)  # Past the test suite's shape checks.


def test_decay_scale_is_the_norm_of_a_row_of_decays():
  gammas = np.array([1 - 2.0**-24, 511 / 512, 0.5, 1, 0])
  with np.errstate(divide="ignore"):
    log_decay = jnp.asarray(np.log(gammas), jnp.float32)
  positions = np.array([[0, 1, 7, 500]])
  want = [[np.sqrt(np.sum(g ** np.arange(n + 1.0))) for g in gammas] for n in positions[0]]
  np.testing.assert_allclose(ops.decay_scale(jnp.asarray(positions), log_decay)[0], want, rtol=1e-5)


def test_retnet_07_a_column_of_ones_makes_the_papers_normaliser():
  """Section 2.2's three steps, in full, are a division by `max(|q z|, s)`."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(1, 9, 2, d)) for d in (4, 4, 6))
  log_decay = np.asarray(ops.log_decay_rates(2), np.float64)
  gap = np.arange(9)[:, None] - np.arange(9)
  decay = np.where(gap >= 0, np.exp(log_decay[:, None, None] * gap), 0)
  decay /= np.sqrt(decay.sum(-1, keepdims=True))
  scores = np.einsum("BTNH,BSNH->BNTS", q, k) * decay
  scores /= np.maximum(np.abs(scores.sum(-1, keepdims=True)), 1)
  want = np.einsum("BNTS,BSNV->BTNV", scores, v)
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  extended = jnp.concatenate([v, jnp.ones((1, 9, 2, 1))], -1)
  scale = ops.decay_scale(jnp.arange(9)[None], ops.log_decay_rates(2))
  for implementation in ("xla", "parallel", "recurrent"):
    out, _ = ops.retention(
      q, k, extended, ops.log_decay_rates(2), chunk_size=4, implementation=implementation
    )
    got = out[..., :-1] / jnp.maximum(jnp.abs(out[..., -1]), scale)[..., None]
    np.testing.assert_allclose(got, want, atol=1e-5)
