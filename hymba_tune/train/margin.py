"""Noticing preferences that are not learned."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hymba_tune.train.screen import Screen

STEPS = 20
"""Steps after which a margin should have moved."""
LEAST_NATS = 0.05
"""What counts as moved: the log-ratio by which better answers lead, without beta."""


class MarginWatch(TrainerCallback):
    """Says once if the margin of rewards has not moved in a run's first steps, and what is likely to be why.

    Args:
        beta: What rewards are multiplied by.
        identical: Share of the rows that were left out because both answers are the same.
        screen: Told of it.
    """

    def __init__(self, beta: float, identical: float, screen: Screen) -> None:
        self._least, self._identical, self._screen = LEAST_NATS * beta, identical, screen
        self._done = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Look at a margin."""
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
