"""What the benchmarks of architectures read and count, without timing anything."""

import pytest

from experiments.benchmarks import architectures, tpu_train
from latentlab.models import build_config, num_params


def test_collectives_are_read_from_a_program():
  text = """
  %a = bf16[4,8]{1,0} all-gather(bf16[1,8] %x), dimensions={0}
  %b = (f32[2]{0}, f32[16]{0}) all-gather-start(f32[2] %y), dimensions={0}
  %c = f32[16]{0} all-gather-done((f32[2], f32[16]) %b)
  %e = (bf16[8,128], bf16[8,128], u32[], u32[]) collective-permute-start(bf16[8,128] %w)
  %f = (f32[16], f32[64]) all-reduce-start(f32[16] %v, f32[64] %u), to_apply=%add
  %d = f32[2,3]{1,0} reduce-scatter(f32[8,3] %z), to_apply=%add
  """
  assert tpu_train.collectives(text) == {
    "all-gather": dict(count=2, bytes=4 * 8 * 2 + 16 * 4),
    "all-reduce": dict(count=1, bytes=320),
    "reduce-scatter": dict(count=1, bytes=24),
    "collective-permute": dict(count=1, bytes=2048),
  }


def test_models_have_about_equal_parameters():
  width, layers = 256, 4
  count = {}
  for name, section in architectures.MODELS.items():
    sizes = dict(num_layers=layers, embed_dim=width) | section(width)
    count[name] = num_params(build_config(sizes, architectures.VOCAB_SIZE))["body"]
  assert max(count.values()) < 1.09 * min(count.values()), count


def test_ratios_stand_beside_counted_operations():
  seconds = lambda t: dict(prefill_8=dict(best=t, median=t), decode_8=dict(best=t, median=t))
  report = {
    "transformer": dict(seconds=seconds(2.0), flops=dict(prefill_8=10.0)),
    "yoco": dict(seconds=seconds(1.0), flops=dict(prefill_8=4.0)),
  }
  assert architectures.ratios(report)["yoco"] == {
    "prefill_8": dict(time=0.5, flops=0.4),
    "decode_8": dict(time=0.5, flops=None),
  }


@pytest.mark.parametrize("length", [64, 256])
def test_counted_operations_of_a_prompt_leave_the_cross_decoder_out(length):
  """The cross-decoder's share is that of one row, up to a row in `length`."""
  sizes = dict(num_layers=2, embed_dim=128) | architectures.MODELS["yoco"](128)
  decoder = build_config(sizes, 7).decoder
  whole, early = decoder.flops_per_token(length) * length, decoder.prefill_flops(length)
  cross = decoder.stages[1].pattern[0]
  per_token = cross.mixer.flops_per_token(128, length) + cross.feed_forward.flops_per_token(128)
  assert early == pytest.approx(whole - length * per_token, rel=0.01)
  assert early < 0.75 * whole
