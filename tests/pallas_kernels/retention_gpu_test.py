"""Retention's Mosaic GPU kernels: interpreted, watched for races, and as an H100's machine code.

Where the platform is a GPU the suites run on it.
"""

import functools

import gpu_compile
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from retention_suite import NAMES, DecodeSuite, RetentionSuite

from pallas_kernels import mosaic_gpu
from pallas_kernels.retention import gpu, gpu_decode, reference
from pallas_kernels.retention.blocks import GpuBlocks, GpuTile

KERNELS = ("fwd", "bwd_dq", "bwd_dk", "bwd_dv")


class TestChunkwise(RetentionSuite):
  implementation = "pallas_gpu"
  kernels = tuple(f"retention_chunkwise_{name}" for name in KERNELS)
  chunk = gpu.CHUNK
  head_dim = value_dim = 64
  dtype = "bfloat16"
  tolerance = {"bfloat16": 5e-3}
  # A fixed decay's is that of each token's gate, summed, with the last state's rounding in each.
  decay_tolerance = {"bfloat16": 3e-2}
  remat = staticmethod(lambda op: op)  # Which jax refuses for interpreted kernels.

  @pytest.fixture(autouse=True)
  def _interpreter(self):
    gpu_compile.require_interpreter()

  @pytest.mark.parametrize("per_token", [False, True])
  def test_retnet_08_bfloat16(self, per_token):
    self.check(self.case(3 * self.chunk + 12, decays="slow", per_token=per_token))


@pytest.fixture
def interpreter():
  gpu_compile.require_interpreter()


@pytest.mark.gpu_only
class TestChunkwiseOfRetNet(TestChunkwise):
  head_dim, value_dim = 256, 512
  remat = staticmethod(jax.checkpoint)


class TestDecode(DecodeSuite):
  implementation = "pallas_gpu"
  kernels = ("retention_decode",)
  head_dim, value_dim = 32, 128
  gradient_tolerance = 1e-5  # Of the sine of larger outputs.

  def inputs(self, *args, **kwargs):  # One row: the interpreter takes its time.
    inputs = super().inputs(*args, **kwargs)
    return {k: x[:1] if x.ndim > 1 else x for k, x in inputs.items()}

  @pytest.fixture(autouse=True)
  def _interpreter(self):
    gpu_compile.require_interpreter()


def _inputs(length, head_dim, value_dim, batch=1, heads=2, kv_heads=1, per_token=True):
  rng = np.random.default_rng(length)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  decay = rng.exponential(0.2, size=(batch, length, heads) if per_token else (heads,))
  return (
    draw(batch, length, heads, head_dim),
    draw(batch, length, kv_heads, head_dim) * head_dim**-0.5,
    draw(batch, length, kv_heads, value_dim),
    jnp.asarray(-decay, jnp.float32),
    draw(batch, heads, head_dim, value_dim).astype(jnp.float32),
  )


def _outputs_and_grads(op, args):
  """Both outputs, and the gradients of a sum that weighs both of them at random."""

  def weighed(*args):
    out = op(*args)
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16) for x in out]
    return sum(jnp.sum(x * w.astype(x.dtype)) for x, w in zip(out, weights, strict=True)), out

  (_, out), grads = jax.jit(jax.value_and_grad(weighed, range(len(args)), has_aux=True))(*args)
  return *out, *grads


def _assert_matches_recurrent(args, blocks=None, decay_tolerance=1e-2, **options):
  op = lambda *a: gpu.chunkwise(*a, **options, blocks=blocks)
  got = _outputs_and_grads(op, args)
  with jax.enable_x64(True):  # Of the same rounded inputs.
    exact = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
    want = _outputs_and_grads(lambda *a: reference.recurrent(*a, **options), exact)
  for name, a, b in zip(NAMES[: 2 + len(args)], got, want, strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b)
    tolerance = decay_tolerance if name == "dlog_decay" else 5e-3
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), name


@pytest.mark.parametrize("per_token", [False, True])
def test_rows_of_a_state_in_several_blocks(interpreter, per_token):
  """As a state of 256 by 512 has them in the gradients of queries and keys."""
  tile = GpuTile(rows=64, warpgroups=1)
  blocks = GpuBlocks(fwd=tile, bwd_dq=tile, bwd_dk=tile, bwd_dv=tile)
  _assert_matches_recurrent(_inputs(70, 128, 64, per_token=per_token), blocks=blocks)


# Which start within a segment of 128 tokens, and with one.
_DOCUMENTS = jnp.asarray([np.repeat([1, 2, 1], x) for x in ((64, 66, 100), (60, 68, 102))])


