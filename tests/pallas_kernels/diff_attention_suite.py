"""What every implementation of differential attention must show: a test class inherits all of it.

Outputs and every gradient are held to the naive form in float64, which `diff_attention_test.py`
holds to the equation head by head. Lengths are counted in blocks, so that each implementation meets
its edges.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite_common import attention_bounds, outputs_and_gradients, relative_error

from pallas_kernels.diff_attention import diff_attention, diff_attention_decode

NAMES = ("dq", "dk", "dv", "dlam", "dgain")


@dataclasses.dataclass(frozen=True)
class Case:
  """Inputs of one call.

  Attributes:
    length: Queries `T`.
    kv_length: Keys `S`; as many if `None`.
    head_dim: `H`.
    value_dim: `V`.
    heads: `N`.
    kv_heads: `K`.
    shared_keys: Whether both maps have the same keys.
    lam: "scalar", "head" or "token"; random between -0.5 and 1.5.
    norm: Whether outputs are normalised, with a gain.
    lse: Whether the log-sum-exps are returned, and have a gradient.
    sharpness: Standard deviation of the scores.
    padded: Whether rows end early, one of them before it begins.
    packed: Whether rows hold several documents.
    row_offsets: Whether each row has a `q_offset` of its own.
    options: Further ones of the call.
    dtype: Of `q`, `k` and `v`.
  """

  length: int
  head_dim: int
  value_dim: int
  kv_length: int | None = None
  heads: int = 2
  kv_heads: int = 2
  shared_keys: bool = False
  lam: str = "head"
  norm: bool = False
  lse: bool = False
  sharpness: float = 1.0
  padded: bool = False
  packed: bool = False
  row_offsets: bool = False
  options: tuple[tuple[str, Any], ...] = ()
  dtype: str = "float32"

  @property
  def batch(self) -> int:
    return 3 if self.padded or self.packed or self.row_offsets else 1

  @property
  def keys(self) -> int:
    return self.kv_length or self.length

  def args(self) -> tuple[Any, ...]:
    """`q`, `k`, `v`, `lam` and, of a norm, the gain."""
    rng = np.random.default_rng(self.length)
    draw = lambda *shape: rng.normal(size=shape)
    maps = () if self.shared_keys else (2,)
    q = draw(self.batch, self.length, self.heads, 2, self.head_dim)
    k = draw(self.batch, self.keys, self.kv_heads, *maps, self.head_dim)
    v = draw(self.batch, self.keys, self.kv_heads, self.value_dim)
    shape = {"scalar": (), "head": (self.heads,), "token": q.shape[:3]}[self.lam]
    lam = jnp.asarray(rng.uniform(-0.5, 1.5, shape), jnp.float32)
    q, k, v = (jnp.asarray(x, self.dtype) for x in (q, k * self.sharpness, v))
    gain = (jnp.asarray(1 + 0.3 * draw(self.value_dim), jnp.float32),) if self.norm else ()
    return q, k, v, lam, *gain

  def keywords(self, block: int) -> dict[str, Any]:
    """Options, and arrays of bounds on, before and after the edges of blocks."""
    keywords = dict(scale=self.head_dim**-0.5, return_lse=self.lse) | dict(self.options)
    if self.norm:
      keywords |= dict(eps=1e-5, post_scale=0.7)
    return keywords | attention_bounds(self, block)


def _op(case: Case, block: int, **options: Any):
  keywords = case.keywords(block) | options

  def op(q, k, v, lam, gain=None):
    return diff_attention(q, k, v, lam, gain=gain, **keywords)

  return op


@functools.cache
def reference(case: Case, block: int):
  """What the naive form makes of the same inputs in float64."""
  with jax.enable_x64(True):
    args = [jnp.asarray(np.asarray(x, np.float64)) for x in case.args()]
    op = _op(case, block, implementation="naive")
    return jax.tree.map(np.asarray, outputs_and_gradients(op, args))


class DiffAttentionSuite:
  """Tests of one implementation.

  Attributes:
    implementation: Its name.
    kernels: Names of the kernels that serve a gradient, as the program shows them.
    decode_kernels: Of the kernels that serve decoding.
    block: The unit of lengths, about as many tokens as the implementation takes at once.
    head_dim: `H` of most cases.
    value_dim: `V` of most cases.
    dtype: Of most cases.
    tolerance: Bounds of the relative error by dtype.
    lam_tolerance: The same of lambda's gradient, a sum of differences over all tokens.
    lse_gradient: Whether the log-sum-exps' gradient is served.
    decodes: Whether it decodes.
    remat: `jax.checkpoint`, or the identity where it can't be had.
  """

  implementation: str
  kernels: tuple[str, ...] = ()
  decode_kernels: tuple[str, ...] = ()
  block = 16
  head_dim, value_dim = 5, 6
  dtype = "float32"
  tolerance = {"float32": 1e-5, "bfloat16": 5e-3}
  lam_tolerance = {"float32": 1e-4, "bfloat16": 5e-3}
  lse_gradient = True
  decodes = True
  remat = staticmethod(jax.checkpoint)

  def case(self, length: int, **fields: Any) -> Case:
    fields = dict(head_dim=self.head_dim, value_dim=self.value_dim, dtype=self.dtype) | fields
    return Case(length, **fields)

  def op(self, case: Case, **options: Any):
    return _op(case, self.block, **dict(implementation=self.implementation) | options)

  def check(self, case: Case, **options: Any) -> None:
    """Holds outputs and gradients to the reference."""
    outs, grads = outputs_and_gradients(self.op(case, **options), case.args())
    want_outs, want_grads = reference(case, self.block)
    assert outs[0].dtype == case.dtype and len(outs) == 1 + case.lse
    names = ("out", "lse")[: len(outs)] + NAMES[: len(grads)]
    for name, a, b in zip(names, (*outs, *grads), (*want_outs, *want_grads), strict=True):
      bound = (self.lam_tolerance if name == "dlam" else self.tolerance)[case.dtype]
      assert relative_error(a, b) <= bound, name

  @pytest.mark.parametrize("blocks,more", [(0, 1), (0, 7), (1, 0), (1, 1), (3, 5)])
  def test_diff_04_any_length(self, blocks, more):
    self.check(self.case(blocks * self.block + more))

  @pytest.mark.parametrize("lam", ["scalar", "token"])
  def test_lambdas(self, lam):
    self.check(self.case(self.block + 3, lam=lam))

  @pytest.mark.parametrize("heads,kv_heads,shared", [(4, 2, False), (3, 1, False), (4, 2, True)])
  def test_diff_05_shares_key_heads(self, heads, kv_heads, shared):
    case = self.case(self.block + 3, heads=heads, kv_heads=kv_heads, shared_keys=shared)
    self.check(dataclasses.replace(case, lam="token"))

  @pytest.mark.parametrize("lam", ["head", "token"])
  def test_headwise_norm(self, lam):
    self.check(self.case(self.block + 3, norm=True, lam=lam))

  def test_norm_without_a_gain(self):
    case = self.case(self.block + 3, options=(("eps", 1e-5),))
    self.check(case)

  def test_log_sum_exps(self):
    case = self.case(self.block + 3, lse=True, padded=True)
    if self.lse_gradient:
      self.check(case)
    else:
      outs = jax.jit(self.op(case))(*case.args())
      for a, b in zip(outs, reference(case, self.block)[0], strict=True):
        assert relative_error(a, b) <= self.tolerance[case.dtype]

  @pytest.mark.parametrize("blocks", [0, 1, 2])
  def test_windows(self, blocks):
    window = blocks * self.block + 1
    self.check(self.case(2 * self.block + 5, options=(("window", window),)))

  def test_sees_all_keys_if_not_causal(self):
    case = self.case(self.block + 3, kv_length=2 * self.block + 1, options=(("causal", False),))
    self.check(case)

  @pytest.mark.parametrize("offset", [0, 5, 40])
  def test_queries_begin_anywhere(self, offset):
    """Among fewer keys than that, and with a window that hides all keys from the last rows."""
    options = (("q_offset", offset), ("window", 2 * self.block))
    self.check(self.case(self.block + 3, kv_length=2 * self.block + 1, options=options))

  def test_each_row_begins_anywhere(self):
    case = self.case(self.block + 3, kv_length=2 * self.block + 1, row_offsets=True)
    self.check(dataclasses.replace(case, options=(("window", self.block + 1),)))

  @pytest.mark.parametrize("padded,packed", [(True, False), (False, True), (True, True)])
  def test_lengths_and_documents(self, padded, packed):
    case = self.case(2 * self.block + 5, padded=padded, packed=packed, norm=True, kv_heads=1)
    self.check(case)

  def test_documents_of_the_keys(self):
    case = self.case(self.block + 3, kv_length=2 * self.block + 1, packed=True)
    self.check(dataclasses.replace(case, options=(("causal", False),)))

  @pytest.mark.parametrize("norm", [False, True])
  def test_bfloat16(self, norm):
    case = self.case(3 * self.block + 12, dtype="bfloat16", norm=norm)
    self.check(dataclasses.replace(case, head_dim=60, value_dim=24, lam="scalar"))

  def test_diff_09_extreme_logits(self):
    """Scores of +-1e4, lambdas above one: exact where one key outweighs all, finite everywhere."""
    case = self.case(self.block + 3, sharpness=1e4, lam="head")
    q, k, v, _ = case.args()
    lam = jnp.array([1.0, 1.7])
    outs, grads = outputs_and_gradients(self.op(case), (q, k, v, lam))
    with jax.enable_x64(True):
      args = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, lam)]
      want = _op(case, self.block, implementation="naive")(*args)
    # float32's scores are off by 1e-3 here, which ties alone feel.
    assert relative_error(outs[0], want) <= 1e-2
    for name, grad in zip(NAMES, grads, strict=False):
      assert np.isfinite(np.asarray(grad, np.float32)).all(), name

  def test_diff_02_lambda_zero_is_plain_attention(self):
    case = self.case(self.block + 3)
    q, k, v, lam = case.args()
    (out,), (dq, dk, *_) = outputs_and_gradients(self.op(case), (q, k, v, 0 * lam))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q[:, :, :, 0], k[:, :, :, 0]) * case.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(case.length, dtype=bool), scores, -jnp.inf))
    assert (
      relative_error(out, jnp.einsum("BNTS,BSNV->BTNV", weights, v)) <= self.tolerance[case.dtype]
    )
    assert not dq[:, :, :, 1].any() and not dk[:, :, :, 1].any()
    assert dq[:, 1:, :, 0].any() and dk[:, :, :, 0].any()

  def test_diff_02_equal_maps_leave_one_minus_lambda(self):
    case = self.case(self.block + 3)
    q, k, v, lam = case.args()
    q, k = (jnp.stack([x[:, :, :, 0]] * 2, axis=3) for x in (q, k))
    run = jax.jit(self.op(case))
    plain = run(q, k, v, 0 * lam)
    error = relative_error(run(q, k, v, lam), (1 - lam)[:, None] * plain)
    assert error <= self.tolerance[case.dtype]
    keywords = dict(eps=1e-5)
    (out,), grads = outputs_and_gradients(self.op(case, **keywords), (q, k, v, 0 * lam + 1))
    np.testing.assert_allclose(out, 0, atol=1e-3)  # Nothing, times the norm's 1 / sqrt(eps).
    assert all(np.isfinite(x).all() for x in grads)

  def test_diff_03_rows_sum_to_one_minus_lambda(self):
    case = self.case(self.block + 3)
    q, k, v, lam = case.args()
    run = jax.jit(self.op(case))
    out = run(q, k, jnp.ones_like(v), lam)
    tolerance = self.tolerance[case.dtype]
    assert relative_error(out, jnp.broadcast_to((1 - lam)[:, None], out.shape)) <= tolerance
    out = run(q, k, v, lam)
    assert relative_error(out[:, 0], (1 - lam)[:, None] * v[:, 0]) <= tolerance

  def test_diff_03_gradient_of_lambda_is_the_second_maps_row_terms(self):
    """`dlam = -sum(dO O2)`, where `O2` is the difference of two runs."""
    case = self.case(self.block + 3, lam="token")
    q, k, v, lam = case.args()
    op = jax.jit(self.op(case))
    second = op(q, k, v, 0 * lam) - op(q, k, v, 0 * lam + 1)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=second.shape), jnp.float32)
    got = jax.jit(jax.grad(lambda lam: jnp.sum(op(q, k, v, lam) * weights)))(lam)
    error = relative_error(got, -jnp.sum(second * weights, -1))
    assert error <= self.lam_tolerance[case.dtype]

  def test_diff_04_padding_is_as_if_absent(self):
    """Even where it holds NaN; and a row without keys is zero, with finite gradients."""
    case = self.case(self.block + 9, norm=True)
    end = self.block - 3
    q, k, v, lam, gain = (jnp.concatenate([x, x]) if x.ndim > 2 else x for x in case.args())
    keywords = dict(causal=False)
    want = jax.jit(self.op(case, **keywords))(q, k[:, :end], v[:, :end], lam, gain)
    k, v = (x.at[0, end:].set(jnp.nan).at[1].set(jnp.nan) for x in (k, v))
    op = self.op(case, lengths=jnp.array([end, 0]), **keywords)
    (out,), grads = outputs_and_gradients(op, (q, k, v, lam, gain))
    assert relative_error(out[0], want[0]) <= self.tolerance[case.dtype]
    assert not out[1].any()
    for name, grad in zip(NAMES, grads, strict=True):
      assert np.isfinite(np.asarray(grad, np.float32)).all(), name
    for grad in grads[1:3]:
      assert grad[0, :end].any() and not grad[0, end:].any() and not grad[1].any()

  def test_lengths_end_with_the_keys(self):
    """Beyond all keys is as many as there are."""
    case = self.case(self.block + 9)
    run = jax.jit(lambda lengths: self.op(case, lengths=lengths, causal=False)(*case.args()))
    ends = jnp.array([[case.keys + self.block], [case.keys]])
    np.testing.assert_array_equal(*map(run, ends))

  def test_diff_04_documents_are_isolated(self):
    """Each document is as if alone, bit for bit, whatever the others hold."""
    case = self.case(self.block + 9)
    q, k, v, lam = case.args()
    cut = self.block // 2
    ids = (jnp.arange(case.length) >= cut)[None].astype(int)
    run = jax.jit(self.op(case, segment_ids=ids))
    out = run(q, k, v, lam)
    other = run(*(x.at[:, :cut].multiply(3) for x in (q, k, v)), lam)
    np.testing.assert_array_equal(out[:, cut:], other[:, cut:])
    assert (out[:, :cut] != other[:, :cut]).any()

  def test_diff_04_is_causal_bit_for_bit(self):
    case = self.case(self.block + 9)
    *qkv, lam = case.args()
    at = self.block - 3
    run = jax.jit(self.op(case))
    changed, out = run(*(x.at[:, at].add(1) for x in qkv), lam), run(*qkv, lam)
    assert (changed[:, :at] == out[:, :at]).all()
    assert (changed[:, at:] != out[:, at:]).any(axis=(0, 2, 3)).all()

  def test_repeats_bit_for_bit(self):
    case = self.case(self.block + 3, lam="token")
    run = jax.jit(functools.partial(outputs_and_gradients, self.op(case)))
    first, second = (run(case.args()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)

  def test_vmap_and_remat_change_nothing(self):
    case = self.case(self.block + 3, norm=True)
    args = case.args()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), args)
    loss = lambda op: lambda *args: jnp.sum(jnp.sin(op(*args).astype(jnp.float32)))
    grads = lambda op: jax.value_and_grad(loss(op), range(len(args)))
    plain = jax.jit(grads(self.op(case)))(*args)
    mapped = jax.jit(jax.vmap(grads(self.remat(self.op(case)))))(*stacked)
    jax.tree.map(
      lambda a, b: self._assert_close(a[0], b, 2 * self.tolerance[case.dtype]), mapped, plain
    )

  @staticmethod
  def _assert_close(got, want, tolerance):
    assert relative_error(got, want) <= tolerance

  def test_the_program_names_its_kernels(self):
    case = self.case(self.block + 3)
    trace = jax.make_jaxpr(functools.partial(outputs_and_gradients, self.op(case)))
    program = str(trace(case.args()))
    assert any(x in program for x in ("pallas_call", "mpmd_map")) == bool(self.kernels)
    for name in self.kernels:
      assert name in program

  def decode(self, **options: Any):
    options = dict(implementation=self.implementation) | options
    return jax.jit(functools.partial(diff_attention_decode, **options))

  @pytest.mark.parametrize(
    "heads,kv_heads,shared,lam",
    [(2, 2, False, "scalar"), (4, 2, False, "head"), (4, 2, True, "token"), (3, 1, False, "head")],
  )
  def test_decoding_equals_the_rows_of_a_prefill(self, heads, kv_heads, shared, lam):
    self._skip_unless_it_decodes()
    length = 2 * self.block + 5
    case = self.case(length, heads=heads, kv_heads=kv_heads, shared_keys=shared, lam=lam, norm=True)
    q, k, v, lam, gain = case.args()
    keywords = {n: x for n, x in case.keywords(self.block).items() if n != "return_lse"}
    want = reference(case, self.block)[0][0]
    decode = self.decode(**keywords)
    for at in (1, self.block, self.block + 1, length):
      # What the cache holds behind the last token is nobody's.
      cache = [x.at[:, at:].set(jnp.nan) for x in (k, v)]
      row = lam[:, at - 1] if lam.ndim == 3 else lam
      out = decode(q[:, at - 1], *cache, row, lengths=jnp.array([at]), gain=gain)
      assert relative_error(out, want[:, at - 1]) <= self.tolerance[case.dtype]

  def test_gradients_of_decoding(self):
    self._skip_unless_it_decodes()
    end = self.block + 2
    case = self.case(self.block + 5, heads=4, norm=True)
    keywords = {n: x for n, x in case.keywords(self.block).items() if n != "return_lse"}
    q, k, v, lam, gain = case.args()
    args = q[:, -1], *(x.at[:, end:].set(jnp.nan) for x in (k, v)), lam, gain

    def run(implementation, args):
      def op(*args):
        options = dict(lengths=jnp.array([end]), gain=args[4], implementation=implementation)
        return diff_attention_decode(*args[:4], **options, **keywords)

      return outputs_and_gradients(op, args)

    got = jax.tree.leaves(run(self.implementation, args))
    with jax.enable_x64(True):
      want = run("naive", [jnp.asarray(np.asarray(x, np.float64)) for x in args])
    for name, a, b in zip(("out", *NAMES), got, jax.tree.leaves(want), strict=True):
      bound = (self.lam_tolerance if name == "dlam" else self.tolerance)[case.dtype]
      assert relative_error(a, b) <= bound, name

  def test_diff_07_split_keys_change_nothing(self):
    self._skip_unless_it_decodes()
    case = self.case(3 * self.block + 5, padded=True)
    q, k, v, lam = case.args()
    lengths = case.keywords(self.block)["lengths"]
    for window in (None, self.block - 3):
      run = lambda n, window=window: self.decode(num_splits=n, window=window, scale=2.0)(
        q[:, -1], k, v, lam, lengths=lengths
      )
      want = run(1)
      assert not want[2].any() and want[:2].any()
      for num_splits in (2, 3, 5):
        assert relative_error(run(num_splits), want) <= self.tolerance[case.dtype]
      naive = self.decode(implementation="naive", window=window, scale=2.0)
      error = relative_error(want, naive(q[:, -1], k, v, lam, lengths=lengths))
      assert error <= self.tolerance[case.dtype]

  def test_decoding_names_its_kernels(self):
    self._skip_unless_it_decodes()
    q, k, v, lam = self.case(self.block).args()
    program = str(jax.make_jaxpr(self.decode())(q[:, 0], k, v, lam))
    assert any(x in program for x in ("pallas_call", "mpmd_map")) == bool(self.decode_kernels)
    for name in self.decode_kernels:
      assert name in program

  def _skip_unless_it_decodes(self):
    if not self.decodes:
      pytest.skip(f"{self.implementation} is no implementation of decoding.")
