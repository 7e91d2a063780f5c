"""Trains a model, or goes on training it.

python -m experiments.train --config=experiments/configs/quickstart.py --workdir=runs/a
"""

from latentlab import app
from latentlab.train import loop

if __name__ == "__main__":
  app.run(loop.train, huge_pages=True)
