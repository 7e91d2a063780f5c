"""What the benchmark of latents counts and compares, without timing anything."""

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from experiments.benchmarks import latents
from latentlab.models import dit, latentlm

WIDTH = 96


@pytest.fixture(scope="module")
def ours():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(latents, "NUM_LAYERS", 2)  # Of eight the suite's compiler would take long.
    return latents.Latents(latents.model_config(WIDTH), 2)


def test_twins_have_equal_parameters():
  for width in (96, 192):
    own = latentlm.num_params(latents.model_config(width))["total"]
    assert own == pytest.approx(latents.twin_config(width).num_params, rel=0.005)


@pytest.mark.parametrize("compiled", [False, True])
def test_operations_are_those_of_the_formula(compiled, monkeypatch):
  """A latent's channels, attention to 16 others, norms and activations are a few per cent."""
  monkeypatch.setattr(latents, "NUM_LAYERS", 2)
  one = latents.counted(latents.model_config(192), compiled=compiled)
  want = latents.formula(latents.NUM_LAYERS, 192, 4 * 192, latents.HEAD_DEPTH)
  for name, value in want.items():
    assert 1.0 < one[name] / value < 1.05, name
  # 12 h^2 of each block; its six modulations, 6 h^2, are one of 16 latents'.
  twin = latents.counted_twin(latents.twin_config(192), compiled=compiled)
  assert 1.0 < twin / (latents.NUM_LAYERS * (12 + 6 / 16) * 192**2) < 1.05


def test_presets_are_counted_from_shapes_alone():
  """Medium: 403M multiply-adds of the backbone, 49M of each pass of the head, for each stream."""
  before = {id(x) for x in jax.live_arrays()}
  one = latents.counted(latentlm.class_conditional("medium"))
  assert one["backbone"] == pytest.approx(403e6, rel=0.05)
  assert one["head_pass"] == pytest.approx(49e6, rel=0.01)
  new = [x for x in jax.live_arrays() if id(x) not in before]
  assert sum(x.size for x in new) < 1e6
  twin = latents.counted_twin(dit.preset("medium", dim=16, grid=(16, 16), num_classes=1000))
  by_steps = {s: latents.costs(one, twin, s) for s in (1, 5, 20)}
  # At 20 steps the head is 2.4 times the backbone, and at 5 it is not the larger part.
  shares = [cost["head_share"] for cost in by_steps.values()]
  assert shares == sorted(shares) and shares[1] < 0.5
  assert shares[2] / (1 - shares[2]) == pytest.approx(2.4, abs=0.1)
  passes = 20 * twin / (one["backbone"] + 20 * one["head_pass"])
  assert by_steps[20]["twin_over_ours"] == pytest.approx(passes)


def test_the_python_loop_draws_the_same(ours):
  assert latents.check(ours, 3) < 1e-4
  drawn = ours.compiled(3)
  assert drawn.shape == (2, 16, latents.DIM) and np.isfinite(drawn).all()


def test_what_differs_is_not_timed(ours, monkeypatch):
  compiled = ours.compiled(3)
  monkeypatch.setattr(ours, "python_loop", lambda num_steps: compiled.at[1, 7, 2].add(0.1))
  with pytest.raises(RuntimeError, match="differ by 0.1"):
    latents.check(ours, 3)


def test_parts_are_a_line_over_steps():
  line = lambda s: dict(ms_per_latent=2.0 + 0.5 * s, cpu_ms_per_latent=4.0 + s)
  reports = dict(latentlm=line(20), latentlm_1_steps=line(1), latentlm_5_steps=line(5))
  want = dict(head_pass_ms=0.5, backbone_and_loop_ms=2.0, head_share=round(10 / 12, 3))
  found = latents.parts(reports)
  assert found["clock"] == pytest.approx(want)
  want = dict(head_pass_ms=1.0, backbone_and_loop_ms=4.0, head_share=round(20 / 24, 3))
  assert found["cpu"] == pytest.approx(want)


def test_the_plot_has_all_cases(tmp_path):
  case = lambda width, batch: dict(
    width=width,
    batch_size=batch,
    ratio=dict(dit=dict(per_cpu_second_best=2.0), python_loop=dict(per_cpu_second_best=3.0)),
    counted=dict(twin_over_ours=4.0, head_share=0.7),
    time_of_parts=dict(cpu=dict(head_share=0.6)),
  )
  cases = {f"{w}_{b}": case(w, b) for w in (96, 192) for b in (1, 8)}
  latents.plot(cases, tmp_path / "a.png")
  assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(latent_widths=["64"]), "--latent_widths=64: give multiples of 96"),
    (dict(latent_batches=["0"]), "--latent_batches=0: give positive numbers"),
    (dict(latent_batches=["many"]), "--latent_batches=many: give positive numbers"),
  ],
)
def test_bad_flags_are_named(change, message):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**change), pytest.raises(app.UsageError, match=message):
    latents.main([""])
