"""Weights of the release's image tokenizer that are not what they should be, and its size."""

import forked_binaries
import numpy as np
import pytest

from experiments.configs.latentlm import tokenizers_paper
from latentlab import interop
from latentlab.interop import latentlm_tokenizer as names
from latentlab.models import latent_tokenizer
from latentlab.train import loop

FIELDS = dict(
  name="beit_tokenizer", image_size=4, patch_size=2, embed_dim=8, num_heads=2, num_layers=1, dim=3
)


def _state(**fields):
  config = latent_tokenizer.build_config(FIELDS | fields)
  rng, shapes = np.random.default_rng(0), names.tokenizer_shapes(config)
  fill = lambda x: rng.normal(size=x.shape).astype(np.float32)
  params = {part: _map(fill, tree) for part, tree in shapes.items()}
  return config, names.export_model(config, params)


def _map(f, tree):
  return {k: _map(f, x) for k, x in tree.items()} if isinstance(tree, dict) else f(tree)


def test_the_release_has_172_million_parameters():
  config = latent_tokenizer.build_config(dict(name="beit_tokenizer", preset="imagenet"))
  sizes = latent_tokenizer.num_params(config)
  width, mlp, places = 768, 3072, 257
  matrices = 12 * (4 * width**2 + 2 * width * mlp)
  ends = lambda features: (features + 1) * width + (places + 1) * width + 2 * width
  of_layer = 2 * 2 * width + mlp + width  # Norms, and biases of the feed-forward.
  beit = matrices + ends(768) + 12 * (of_layer + 2 * width + 2 * mlp + 4 * width)
  vit = matrices + ends(16) + 12 * (of_layer + 3 * width)
  heads = 16 * width + 16, width**2 + width + 768 * width + 768
  assert sizes == {
    "encoder": beit + heads[0],
    "decoder": vit + heads[1],
    "total": beit + vit + sum(heads),
  }
  assert abs(sizes["total"] - 172e6) < 1e6


def test_sizes_are_read_off_the_weights():
  config, state = _state(encoder_kind="vit", decoder_layers=2, mlp_dim=20, channels=1)
  imported = names.import_tokenizer(state, dict(num_heads=2))
  assert latent_tokenizer.build_config(imported.model) == config


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s: s.pop("encoder.vision_embed.proj.weight"), "encoder.patch_embed.proj.weight"),
    (lambda s: s.pop("decoder.blocks.0.attn.q_bias"), "missing .'decoder.blocks.0.attn.q_bias"),
    (lambda s: s.update(other=np.zeros(1)), r"unexpected \['other'\]"),
    (
      lambda s: s.update({"encoder.encoder.embed_positions.weight": np.zeros((6, 8))}),
      "4 places of the encoder are no square and a class token",
    ),
    (
      lambda s: s.update({"encoder.encoder.embed_positions.weight": np.zeros(())}),
      r"the table of the encoder's places is \(\)",
    ),
    (
      lambda s: s.update({"encoder.vision_embed.proj.weight": np.zeros((8, 3, 2, 1))}),
      "no convolution of square patches",
    ),
    (
      lambda s: s.update({"decoder_post_processor.fc2.bias": np.zeros(11)}),
      "decoder_post_processor.fc2.bias is",
    ),
  ],
)
def test_weights_of_something_else_are_refused(change, message):
  _, state = _state()
  change(state)
  with pytest.raises(ValueError, match=message):
    names.import_tokenizer(state, dict(num_heads=2))


def test_fields_that_are_untold_or_told_are_named():
  config, state = _state()
  with pytest.raises(ValueError, match="give num_heads"):
    names.import_tokenizer(state, {})
  with pytest.raises(ValueError, match=r"\['embed_dim'\] are told by the weights"):
    names.import_tokenizer(state, dict(num_heads=2, embed_dim=8))
  with pytest.raises(ValueError, match=r"\['name'\] are told"):
    names.import_tokenizer(state, dict(num_heads=2, name="x"))
  with pytest.raises(ValueError, match="missing .*vision_embed"):
    names.import_like({"foo": np.zeros(1)}, config)
  # As many numbers in a patch, and as many patches.
  config, _ = _state(image_size=8, patch_size=4, channels=1)
  _, others = _state(image_size=4, patch_size=2, channels=4)
  with pytest.raises(ValueError, match=r"proj.weight is \(8, 4, 2, 2\), and the model has"):
    names.import_like(others, config)
  config, _ = _state()
  _, others = _state(encoder_kind="vit")
  with pytest.raises(ValueError, match="encoder is a vit, and the model has 'beit3'"):
    names.import_like(others, config)


def test_other_tokenizers_are_refused():
  plain = latent_tokenizer.build_config(FIELDS | dict(bottleneck="plain"))
  vit = latent_tokenizer.build_config(FIELDS | dict(name="vit_tokenizer"))
  for config, message in ((plain, "'plain'"), (vit, "VitBody")):
    with pytest.raises(ValueError, match=message):
      names.export_model(config, {})


@pytest.mark.slow
def test_a_file_goes_into_a_run_and_out_again(tmp_path):
  config = tokenizers_paper.get_config("row=imagenet_beit,smoke")
  config.task.adversarial_weight = 0.1  # A run with more parameters than the file has.
  config.train_steps = config.checkpoint_steps = 2
  config.sample.num_samples = 0
  config.evals = {}
  run, new = tmp_path / "run", tmp_path / "new"
  loop.train(config, run)
  trained = loop.load(run)
  files = [tmp_path / f"{i}.safetensors" for i in "ab"]
  for module, *args in (
    ("export_weights", "--to=latentlm_tokenizer", f"--workdir={run}", f"--output={files[0]}"),
    (
      "import_weights",
      "--from=latentlm_tokenizer",
      f"--input={files[0]}",
      f"--like={run}",
      f"--workdir={new}",
    ),
    ("export_weights", "--to=latentlm_tokenizer", f"--workdir={new}", f"--output={files[1]}"),
  ):
    code, _, errors = forked_binaries.run(module, *args)
    assert code == 0, errors
  first, second = map(interop.read, files)
  assert first.keys() == second.keys()
  for name, x in first.items():
    np.testing.assert_array_equal(second[name], x, err_msg=name)
  imported = loop.load(new)
  assert imported.step == 0 and imported.params.keys() == trained.params.keys()
  code, _, errors = forked_binaries.run(
    "import_weights", "--from=latentlm", f"--input={files[0]}", f"--like={run}", f"--workdir={new}"
  )
  assert code == 1 and "is a LatentTokenizerConfig, and --from=latentlm is of a" in errors
