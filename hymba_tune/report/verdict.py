"""The verdict at the top of a report: whether the run improved the model, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import mean

from hymba_tune.formatting import share
from hymba_tune.report.measures import measure
from hymba_tune.report.record import RunRecord

WORSE = 1.02
"""The least ratio to the best held-out loss that counts as worse; a smaller one may be chance."""
FEW_ROWS = 10
"""The fewest held-out rows whose loss says whether a run improved the model."""
FEW_STEPS = 20
"""The fewest steps that are not said to be few."""
HARDLY = 0.01
"""The change of a loss, as a share of it, below which it hardly changed."""
UNMOVED = 0.003
"""The change of the held-out loss, as a share of it, below which it did not move."""
MOSTLY_EQUAL = 0.8
"""The share of groups with equal rewards that is worth a note."""
RISEN = 0.01
"""The least rise of a reward that counts."""


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
    rewards = record.series("eval_reward")
    if len(rewards[1]) > 1:
        verdict = _rewarded(record, *rewards)
    elif len(losses) > 1 and all(map(math.isfinite, losses)):
        verdict = _held_out(record, steps, losses)
    else:
        verdict = _without_held_out(record, evaluated=bool(losses))
    stuck = [] if rewards[1] else _stuck(record)
    notes = [*verdict.notes, *stuck, *_few_steps(record)]
    notes += [f"After a crash, these cannot be read: {', '.join(record.damaged)}."] if record.damaged else []
    return replace(verdict, notes=notes, better=False if stuck and verdict.better else verdict.better)


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
    first, last = losses[0], losses[-1]
    best = min(range(1, len(losses)), key=lambda index: losses[index])
    measured = measure("loss", record.verb)
    sentence, better, notes = _change(record, first, losses[best])
    if last > WORSE * losses[best]:
        notes.append(
            f"After step {steps[best]:,} the held-out loss rose again, to {last:.3f}: the run overfits its "
            "training data. Use fewer --epochs, a lower --lr, or more data."
        )
    worse = [
        f"{name} {curve[0]:.3f} → {curve[best]:.3f}"
        for name, (_, curve) in record.source_losses.items()
        if len(curve) > best and curve[best] > WORSE * curve[0]
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
    return Verdict(f"{sentence}{_accuracy(record)}{counted}.", better, figures + counts + _others(record), notes)


def _rewarded(record: RunRecord, steps: list[int], rewards: list[float]) -> Verdict:
    """Judge a run by the reward of its answers to held-out prompts."""
    measured = measure("reward", record.verb)
    first, last = rewards[0], rewards[-1]
    best = max(range(1, len(rewards)), key=lambda index: rewards[index])
    rows = record.held_out_rows
    on = f" on {rows:,} prompts" if rows is not None else ""
    change = f"held-out reward {first:.3f} → {measured.written(rewards[best])}{on}"
    figures = [
        ("held-out reward before", f"{first:.3f}", ""),
        ("best", f"{rewards[best]:.3f}", f"step {steps[best]:,}"),
        ("last", f"{last:.3f}", f"step {steps[-1]:,}"),
        *_others(record),
    ]
    notes = []
    if rewards[best] - last > RISEN:
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
    if rows is not None and rows < FEW_ROWS:
        few = "1 held-out prompt is" if rows == 1 else f"{rows} held-out prompts are"
        return Verdict(f"{few} too few to say whether it got better: {change}.", None, figures, notes)
    if abs(rewards[best] - first) <= RISEN:
        return Verdict(f"It hardly changed: {change}.", None, figures, notes)
    better = rewards[best] > first
    return Verdict(f"It {'got' if better else 'did not get'} better: {change}.", better, figures, notes)


def _change(record: RunRecord, first: float, best: float) -> tuple[str, bool | None, list[str]]:
    """Return how the held-out loss changed, in words; whether that is better, None if it is unknown; and notes."""
    rows = record.held_out_rows
    on = f" on {rows:,} rows" if rows is not None else ""
    change = f"held-out loss {first:.3f} → {measure('loss', record.verb).written(best)}{on}"
    if rows is not None and rows < FEW_ROWS:
        few = "1 held-out row is" if rows == 1 else f"{rows} held-out rows are"
        note = f"Hold out at least {FEW_ROWS} rows, or better 100: a larger --eval-split, or --eval-data FILE."
        return f"{few} too few to say whether it got better: {change}", None, [note]
    if (risen := _risen_reward(record)) and best < first:
        return f"It is not clear that it got better: {change}", None, [risen]
    if abs(first - best) < HARDLY * abs(first):
        return f"It hardly changed: {change}", None, []
    if best > first:
        return f"It did not get better: {change}", False, []
    return f"It got better: {change}, {share(first - best, first)} less", True, []


def _risen_reward(record: RunRecord) -> str:
    """Return a note if the reward of worse answers rose; empty otherwise."""
    _, rewards = record.series("eval_rejected_reward")
    if len(rewards) < 2 or not rewards[-1] - rewards[0] > RISEN:
        return ""
    kind = "rejected" if record.verb.paired else "bad"
    return (
        f"The reward of {kind} answers rose, {rewards[0]:.3f} → {rewards[-1]:.3f}: the model writes them more often "
        "than before. Use a lower --lr, fewer --epochs, or pairs that differ more."
    )


def _few_steps(record: RunRecord) -> list[str]:
    steps = record.last_step
    if not 0 < steps < FEW_STEPS:
        return []
    few = "1 step is" if steps == 1 else f"{steps} steps are"
    return [f"{few} few: most runs need a hundred or more. Try --steps 100, more --epochs, or a smaller --batch-size."]


def _stuck(record: RunRecord) -> list[str]:
    """Return a note if the loss did not move, or if it ended at that of a uniform guess."""
    evaluated, trained = record.series("eval_loss")[1], record.series("loss")[1]
    losses = evaluated if len(evaluated) > 1 else trained
    if record.last_step < FEW_STEPS or len(losses) < 2 or not all(map(math.isfinite, losses)):
        return []
    vocabulary = record.vocabulary if record.verb.loss_unit else None
    if vocabulary and abs(losses[-1] / math.log(vocabulary) - 1) < HARDLY:
        return [
            f"The loss is stuck at {losses[-1]:.3f}, about ln({vocabulary:,}) = {math.log(vocabulary):.3f}: the model "
            "gives every token the same probability. Use a lower --lr."
        ]
    # Batches differ; held-out rows are the same at every evaluation.
    part, least = (1, UNMOVED) if losses is evaluated else (max(1, len(losses) // 3), HARDLY)
    before, after = mean(losses[:part]), mean(losses[-part:])
    if abs(after - before) >= least * abs(before):
        return []
    return [
        f"The loss did not move in {record.last_step:,} steps: {before:.3f} at first, {after:.3f} at last. Try a "
        "higher --lr, or a lower one if it is above the default."
    ]


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
