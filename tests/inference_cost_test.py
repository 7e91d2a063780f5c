"""Figures 1 and 6: the closed forms of what is remembered, and what a compiled step holds."""

import json

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import inference_cost
from latentlab.models import init_cache, retnet, transformer

_SMALL = dict(num_layers=2, embed_dim=128, num_heads=4)


def _small(model, dtype="float32"):
  return inference_cost.model_config(dict(name=model, dtype=dtype, **_SMALL), vocab_size=64)


def _elements(model, length):
  section = dict(name=model, preset="6b7", dtype="bfloat16")
  config = inference_cost.model_config(section, vocab_size=1024)
  (d,), layers = {config.decoder.embed_dim}, config.decoder.num_layers
  cache = jax.eval_shape(lambda: init_cache(config, 1, length))
  floats = [x for x in jax.tree.leaves(cache) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)]
  return d, layers, sum(x.size for x in floats), {x.dtype.name for x in floats}


def test_states_have_512_d_elements_a_layer_whatever_the_length():
  d, layers, elements, dtypes = _elements("retnet", 1)
  assert elements == layers * d * 512 == 67_108_864 and dtypes == {"float32"}
  assert _elements("retnet", 8192)[2] == elements


def test_keys_and_values_have_2_d_elements_a_layer_and_token():
  d, layers, elements, dtypes = _elements("transformer", 8192)
  assert elements == 8192 * 2 * layers * d == 8192 * 262_144 and dtypes == {"bfloat16"}
  # A state is as large as the keys and values of 256 tokens; in float32, as of 512 in bfloat16.
  assert _elements("retnet", 1)[2] == 256 * elements // 8192


@pytest.mark.parametrize("model", ["retnet", "transformer"])
def test_a_step_holds_weights_and_cache_once(model):
  """Cache and weights are all that comes in, and the cache is updated where it lies."""
  point = inference_cost.decode_bytes(_small(model), 2, 300, None, 1)
  inputs = point["weight_bytes"] + point["cache_bytes"]
  assert inputs <= point["argument_bytes_per_chip"] < inputs + 10_000
  assert 0 <= point["cache_bytes"] - point["updated_in_place_bytes_per_chip"] < 10_000
  # One layer's at most is held a second time.
  assert point["temporary_bytes_per_chip"] < 1.1 * point["cache_bytes"] / _SMALL["num_layers"]
  total = point["argument_bytes_per_chip"] + point["temporary_bytes_per_chip"]
  assert total <= point["total_bytes_per_chip"] < total + 10_000


def test_heads_are_split_over_chips(tpu_mesh):
  tpu_mesh("v5e:2x2")  # Skips without libtpu.
  config = _small("transformer", "bfloat16")
  one, four = (inference_cost.decode_bytes(config, 8, 512, "v5e:2x2", n) for n in (1, 4))
  assert four["cache_bytes"] == one["cache_bytes"] and four["weight_bytes"] == one["weight_bytes"]
  shared = four["argument_bytes_per_chip"] / one["argument_bytes_per_chip"]
  assert 0.25 <= shared < 0.27


def test_the_command(tmp_path, monkeypatch, capsys):
  for presets in (retnet.PRESETS, transformer.PRESETS):
    monkeypatch.setitem(presets, "small", _SMALL)
  times = dict(
    batch_size=1,
    length=9,
    num_params=5,
    ours=dict(decode_step_ms=2.0, decode_tokens_per_second=dict(best=4.0), cache_bytes=3),
  )
  slow = times["ours"] | dict(decode_step_ms=7.0)
  slower = times | dict(ours=slow, peer=slow | dict(decode_step_ms=5.0))  # The faster one counts.
  times["peer"] = slow
  cases = dict(cases=dict(retnet_a_b1_t9=times, transformer_a_b1_t9=slower))
  (tmp_path / "times.json").write_text(json.dumps(cases))
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  values = dict(preset="small", targets=["cpu"], cost_lengths=["8", "512"], cost_batches=["2"])
  values |= dict(vocab_size=64, times=f"{tmp_path}/times.json", cost_output=f"{tmp_path}/out/fig")
  with flagsaver.flagsaver(**values):
    inference_cost.main()
    once = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "fig.json").read_text())
    # A second run compiles nothing anew.
    monkeypatch.setattr(inference_cost, "decode_bytes", None)
    inference_cost.main()
    assert capsys.readouterr().out == once
  points = result["bytes"]
  assert list(points) == ["retnet_cpu_b2_t512", "transformer_cpu_b2_t8", "transformer_cpu_b2_t512"]
  ratios = {(r["what"], r["length"]): r["ratio"] for r in result["ratios"]}
  assert ratios["step time", 9] == 2.5 and ratios["memory", 8] < ratios["memory", 512]
  assert (tmp_path / "out" / "fig.png").stat().st_size > 1000
  assert "15.6" in once and "2.50" in once


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(cost_lengths=["none"]), "--cost_lengths=none: give positive numbers"),
    (dict(targets=["tpu"]), "unknown .'tpu'.; choose among .'cpu'"),
  ],
)
def test_bad_flags_are_named(change, message):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**change), pytest.raises(ValueError, match=message):
    inference_cost.main()
