"""A callback that notices when preferences are not learned."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_tune.train.screen import Screen

STEPS = 20
"""The number of steps after which the margin should have moved."""
LEAST_NATS = 0.05
"""The least margin that counts as moved: a log-ratio, before the multiplication by beta."""


class MarginWatch(TrainerCallback):
    """Notes once if the margin of rewards has not moved in a run's first steps, with the likely causes.

    Args:
        beta: The factor of rewards.
        identical: The share of rows that were dropped because both answers are the same.
        screen: Shows the note.
    """

    def __init__(self, beta: float, identical: float, screen: Screen) -> None:
        self._least = LEAST_NATS * beta
        self._identical = identical
        self._screen = screen
        self._done = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Check a logged margin."""
        del control
        margin = logs.get("rewards/margins")
        if margin is None or self._done:
            return
        moved = abs(margin) >= self._least
        self._done = moved or state.global_step >= STEPS
        if self._done and not moved:
            self._screen.note(self._explain(margin, state.global_step, args.learning_rate))

    def _explain(self, margin: float, step: int, rate: float) -> str:
        causes = [f"the learning rate is too low (--lr {10 * rate:.0e} is ten times as much)"]
        causes.append("the adapter is not where it is needed (--targets all, a larger --rank)")
        if self._identical:
            causes.append(f"many pairs hardly differ: in {self._identical:.0%} of the rows both answers are the same")
        return f"The margin has not moved in {step} steps ({margin:.4f}). Perhaps " + ", or ".join(causes) + "."
