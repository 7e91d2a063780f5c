"""Evaluation: metrics of parameters on data, chosen by a config."""

from latentlab.eval.runner import Evaluation, Evaluator, build

__all__ = ["Evaluation", "Evaluator", "build"]
