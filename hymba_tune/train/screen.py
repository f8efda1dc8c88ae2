"""What training has to say while it works; the command line shows it, a library's user may pass this silent one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

OF_SOURCE = "eval_loss/"
"""Begins the names of the columns with the held-out losses of several sources, before the source's."""


@dataclass(frozen=True)
class MetricsRow:
    """One line of a run's metrics; None where the step has no such number.

    Attributes:
        step: Optimizer steps done.
        loss: Mean over the steps since the last row, nats a learned token.
        eval_loss: Mean over the held-out data's learned tokens, nats.
        learning_rate: Of the last step.
        grad_norm: Of the last step, before it was clipped.
        tokens_per_s: Tokens read a second since the last row, evaluations not counted.
        memory_bytes: Peak memory so far, of the GPU or, on a CPU, of the process.
        margin: Of preferences: how much larger the rewards of better answers are than those of worse ones, on average.
            A reward is beta times the log-ratio of the answer's probabilities under the model and the reference.
        accuracy: Share of the pairs whose better answer has the larger reward. Of answers judged one by one: share of
            the good ones whose reward is above the point that KTO compares with, and of the bad ones below it; that is
            beta times its estimate of the divergence from the reference, or 0 in losses without one.
        chosen_reward: Mean reward of the better, or good, answers.
        rejected_reward: Mean reward of the worse, or bad, answers.
        eval_margin: These four on the held-out data, as means over all of its pairs or answers.
        eval_accuracy: See `eval_margin`.
        eval_chosen_reward: See `eval_margin`.
        eval_rejected_reward: See `eval_margin`.
        more: Whatever else is measured, by the names of its columns: the held-out loss of each source where there are
            several (`OF_SOURCE`), what one kind of training has of its own.
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
        """Held-out losses by source, where there are several."""
        return {name.removeprefix(OF_SOURCE): loss for name, loss in self.more.items() if name.startswith(OF_SOURCE)}

    def as_columns(self) -> dict[str, Any]:
        """What is known, by column."""
        columns = asdict(self)
        columns |= columns.pop("more")
        return {name: value for name, value in columns.items() if value is not None}

    @classmethod
    def of_columns(cls, columns: Mapping[str, Any]) -> Self:
        """The row that has these columns."""
        own = {one.name for one in fields(cls)} - {"more"}
        more = {name: value for name, value in columns.items() if name not in own}
        return cls(**{name: columns[name] for name in own & columns.keys()}, more=more)


class Screen:
    """Shows nothing."""

    @contextmanager
    def working(self, label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Something that may take a while; what it yields is called with how much is done, of how much in all."""
        del label, total
        yield lambda _: None

    def banner(self, lines: dict[str, str]) -> None:
        """What is about to run, a label and a line each."""

    def row(self, row: MetricsRow, *, total_steps: int, seconds_left: float | None) -> None:
        """New numbers."""

    def note(self, text: str) -> None:
        """Something worth knowing that needs no answer."""
