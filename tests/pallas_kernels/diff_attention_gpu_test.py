"""Differential attention's Mosaic GPU kernels: interpreted, watched for races, as machine code.

The interpreter takes seconds to trace a kernel, and they are three; on a card the same tests run
them in earnest.
"""

import dataclasses

import gpu_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diff_attention_suite import Case, DiffAttentionSuite
from suite_common import relative_error

from pallas_kernels import mosaic_gpu
from pallas_kernels.diff_attention import gpu, gpu_tiles, reference
from pallas_kernels.diff_attention.blocks import GpuBlocks
from pallas_kernels.diff_attention.reference import Options, Visibility

KERNELS = ("diff_attention_fwd", "diff_attention_bwd_dq", "diff_attention_bwd_dkv")


def _slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


class TestDiffAttention(DiffAttentionSuite):
  implementation = "pallas_gpu"
  kernels = KERNELS
  decode_kernels = ("diff_attention_decode",)
  block = 64
  head_dim = value_dim = 64
  dtype = "bfloat16"
  tolerance = {"bfloat16": 5e-3}
  lam_tolerance = {"bfloat16": 1e-2}  # Of rounded gradients of outputs, a few tokens' worth.
  remat = staticmethod(lambda op: op)  # Which jax refuses for interpreted kernels.

  @pytest.fixture(autouse=True)
  def _interpreter(self):
    gpu_compile.require_interpreter()

  @pytest.mark.parametrize("blocks,more", [(0, 7), _slow(0, 1), _slow(1, 0), _slow(1, 1)])
  def test_diff_04_any_length(self, blocks, more):
    super().test_diff_04_any_length(blocks, more)

  @pytest.mark.parametrize("lam", [_slow("scalar"), _slow("token")])
  def test_lambdas(self, lam):
    super().test_lambdas(lam)

  @pytest.mark.parametrize(
    "heads,kv_heads,shared", [_slow(4, 2, False), (3, 1, False), (4, 2, True)]
  )
  def test_diff_05_shares_key_heads(self, heads, kv_heads, shared):
    super().test_diff_05_shares_key_heads(heads, kv_heads, shared)

  @pytest.mark.parametrize("lam", [_slow("head"), "token"])
  def test_headwise_norm(self, lam):
    super().test_headwise_norm(lam)

  @pytest.mark.parametrize("blocks", [_slow(0), 1, _slow(2)])
  def test_windows(self, blocks):
    super().test_windows(blocks)

  @pytest.mark.parametrize("offset", [_slow(0), _slow(5), 40])
  def test_queries_begin_anywhere(self, offset):
    super().test_queries_begin_anywhere(offset)

  @pytest.mark.parametrize("padded,packed", [_slow(True, False), _slow(False, True), (True, True)])
  def test_lengths_and_documents(self, padded, packed):
    """Without the norm, which makes a hundredth of rounding where lambda all but cancels a row."""
    self.check(self.case(2 * self.block + 5, padded=padded, packed=packed, kv_heads=1))

  @pytest.mark.parametrize("head_dim", [_slow(96), 128])
  def test_bfloat16(self, head_dim):
    """The paper's sizes."""
    sizes = dict(head_dim=head_dim, value_dim=2 * head_dim)
    self.check(self.case(self.block + 12, norm=True, lam="scalar", **sizes))

  @pytest.mark.parametrize(
    "heads,kv_heads,shared,lam",
    [
      _slow(2, 2, False, "scalar"),
      _slow(4, 2, False, "head"),
      _slow(4, 2, True, "token"),
      _slow(3, 1, False, "head"),
    ],
  )
  def test_decoding_equals_the_rows_of_a_prefill(self, heads, kv_heads, shared, lam):
    super().test_decoding_equals_the_rows_of_a_prefill(heads, kv_heads, shared, lam)

  @pytest.mark.slow
  def test_norm_without_a_gain(self):
    super().test_norm_without_a_gain()

  @pytest.mark.slow
  def test_documents_of_the_keys(self):
    super().test_documents_of_the_keys()

  @pytest.mark.slow
  def test_diff_03_gradient_of_lambda_is_the_second_maps_row_terms(self):
    super().test_diff_03_gradient_of_lambda_is_the_second_maps_row_terms()

  @pytest.mark.slow
  def test_diff_07_split_keys_change_nothing(self):
    super().test_diff_07_split_keys_change_nothing()

  @pytest.mark.parametrize("window,num_splits,shared", [(None, 2, False), (100, 5, True)])
  def test_decoding_by_parts_of_a_padded_cache(self, window, num_splits, shared):
    """Lengths within the first part, within the last, and none; what lies behind them is NaN."""
    case = Case(320, 64, 128, heads=4, kv_heads=2, shared_keys=shared, dtype=self.dtype)
    q, k, v, lam = (jnp.concatenate([x] * 3) if x.ndim > 2 else x for x in case.args())
    lengths = jnp.array([313, 50, 0])
    padded = jnp.arange(320) >= lengths[:, None]
    hide = lambda x: jnp.where(padded.reshape(3, 320, *[1] * (x.ndim - 2)), jnp.nan, x)
    keywords = dict(lengths=lengths, window=window, scale=0.1)
    got = self.decode(num_splits=num_splits, **keywords)(q[:, -1], hide(k), hide(v), lam)
    q, k, v = (x.astype(jnp.float32) for x in (q[:, -1], k, v))
    want = self.decode(implementation="naive", **keywords)(q, k, v, lam)
    assert relative_error(got, want) <= self.tolerance[case.dtype] and not got[2].any()

  @pytest.mark.slow
  def test_float16(self):
    case = self.case(2 * self.block + 5, dtype="float16", norm=True)
    self.tolerance = self.lam_tolerance = {"float16": 1e-3}
    self.check(case)


