"""The benchmarks that read machine code: what they make of a schedule, and of a real compile."""

import importlib.metadata
import json
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks import gpu_compile, tpu_schedule

_ROOT = pathlib.Path(__file__).parent.parent
_RESULTS = _ROOT / "experiments/results/benchmarks"

# As libtpu writes it: a bundle a line, `>` inside the loop, branches with a region as their target.
_BUNDLES = """
= control target key start
LB: loop body
PF: predicated region fallthrough
= control target key end

     0   :  { %s1_s0 = smov.u32 [#allocation3] } /* Start region 1 */
   0x1   :  { %9 = sbr.rel (%p0_p0) target = $region3 } /* Start region 20 */
   0x2   :  { %s2_s1 = smov.u32 0 } /* End region 20 :: Start/End empty region 3 */
   0x3 LB: > { %s3_s2 = sphi %s2_s1, %s4_s3 } /* Start region 2 */
   0x4   : > { %17 = sbr.rel (%p1_p1) target = $region4 }
   0x5   : > { %18 = dma.general %s3_s2
 strides: (1, 1) } /* Start region 21 :: End region 21 */
   0x6 PF: > { %s5_s4 = sand.u32 1, %s3_s2 } /* Start/End empty region 4 */
   0x7   : > { %20 = sbr.rel (%p2_p2) target = $region5 }
   0x8   : > { %v1_v0 = vld [vmem:[%s5_s4] sm:$0xff] } /* Start region 22 */
   0x9   : > { %21 = sbr.rel (%p3_p3) target = $region6 }
   0xa   : > { %22 = vst [vmem:[%s5_s4] sm:$0xff] %v2_v1 } /* Start region 23 */
   0xb   : > { %23 = vst [vmem:[%s5_s4] sm:$0xff] %v2_v1 } /* End region 23 */
   0xc PF: > { %24 = vmatmul.msk.bf16 %v1_v0 } /* Start/End empty region 6 */
   0xd   : > { %25 = vmatmul.msk.bf16 %v1_v0 } /* End region 22 */
   0xe PF: > { %s4_s3 = sadd.s32 1, %s3_s2 } /* Start/End empty region 5 */
   0xf   : > { %p4_p4 = scmp.ge.s32.totalorder %s4_s3, 66 /* loop exit test */ }
  0x10   :  { %35 = sbr.rel (!%p4_p4) target = $region2 }
  0x11   :  { %36 = vsyncpa [#allocation6], 1 }
"""
_HEAD = """== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
"""


def _table(uses, bundles=18, units=None):
  """A dump's table with `uses[bundle]` of the named units."""
  row = lambda i: (str(uses.get(i, {}).get(name, 0)) for name in tpu_schedule.UNITS[:units])
  return _HEAD + "\n".join(" ".join(row(i)) for i in range(bundles)) + "\n"


def test_schedule_of_a_loop():
  """What lies outside the loop counts for nothing; a branch in its body is rare."""
  uses = {
    0: dict(salu=1),
    0x8: dict(vload=1, fill=2),
    0xA: dict(vstore=1, spill=1),
    0xC: dict(matmul=2),
    0xD: dict(matmul=1),
    0x11: dict(matmul=7),
  }
  schedule = tpu_schedule.read_schedule(_BUNDLES, _table(uses))
  assert (schedule.steps, schedule.loop, schedule.rare) == (64, 14, 3)
  used = {name: count for name, count in schedule.units.items() if count}
  assert used == dict(matmul=3, vload=1, fill=2, vstore=1, spill=1)


@pytest.mark.parametrize(
  "bundles,table,match",
  [
    (_BUNDLES.replace("LB: >", "  : >"), _table({}), "No loop"),
    (_BUNDLES.replace("loop exit test", ""), _table({}), "No loop"),
    (_BUNDLES, _table({}, units=9), "9 units, where 11"),
  ],
  ids=["no-body", "no-exit", "units"],
)
def test_schedules_of_another_form_are_refused(bundles, table, match):
  with pytest.raises(ValueError, match=match):
    tpu_schedule.read_schedule(bundles, table)


def test_a_real_schedule_is_as_committed(tmp_path):
  """Decoding's: no slower than its row by more than a twentieth, and with its memory and spills."""
  (row,) = (
    x
    for x in json.loads((_RESULTS / "tpu_static.json").read_text())["kernels"]
    if (x["case"], x["chip"]) == ("retention/retnet/decode", "v5e")
  )
  try:
    version = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    pytest.skip("compiling for a TPU needs libtpu")
  if version != row["libtpu"]:
    pytest.skip(f"the committed row is of libtpu {row['libtpu']}, and this is {version}")
  output = tmp_path / "static.json"
  command = [sys.executable, "-m", "experiments.benchmarks.tpu_static", f"--output={output}"]
  command += ["--cases=retention/retnet/decode", "--chips=v5e"]
  done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  (got,) = json.loads(output.read_text())["kernels"]
  assert got["kernel"] == "retention_decode" and got["grid_steps"] == row["grid_steps"]
  assert 0 < got["bundles_per_step"] <= 1.05 * row["bundles_per_step"]
  assert got["spills"] <= row["spills"] and got["vmem_bytes"] <= 1.05 * row["vmem_bytes"]


_NOTES = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'retention_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for retention_mosaic_gpu_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 3 barriers, 16 bytes cumulative stack size
"""


@pytest.mark.parametrize("more", ["", "ptxas info : (C7512) Potential Performance Loss: wgmma\n"])
def test_reports_of_an_assembler(tmp_path, more):
  (tmp_path / "retention_0.ptxas").write_text(_NOTES + more)
  code = "HGMMA.64x64x16.F32.BF16 R24\n" * 3 + "FFMA R1, R2\n"
  (tmp_path / "retention_0.sass_ctrl").write_text(code)
  resources = (
    "Resources(smem_scratch_bytes=4096, barrier_counts=Counter({Barrier(arrival_count=128, "
    "num_barriers=2, orders_tensor_core=False): 3, Barrier(arrival_count=384, num_barriers=1, "
    "orders_tensor_core=False): 1}))"
  )
  (tmp_path / "retention_1.resources.txt").write_text(resources)
  ((name, report),) = gpu_compile.read_reports(tmp_path)
  assert name == "retention"
  assert report == gpu_compile.Report(255, 20, bool(more), 4096 + 8 * (2 * 3 + 1), 3)
