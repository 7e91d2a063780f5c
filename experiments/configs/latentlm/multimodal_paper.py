r"""Text and images at the paper's size: LatentLM's table 3 and figure 8 (arXiv 2412.08635).

  python -m experiments.train --workdir=runs/multimodal \
      --config=experiments/configs/latentlm/multimodal_paper.py:row=latentlm \
      --config.data.media.path=pairs/captions.jsonl --config.data.tokenizer_run=runs/imagenet

Rows are the models that the paper compares, 1.3B parameters each and 200B tokens. `runs/imagenet`
is a trained tokenizer, that of `tokenizers_paper.py:row=imagenet`, or for the row `vq` one of
codes, which is trained first where the field is left empty. Documents are captioned images both
ways, packed into rows of 4,096. Evaluations along the run are figure 8's curves, whose values are
unknown.

What differs from the paper: it trains on text, captioned images and interleaved pages, 2 : 1 : 1,
from data that is not public, and on cl100k's tokens; here are captioned images alone, and bytes.
Its Transfusion has a transformer of 6 layers as its image head, and this one a linear map. Size of
images, channels of latents, guidance and the tokenizer of its VQ model are unknown: here they are
those of ImageNet's rows, and 16,384 codes of 8 channels. Its "PPL" of text looks like nats a token.
FID, CLIP and VQAv2 need pretrained networks, or answers, that are not here. Arguments: `row`;
`scale`, of which there is one; `smoke`, a run of seconds on digits; `seed`. What can be compared on
two CPU cores is in `captions.py`.
"""

from experiments.configs import common
from experiments.configs.latentlm import common as latentlm
from experiments.configs.latentlm import tokenizers_paper
from latentlab.models.latentlm import PRESETS, RELEASE

TITLE = "LatentLM, table 3: text and images in one model"
BASE = "vq"
METRICS = {
  # The paper's "PPL", which is below what any such model's perplexity could be.
  "text nats": "captions/text_loss",
  "caption PPL": "captions/caption_perplexity",
  "CIDEr": "captions/cider",
}
SCALES = common.paper_alone("1.3B parameters, 4M tokens a step, 50k steps.")


def _table3(*figures: float) -> dict[str, float | None]:
  names = ("text nats", "FID", "CLIP", "CIDEr", "VQAv2")
  return {"caption PPL": None} | dict(zip(names, figures, strict=True))


ROWS = {
  "vq": dict(about="VQ-MLLM, codes as tokens", expected=_table3(2.79, 16.92, 29.33, 37.4, 30.19)),
  "transfusion": dict(
    about="Transfusion, whole images of noise", expected=_table3(2.74, 16.10, 28.66, 43.4, 35.36)
  ),
  "latentlm": dict(about="LatentLM", expected=_table3(2.73, 14.54, 28.75, 54.5, 38.72)),
}


def get_config(arg=None):
  arg = common.parse_arg(arg, row=tuple(ROWS), scale=tuple(SCALES), smoke=False, seed=0)
  tokenizer = tokenizers_paper.get_config(f"row=imagenet,seed={arg.seed}")
  tokenizer.data = latentlm.media("captioned_images", path="captions.jsonl", size=256, channels=3)
  if arg.row == "vq":
    tokenizer.model.update(bottleneck="vq", codebook_size=16_384, dim=8)
    tokenizer.task.beta = 0.0
  c = getattr(latentlm, arg.row)(tokenizer, seed=arg.seed)
  sizes = dict(PRESETS["multimodal"])
  head_depth = sizes.pop("head_depth")
  c.model.update(**sizes, **RELEASE, dtype="bfloat16")
  c.data.update(condition="both", seq_length=4_096)
  if arg.row == "latentlm":
    c.latents.head.update(depth=head_depth, mlp_dim=sizes["mlp_dim"])
  if "loss_weight" in c.latents:
    c.latents.loss_weight = 5.0
  c.optimizer.update(peak_lr=3e-4, warmup_steps=500, b2=0.98)
  c.batch_size, c.train_steps = 1_024, 50_000
  c.log_steps, c.checkpoint_steps = 100, 2_500
  c.evals.validation.update(every_steps=2_500, max_batches=4)
  c.evals.captions = dict(
    type="captions",
    split="validation",
    every_steps=2_500,
    max_batches=4,
    max_media=5_000,
    max_tokens=64,
  )
  c.sample.num_samples = 64
  if arg.smoke:
    c.data.seq_length = 0
    c.evals.captions.update(max_media=8, max_tokens=4)
  return latentlm.smoke(c) if arg.smoke else c