@pytest.mark.parametrize(
  "segments,per_token,options",
  [
    (1, False, dict(segment_ids=_DOCUMENTS)),
    (2, False, dict(segment_ids=_DOCUMENTS)),
    (2, True, dict(segment_ids=_DOCUMENTS, lengths=jnp.array([150, 230]))),
  ],
  ids=["one-fixed", "two-fixed", "two-gated-padded"],
)
def test_segments_and_documents(interpreter, segments, per_token, options):
  tile = GpuTile(rows=64, warpgroups=1)
  blocks = GpuBlocks(fwd=tile, bwd_dq=tile, bwd_dk=tile, bwd_dv=tile, segments=segments)
  args = _inputs(230, 64, 64, batch=2, per_token=per_token)
  _assert_matches_recurrent(args, blocks=blocks, decay_tolerance=5e-3, **options)


def test_rounding_stays_in_its_document():
  """Terms that should sum up to zero over each run, and don't quite."""
  rng = np.random.default_rng(0)
  forgets = np.zeros((1, 12, 1), bool)
  forgets[0, [0, 5, 9]] = True
  runs = [slice(0, 5), slice(5, 9), slice(9, 12)]
  terms = rng.normal(size=(1, 12, 1))
  for run in runs:
    terms[:, run] -= terms[:, run].mean(axis=1, keepdims=True)
  want = np.concatenate([np.cumsum(terms[:, run][:, ::-1], 1)[:, ::-1] for run in runs], axis=1)
  off = terms.copy()
  off[:, runs[2]] += 0.1
  got = gpu._sums_behind(jnp.asarray(off, jnp.float32), jnp.asarray(forgets))
  np.testing.assert_allclose(got, want, atol=1e-6)
  # A state that enters the first run leaves it as it is.
  forgets[0, 0] = False
  off[:, runs[0]] += 0.1
  got = gpu._sums_behind(jnp.asarray(off, jnp.float32), jnp.asarray(forgets))
  np.testing.assert_allclose(got[:, 5:], want[:, 5:], atol=1e-6)
  np.testing.assert_allclose(got[:, :5, 0], want[:, :5, 0] + 0.1 * np.arange(5, 0, -1), atol=1e-6)


def test_segments_without_an_initial_state(interpreter):
  """Nothing crosses the first gate: it has no gradient, and leaves no rounding in the others."""
  tile = GpuTile(rows=64, warpgroups=1)
  blocks = GpuBlocks(fwd=tile, bwd_dq=tile, bwd_dk=tile, bwd_dv=tile, segments=2)
  args = _inputs(230, 64, 64, batch=2)[:4]
  _assert_matches_recurrent(args, blocks=blocks, decay_tolerance=5e-3)
  gradient = jax.grad(lambda g: gpu.chunkwise(*args[:3], g, blocks=blocks)[0].sum())(args[3])
  assert not gradient[:, 0].any()


@pytest.mark.cpu_only
@pytest.mark.parametrize(
  "heads,length,head_dim,value_dim,segments",
  [
    (64, 65536, 256, 512, 1),  # RetNet's, at batch 8: two full rounds.
    (8, 65536, 256, 512, 2),  # The same at batch 1, which would be 64 of 132 cores.
    (4, 65536, 256, 512, 4),
    (8, 16384, 64, 64, 4),
    (8, 1024, 256, 512, 1),  # Too short: its states would be moved for little.
    (2, 65536, 256, 256, 16),
    (32, 16384, 128, 128, 1),  # 64 cores, and as many bytes as memory has.
    (100, 8192, 64, 64, 1),
  ],
)
def test_segments_fill_the_card(heads, length, head_dim, value_dim, segments):
  assert GpuBlocks.for_sizes(heads, length, head_dim, value_dim).segments == segments


def test_two_warpgroups_share_queries_and_keys(interpreter):
  tile = GpuTile(rows=128, warpgroups=2)
  blocks = GpuBlocks(fwd=tile, bwd_dq=tile, bwd_dk=tile, bwd_dv=tile)
  _assert_matches_recurrent(_inputs(130, 128, 128, heads=1), blocks=blocks)


def test_three_stages(interpreter):
  tile = GpuTile(rows=64, warpgroups=1, stages=3)
  blocks = GpuBlocks(fwd=tile, bwd_dq=tile, bwd_dk=tile, bwd_dv=tile)
  _assert_matches_recurrent(_inputs(250, 64, 64, heads=1), blocks=blocks)


@pytest.mark.cpu_only
def test_no_races(interpreter):
  """Of two warpgroups, over more chunks than stages, along the sequence and against it."""
  tile = GpuTile(rows=64, warpgroups=2)
  upright, lying = tile, GpuTile(rows=128, warpgroups=1)
  blocks = GpuBlocks(fwd=upright, bwd_dq=lying, bwd_dk=lying, bwd_dv=upright)
  with gpu_compile.race_detection():
    _assert_matches_recurrent(_inputs(200, 64, 128, heads=1), blocks=blocks)


