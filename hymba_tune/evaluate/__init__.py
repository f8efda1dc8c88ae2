"""Evaluation of models on texts, on questions with known answers, and on lm-eval tasks; independent of training."""

from hymba_tune.evaluate.evaluation import Evaluation, ModelResult, evaluate
from hymba_tune.evaluate.records import add_to_run, check_run, facts, run_of, save

__all__ = ["Evaluation", "ModelResult", "add_to_run", "check_run", "evaluate", "facts", "run_of", "save"]
