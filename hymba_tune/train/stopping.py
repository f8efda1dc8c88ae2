"""When a run ends, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_tune.files import is_whole


@dataclass(frozen=True)
class BestCheckpoint:
    """The weights that a run ended with.

    Attributes:
        step: The step after which the weights had these values.
        eval_loss: The held-out loss of the weights, if there is held-out data.
        why: ``last``, or ``best`` for the lowest held-out loss.
        ended: The reason why the run ended early; None where it did not.
    """

    step: int
    eval_loss: float | None
    why: str
    ended: str | None

    def described(self) -> str:
        """Describe the weights in a line."""
        loss = "" if self.eval_loss is None else f", held-out loss {self.eval_loss:.3f}"
        ended = f"stopped early: {self.ended} · " if self.ended else ""
        return f"{ended}kept the {self.why} weights (step {self.step:,}{loss})"


class Stopping(TrainerCallback):
    """Evaluates the last step, saves the best weights, and ends a run that no longer improves.

    It reads the evaluations so far, which a checkpoint holds: a resumed run ends where it would have otherwise.

    Args:
        keep_best: Whether the run ends with the weights of its best evaluation.
        patience: The number of evaluations without improvement after which the run ends; None for no limit.
    """

    def __init__(self, *, keep_best: bool, patience: int | None) -> None:
        self._keep_best, self._patience = keep_best, patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Find the best checkpoint, as the run may have been moved; stop at once where no steps are left."""
        if self._keep_best and state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if is_whole(best) else None
        if state.global_step >= state.max_steps or self._is_over(state):
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate the last step, whatever the intervals are."""
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the weights of the best evaluation so far; stop after too many evaluations without improvement."""
        del args
        losses = [loss for _, loss in evaluations(state)]
        if self._keep_best and losses and since_best(losses) == 0:
            control.should_save = True
        if self._is_over(state):
            control.should_save = control.should_training_stop = True

    def final_checkpoint(self, state: TrainerState) -> BestCheckpoint:
        """Return the weights that the trainer holds at the end of training."""
        losses = dict(evaluations(state))
        ended = f"no better evaluation in {self._patience}" if self._is_over(state) else None
        if self._keep_best and state.best_model_checkpoint is not None:
            return BestCheckpoint(state.best_global_step, losses[state.best_global_step], "best", ended)
        return BestCheckpoint(state.global_step, losses.get(state.global_step), "last", ended)

    def _is_over(self, state: TrainerState) -> bool:
        losses = [loss for _, loss in evaluations(state)]
        return self._patience is not None and since_best(losses) >= self._patience


def evaluations(state: TrainerState) -> list[tuple[int, float]]:
    """Return the steps and held-out losses so far, without the evaluation before training."""
    return [(row["step"], row["eval_loss"]) for row in state.log_history if "eval_loss" in row and row["step"] > 0]


def since_best(losses: Sequence[float]) -> int:
    """Return the number of losses after the first lowest one."""
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