@pytest.mark.cpu_only
def test_no_races_in_decoding(interpreter):
  inputs = TestDecode().inputs()
  with gpu_compile.race_detection():
    jax.block_until_ready(jax.jit(functools.partial(gpu_decode.decode, norm_eps=1e-6))(**inputs))


@pytest.mark.parametrize("head_dim,value_dim,more", [(256, 512, ""), (256, 256, "_gated")])
def test_machine_code(head_dim, value_dim, more):
  """No register is spilled, and no matrix product waits for one."""
  reports = gpu_compile.compile_for_h100(f"retention/{head_dim}x{value_dim}{more}")
  assert sorted(reports) == sorted(f"retention_chunkwise_{name}" for name in KERNELS)
  for name, report in reports.items():
    assert report.spilled_bytes == 0 and not report.serialized, (name, report)
    assert report.smem_bytes <= mosaic_gpu.MAX_SMEM_BYTES, (name, report)
    # Of 16 deep instructions: the scores', the state's read-out and update, the values'.
    tile = getattr(
      GpuBlocks.for_sizes(32, 4096, head_dim, value_dim), name[len("retention_chunkwise_") :]
    )
    assert report.num_hgmma == 3 * tile.rows // 16 + 4, (name, report)


def test_machine_code_under_transformations():
  reports = gpu_compile.compile_for_h100("retention/64x64_transformed")
  assert set(reports) == {f"retention_chunkwise_{name}" for name in KERNELS}
  assert all(report.spilled_bytes == 0 for report in reports.values()), reports


def test_machine_code_of_segments():
  reports = gpu_compile.compile_for_h100("retention/64x64_row")  # In four, see above.
  assert set(reports) == {f"retention_chunkwise_{name}" for name in KERNELS}
  for report in reports.values():
    assert report.spilled_bytes == 0 and not report.serialized, reports
    assert report.num_hgmma == 16, reports


def test_machine_code_of_decoding():
  reports = gpu_compile.compile_for_h100("retention_decode/256x512")
  assert list(reports) == ["retention_decode"]
  assert reports["retention_decode"].spilled_bytes == 0, reports


@pytest.mark.parametrize(
  "change,match",
  [
    (dict(q=jnp.float32), "bfloat16 or float16"),
    (dict(head_dim=96), "head_dim=96"),
    (dict(head_dim=320), "head_dim=320"),
    (dict(value_dim=576), "value_dim=576"),
    (dict(length=0), "empty"),
  ],
  ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_refuses(interpreter, change, match):
  sizes = dict(length=4, head_dim=64, value_dim=64) | {k: v for k, v in change.items() if k != "q"}
  q, *args = _inputs(**sizes)
  with pytest.raises(NotImplementedError, match=match):
    gpu.chunkwise(q.astype(change.get("q", q.dtype)), *args[:3])


def test_decoding_refuses_rows_that_threads_do_not_share_evenly(interpreter):
  inputs = {k: x[..., :64] for k, x in TestDecode().inputs().items()}
  with pytest.raises(NotImplementedError, match="value_dim=64"):
    gpu_decode.decode(**inputs)


def test_refuses_where_mosaic_gpu_cannot_serve(monkeypatch):
  args = _inputs(4, 64, 64)[:4]
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  with pytest.raises(NotImplementedError, match="jax 0.11"):
    gpu.chunkwise(*args)


@pytest.mark.parametrize(
  "kind,platform,refused",
  [
    ("NVIDIA H200", "gpu", None),
    ("NVIDIA B200", "gpu", "wgmma"),
    ("TPU v5e", "tpu", "not on 'tpu'"),
  ],
)
def test_target_is_the_meshs_device(interpreter, kind, platform, refused):
  device = jax.sharding.AbstractDevice(kind, 132, platform)
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    if refused is None:
      return mosaic_gpu.refuse_unless_supported()
    with pytest.raises(NotImplementedError, match=refused):
      mosaic_gpu.refuse_unless_supported()


@pytest.mark.parametrize(
  "tile,rows,columns",
  [
    (GpuTile(96, 1), 96, 64),
    (GpuTile(128, 1), 192, 64),
    (GpuTile(64, 2), 64, 64),
    (GpuTile(64, 3), 64, 192),
    (GpuTile(64, 1, stages=1), 64, 64),
    (GpuTile(256, 2, stages=3), 256, 128),
  ],
  ids=str,
)
def test_tile_that_does_not_fit(tile, rows, columns):
  with pytest.raises(ValueError, match="needs|takes"):
    tile.check(rows, columns)
