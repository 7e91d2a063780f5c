"""Retention's TPU kernels: the suites in interpret mode, and real compiles, which need no TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from retention_suite import Case, DecodeSuite, RetentionSuite, outputs_and_gradients
from tpu_compile import compile_for, interpreted

from latentlab import ops
from pallas_kernels import mosaic_tpu
from pallas_kernels.retention import retention, retention_decode, tpu
from pallas_kernels.retention.blocks import Sizes, TpuBlocks, TpuTile

KERNELS = (
  "retention_chunkwise_fwd",
  "retention_chunkwise_bwd_dq",
  "retention_chunkwise_bwd_dkv",
)
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


class TestInterpreted(RetentionSuite):
  implementation = "pallas_tpu"
  kernels = KERNELS
  chunk = 128
  # A fixed decay's gradient weighs the difference at each token by its position.
  decay_tolerance = {"float32": 3e-4, "bfloat16": 5e-3}

  def test_heads_side_by_side(self):
    """Multiples of 128 are not transposed."""
    self.check(Case(200, 128, 256))

  @pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 1)], ids=["alone", "part-of-a-group"])
  def test_blocks_change_nothing(self, heads, kv_heads):
    """Kernels may differ in theirs, and a step may have a part of the heads that share a key."""
    case = self.case(300, heads=heads, kv_heads=kv_heads)
    blocks = TpuBlocks(TpuTile(256, 1), TpuTile(128, 2), TpuTile(128, 1))
    op = lambda q, k, v, g, state: tpu.chunkwise(q, k, v, g, state, blocks=blocks)
    got, want = (outputs_and_gradients(f, case.args()) for f in (op, self.op()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)

  def test_modelled_memories_and_races(self):
    case = self.case(150, per_token=True, padded=True, heads=1, kv_heads=1)
    with interpreted(detect_races=True):
      self.check(case)


class TestDecodeInterpreted(DecodeSuite):
  implementation = "pallas_tpu"
  kernels = ("retention_decode",)

  def test_interpreted_without_races(self):
    args = self.inputs()
    with interpreted(detect_races=True):
      out, state = retention_decode(**args, implementation="pallas_tpu")
    want, want_state = self.want(**args)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(state, want_state, atol=1e-5)


def _gradients(op, *, learned):
  """Gradients of all that is learned, through outputs and last state."""

  def run(q, k, v, log_decay, state, dout, dstate):
    fixed = () if learned else (log_decay,)
    args = (q, k, v, log_decay) if learned else (q, k, v)
    out, vjp = jax.vjp(lambda *a: op(*a, *fixed, initial_state=state), *args)
    return out, vjp((dout, dstate))

  return run


def _shapes(batch, length, heads, head_dim, value_dim, *, per_token, dtype="bfloat16", axes=()):
  """Of `_gradients`, laid out over `axes` of a mesh for batch, length and heads."""
  b, t, n = axes or (None, None, None)
  lead, tokens = (batch, length, heads), P(b, t, n)
  state = ((batch, heads, head_dim, value_dim), "float32", P(b, n))
  return [
    *(((*lead, dim), dtype, tokens) for dim in (head_dim, head_dim, value_dim)),
    (lead, "float32", tokens) if per_token else ((heads,), "float32", P(n)),
    state,
    ((*lead, value_dim), dtype, tokens),
    state,
  ]


@pytest.mark.parametrize(
  "topology,value_dim,per_token",
  [
    ("v5e:2x2", 256, True),
    ("v5e:2x2", 512, False),
    ("v5p:2x2x1", 512, False),  # Of half the others' vector memory.
    ("v6e:2x2", 512, False),  # Of larger chunks than the others'.
    ("v6e:2x2", 256, True),
  ],
)
def test_compiles_for_a_tpu(tpu_mesh, topology, value_dim, per_token):
  op = _gradients(functools.partial(retention, implementation="pallas_tpu"), learned=per_token)
  mesh = tpu_mesh(topology)
  program = compile_for(mesh, op, *_shapes(1, 520, 4, 256, value_dim, per_token=per_token))
  for name in KERNELS:
    assert name in program.text
  assert len(program.vmem_bytes) == 3
  sizes = Sizes(1, 520, 4, 4, 256, value_dim, 2)
  with jax.set_mesh(mesh):
    expected = TpuBlocks.for_sizes(sizes).fwd.vmem_bytes(sizes)
    assert max(program.vmem_bytes.values()) <= expected <= mosaic_tpu.vmem_limit_bytes()


def test_compiles_small_and_odd_heads(tpu_mesh):
  """What Mosaic pads itself, in both dtypes, with lengths and documents."""
  options = dict(
    lengths=jnp.array([300, 130]),
    segment_ids=jnp.asarray(np.arange(600).reshape(2, 300) // 70),
    implementation="pallas_tpu",
  )
  for dtype, head_dim, value_dim in (("float32", 20, 36), ("bfloat16", 60, 100)):
    op = _gradients(functools.partial(retention, **options), learned=True)
    shapes = _shapes(2, 300, 1, head_dim, value_dim, per_token=False, dtype=dtype)
    program = compile_for(tpu_mesh("v5e:2x2"), op, *shapes)
    assert all(name in program.text for name in KERNELS)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_decode_compiles_in_place(tpu_mesh, topology):
  step = functools.partial(retention_decode, norm_eps=1e-6, implementation="pallas_tpu")
  lead = (2, 8)
  shapes = [
    *(((*lead, dim), "bfloat16") for dim in (256, 256, 512)),
    ((8,), "float32"),
    ((*lead, 256, 512), "float32"),
    ((*lead, 512), "bfloat16"),
  ]

  def decode(*args):
    # The state is the carry of a loop, and its copies would show in the program.
    *token, state, gate = args
    return jax.lax.fori_loop(
      0, 4, lambda _, c: step(*token, c[1], gate=gate), (jnp.zeros_like(gate), state)
    )

  text = compile_for(tpu_mesh(topology), decode, *shapes).text
  loop = text[: text.index("ENTRY")]  # The entry may copy what it was not given.
  (call,) = [x for x in loop.splitlines() if "tpu_custom_call" in x]
  assert "retention_decode" in call and "output_to_operand_aliasing={{1}:" in call
  assert not [x for x in loop.splitlines() if "f32[2,8,256,512]" in x and " copy(" in x]


@pytest.mark.parametrize(
  "axes,spec",
  [
    (dict(data=2, tensor=2), ("data", None, "tensor")),
    (dict(data=2, seq=2), ("data", "seq", None)),
  ],
  ids=["batch-heads", "batch-sequence"],
)
def test_sharded_without_gathers(tpu_mesh, axes, spec):
  """Each device runs the kernels on its own part of the arrays."""
  op = functools.partial(ops.retention, implementation="pallas_tpu", spec=P(*spec))
  shapes = _shapes(2, 512, 4, 128, 128, per_token=True, axes=spec)
  program = compile_for(tpu_mesh("v5e:2x2", **axes), _gradients(op, learned=True), *shapes)
  assert all(name in program.text for name in KERNELS)
  assert "all-gather" not in program.text and "all-to-all" not in program.text
  assert ("collective-permute" in program.text) == (spec[1] is not None)


def test_is_the_default_on_a_tpu(tpu_mesh):
  shapes = _shapes(1, 128, 1, 128, 128, per_token=False)[:4]
  program = compile_for(tpu_mesh("v5e:2x2"), lambda *a: retention(*a)[0], *shapes)
  assert "retention_chunkwise_fwd" in program.text


@pytest.mark.parametrize(
  "shape,dtype,match",
  [
    ((1, 8, 1, 4), "float16", "float16"),
    ((1, 8, 1, 1), "float32", "lanes"),
    ((1, 0, 1, 4), "float32", "empty"),
  ],
  ids=["dtype", "one-column", "no-tokens"],
)
def test_refuses_with_a_reason(shape, dtype, match):
  x = jnp.zeros(shape, dtype)
  with pytest.raises(ExceptionGroup) as caught:
    retention(x, x, x, jnp.zeros(1), implementation="pallas_tpu")
  assert match in str(caught.value.exceptions[0])


def test_tiles_check_themselves():
  sizes = Sizes(batch=1, length=512, heads=6, kv_heads=2, head_dim=256, value_dim=512, itemsize=2)
  TpuTile(128, 3).check(sizes)
  for tile, match in (
    (TpuTile(96, 3), "multiple of 128"),
    (TpuTile(128, 4), "divide"),
    (TpuTile(128, 2), "groups"),
    (TpuTile(512 * 128, 6), "bytes"),
  ):
    with pytest.raises(ValueError, match=match):
      tile.check(sizes)
  with pytest.raises(NotImplementedError, match="bytes"):
    TpuBlocks.for_sizes(Sizes(1, 512, 1, 1, 4096, 4096, 2))
