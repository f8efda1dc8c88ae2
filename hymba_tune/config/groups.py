"""The groups of flags in `--help`, in their order: what a newcomer needs comes first."""

from __future__ import annotations

from itertools import count

from cyclopts import Group

_place = count()


def _next(name: str) -> Group:
    return Group(name, sort_key=next(_place))


MODEL = _next("Model")
DATA = _next("Data")
TEACHER = _next("Teacher")
ANSWERS = _next("Answers")
SERVER = _next("Server")
RESULT = _next("Result")
TRAINING = _next("Training")
PREFERENCES = _next("Preferences")
REWARDS = _next("Rewards")
DISTILLATION = _next("Distillation")
ADAPTER = _next("Adapter")
EVALUATION = _next("Evaluation")
RUN = _next("Run")
COMPUTING = _next("Computing")
DISTRIBUTED = _next("Distributed")
FIRST = Group("First", show=False)
"""Tag of the settings that `--help` shows of a verb with many flags: ``lr: Annotated[float, FIRST]``. A setting that a
verb redefines needs it again. `--help-all` shows all."""
