"""The TPU kernels: the suite of all implementations, interpreted; races; and real compiles."""

import dataclasses
import functools

import diff_attention_suite
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_compile import interpreted

from pallas_kernels.diff_attention import (
  IMPLEMENTATIONS,
  diff_attention,
  diff_attention_decode,
  tpu,
)
from pallas_kernels.diff_attention.blocks import TpuBlocks, TpuTile

_TILE = TpuTile(128, 128, 128)
_FUSED = TpuBlocks(_TILE, _TILE, _TILE, _TILE)
_APART = dataclasses.replace(_FUSED, bwd=None)


def _use(monkeypatch, blocks):
  op = functools.partial(tpu.diff_attention, blocks=blocks)
  monkeypatch.setitem(IMPLEMENTATIONS, "pallas_tpu", op)


class TestTpu(diff_attention_suite.DiffAttentionSuite):
  implementation = "pallas_tpu"
  kernels = ("diff_attention_fwd", "diff_attention_bwd")
  decode_kernels = ("diff_attention_decode",)
  block = 128

  @pytest.fixture(autouse=True)
  def _small_tiles(self, monkeypatch):
    _use(monkeypatch, _FUSED)

  @pytest.mark.parametrize("options", [dict(), dict(window=130), dict(causal=False)], ids=str)
  def test_backward_in_two_kernels(self, options, monkeypatch):
    _use(monkeypatch, _APART)
    case = self.case(300, options=tuple(options.items()), heads=4, lam="token", norm=True)
    self.check(case)
    program = str(jax.make_jaxpr(jax.grad(lambda q, *a: self.op(case)(q, *a).sum()))(*case.args()))
    assert "diff_attention_bwd_dq" in program and "diff_attention_bwd_dkv" in program

  def test_tiles_of_unlike_sizes(self, monkeypatch):
    wide, high = TpuTile(128, 256, 128), TpuTile(256, 128, 128)
    _use(monkeypatch, TpuBlocks(wide, high, high, wide))
    self.check(self.case(600, padded=True, lse=True))

  def test_heads_side_by_side(self):
    """Heads that are 128 wide are read where they lie, and others are put before the length."""
    self.check(self.case(140, head_dim=64, value_dim=128, heads=4, shared_keys=True, norm=True))
    self.check(self.case(140, head_dim=64, value_dim=128, dtype="bfloat16"))

  def test_tiles_that_fit_no_chip_are_refused(self):
    with pytest.raises(ValueError, match="divides keys"):
      TpuTile(128, 128, 96)
    with pytest.raises(ValueError, match="multiple of 128"):
      TpuTile(64, 128, 128).check(256, 256)

  def test_long_sequences_need_two_kernels(self):
    assert TpuBlocks.for_sizes(4096, 4096, 128, 256).bwd is not None
    assert TpuBlocks.for_sizes(2**20, 2**20, 128, 256).bwd is None


@pytest.mark.parametrize("blocks", [_FUSED, _APART], ids=["fused", "apart"])
def test_modelled_memories_and_races(blocks, monkeypatch):
  _use(monkeypatch, blocks)
  case = diff_attention_suite.Case(200, 8, 16, lam="token", packed=True, padded=True)
  with interpreted(detect_races=True):
    TestTpu().check(case)


def _compile(mesh, op, batch, length, heads, kv_heads, head_dim, dtype="bfloat16", shared=False):
  with jax.set_mesh(mesh):
    whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    maps = () if shared else (2,)
    shapes = [
      ((batch, length, heads, 2, head_dim), dtype),
      ((batch, length, kv_heads, *maps, head_dim), dtype),
      ((batch, length, kv_heads, 2 * head_dim), dtype),
      ((heads,), "float32"),
    ]
    args = [jax.ShapeDtypeStruct(s, jnp.dtype(d), sharding=whole) for s, d in shapes]
    return jax.jit(op).lower(*args).compile()


def _gradients(op):
  return jax.grad(lambda *args: jnp.sum(op(*args).astype(jnp.float32)), range(4))


# A v5p has half the vector memory of the others, and gets the wider heads.
_CHIPS = (("v5e:2x2", 64), ("v5e:2x2", 128), ("v5p:2x2x1", 128), ("v6e:2x2", 128))


@pytest.mark.parametrize("topology,head_dim", _CHIPS)
def test_compiles_for_tpus(topology, head_dim, tpu_mesh):
  """The paper's shapes at 4096 tokens, with the norm; what the kernels need of memory is there."""
  op = functools.partial(diff_attention, implementation="pallas_tpu", eps=1e-5, post_scale=0.8)
  step = _gradients(op)
  compiled = _compile(tpu_mesh(topology), step, 1, 4096, 2, 2, head_dim)
  for name in ("diff_attention_fwd", "diff_attention_bwd"):
    assert name in compiled.as_text()
  # Not even one map of one head in float32.
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 4096


@pytest.mark.parametrize(
  "options",
  [
    dict(window=700, return_lse=True, q_offset=jnp.array([3]), lengths=jnp.array([1000])),
    dict(segment_ids=jnp.zeros((1, 1111), jnp.int32), causal=False),
  ],
  ids=lambda x: "-".join(x),
)
@pytest.mark.parametrize("blocks", ["apart", pytest.param("fused", marks=pytest.mark.slow)])
def test_compiles_with_every_option(options, blocks, tpu_mesh, monkeypatch):
  """At sizes that are no multiple of anything, with shared keys and heads."""
  options = {n: np.asarray(x) if isinstance(x, jax.Array) else x for n, x in options.items()}
  if blocks == "apart":
    tile = TpuTile(384, 384, 384)
    _use(monkeypatch, TpuBlocks(tile, None, tile, tile))

  def op(q, k, v, lam):
    arrays = {n: jnp.asarray(x) for n, x in options.items() if isinstance(x, np.ndarray)}
    out = diff_attention(q, k, v, lam, implementation="pallas_tpu", **options | arrays)
    return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(out))

  mesh = tpu_mesh("v5e:2x2")
  compiled = _compile(mesh, _gradients(op), 1, 1111, 4, 2, 48, "float32", shared=True)
  names = ["diff_attention_fwd", "diff_attention_bwd"]
  for name in names if blocks == "fused" else names[:1] + [names[1] + x for x in ("_dq", "_dkv")]:
    assert name in compiled.as_text()


@pytest.mark.parametrize("topology,head_dim", _CHIPS)
def test_decoding_compiles_for_tpus(topology, head_dim, tpu_mesh):
  mesh = tpu_mesh(topology)
  with jax.set_mesh(mesh):
    whole = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [
      ((8, 8, 2, head_dim), jnp.bfloat16),
      ((8, 4096, 4, 2, head_dim), jnp.bfloat16),
      ((8, 4096, 4, 2 * head_dim), jnp.bfloat16),
      ((8,), jnp.float32),
      ((8,), jnp.int32),
    ]
    args = [jax.ShapeDtypeStruct(*x, sharding=whole) for x in shapes]
    options = dict(num_splits=2, eps=1e-5, window=3000, implementation="pallas_tpu")
    op = lambda *args: diff_attention_decode(*args[:4], lengths=args[4], **options)
    assert "diff_attention_decode" in jax.jit(op).lower(*args).compile().as_text()
