"""The verdict at the top of a report: whether the run improved the model, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hymba_tune.formatting import share
from hymba_tune.report.measures import measure
from hymba_tune.report.record import RunRecord

WORSE = 1.02
"""The least ratio to the best held-out loss that counts as worse; a smaller one may be chance."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run.

    Attributes:
        sentence: The verdict in a sentence.
        better: Whether the run improved the model; None if that is unknown.
        figures: The most important numbers, each with a label, its value and a comment.
        notes: Further remarks.
    """

    sentence: str
    better: bool | None
    figures: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)


def judge(record: RunRecord) -> Verdict:
    """Judge a run by its held-out loss."""
    steps, losses = record.series("eval_loss")
    if len(losses) > 1 and all(map(math.isfinite, losses)):
        return _held_out(record, steps, losses)
    evaluated = len(losses)
    measured = measure("loss", record.verb)
    steps, losses = record.series("loss")
    if not losses:
        return Verdict("It ended before its first step was measured.", None, [])
    first, last = measured.written(losses[0]), measured.written(losses[-1])
    figures = [("first training loss", first, f"step {steps[0]:,}"), ("last", last, f"step {steps[-1]:,}")]
    why = "without a second finite evaluation" if evaluated else "without held-out data"
    how = (
        "Evaluate more often: --eval-every."
        if evaluated
        else "Hold some data out: --eval-split 0.05, or --eval-data FILE."
    )
    sentence = f"Whether it got better is unknown {why}. Training loss {first} → {last}."
    return Verdict(sentence, None, figures, [how])


def _held_out(record: RunRecord, steps: list[int], losses: list[float]) -> Verdict:
    first, last = losses[0], losses[-1]
    best = min(range(1, len(losses)), key=lambda index: losses[index])
    measured = measure("loss", record.verb)
    better = losses[best] < first
    change = f"held-out loss {first:.3f} → {measured.written(losses[best])}"
    accuracy = _accuracy(record)
    sentence = f"It did not get better: {change}"
    if better:
        sentence = f"It got better: {change}, {share(first - losses[best], first)} less"
    notes = []
    if last > WORSE * losses[best]:
        notes.append(
            f"After step {steps[best]:,} the held-out loss rose again, to {last:.3f}: the run overfits its "
            "training data. Use fewer --epochs, a lower --lr, or more data."
        )
    worse = [
        f"{name} {curve[0]:.3f} → {curve[best]:.3f}"
        for name, (_, curve) in record.source_losses.items()
        if curve[best] > WORSE * curve[0]
    ]
    if better and worse:
        notes.append(f"The held-out loss rose on some sources: {', '.join(worse)}.")
    figures = [
        ("held-out loss before", f"{first:.3f}", measured.unit),
        ("best", f"{losses[best]:.3f}", f"step {steps[best]:,}"),
        ("last", f"{last:.3f}", f"step {steps[-1]:,}"),
    ]
    if measured.unit:
        figures.append(("perplexity", _perplexity(losses[best]), f"{_perplexity(first)} before"))
    counted, counts = _answers(record)
    return Verdict(f"{sentence}{accuracy}{counted}.", better, figures + counts + _others(record), notes)


def _answers(record: RunRecord) -> tuple[str, list[tuple[str, str, str]]]:
    """Return how many held-out prompts are answered right after training, where the run counted them."""
    counts = record.facts.get("answers", {})
    if "after" not in counts:
        return "", []
    right = f"{counts['after']:,} of {counts['questions']:,}"
    return f"; {right} answers right", [("right answers", right, f"{counts['before']:,} before")]


def _accuracy(record: RunRecord) -> str:
    """Return the final held-out accuracy in words; empty where the run measured none."""
    _, values = record.series("eval_accuracy")
    accuracy = record.verb.accuracy
    return f"; {100 * values[-1]:.0f} % of the {accuracy.subject} {accuracy.verdict}" if values and accuracy else ""


def _others(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return how the other held-out measures changed, where the run has them."""
    figures = []
    for name in record.verb.figures:
        _, values = record.series(f"eval_{name}")
        measured = measure(name, record.verb)
        if values:
            compared = (
                f"{measured.written(values[0])} before"
                if measured.chance is None
                else f"{measured.written(measured.chance)} by chance"
            )
            figures.append((measured.title.lower(), measured.written(values[-1]), compared))
    return figures


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.3g}" if loss < 20 else "> 10⁸"
