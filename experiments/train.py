"""Trains a model, or goes on training it.

python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/a
"""

from latentlab import huge_pages

if __name__ == "__main__":
  huge_pages.restart()  # Before the imports that take seconds.

  from latentlab import app
  from latentlab.train import loop

  app.run(loop.train)
