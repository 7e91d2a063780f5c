"""LatentLM's rows of the paper's sizes: parameters, tokens of a run, what differs in a figure."""

import pytest

from experiments.configs.latentlm import captions, figure6_variance, imagenet, multimodal_paper
from latentlab.models import latentlm
from latentlab.train.tasks import build_task


def _task(config):
  summary = dict(
    text_vocab_size=258,
    dim=16,
    num_latents=256,
    equal_lengths=True,
    num_classes=1000,
    noise=dict(kind="gaussian_scale", std=0.75, per="example", on_sphere=False),
    mean=0.0,
    std=1.0,
    seq_length=4096,
    documents_per_row=12,
    media_shape=[256, 256, 3],
    codebook_size=0,
  )
  return build_task(config, 0, summary)


@pytest.mark.parametrize(
  ("size", "millions"), [("medium", 454.3), ("large", 1028), ("xl", 1824), ("3b", 3787)]
)
def test_figure_4_has_dits_of_equal_sizes(size, millions):
  dit = _task(imagenet.get_config(f"row=dit_{size}")).model.config
  assert dit.num_params / 1e6 == pytest.approx(millions, rel=1e-3)
  model = _task(imagenet.get_config(f"row={size}")).model.config
  assert latentlm.num_params(model)["total"] == pytest.approx(dit.num_params, rel=0.03)
  assert imagenet.ROWS[f"dit_{size}"]["base"] == size


def test_the_model_of_text_and_images_is_the_papers():
  config = multimodal_paper.get_config("row=latentlm")
  assert config.batch_size * config.data.seq_length == 4 * 2**20
  assert config.train_steps * config.batch_size * config.data.seq_length == pytest.approx(
    2e11, 0.05
  )
  counts = latentlm.num_params(_task(config).model.config)
  h, mlp, layers = 2048, 6144, 24
  embedding = (258 + 4) * h
  assert counts["language"] - embedding == pytest.approx(
    layers * (4 * h**2 + 3 * h * mlp), rel=1e-3
  )
  head = 6 * (3 * h**2 + 3 * h * mlp)
  ends = 2 * h * 16 + 4 * h**2 + 256 * h  # Latents, their last modulation, time and condition.
  assert head / 1e6 == pytest.approx(302, rel=1e-3) and counts["heads"] == head + ends


def test_the_variance_alone_differs():
  for scale in figure6_variance.SCALES:
    configs = {
      row: figure6_variance.get_config(f"row={row},scale={scale}").to_dict()
      for row in figure6_variance.ROWS
    }
    for model in ("latentlm", "dit"):
      stds = []
      for name in ("c10", "c30", "c75"):
        config = configs[f"{model}_{name}"]
        stds.append(config["tokenizer"]["model"].pop("std"))
        assert config == configs[f"{model}_c10"]
      assert stds == [0.1, 0.3, 0.75]
      plain = configs[f"{model}_plain"]["tokenizer"]["model"]
      assert plain["bottleneck"] == "plain" and config["sample"]["guidance"] == 1.0
      assert config["evals"]["generation"]["guidance"] == 1.0
    for name in ("plain", "c75"):  # Both models are on one tokenizer.
      pair = [configs[f"{model}_{name}"]["tokenizer"] for model in ("latentlm", "dit")]
      assert pair[0] == pair[1]


def test_words_and_digits_are_the_models_by_class():
  for row in captions.ROWS:
    config = captions.get_config(f"row={row}")
    assert config.data.condition == "both" and config.evals.captions.type == "captions"
    assert config.latents.get("loss_weight", 5.0) == 5.0
  assert config.model.dropout_rate == 0.2  # Of codes.
