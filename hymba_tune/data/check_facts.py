"""A check in words and numbers: the verdict, what to mend, and the same as JSON."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hymba_tune.data.check_counts import Check, FileCheck, Lengths, PairCounts

BARS = 10
"""Bars of a histogram, about, where they are of even width."""
UNEVEN = 20
"""Ratio of the longest rows to the usual ones from which each bar is twice as wide as the one before."""
LONGEST_ADVISED = 32_768
LENGTH_BIAS = 0.65
"""Share of pairs from which it is worth saying that one side's answers are the longer ones."""


@dataclass(frozen=True)
class Problem:
    """Something worth mending.

    Attributes:
        what: How many rows, and what is with them.
        fix: What to do about it; may be empty.
        examples: Where.
    """

    what: str
    fix: str = ""
    examples: tuple[str, ...] = ()


def counted(number: int, thing: str) -> str:
    """A number and what it counts: ``1 row``, ``2 rows``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def verdict(check: Check) -> str:
    """Whether the files can be trained on, in one sentence."""
    unreadable = [file.name for file in check.files if file.problem]
    if unreadable:
        others = f", nor can {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        return f"Cannot be trained on yet: {unreadable[0]} cannot be used{others}."
    if check.bad_rows:
        return f"Cannot be trained on yet: {check.bad_rows:,} of {counted(check.rows, 'row')} would stop a run."
    if not check.learned:
        return f"Cannot be trained on: nothing is left to learn at --max-length {check.max_length:,}."
    return "Can be trained on as it is."


def problems(check: Check) -> list[Problem]:
    """What to mend, what stops a run first."""
    found = [Problem(file.problem.what, file.problem.details["to fix"]) for file in check.files if file.problem]
    for finding in sorted(check.problems.values(), key=lambda finding: -finding.rows):
        found.append(Problem(f"{counted(finding.rows, 'row')}: {finding.what}", finding.fix, tuple(finding.examples)))
    if check.bad_rows:
        found.append(Problem("or leave all such rows out", "--on-bad-row skip"))
    if check.too_long:
        dropped = f"{counted(check.too_long, 'row')} dropped: no answer begins within --max-length"
        found.append(Problem(dropped, _longer(check)))
    if check.cut:
        lost = f"{counted(check.cut, 'conversation')} cut ({counted(check.tokens_lost, 'token')} lost)"
        found.append(Problem(lost, _longer(check)))
    if check.duplicates.rows:
        pairs = tuple(f"{place} repeats {original}" for place, original in check.duplicates.examples)
        fix = "hymba-tune data convert --unique leaves them out"
        found.append(Problem(f"{counted(check.duplicates.rows, 'row')}: the same as an earlier one", fix, pairs))
    if check.pairs and check.pairs.ties:
        found.append(Problem(f"{counted(check.pairs.ties, 'pair')}: both answers have one score", "take them out"))
    if check.pairs and max(shares := _longer_shares(check.pairs)) > LENGTH_BIAS:
        side = "better" if shares[0] > shares[1] else "worse"
        told = f"the {side} answer is the longer one in {max(shares):.0%} of the pairs"
        found.append(Problem(told, "balance them, or length is what is learned"))
    for note in check.notes.values():
        found.append(Problem(f"{counted(note.rows, 'row')}: {note.what}", note.fix, tuple(note.examples)))
    return found


def _longer_shares(pairs: PairCounts) -> tuple[float, float]:
    """In which share of the pairs the better answer is the longer one, and the worse."""
    rows = max(1, pairs.rows)
    return pairs.chosen_longer / rows, pairs.rejected_longer / rows


def _longer(check: Check) -> str:
    """A length within reason that holds most rows whole, if it is more than the present one."""
    for share in (0.99, 0.95, 0.9):
        enough = -(-check.lengths.quantile(share) // 64) * 64
        if check.max_length < enough <= LONGEST_ADVISED:
            return f"--max-length {enough} holds {share:.0%} of the rows whole"
    return "shorten them, or a larger --max-length"


def overview(check: Check) -> list[tuple[str, str]]:
    """What the files hold, a label and a line each."""
    lengths, duplicates = check.lengths, check.duplicates
    lines = [(f"{file.name}", f"{counted(file.rows, 'row')}{_formats(file)}") for file in check.files]
    if check.tokens:
        share = check.learned / check.tokens
        lines.append(("tokens", f"{check.tokens:,}, {share:.0%} learned"))
        longest = max(lengths.rows)
        spread = f"median {lengths.quantile(0.5):,}, 90 % up to {lengths.quantile(0.9):,}, longest {longest:,}"
        lines.append(("a row", spread))
    lost = {"dropped": check.too_long, "cut": check.cut, "in pieces": check.continued}
    at = ", ".join(f"{rows:,} {what}" for what, rows in lost.items() if rows) or "all rows whole"
    if lengths.rows:
        lines.append((f"at {check.max_length:,}", f"{at} (--max-length)"))
    lines.append(
        ("repeated", f"{counted(duplicates.rows, 'row')}; {duplicates.other_answers:,} more answers to a prompt")
    )
    if check.pairs:
        told = f"{counted(check.pairs.rows, 'pair')}, {check.pairs.ties:,} ties, {check.pairs.identical:,} identical"
        lines.append(("preferences", f"{told}; chosen longer in {_longer_shares(check.pairs)[0]:.0%}"))
    if check.hidden:
        lines.append(("not shown", ", ".join(f"{key} ({rows:,})" for key, rows in check.hidden.most_common())))
    return lines


def _formats(file: FileCheck) -> str:
    formats = ", ".join(f"{name} {rows:,}" if len(file.formats) > 1 else name for name, rows in file.formats.items())
    return f" · {formats}" if formats else ""


def next_commands(
    check: Check, files: Sequence[str], model: str, mapping: Sequence[str], max_length: int
) -> list[tuple[str, str]]:
    """What to do with the files now: a label and a command line each."""
    if any(file.problem for file in check.files):
        return []
    flags = [*files, "--model", model, *(word for pair in mapping for word in ("--map", pair))]
    train = ["hymba-tune", "dpo" if check.pairs else "sft", "--data", *flags, "--max-length", str(max_length)]
    if not check.usable:
        train += ["--on-bad-row", "skip"]
    look = shlex.join(["hymba-tune", "data", "preview", *flags])
    commands = [] if check.pairs else [("look", look)]
    if not check.learned:
        return commands
    commands.append(("train", shlex.join(train)))
    if "label" in check.hidden:  # which may say how good the answers are
        commands.append(("judged", shlex.join(["hymba-tune", "kto", *train[2:]])))
    return commands


def facts(check: Check) -> dict[str, Any]:
    """Everything as JSON takes it. Lengths and counts are numbers of tokens and rows."""
    return {
        "usable": check.usable,
        "verdict": verdict(check),
        "rows": check.rows,
        "bad_rows": check.bad_rows,
        "files": [
            {
                "name": file.name,
                "rows": file.rows,
                "formats": dict(file.formats),
                "problem": file.problem and str(file.problem),
            }
            for file in check.files
        ],
        "problems": [asdict(finding) for finding in check.problems.values()],
        "notes": [asdict(finding) for finding in check.notes.values()],
        "hidden": dict(check.hidden),
        "duplicates": asdict(check.duplicates),
        "preferences": check.pairs and {**asdict(check.pairs), "chosen_longer_share": _longer_shares(check.pairs)[0]},
        "tokens": {
            "kept": check.tokens,
            "learned": check.learned,
            "learned_share": check.learned / check.tokens if check.tokens else 0.0,
            "lost": check.tokens_lost,
        },
        "lengths": {
            "median": check.lengths.quantile(0.5),
            "p90": check.lengths.quantile(0.9),
            "p99": check.lengths.quantile(0.99),
            "longest": max(check.lengths.rows, default=0),
            "histogram": [{"from": low, "to": high, "rows": rows} for low, high, rows in histogram(check.lengths)],
        },
        "at_max_length": {
            "max_length": check.max_length,
            "too_long": check.too_long,
            "cut": check.cut,
            "continued": check.continued,
        },
    }


def histogram(lengths: Lengths) -> list[tuple[int, int | None, int]]:
    """Bars over all lengths: of even width, or where a few rows are far longer each twice as wide as the one before.

    Returns:
        From and up to how many tokens (`None`: and more), and how many rows.
    """
    if not lengths.rows:
        return []
    most, longest = lengths.quantile(0.99), max(lengths.rows)
    if longest > UNEVEN * lengths.quantile(0.5):
        edges = [0, *(2**power for power in range(4, longest.bit_length() + 1))]
    else:
        width = 2 ** max(3, math.ceil(math.log2(max(1, most) / BARS)))
        edges = list(range(0, most + width + 1, width))
    sizes, counts = lengths.table()
    rows, _ = np.histogram(sizes, [*edges, np.inf], weights=counts)
    highs: list[int | None] = [*(edge - 1 for edge in edges[1:]), None]
    bars = list(zip(edges, highs, rows.astype(int).tolist(), strict=True))
    filled = [index for index, bar in enumerate(bars) if bar[2]]
    return bars[filled[0] : filled[-1] + 1]
