"""The interface through which training shows its progress: silent here, and shown by the command line's subclass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

OF_SOURCE = "eval_loss/"
"""Prefix of the columns with the held-out loss of each of several sources; the source's name follows."""


@dataclass(frozen=True)
class MetricsRow:
    """One line of a run's metrics. A field is None where the step has no such number.

    Attributes:
        step: The number of optimizer steps done.
        loss: The mean loss over the steps since the last row, in nats a learned token.
        eval_loss: The mean loss over the held-out data's learned tokens, in nats.
        learning_rate: The learning rate of the last step.
        grad_norm: The gradient norm of the last step, before clipping.
        tokens_per_s: Tokens a second since the last row, without evaluations.
        memory_bytes: The peak memory so far, of the GPU or, on a CPU, of the process.
        margin: In preference training, the mean reward of chosen answers less that of rejected ones. A reward is beta
            times the log-ratio of the answer's probabilities under the model and the reference.
        accuracy: The share of pairs whose chosen answer has the larger reward. In KTO, the share of good answers with a
            reward above the KL baseline and of bad ones below it; the baseline is beta times the estimated divergence
            from the reference, or 0 for losses without one.
        chosen_reward: The mean reward of the chosen, or good, answers.
        rejected_reward: The mean reward of the rejected, or bad, answers.
        eval_margin: The margin on the held-out data, as a mean over all of its pairs or answers.
        eval_accuracy: The accuracy on the held-out data.
        eval_chosen_reward: The mean reward of the chosen, or good, held-out answers.
        eval_rejected_reward: The mean reward of the rejected, or bad, held-out answers.
        more: Further measures by their column names: the held-out loss of each source where there are several
            (`OF_SOURCE`), and the measures of one kind of training.
    """

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    memory_bytes: int | None = None
    margin: float | None = None
    accuracy: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    eval_margin: float | None = None
    eval_accuracy: float | None = None
    eval_chosen_reward: float | None = None
    eval_rejected_reward: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def source_losses(self) -> dict[str, float]:
        """The held-out losses by source, where there are several."""
        return {name.removeprefix(OF_SOURCE): loss for name, loss in self.more.items() if name.startswith(OF_SOURCE)}

    def as_columns(self) -> dict[str, Any]:
        """Return the numbers that are not None, by column."""
        columns = asdict(self)
        columns |= columns.pop("more")
        return {name: value for name, value in columns.items() if value is not None}

    @classmethod
    def of_columns(cls, columns: Mapping[str, Any]) -> Self:
        """Return the row with these columns."""
        own = {one.name for one in fields(cls)} - {"more"}
        more = {name: value for name, value in columns.items() if name not in own}
        return cls(**{name: columns[name] for name in own & columns.keys()}, more=more)


class Screen:
    """A screen that shows nothing."""

    @contextmanager
    def working(self, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Announce work that may take a while; the block calls the yielded function with the amount done."""
        del label, total
        yield lambda _: None

    def banner(self, lines: dict[str, str]) -> None:
        """Show what is about to run, a label and a line each."""

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        """Show a new row of metrics."""

    def note(self, text: str) -> None:
        """Show a note."""
