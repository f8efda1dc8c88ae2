"""The verdict at the top of a report: whether the run improved the model, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from hymba_tune.formatting import share
from hymba_tune.report.advice import FEW_ROWS, RISEN, advice, after_the_best, few_rows, risen_reward, stuck
from hymba_tune.report.measures import measure
from hymba_tune.report.record import RunRecord
from hymba_tune.significance import Outcome, compare_counts

HARDLY = 0.01
"""The change of a loss, as a share of it, below which it hardly changed."""
MOSTLY_EQUAL = 0.8
"""The share of groups with equal rewards that is worth a note."""
RISEN_SOURCE = 1.02
"""The least ratio to the loss before training that counts as a rise on one source of several."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run.

    Attributes:
        sentence: The verdict in a sentence.
        better: Whether the run improved the model; None if that is unknown.
        figures: The most important numbers, each with a label, its value and a comment.
        notes: Further remarks.
        tested: The test of the held-out loss, or reward, before training against that of the weights at the end.
        answers: The test of the right answers, where the run counted them.
    """

    sentence: str
    better: bool | None
    figures: list[tuple[str, str, str]]
    notes: list[str] = field(default_factory=list)
    tested: Outcome | None = None
    answers: Outcome | None = None


def judge(record: RunRecord) -> Verdict:
    """Judge a run by its held-out loss: the weights that it ended with against those before it."""
    steps, losses = record.series("eval_loss")
    rewards = record.series("eval_reward")
    if len(rewards[1]) > 1:
        verdict = _rewarded(record, *rewards)
    elif len(losses) > 1 and all(map(math.isfinite, losses)):
        verdict = _held_out(record, steps, losses)
    else:
        verdict = _without_held_out(record, evaluated=bool(losses))
    unmoved = [] if rewards[1] else stuck(record)
    better = False if unmoved and verdict.better else verdict.better
    notes = [*verdict.notes, *(unmoved or advice(record, better))]
    notes += [f"After a crash, these cannot be read: {', '.join(record.damaged)}."] if record.damaged else []
    return replace(verdict, notes=notes, better=better)


def _without_held_out(record: RunRecord, *, evaluated: bool) -> Verdict:
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
    at = record.final_evaluation
    first, last = losses[0], losses[at]
    best = min(range(1, len(losses)), key=lambda index: losses[index])
    measured = measure("loss", record.verb)
    tested = record.tested(steps[0], steps[at])
    sentence, better, notes = _change(record, tested, first, last, "loss", measured.written(last))
    notes += after_the_best(record, steps, losses)
    worse = [
        f"{name} {curve[0]:.3f} → {curve[at]:.3f}"
        for name, (_, curve) in record.source_losses.items()
        if len(curve) > at and curve[at] > RISEN_SOURCE * curve[0]
    ]
    if better and worse:
        notes.append(f"The held-out loss rose on some sources: {', '.join(worse)}.")
    figures = [
        ("held-out loss before", f"{first:.3f}", measured.unit),
        ("at the end", f"{last:.3f}", f"step {steps[at]:,}"),
    ]
    if losses[best] < last:
        figures.append(("lowest", f"{losses[best]:.3f}", f"step {steps[best]:,}"))
    if measured.unit:
        figures.append(("perplexity", _perplexity(last), f"{_perplexity(first)} before"))
    counted, counts, answers = _answers(record)
    sentence = f"{sentence}{_accuracy(record)}{counted}."
    return Verdict(sentence, better, figures + counts + _others(record), notes, tested, answers)


def _rewarded(record: RunRecord, steps: list[int], rewards: list[float]) -> Verdict:
    """Judge a run by the reward of its answers to held-out prompts."""
    measured = measure("reward", record.verb)
    at = record.final_evaluation
    first, last = rewards[0], rewards[at]
    best = max(range(1, len(rewards)), key=lambda index: rewards[index])
    tested = record.tested(steps[0], steps[at])
    sentence, better, notes = _change(record, tested, -first, -last, "reward", measured.written(last))
    figures = [("held-out reward before", f"{first:.3f}", ""), ("at the end", f"{last:.3f}", f"step {steps[at]:,}")]
    if rewards[best] > last:
        figures.append(("highest", f"{rewards[best]:.3f}", f"step {steps[best]:,}"))
    fell = record.tested(steps[best], steps[at])
    if fell and fell.better is False and rewards[best] - last > RISEN:
        notes.append(
            f"After step {steps[best]:,} the held-out reward fell again, to {last:.3f}. Use a lower --lr, or --keep "
            "best."
        )
    _, equal = record.series("equal_groups")
    if equal and equal[-1] > MOSTLY_EQUAL:
        notes.append(
            f"At the end, all answers to a prompt had the same reward in {equal[-1]:.0%} of the groups, which teach "
            "nothing. Use other prompts, a larger --group-size, or a reward by parts."
        )
    return Verdict(f"{sentence}.", better, figures + _others(record), notes, tested)


def _change(
    record: RunRecord, tested: Outcome | None, first: float, last: float, what: str, written: str
) -> tuple[str, bool | None, list[str]]:
    """Return how the held-out loss changed, in words; whether that is better, None if it is unknown; and notes."""
    rows = record.held_out_rows
    unit = "prompts" if what == "reward" else "rows"
    on = f" on {rows:,} {unit}" if rows is not None else ""
    change = f"held-out {what} {abs(first) if what == 'reward' else first:.3f} → {written}{on}"
    small = abs(first - last) <= RISEN if what == "reward" else abs(first - last) < HARDLY * abs(first)
    if tested is None:
        return f"Whether it got better was not tested: {change}", None, []
    if tested.word == "the same" or (small and tested.n >= FEW_ROWS):
        return f"It hardly changed: {change}", None, []
    if tested.better is None:
        few = f"1 held-out {unit[:-1]} is" if tested.n == 1 else f"{tested.n:,} held-out {unit} are"
        return f"{few} too few to say whether it got better: {change.removesuffix(on)}", None, few_rows(tested.n)
    if (risen := risen_reward(record)) and tested.better:
        return f"It is not clear that it got better: {change}", None, [risen]
    if not tested.better:
        return f"It got worse: {change}", False, []
    return f"It got better: {change}" + (f", {share(first - last, first)} less" * (what == "loss")), True, []


def _answers(record: RunRecord) -> tuple[str, list[tuple[str, str, str]], Outcome | None]:
    """Return how many held-out prompts are answered right after training, where the run counted them."""
    counts = record.facts.get("answers", {})
    if "after" not in counts:
        return "", [], None
    tested = compare_counts(counts["gained"], counts["lost"], n=counts["questions"]) if "gained" in counts else None
    verdict = f", {tested.word}" if tested else ""
    right = f"{counts['after']:,} of {counts['questions']:,}"
    figures = [("right answers", right, f"{counts['before']:,} before{verdict}")]
    return f"; {right} answers right, {counts['before']:,} before", figures, tested


def _accuracy(record: RunRecord) -> str:
    """Return the final held-out accuracy in words; empty where the run measured none."""
    _, values = record.series("eval_accuracy")
    accuracy = record.verb.accuracy
    return f"; {100 * values[-1]:.0f} % of the {accuracy.subject} {accuracy.verdict}" if values and accuracy else ""


def _others(record: RunRecord) -> list[tuple[str, str, str]]:
    """Return how the other held-out measures changed, where the run has them."""
    figures = []
    for name in record.verb.figures:
        steps, values = record.series(f"eval_{name}")
        measured = measure(name, record.verb)
        if values:
            compared = f"{measured.written(values[0])} before" if steps[0] == 0 else ""
            if measured.chance is not None:
                compared = f"{measured.written(measured.chance)} by chance"
            figures.append((measured.title.lower(), measured.written(values[-1]), compared))
    return figures


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.3g}" if loss < 20 else "> 10⁸"
