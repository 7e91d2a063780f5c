"""From another library's files to a workdir that is used, and back to files, by the commands."""

import json
import re

import forked_binaries
import jax
import numpy as np
import pytest

from experiments.configs import quickstart_latent
from latentlab import interop
from latentlab.models import build_config
from latentlab.models.latentlm import RELEASE
from latentlab.train import loop

VOCAB = 258  # Bytes, and the tokenizer's two of its own.
SIZES = dict(num_layers=2, embed_dim=16, num_heads=2, mlp_dim=20)
MODELS = {
  "diffllama": dict(name="diff_transformer", head_norm_affine=False, num_kv_heads=1, **SIZES),
  "torchscale": dict(name="torchscale_retnet", **SIZES),
  "yoco": dict(name="yoco", num_self_heads=4, num_kv_heads=1, **SIZES),
}
SETTINGS = {
  "diffllama": ["head_layout=neighbour", "rope_layout=interleaved"],
  "torchscale": ["feed_forward=swiglu", "scale_embeddings=true"],
  "yoco": ["chunk_size=8"],
}


def _run(module, *args, fails=False):
  code, output, errors = forked_binaries.run(module, *args)
  assert code == int(fails), errors
  return errors if fails else output


@pytest.fixture(params=MODELS)
def exported(request, tmp_path):
  """A library, and a folder as it would write one."""
  config = build_config(MODELS[request.param], VOCAB)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32),
    interop.parameter_shapes(config),
  )
  folder = tmp_path / "theirs"
  folder.mkdir()
  interop.write(folder / "model.safetensors", interop.EXPORTERS[request.param](config, params))
  if file := interop.CONFIG_FILES.get(request.param):
    (folder / file.name).write_text(json.dumps(file.make(config)))
  return request.param, folder


@pytest.mark.slow
def test_a_folder_is_imported_used_and_exported(exported, tmp_path):
  library, folder = exported
  workdir, back = tmp_path / "run", tmp_path / "back"
  settings = [f"--set={item}" for item in SETTINGS[library]]
  _run(
    "import_weights", f"--from={library}", f"--input={folder}", f"--workdir={workdir}", *settings
  )
  if library != "torchscale":  # Its own test samples from it.
    text = _run("generate", f"--workdir={workdir}", "--prompt=def", "--num_tokens=4", "--greedy")
    assert text.startswith("def")
  export = ("export_weights", f"--to={library}", f"--workdir={workdir}", f"--output={back}")
  _run(*export)
  assert {x.name for x in back.iterdir()} == {x.name for x in folder.iterdir()}
  got, want = interop.read(back), interop.read(folder)
  assert got.keys() == want.keys()
  for name, x in want.items():
    np.testing.assert_array_equal(got[name], x, err_msg=name)
  if library == "torchscale":
    assert "exists; give another place" in _run(*export, fails=True)
  else:
    name = interop.CONFIG_FILES[library].name
    assert interop.read_json(back / name) == interop.read_json(folder / name)


@pytest.mark.slow
def test_weights_over_latents_take_the_place_of_a_runs(tmp_path):
  """Out of one run, into a new one over the same latents, and out of that: the same file."""
  config = quickstart_latent.get_config("smoke")
  config.model.update(RELEASE | dict(tie_embeddings=False))
  config.latents.head.input_bias = True
  config.train_steps = config.checkpoint_steps = 2
  config.tokenizer.train_steps = config.tokenizer.checkpoint_steps = 2
  config.evals = config.tokenizer.evals = {}
  config.sample.num_samples = config.tokenizer.sample.num_samples = 0
  config.data.cache_dir = str(tmp_path / "cache")
  run, new, files = (
    tmp_path / "run",
    tmp_path / "new",
    [tmp_path / f"{i}.safetensors" for i in "ab"],
  )
  loop.train(config, run)
  _run("export_weights", "--to=latentlm", f"--workdir={run}", f"--output={files[0]}")
  into = ("import_weights", "--from=latentlm", f"--input={files[0]}", f"--workdir={new}")
  assert "needs --like" in _run(*into, fails=True)
  assert "of a LatentLMConfig" in _run(*into, f"--like={run}/tokenizer", fails=True)
  _run(*into, f"--like={run}")
  _run("export_weights", "--to=latentlm", f"--workdir={new}", f"--output={files[1]}")
  first, second = map(interop.read, files)
  assert len(first) == 19 and first.keys() == second.keys()
  for name, x in first.items():
    np.testing.assert_array_equal(second[name], x, err_msg=name)
  trained, imported = map(loop.load, (run, new))
  assert imported.step == 0 and imported.summary == trained.summary
  wrong = "is of a LanguageModelConfig, and .* holds a LatentLMConfig"
  assert re.search(
    wrong, _run("export_weights", "--to=yoco", f"--workdir={run}", "--output=x", fails=True)
  )
