"""What every implementation of plain attention must show: a test class inherits all of it.

Outputs and every gradient are held to the naive form in float64, which `flash_attention_test.py`
holds to the equation row by row. Lengths are counted in blocks, so that each implementation meets
its edges. Where one refuses a call, the suite asks that it does, and says why.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from suite_common import attention_bounds, outputs_and_gradients, relative_error

from pallas_kernels.flash_attention import flash_attention

NAMES = ("dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
  """Inputs of one call.

  Attributes:
    length: Queries `T`.
    head_dim: `H`.
    value_dim: `V`.
    kv_length: Keys `S`; as many if `None`.
    heads: `N`.
    kv_heads: `K`.
    lse: Whether the log-sum-exps are returned, and have a gradient.
    sharpness: Standard deviation of the scores.
    padded: Whether rows end early, one of them before it begins.
    packed: Whether rows hold several documents.
    row_offsets: Whether each row has a `q_offset` of its own.
    traced_offset: A `q_offset` of all rows that is not known when the call is traced.
    options: Further ones of the call.
    dtype: Of the arrays.
  """

  length: int
  head_dim: int
  value_dim: int
  kv_length: int | None = None
  heads: int = 2
  kv_heads: int = 2
  lse: bool = False
  sharpness: float = 1.0
  padded: bool = False
  packed: bool = False
  row_offsets: bool = False
  traced_offset: int | None = None
  options: tuple[tuple[str, Any], ...] = ()
  dtype: str = "float32"

  @property
  def batch(self) -> int:
    return 3 if self.padded or self.packed or self.row_offsets else 1

  @property
  def keys(self) -> int:
    return self.kv_length or self.length

  def option(self, name: str, default: Any) -> Any:
    """One of `options`."""
    return dict(self.options).get(name, default)

  def args(self) -> tuple[Any, ...]:
    """`q`, `k` and `v`."""
    rng = np.random.default_rng(self.length)
    draw = lambda *shape: rng.normal(size=shape)
    q = draw(self.batch, self.length, self.heads, self.head_dim)
    k = draw(self.batch, self.keys, self.kv_heads, self.head_dim) * self.sharpness
    v = draw(self.batch, self.keys, self.kv_heads, self.value_dim)
    return tuple(jnp.asarray(x, self.dtype) for x in (q, k, v))

  def keywords(self, block: int) -> dict[str, Any]:
    """Options, and arrays of bounds on, before and after the edges of blocks."""
    keywords = dict(scale=self.head_dim**-0.5, return_lse=self.lse) | dict(self.options)
    if self.traced_offset is not None:
      keywords["q_offset"] = jnp.int32(self.traced_offset)
    return keywords | attention_bounds(self, block)


@functools.cache
def reference(case: Case, block: int):
  """What the naive form makes of the same inputs in float64."""
  with jax.enable_x64(True):
    args = [jnp.asarray(np.asarray(x, np.float64)) for x in case.args()]
    op = functools.partial(flash_attention, implementation="naive", **case.keywords(block))
    return jax.tree.map(np.asarray, outputs_and_gradients(op, args))


class FlashAttentionSuite:
  """Tests of one implementation.

  Attributes:
    implementation: Its name.
    kernels: Names of the kernels that serve a gradient, as the program shows them.
    block: The unit of lengths, about as many tokens as the implementation takes at once.
    head_dim: `H` of most cases.
    value_dim: `V` of most cases.
    dtype: Of most cases.
    tolerance: Bounds of the relative error by dtype.
    remat: `jax.checkpoint`, or the identity where it can't be had.
  """

  implementation: str
  kernels: tuple[str, ...] = ()
  block = 16
  head_dim, value_dim = 5, 6
  dtype = "float32"
  tolerance = {"float32": 1e-5, "bfloat16": 5e-3}
  remat = staticmethod(jax.checkpoint)

  def refusal(self, case: Case) -> str | None:
    """Words of the reason why the implementation refuses a case, if it does."""
    del case
    return None

  def case(self, length: int, **fields: Any) -> Case:
    fields = dict(head_dim=self.head_dim, value_dim=self.value_dim, dtype=self.dtype) | fields
    return Case(length, **fields)

  def op(self, case: Case, **options: Any):
    options = dict(implementation=self.implementation) | case.keywords(self.block) | options
    return functools.partial(flash_attention, **options)

  def serves(self, case: Case) -> bool:
    """Whether a case is served; one that is not must be refused, with the reason."""
    reason = self.refusal(case)
    if reason is not None:
      with pytest.raises(ExceptionGroup) as caught:
        jax.eval_shape(self.op(case), *case.args())
      (refused,) = caught.value.exceptions
      assert isinstance(refused, NotImplementedError) and re.search(reason, str(refused)), refused
    return reason is None

  def check(self, case: Case) -> None:
    """Holds outputs and gradients to the reference, or a refusal to its reason."""
    if not self.serves(case):
      return
    outs, grads = outputs_and_gradients(self.op(case), case.args())
    want_outs, want_grads = reference(case, self.block)
    assert outs[0].dtype == case.dtype and len(outs) == 1 + case.lse
    names = ("out", "lse")[: len(outs)] + NAMES
    for name, a, b in zip(names, (*outs, *grads), (*want_outs, *want_grads), strict=True):
      assert relative_error(a, b) <= self.tolerance[case.dtype], name

  @pytest.mark.parametrize("blocks,more", [(0, 1), (0, 7), (1, 0), (1, 1), (3, 5)])
  def test_any_length(self, blocks, more):
    self.check(self.case(blocks * self.block + more))

  @pytest.mark.parametrize("heads,kv_heads", [(4, 2), (3, 1)])
  def test_shares_key_heads(self, heads, kv_heads):
    self.check(self.case(self.block + 3, heads=heads, kv_heads=kv_heads))

  @pytest.mark.parametrize("scale", [1.0, 0.3])
  def test_scales(self, scale):
    self.check(self.case(self.block + 3, options=(("scale", scale),)))

  @pytest.mark.parametrize("blocks", [0, 1, 2])
  def test_windows(self, blocks):
    window = blocks * self.block + 1
    self.check(self.case(2 * self.block + 5, options=(("window", window),)))

  @pytest.mark.parametrize("more", [0, 1], ids=["whole", "ragged"])
  def test_sees_all_keys_if_not_causal(self, more):
    lengths = dict(length=self.block + 3 * more, kv_length=2 * self.block + more)
    self.check(self.case(**lengths, options=(("causal", False),)))

  @pytest.mark.parametrize("offset", [0, 5, 40])
  def test_queries_begin_anywhere(self, offset):
    """Among fewer keys than that, and with a window that hides all keys from the last rows."""
    options = (("q_offset", offset), ("window", 2 * self.block))
    self.check(self.case(self.block + 3, kv_length=2 * self.block + 1, options=options))

  @pytest.mark.parametrize("length", [1, 5])
  def test_queries_are_the_last(self, length):
    """As in decoding with a cache that is full."""
    keys = self.block + 9
    self.check(self.case(length, kv_length=keys, options=(("q_offset", keys - length),)))

  def test_whole_blocks_continue_a_prompt(self):
    options = (("q_offset", self.block),)
    self.check(self.case(self.block, kv_length=2 * self.block, options=options))

  def test_an_offset_may_be_traced(self):
    self.check(self.case(self.block + 3, kv_length=2 * self.block + 1, traced_offset=3))

  def test_each_row_begins_anywhere(self):
    case = self.case(self.block + 3, kv_length=2 * self.block + 1, row_offsets=True)
    self.check(dataclasses.replace(case, options=(("window", self.block + 1),)))

  @pytest.mark.parametrize("padded,packed", [(True, False), (False, True), (True, True)])
  def test_lengths_and_documents(self, padded, packed):
    self.check(self.case(2 * self.block + 5, padded=padded, packed=packed, kv_heads=1))

  def test_lengths_of_all_that_is_seen(self):
    case = self.case(self.block, padded=True, kv_length=2 * self.block)
    self.check(dataclasses.replace(case, options=(("causal", False),)))

  def test_documents_of_the_keys(self):
    case = self.case(self.block + 3, kv_length=2 * self.block + 1, packed=True)
    self.check(dataclasses.replace(case, options=(("causal", False),)))

  def test_log_sum_exps(self):
    self.check(self.case(self.block + 3, lse=True))

  def test_log_sum_exps_of_rows_without_a_key(self):
    self.check(self.case(self.block + 3, lse=True, padded=True))

  def test_bfloat16(self):
    self.check(self.case(3 * self.block + 12, dtype="bfloat16", kv_heads=1))

  def test_extreme_logits(self):
    """Scores of +-1e4 are exact where one key outweighs all, and gradients finite everywhere."""
    case = self.case(self.block + 3, sharpness=1e4)
    q, k, v = map(jnp.round, case.args())
    if not self.serves(case):
      return
    # Of integers, whose scores float32 holds exactly; log-sum-exps are rounded at their size.
    op = self.op(case, scale=1.0)
    outs, grads = outputs_and_gradients(op, (q, k, v))
    with jax.enable_x64(True):
      args = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
      naive = self.op(case, scale=1.0, implementation="naive")
      want = jax.tree.map(np.asarray, outputs_and_gradients(naive, args))
    assert relative_error(outs[0], want[0][0]) <= max(1e-5, self.tolerance[case.dtype])
    for name, a, b in zip(NAMES, grads, want[1], strict=True):
      assert np.isfinite(np.asarray(a, np.float32)).all(), name
      assert relative_error(a, b) <= 2e-2, name

  def test_rows_sum_to_one(self):
    case = self.case(self.block + 3)
    q, k, v = case.args()
    run = jax.jit(self.op(case))
    tolerance = self.tolerance[case.dtype]
    assert relative_error(run(q, k, jnp.ones_like(v)), np.ones_like(v)) <= tolerance
    assert relative_error(run(q, k, v)[:, 0], v[:, 0]) <= tolerance

  def test_padding_is_as_if_absent(self):
    """Even where it holds NaN; and a row without keys is zero, with finite gradients."""
    end = self.block - 3
    case = self.case(self.block + 9, padded=True, options=(("causal", False),))
    if not self.serves(case):
      return
    lengths = jnp.array([case.keys, end, 0])
    q, k, v = case.args()
    want = jax.jit(self.op(case, lengths=None))(q, k[:, :end], v[:, :end])
    hidden = (jnp.arange(case.keys) >= lengths[:, None])[..., None, None]
    k, v = (jnp.where(hidden, jnp.nan, x) for x in (k, v))
    (out,), grads = outputs_and_gradients(self.op(case, lengths=lengths), (q, k, v))
    assert relative_error(out[1], want[1]) <= self.tolerance[case.dtype]
    assert not np.asarray(out[2], np.float32).any()
    for name, grad in zip(NAMES, grads, strict=True):
      assert np.isfinite(np.asarray(grad, np.float32)).all(), name
    for name, grad in zip(NAMES[1:], grads[1:], strict=True):
      grad = np.asarray(grad, np.float32)
      assert grad[1, :end].any() and not grad[1, end:].any() and not grad[2].any(), name

  def test_documents_are_isolated(self):
    """Each document is as if alone, bit for bit, whatever the others hold."""
    cut = self.block // 2
    case = self.case(self.block + 9, packed=True)
    if not self.serves(case):
      return
    q, k, v = case.args()
    ids = jnp.broadcast_to(jnp.arange(case.length) >= cut, q.shape[:2]).astype(int)
    run = jax.jit(self.op(case, segment_ids=ids))
    out, other = run(q, k, v), run(*(x.at[:, :cut].multiply(3) for x in (q, k, v)))
    np.testing.assert_array_equal(out[:, cut:], other[:, cut:])
    assert (out[:, :cut] != other[:, :cut]).any()

  def test_is_causal_bit_for_bit(self):
    case = self.case(self.block + 9)
    args, at = case.args(), self.block - 3
    run = jax.jit(self.op(case))
    changed, out = run(*(x.at[:, at].add(1) for x in args)), run(*args)
    assert (changed[:, :at] == out[:, :at]).all()
    assert (changed[:, at:] != out[:, at:]).any(axis=(0, 2, 3)).all()

  def test_repeats_bit_for_bit(self):
    case = self.case(self.block + 3)
    first, second = (outputs_and_gradients(self.op(case), case.args()) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)

  def test_vmap_and_remat_change_nothing(self):
    case = self.case(self.block + 3)
    args = case.args()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), args)
    loss = lambda op: lambda *args: jnp.sum(jnp.sin(op(*args).astype(jnp.float32)))
    grads = lambda op: jax.value_and_grad(loss(op), range(len(args)))
    plain = jax.jit(grads(self.op(case)))(*args)
    mapped = jax.jit(jax.vmap(grads(self.remat(self.op(case)))))(*stacked)
    for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(plain), strict=True):
      assert relative_error(a[0], b) <= 2 * self.tolerance[case.dtype]

  def test_the_program_names_its_kernels(self):
    case = self.case(self.block + 3)
    trace = jax.make_jaxpr(functools.partial(outputs_and_gradients, self.op(case)))
    program = str(trace(case.args()))
    kernels = ("pallas_call", "dot_product_attention_")
    assert any(x in program for x in kernels) == bool(self.kernels)
    for name in self.kernels:
      assert name in program