@pytest.mark.gpu_only
class TestDiffAttentionOfThePaper(TestDiffAttention):
  head_dim, value_dim = 128, 256
  remat = staticmethod(jax.checkpoint)


@pytest.fixture
def interpreter():
  gpu_compile.require_interpreter()


@pytest.mark.cpu_only
def test_no_races(interpreter):
  """Over more tiles than are in flight, in the kernels of two query heads to a key head."""
  suite = TestDiffAttention()
  case = suite.case(150, heads=2, kv_heads=1, packed=False)
  with gpu_compile.race_detection():
    suite.check(case)


def test_tables_of_tiles_are_exact():
  """A tile is visited if it holds a pair that is seen; unmasked, if it holds no other."""
  rng = np.random.default_rng(0)
  for _ in range(6):
    length, kv_length = (int(x) for x in rng.integers(1, 40, 2))
    block, tile = (int(x) for x in rng.integers(1, 12, 2))
    causal = bool(rng.integers(2))
    options = Options(
      causal=causal,
      window=int(rng.integers(1, 20)) if causal and rng.integers(2) else None,
      q_offset=int(rng.integers(-5, 20)) if rng.integers(2) else None,
    )
    offsets = jnp.asarray(rng.integers(-3, 20, 2)) if options.q_offset is None else None
    lengths = jnp.asarray(rng.integers(0, kv_length + 1, 2)) if rng.integers(2) else None
    visibility = Visibility(q_offset=offsets, lengths=lengths)
    if packed := bool(rng.integers(2)):
      ids = [jnp.asarray(np.sort(rng.integers(0, 4, (2, n)))) for n in (length, kv_length)]
      visibility = visibility._replace(segment_ids=ids[0], kv_segment_ids=ids[1])
    seen = np.array(
      jnp.broadcast_to(
        reference.visible(options, visibility, length, kv_length), (2, length, kv_length)
      )
    )
    sizes = (2, length, kv_length)
    table = gpu_tiles.key_tiles(options, visibility, sizes, block, tile)
    _check_table(np.asarray(table), seen, block, tile, packed, whole_tiles=True)
    table = gpu_tiles.query_tiles(options, visibility, sizes, tile, block)
    _check_table(np.asarray(table), seen.swapaxes(1, 2), tile, block, packed, whole_tiles=False)


def _check_table(table, seen, block, tile, packed, *, whole_tiles):
  _, rows, columns = seen.shape
  count = -(-columns // tile)
  for row, blocks in zip(seen, table, strict=True):
    assert len(blocks) == -(-rows // block)
    for i, (first, whole, whole_end, end) in enumerate(blocks):
      assert 0 <= first <= whole <= whole_end <= end <= count
      part = row[i * block : (i + 1) * block]
      parts = [part[:, j * tile : (j + 1) * tile] for j in range(count)]
      # Keys past the last must be masked; queries past the last weigh nothing.
      keys_end = [(j + 1) * tile if whole_tiles else (i + 1) * block for j in range(count)]
      fits = [x <= (columns if whole_tiles else rows) for x in keys_end]
      for j, (pairs, fit) in enumerate(zip(parts, fits, strict=True)):
        assert first <= j < end or not pairs.any()
        if whole <= j < whole_end:
          assert pairs.all() and fit
        elif not packed:
          assert not (pairs.all() and fit)
      if end > first and not packed:
        assert parts[first].any() and parts[end - 1].any()


@pytest.mark.parametrize(
  "case",
  [
    "64x128",
    "96x192",
    "128x256",
    "128x256_everything",
    pytest.param("128x128_shared", marks=pytest.mark.slow),
  ],
)
def test_machine_code(case):
  """No register is spilled, no matrix product waits for one, and all fits an H100."""
  reports = gpu_compile.compile_for_h100(f"diff_attention/{case}")
  assert sorted(reports) == sorted(KERNELS)
  _check_machine_code(reports)


def test_machine_code_of_decoding():
  reports = gpu_compile.compile_for_h100("diff_attention_decode/128x256")
  assert list(reports) == ["diff_attention_decode"]
  _check_machine_code(reports)


def _check_machine_code(reports):
  for name, report in reports.items():
    assert report.spilled_bytes == 0 and not report.serialized, (name, report)
    assert report.smem_bytes <= mosaic_gpu.MAX_SMEM_BYTES, (name, report)
    assert report.num_hgmma > 0, (name, report)


@pytest.mark.parametrize(
  "change,match",
  [
    (dict(dtype="float32"), "bfloat16 or float16"),
    (dict(head_dim=80), "dim=80"),
    (dict(value_dim=192), "value_dim=192"),
    (dict(length=0), "No tile"),
    (dict(options=(("scale", -1.0),)), "not positive"),
  ],
  ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_refuses(interpreter, change, match):
  case = dataclasses.replace(Case(4, 64, 64, dtype="bfloat16"), **change)
  options = Options(**dict(case.options))
  with pytest.raises(NotImplementedError, match=match):
    gpu.diff_attention(options, *case.args(), None, Visibility())


def test_refuses_where_mosaic_gpu_cannot_serve(monkeypatch):
  args = Case(4, 64, 64, dtype="bfloat16").args()
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  with pytest.raises(NotImplementedError, match="jax 0.11"):
    gpu.diff_attention(Options(), *args, None, Visibility())


@pytest.mark.parametrize("fields", [dict(fwd_keys=96), dict(dq_stages=0)], ids=str)
def test_tiles_that_are_none(fields):
  with pytest.raises(ValueError, match=next(iter(fields))):
    GpuBlocks(**fields)
