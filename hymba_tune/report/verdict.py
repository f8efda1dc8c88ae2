"""The answer that a report begins with: did it get better, and by how much?"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hymba_tune.formatting import share
from hymba_tune.report.measures import measure
from hymba_tune.report.record import RunRecord

WORSE = 1.02
"""An evaluation this many times the best one is said to be worse; less may be chance."""


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        sentence: In a line.
        better: Whether it got better; None if nothing tells.
        figures: What, its value, and a word on it: the numbers that matter most, first.
        notes: What is to be known besides.
    """

    sentence: str
    better: bool | None
    figures: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)


def judge(record: RunRecord) -> Verdict:
    """Say what came of a run."""
    steps, losses = record.series("eval_loss")
    if len(losses) > 1 and all(map(math.isfinite, losses)):
        return _held_out(record, steps, losses)
    evaluated = len(losses)
    kind = measure("loss", record.verb)
    steps, losses = record.series("loss")
    if not losses:
        return Verdict("It ended before its first step was measured.", None, [])
    first, last = kind.written(losses[0]), kind.written(losses[-1])
    figures = [("first training loss", first, f"step {steps[0]:,}"), ("last", last, f"step {steps[-1]:,}")]
    why = "without a second finite evaluation" if evaluated else "without held-out data"
    how = (
        "Evaluate more often: --eval-every."
        if evaluated
        else "Hold some data out: --eval-split 0.05, or --eval-data FILE."
    )
    sentence = f"Whether it got better cannot be told {why}. Training loss {first} → {last}."
    return Verdict(sentence, None, figures, [how])


def _held_out(record: RunRecord, steps: list[int], losses: list[float]) -> Verdict:
    first, last = losses[0], losses[-1]
    best = min(range(1, len(losses)), key=lambda index: losses[index])
    kind = measure("loss", record.verb)
    better = losses[best] < first
    change = f"held-out loss {first:.3f} → {kind.written(losses[best])}"
    ranked = _ranked(record)
    sentence = f"It did not get better: {change}"
    if better:
        sentence = f"It got better: {change}, {share(first - losses[best], first)} less"
    notes = []
    if last > WORSE * losses[best]:
        notes.append(
            f"After step {steps[best]:,} the held-out loss rose again, to {last:.3f}: the run went on to learn its "
            "training data by heart. Fewer --epochs, a lower --lr, or more data."
        )
    worse = [
        f"{name} {curve[0]:.3f} → {curve[best]:.3f}"
        for name, (_, curve) in record.source_losses.items()
        if curve[best] > WORSE * curve[0]
    ]
    if better and worse:
        notes.append(f"Not on every source: the held-out loss rose on {', '.join(worse)}.")
    figures = [
        ("held-out loss before", f"{first:.3f}", kind.unit),
        ("best", f"{losses[best]:.3f}", f"step {steps[best]:,}"),
        ("last", f"{last:.3f}", f"step {steps[-1]:,}"),
    ]
    if kind.unit:
        figures.append(("perplexity", _perplexity(losses[best]), f"{_perplexity(first)} before"))
    counted, counts = _answers(record)
    return Verdict(f"{sentence}{ranked}{counted}.", better, figures + counts + _others(record), notes)


def _answers(record: RunRecord) -> tuple[str, list[tuple[str, str, str]]]:
    """How many held-out prompts are answered right after training, where the run counted that."""
    counts = record.facts.get("answers", {})
    if "after" not in counts:
        return "", []
    right = f"{counts['after']:,} of {counts['questions']:,}"
    return f"; {right} answers right", [("right answers", right, f"{counts['before']:,} before")]


def _ranked(record: RunRecord) -> str:
    """The held-out accuracy at the end, where the run measured one."""
    _, right = record.series("eval_accuracy")
    accuracy = record.verb.accuracy
    return f"; {100 * right[-1]:.0f} % of the {accuracy.subject} {accuracy.verdict}" if right and accuracy else ""


def _others(record: RunRecord) -> list[tuple[str, str, str]]:
    """How the other measures of held-out data changed, where the run has them."""
    figures = []
    for name in record.verb.figures:
        _, values = record.series(f"eval_{name}")
        kind = measure(name, record.verb)
        if values:
            than = (
                f"{kind.written(values[0])} before" if kind.chance is None else f"{kind.written(kind.chance)} by chance"
            )
            figures.append((kind.title.lower(), kind.written(values[-1]), than))
    return figures


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.3g}" if loss < 20 else "> 10⁸"
