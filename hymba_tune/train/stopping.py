"""When a run ends, and which of its weights it ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_tune.train.checkpoints import is_whole


@dataclass(frozen=True)
class BestCheckpoint:
    """The weights a run ended with.

    Attributes:
        step: After which they were these.
        eval_loss: Their held-out loss, nats a token, if there is held-out data.
        why: ``last``, or ``best``: of the lowest held-out loss.
        ended: Why there were no further steps, where the run was to have more.
    """

    step: int
    eval_loss: float | None
    why: str
    ended: str | None

    def described(self) -> str:
        """The same in a line."""
        loss = "" if self.eval_loss is None else f", held-out loss {self.eval_loss:.3f}"
        ended = f"stopped early: {self.ended} · " if self.ended else ""
        return f"{ended}kept the {self.why} weights (step {self.step:,}{loss})"


class Stopping(TrainerCallback):
    """Evaluates the last step, saves the best weights, and ends a run that no longer gets better.

    All of it is read off the evaluations so far, which a checkpoint holds: a resumed run ends where it would have.

    Args:
        keep_best: Whether the run is to end with the weights of its best evaluation.
        patience: Evaluations without a better one after which it ends; None for never.
    """

    def __init__(self, *, keep_best: bool, patience: int | None) -> None:
        self._keep_best, self._patience = keep_best, patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Find the best checkpoint wherever the run lies now; end at once where there is nothing left to do."""
        if self._keep_best and state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if is_whole(best) else None
        if state.global_step >= state.max_steps or self._is_over(state):
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the last step evaluated, whatever the intervals are."""
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save what is better than all before; end after too many that are not."""
        del args
        losses = [loss for _, loss in evaluations(state)]
        if self._keep_best and losses and since_best(losses) == 0:
            control.should_save = True
        if self._is_over(state):
            control.should_save = control.should_training_stop = True

    def kept(self, state: TrainerState) -> BestCheckpoint:
        """The weights that the trainer holds at the end of training."""
        losses = dict(evaluations(state))
        ended = f"no better evaluation in {self._patience}" if self._is_over(state) else None
        if self._keep_best and state.best_model_checkpoint is not None:
            return BestCheckpoint(state.best_global_step, losses[state.best_global_step], "best", ended)
        return BestCheckpoint(state.global_step, losses.get(state.global_step), "last", ended)

    def _is_over(self, state: TrainerState) -> bool:
        losses = [loss for _, loss in evaluations(state)]
        return self._patience is not None and since_best(losses) >= self._patience


def evaluations(state: TrainerState) -> list[tuple[int, float]]:
    """The steps and held-out losses so far, without the one before training."""
    return [(row["step"], row["eval_loss"]) for row in state.log_history if "eval_loss" in row and row["step"] > 0]


def since_best(losses: Sequence[float]) -> int:
    """How many there are behind the first lowest."""
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
