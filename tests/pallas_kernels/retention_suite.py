"""What every implementation of retention must show: a test class inherits all of it.

Outputs and every gradient are held to the recurrent form in float64, which `retention_test.py`
holds to the equation. Lengths are counted in chunks, so that each implementation meets its edges.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import suite_common

from pallas_kernels.retention import retention, retention_decode

NAMES = ("out", "state", "dq", "dk", "dv", "dlog_decay", "dstate")


@dataclasses.dataclass(frozen=True)
class Case:
  """Inputs of one call.

  Attributes:
    length: Tokens `T`.
    head_dim: `H`.
    value_dim: `V`.
    heads: `N`.
    kv_heads: `K`.
    decays: "random"; "slow", down to 2^-12 a token; "extreme", from 1 to 0 by heads; "saturated",
      gates of 0, of -1e30 and of -inf among others.
    per_token: Whether each token has its own decays.
    padded: Whether rows end early, one of them before it begins.
    packed: Whether rows hold several documents.
    dtype: Of `q`, `k` and `v`.
  """

  length: int
  head_dim: int
  value_dim: int
  heads: int = 2
  kv_heads: int = 2
  decays: str = "random"
  per_token: bool = False
  padded: bool = False
  packed: bool = False
  dtype: str = "float32"

  @property
  def batch(self) -> int:
    return 3 if self.padded or self.packed else 2

  def args(self) -> tuple[Any, ...]:
    """`q`, `k`, `v`, `log_decay` and the initial state."""
    rng = np.random.default_rng(self.length)
    draw = lambda *shape: rng.normal(size=shape)
    lead = (self.batch, self.length)
    q, k = draw(*lead, self.heads, self.head_dim), draw(*lead, self.kv_heads, self.head_dim)
    v = draw(*lead, self.kv_heads, self.value_dim)
    state = draw(self.batch, self.heads, self.head_dim, self.value_dim)
    q, k, v = (jnp.asarray(x, self.dtype) for x in (q, k * self.head_dim**-0.5, v))
    return q, k, v, jnp.asarray(self._log_decay(rng), jnp.float32), jnp.asarray(state, jnp.float32)

  def _log_decay(self, rng):
    shape = (self.batch, self.length, self.heads) if self.per_token else (self.heads,)
    scale = {"slow": 2.0**-12}.get(self.decays, 0.2)
    random = -rng.exponential(scale, shape)
    if self.decays == "extreme":
      gammas = np.array([1, 1 - 2.0**-24, 511 / 512, 0.5, 1e-3, 0])
      with np.errstate(divide="ignore"):
        return np.broadcast_to(np.log(gammas[: self.heads]), shape)
    if self.decays == "saturated":
      kind = rng.integers(0, 5, shape)
      kind[1] = np.maximum(kind[1], 1)  # The second row meets no -inf, whose totals stay finite.
      return np.select([kind == 0, kind == 1, kind == 2], [-np.inf, -1e30, 0], random)
    return random

  def options(self, chunk: int) -> dict[str, Any]:
    """`lengths` and `segment_ids`, with ends on, before and after the edges of chunks."""
    options = {}
    if self.padded:
      options["lengths"] = jnp.array([self.length, chunk + 2, 0])
    if self.packed:
      starts = [[1, chunk, self.length], [chunk // 2, chunk + 1, 2 * chunk], [self.length] * 3]
      at = np.arange(self.length)[:, None]
      ids = np.sum(at >= np.array(starts)[:, None], -1) % 2  # An id returns.
      options["segment_ids"] = jnp.asarray(ids)
    return options


def outputs_and_gradients(op, args, *, learned=range(5)):
  """Both outputs, and behind them the gradients of a sum that weighs both of them at random."""
  outs, grads = suite_common.outputs_and_gradients(op, args, learned=learned)
  return *outs, *grads


@functools.cache
def reference(case: Case, chunk: int):
  """What the recurrent form makes of the same inputs in float64."""
  with jax.enable_x64(True):
    args = [jnp.asarray(np.asarray(x, np.float64)) for x in case.args()]
    op = lambda *a: retention(
      *a[:4], initial_state=a[4], implementation="recurrent", **case.options(chunk)
    )
    return [np.asarray(x) for x in outputs_and_gradients(op, args)]


def relative_error(got, want) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape and np.isfinite(want).all()
  return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


class RetentionSuite:
  """Tests of one implementation.

  Attributes:
    implementation: Its name.
    kernels: Names of the kernels that serve a gradient, as the program shows them.
    chunk: The chunk size asked for, and the unit of lengths.
    head_dim: `H` of most cases.
    value_dim: `V` of most cases.
    dtype: Of most cases.
    tolerance: Bounds of the relative error by dtype.
    decay_tolerance: The same of the decay's gradient, a sum of differences.
    remat: `jax.checkpoint`, or the identity where it can't be had.
  """

  implementation: str
  kernels: tuple[str, ...] = ()
  chunk = 16
  head_dim, value_dim = 5, 7
  dtype = "float32"
  tolerance = {"float32": 1e-5, "bfloat16": 5e-3}
  decay_tolerance = tolerance
  remat = staticmethod(jax.checkpoint)

  def case(self, length: int, **fields: Any) -> Case:
    fields = dict(head_dim=self.head_dim, value_dim=self.value_dim, dtype=self.dtype) | fields
    return Case(length, **fields)

  def op(self, **options):
    options = dict(chunk_size=self.chunk, implementation=self.implementation) | options
    return lambda q, k, v, log_decay, state=None: retention(
      q, k, v, log_decay, initial_state=state, **options
    )

  def check(self, case: Case) -> None:
    """Holds outputs and gradients to the reference."""
    op = self.op(**case.options(self.chunk))
    got = outputs_and_gradients(op, case.args())
    assert got[0].dtype == case.dtype and got[1].dtype == jnp.float32
    for name, a, b in zip(NAMES, got, reference(case, self.chunk), strict=True):
      bound = (self.decay_tolerance if name == "dlog_decay" else self.tolerance)[case.dtype]
      assert relative_error(a, b) <= bound, name

  @pytest.mark.parametrize("chunks,more", [(0, 1), (0, 7), (1, 0), (1, 1), (3, 5)])
  def test_retnet_01_any_length(self, chunks, more):
    self.check(self.case(chunks * self.chunk + more))

  def test_shares_key_heads_in_consecutive_groups(self):
    self.check(self.case(self.chunk + 3, heads=6, kv_heads=2))

  def test_decay_per_token(self):
    self.check(self.case(2 * self.chunk + 5, kv_heads=1, per_token=True))

  @pytest.mark.parametrize("per_token", [False, True])
  def test_retnet_03_decay_extremes(self, per_token):
    case = self.case(2 * self.chunk + 5, heads=6, kv_heads=6, decays="extreme", per_token=per_token)
    self.check(case)

  def test_token_gates_saturate_and_mix(self):
    """A gate of -inf, or of -1e30, forgets what precedes it and blurs nothing that follows."""
    self.check(self.case(2 * self.chunk + 5, decays="saturated", per_token=True))

  @pytest.mark.parametrize("per_token", [False, True])
  @pytest.mark.parametrize("padded,packed", [(True, False), (False, True), (True, True)])
  def test_lengths_and_documents(self, per_token, padded, packed):
    length = 2 * self.chunk + 5
    self.check(self.case(length, per_token=per_token, padded=padded, packed=packed, kv_heads=1))

  @pytest.mark.parametrize("per_token", [False, True])
  def test_retnet_08_bfloat16(self, per_token):
    length = 3 * self.chunk + 12
    case = self.case(length, decays="slow", per_token=per_token, dtype="bfloat16")
    self.check(dataclasses.replace(case, head_dim=60, value_dim=24))

  def test_without_an_initial_state_nor_a_learned_decay(self):
    case = self.case(2 * self.chunk + 5)
    log_decay = case.args()[3]

    def run(op, log_decay, args):
      return outputs_and_gradients(lambda *a: op(*a, log_decay)[:1], args, learned=range(3))

    with jax.enable_x64(True):
      *args, wide = (jnp.asarray(np.asarray(x, np.float64)) for x in case.args()[:4])
      recurrent = lambda *a: retention(*a, implementation="recurrent")
      want = [np.asarray(x) for x in run(recurrent, wide, args)]
    got = run(self.op(), log_decay, case.args()[:3])
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
      assert relative_error(a, b) <= self.tolerance[case.dtype], name

  def test_retnet_05_padding_is_as_if_absent(self):
    """A padded row ends in the state of the row cut short, even where the padding holds NaN."""
    case = self.case(self.chunk + 9)
    end = self.chunk - 3
    q, k, v, log_decay, state = case.args()
    lengths = jnp.array([end, end])
    want = jax.jit(self.op())(q[:, :end], k[:, :end], v[:, :end], log_decay, state)

    def padded(q, k, v, state):
      out, state = self.op(lengths=lengths)(q, k, v, log_decay, state)
      return out[:, :end], state

    poisoned = (q, *(x.at[:, end:].set(jnp.nan) for x in (k, v)), state)
    out, state, *grads = outputs_and_gradients(padded, poisoned, learned=range(4))
    for a, b in zip((out, state), want, strict=True):
      assert relative_error(a, b) <= self.tolerance[case.dtype]
    for name, grad in zip(("dq", "dk", "dv", "dstate"), grads, strict=True):
      assert np.isfinite(np.asarray(grad, np.float32)).all(), name
    for name, grad in zip(("dk", "dv"), grads[1:3], strict=True):
      assert not np.asarray(grad[:, end:], np.float32).any(), name

  def test_retnet_05_documents_are_isolated(self):
    """Each document is as if alone, bit for bit, whatever the others hold."""
    case = self.case(self.chunk + 9)
    args = case.args()
    cut = self.chunk // 2
    ids = jnp.broadcast_to(jnp.arange(case.length) >= cut, (case.batch, case.length)).astype(int)
    run = jax.jit(self.op(segment_ids=ids))
    out, state = run(*args)
    q, k, v = (x.at[:, :cut].multiply(3) for x in args[:3])
    other_out, other_state = run(q, k, v, args[3], 2 * args[4])
    np.testing.assert_array_equal(out[:, cut:], other_out[:, cut:])
    np.testing.assert_array_equal(state, other_state)
    assert (out[:, :cut] != other_out[:, :cut]).any()

  def test_retnet_05_is_causal_bit_for_bit(self):
    case = self.case(self.chunk + 9)
    q, k, v, log_decay, _ = case.args()
    at = self.chunk - 3
    run = jax.jit(lambda q, k, v: self.op()(q, k, v, log_decay)[0])
    changed, out = run(*(x.at[:, at].add(1) for x in (q, k, v))), run(q, k, v)
    assert (changed[:, :at] == out[:, :at]).all()
    assert (changed[:, at:] != out[:, at:]).any(axis=(0, 2, 3)).all()

  def test_retnet_04_a_sequence_may_be_split_anywhere(self):
    case = self.case(2 * self.chunk + 5)
    args = case.args()
    want = jax.jit(self.op())(*args)
    for at in (1, self.chunk, self.chunk + 4):
      first, second = ([x[:, s] for x in args[:3]] for s in (slice(at), slice(at, None)))
      out, state = jax.jit(self.op())(*first, *args[3:])
      rest, state = jax.jit(self.op())(*second, args[3], state)
      for a, b in zip((jnp.concatenate([out, rest], 1), state), want, strict=True):
        assert relative_error(a, b) <= self.tolerance[case.dtype]

  def test_repeats_bit_for_bit(self):
    args = self.case(self.chunk + 3, per_token=True).args()
    run = jax.jit(functools.partial(outputs_and_gradients, self.op()))
    first, second = (run(args) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)

  def test_vmap_and_remat_change_nothing(self):
    q, k, v, log_decay, state = self.case(self.chunk + 3).args()
    args = (q, k, v, state)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), args)
    op = lambda q, k, v, state: self.op()(q, k, v, log_decay, state)

    def run(op, args):
      def loss(*args):
        outs = op(*args)
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in outs), outs

      grads, outs = jax.jit(jax.grad(loss, range(4), has_aux=True))(*args)
      return *outs, *grads

    got, want = run(jax.vmap(self.remat(op)), stacked), run(op, args)
    for a, b in zip(got, want, strict=True):
      assert relative_error(a[0], b) <= 10 * self.tolerance[self.dtype]

  def test_the_program_names_its_kernels(self):
    args = self.case(self.chunk + 3).args()
    program = str(jax.make_jaxpr(functools.partial(outputs_and_gradients, self.op()))(args))
    assert any(x in program for x in ("pallas_call", "mpmd_map")) == bool(self.kernels)
    for name in self.kernels:
      assert name in program


class DecodeSuite:
  """Tests of one implementation of decoding.

  Attributes:
    implementation: Its name.
    kernels: Names of its kernels, as the program shows them.
    head_dim: `H`.
    value_dim: `V`.
    gradient_tolerance: Bound of the relative error of gradients.
  """

  implementation: str
  kernels: tuple[str, ...] = ()
  head_dim, value_dim = 5, 7
  gradient_tolerance = 1e-6

  def inputs(self, kv_heads=2, per_row=True, dtype="float32"):
    """One token of four query heads, by argument's name."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    decay = -rng.exponential(0.2, (3, 4) if per_row else 4)
    decay[..., 1] = -np.inf
    state_shape = (3, 4, self.head_dim, self.value_dim)
    return dict(
      q=draw(3, 4, self.head_dim),
      k=draw(3, kv_heads, self.head_dim),
      v=draw(3, kv_heads, self.value_dim),
      log_decay=jnp.asarray(decay, jnp.float32),
      state=jnp.asarray(rng.normal(size=state_shape), jnp.float32),
      gate=draw(3, 4, self.value_dim),
    )

  def want(self, q, k, v, log_decay, state, gate, norm_eps=None):
    """The equations in float64."""
    q, k, v, log_decay, state, gate = (
      np.asarray(x, np.float64) for x in (q, k, v, log_decay, state, gate)
    )
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    state = np.exp(log_decay)[..., None, None] * state + k[..., None] * v[..., None, :]
    out = np.einsum("BNH,BNHV->BNV", q, state)
    if norm_eps is not None:
      out /= np.sqrt(np.square(out).mean(-1, keepdims=True) + norm_eps)
    return out * gate / (1 + np.exp(-gate)), state

  @pytest.mark.parametrize("kv_heads", [1, 2, 4])
  @pytest.mark.parametrize("per_row", [False, True])
  @pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 3e-3)])
  def test_equals_the_equation(self, kv_heads, per_row, dtype, tolerance):
    args = self.inputs(kv_heads, per_row, dtype)
    run = functools.partial(retention_decode, norm_eps=1e-2, implementation=self.implementation)
    out, state = jax.jit(run)(**args)
    assert out.dtype == dtype and state.dtype == jnp.float32
    want, want_state = self.want(**args, norm_eps=1e-2)
    assert relative_error(out, want) <= tolerance
    assert relative_error(state, want_state) <= 1e-6

  def test_norm_and_gate_are_optional(self):
    args = self.inputs()
    run = functools.partial(retention_decode, implementation=self.implementation)
    assert relative_error(run(**args)[0], self.want(**args)[0]) <= 1e-6
    plain, _ = run(**{k: x for k, x in args.items() if k != "gate"})
    gate = np.asarray(args["gate"])
    assert relative_error(plain * gate / (1 + np.exp(-gate)), self.want(**args)[0]) <= 1e-6

  def test_gradients_equal_those_of_one_pass(self):
    args = self.inputs()
    names = ("q", "k", "v", "log_decay", "state")

    def loss(op, *values):
      return sum(jnp.sum(jnp.sin(x)) for x in op(**dict(zip(names, values, strict=True))))

    def one_pass(state, **token):
      token = {k: x[:, None] for k, x in token.items()}
      out, state = retention(**token, initial_state=state, implementation="recurrent")
      return out[:, 0], state

    step = functools.partial(retention_decode, implementation=self.implementation)
    values = [args[name] for name in names]
    got, want = (
      jax.jit(jax.grad(functools.partial(loss, op), range(5)))(*values) for op in (step, one_pass)
    )
    for name, a, b in zip(names, got, want, strict=True):
      assert relative_error(a, b) <= self.gradient_tolerance, name

  def test_the_program_names_its_kernels(self):
    run = functools.partial(retention_decode, implementation=self.implementation)
    program = str(jax.make_jaxpr(lambda args: run(**args))(self.inputs()))
    assert any(x in program for x in ("pallas_call", "mpmd_map")) == bool(self.kernels)
    for name in self.kernels:
      assert name in program
