"""Remarks on a run, each with its cause and the flag to change."""

from __future__ import annotations

import math
from statistics import mean

import numpy as np

from hymba_tune.report.record import RunRecord

AGAIN = 1.02
"""The least ratio to the lowest held-out loss that counts as a rise; a smaller one may be chance."""
ENOUGH_ROWS = 100
"""The number of held-out rows from which more are not recommended."""
FEW_ROWS = 10
"""The fewest held-out rows whose loss says more than the training loss."""
FEW_STEPS = 20
"""The fewest steps that are not said to be few."""
HARDLY = 0.01
"""The change of a training loss, as a share of it, below which it did not move."""
RISEN = 0.01
"""The least rise of a reward that counts."""
STEEP = 0.4
"""The fall of the loss in the second half of a run, as a share of that in the first half, from which it is steep."""
STEEP_LOSS = 0.05
"""The least fall of the loss in the second half, as a share of the loss, that is worth more steps."""
UNMOVED = 0.003
"""The change of the held-out loss, as a share of it, below which it did not move."""


def advice(record: RunRecord, better: bool | None) -> list[str]:
    """Return what to do about a run that was too short; empty if it was not."""
    if falling := _still_falling(record):
        return [falling]
    steps = record.last_step
    if not 0 < steps < FEW_STEPS or better:
        return []
    few = "1 step is" if steps == 1 else f"{steps} steps are"
    return [f"{few} few: most runs need a hundred or more. Try --steps 100, more --epochs, or a smaller --batch-size."]


def few_rows(rows: int) -> list[str]:
    """Return how to hold out more rows, where there are few."""
    if rows >= ENOUGH_ROWS:
        return []
    return [f"Hold out more rows for a verdict, up to {ENOUGH_ROWS}: a larger --eval-split, or --eval-data FILE."]


def after_the_best(record: RunRecord, steps: list[int], losses: list[float]) -> list[str]:
    """Return a note if the held-out loss at the end is clearly above the lowest one."""
    best = min(range(1, len(losses)), key=lambda index: losses[index])
    risen = record.tested(steps[best], steps[-1])
    if losses[-1] <= AGAIN * losses[best] or risen is None or risen.better is not False:
        return []
    kept = "" if (record.facts.get("kept") or {}).get("why") == "best" else " --keep best ends with the lowest one."
    return [
        f"After step {steps[best]:,} of {steps[-1]:,} the held-out loss rose again, from {losses[best]:.3f} to "
        f"{losses[-1]:.3f}: the run overfits its training data.{kept} Fewer --epochs, a lower --lr or more data help."
    ]


def risen_reward(record: RunRecord) -> str:
    """Return a note if the reward of worse answers rose; empty otherwise."""
    _, rewards = record.series("eval_rejected_reward")
    if len(rewards) < 2 or not rewards[-1] - rewards[0] > RISEN:
        return ""
    kind = "rejected" if record.verb.paired else "bad"
    return (
        f"The reward of {kind} answers rose, {rewards[0]:.3f} → {rewards[-1]:.3f}: the model writes them more often "
        "than before. Use a lower --lr, fewer --epochs, or pairs that differ more."
    )


def stuck(record: RunRecord) -> list[str]:
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


def _still_falling(record: RunRecord) -> str:
    """Return a note if the loss was still falling steeply when the run ended; empty otherwise.

    The halves of a run are halves of the sum of its learning rates, as any loss is flat at the end of a schedule.
    """
    if not record.verb.loss_unit or (record.facts.get("kept") or {}).get("ended"):
        return ""
    steps, rates = record.series("learning_rate")
    tested = record.series("eval_loss")
    held_out = len(tested[1]) > 3 and (record.held_out_rows or 0) >= FEW_ROWS
    at, losses = tested if held_out else record.series("loss")
    if len(rates) < 3 or len(losses) < 4 or not all(map(math.isfinite, losses)) or losses[-1] > AGAIN * min(losses):
        return ""
    # A row of the metrics is the mean over the steps since the one before.
    reached = np.cumsum([0.0, *(np.diff(steps, prepend=0) * rates)])
    when = at if held_out else np.add(at, [0, *at[:-1]]) / 2
    done = np.interp(when, [0, *steps], reached)
    begin, middle, end = (float(np.interp(part * reached[-1], done, losses)) for part in (0, 0.5, 1))
    if middle - end < max(STEEP * (begin - middle), STEEP_LOSS * end):
        return ""
    which = "held-out" if held_out else "training"
    longer = _longer(record)
    return (
        f"The {which} loss was still falling when the run ended, from {middle:.3f} to {end:.3f} in its second half. "
        f"Train longer: {longer}."
    )


def _longer(record: RunRecord) -> str:
    """Return the flag for twice as many steps."""
    if (epochs := record.settings.get("epochs")) and not record.settings.get("steps"):
        return f"--epochs {2 * epochs:g}"
    return f"--steps {2 * record.last_step}"
