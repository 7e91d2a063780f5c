"""Runs the evaluations of a config on a checkpoint; prints and saves the result.

  python -m experiments.evaluate --workdir=runs/a --step=best

Without `--config`, the workdir's own config is used. Writes `evaluation_<step>.json`, unless
`--model` evaluates the parameters in another model, with `mask=blockwise_causal`, say.
"""

import json
import pathlib

import jax
import ml_collections
from absl import flags

from experiments import model_flag
from latentlab import app
from latentlab import eval as eval_lib
from latentlab.train import loop

_STEP = flags.DEFINE_string("step", "latest", "A step, 'latest' or 'best'.")


def main(config: ml_collections.ConfigDict | None, workdir: str) -> None:
  model = model_flag.fields(config, workdir)
  run = loop.load(workdir, config, step=_STEP.value, model=model)
  evaluations = eval_lib.build(run.config.evals.to_dict(), run.task, run.data, run.trainer.compile)
  results = {name: x for e in evaluations for name, x in e.run(run.params).items()}
  if jax.process_index() == 0:
    text = json.dumps(
      {"step": run.step, **({"model": model} if model else {}), **results}, indent=2
    )
    print(text)
    if not model:
      pathlib.Path(workdir, f"evaluation_{run.step}.json").write_text(text + "\n")


if __name__ == "__main__":
  app.run(main, config_required=False, flag_names=("step", "model"))
