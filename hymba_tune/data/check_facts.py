"""A data check as text and as JSON: the verdict, the problems to fix, an overview and the next commands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hymba_tune.data.check_counts import Check, FileCheck, Lengths, PairCounts
from hymba_tune.errors import command

BARS = 10
"""Approximate number of bars in a histogram with bars of even width."""
UNEVEN = 20
"""Ratio of the longest row to the median from which each bar is twice as wide as the one before."""
LONGEST_ADVISED = 32_768
LENGTH_BIAS = 0.65
"""Share of pairs with a longer answer on one side from which the imbalance is reported."""


@dataclass(frozen=True)
class DataProblem:
    """A problem to fix.

    Attributes:
        what: The number of rows and their problem.
        fix: What to do about it; may be empty.
        examples: Places of the first such rows.
    """

    what: str
    fix: str = ""
    examples: tuple[str, ...] = ()


def counted(number: int, thing: str) -> str:
    """Format a number and the thing it counts: ``1 row``, ``2 rows``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def verdict(check: Check) -> str:
    """State in one sentence whether a run can train on the files."""
    unreadable = [file.name for file in check.files if file.problem]
    if unreadable:
        others = f", nor can {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        return f"Cannot be trained on yet: {unreadable[0]} cannot be used{others}."
    if check.bad_rows:
        return f"Cannot be trained on yet: {check.bad_rows:,} of {counted(check.rows, 'row')} would stop a run."
    if not check.learned:
        return f"Cannot be trained on: no answer begins within --max-length {check.max_length:,}."
    return "Can be trained on as it is."


def problems(check: Check) -> list[DataProblem]:
    """List the problems to fix; those that stop a run come first."""
    result = [DataProblem(file.problem.what, file.problem.details["to fix"]) for file in check.files if file.problem]
    for finding in sorted(check.problems.values(), key=lambda finding: -finding.rows):
        result.append(
            DataProblem(f"{counted(finding.rows, 'row')}: {finding.what}", finding.fix, tuple(finding.examples))
        )
    if 0 < check.bad_rows < check.rows:
        result.append(DataProblem("or skip all of these rows", "--on-bad-row skip"))

    if check.too_long:
        dropped = f"{counted(check.too_long, 'row')} dropped: no answer begins within --max-length"
        result.append(DataProblem(dropped, _longer_maximum(check)))
    if check.cut:
        cut = f"{counted(check.cut, 'conversation')} cut ({counted(check.tokens_lost, 'token')} lost)"
        result.append(DataProblem(cut, _longer_maximum(check)))

    if check.duplicates.rows:
        repeats = tuple(f"{place} repeats {original}" for place, original in check.duplicates.examples)
        fix = "remove them with hymba-tune data convert --unique"
        result.append(DataProblem(f"{counted(check.duplicates.rows, 'row')}: the same as an earlier one", fix, repeats))

    if check.pairs and check.pairs.ties:
        result.append(
            DataProblem(f"{counted(check.pairs.ties, 'pair')}: both answers have the same score", "remove them")
        )
    if check.pairs and max(shares := _longer_shares(check.pairs)) > LENGTH_BIAS:
        side = "better" if shares[0] > shares[1] else "worse"
        bias = f"the {side} answer is the longer one in {max(shares):.0%} of the pairs"
        result.append(DataProblem(bias, "balance them, or the model learns to prefer a length"))

    if len({good for _, good in check.labels}) == 1:
        only = "good" if next(iter(check.labels))[1] else "bad"
        result.append(DataProblem(f"every label says that the answer is {only}", "kto needs good and bad answers"))

    for note in check.notes.values():
        result.append(DataProblem(f"{counted(note.rows, 'row')}: {note.what}", note.fix, tuple(note.examples)))
    return result


def _longer_shares(pairs: PairCounts) -> tuple[float, float]:
    """Return the shares of pairs whose chosen, and whose rejected, answer is the longer one."""
    rows = max(1, pairs.rows)
    return pairs.chosen_longer / rows, pairs.rejected_longer / rows


def _longer_maximum(check: Check) -> str:
    """Propose a larger --max-length that fits most rows, if a reasonable one does."""
    for share in (0.99, 0.95, 0.9):
        enough = -(-check.lengths.quantile(share) // 64) * 64
        if check.max_length < enough <= LONGEST_ADVISED:
            return f"--max-length {enough} fits {share:.0%} of the rows"
    return "shorten them, or use a larger --max-length"


def overview(check: Check) -> list[tuple[str, str]]:
    """Describe the content of the files: a label and a line each."""
    lengths = check.lengths
    duplicates = check.duplicates
    lines = [(f"{file.name}", f"{counted(file.rows, 'row')}{_formats(file)}") for file in check.files]
    if check.tokens:
        share = check.learned / check.tokens
        lines.append(("tokens", f"{check.tokens:,}, {share:.0%} with loss"))
        longest = max(lengths.rows)
        spread = f"median {lengths.quantile(0.5):,}, 90 % up to {lengths.quantile(0.9):,}, longest {longest:,}"
        lines.append(("per row", spread))

    not_whole = {"dropped": check.too_long, "cut": check.cut, "continued in further rows": check.continued}
    fitted = ", ".join(f"{rows:,} {what}" for what, rows in not_whole.items() if rows) or "all rows fit"
    if lengths.rows:
        lines.append((f"at {check.max_length:,}", f"{fitted} (--max-length)"))
    lines.append(
        ("repeated", f"{counted(duplicates.rows, 'row')}; {duplicates.other_answers:,} more answers to a prompt")
    )

    if check.pairs:
        counts = f"{counted(check.pairs.rows, 'pair')}, {check.pairs.ties:,} ties, {check.pairs.identical:,} identical"
        lines.append(("preferences", f"{counts}; chosen longer in {_longer_shares(check.pairs)[0]:.0%}"))
    if check.hidden:
        lines.append(("not shown", ", ".join(f"{key} ({rows:,})" for key, rows in check.hidden.most_common())))
    return lines


def _formats(file: FileCheck) -> str:
    formats = ", ".join(f"{name} {rows:,}" if len(file.formats) > 1 else name for name, rows in file.formats.items())
    return f" · {formats}" if formats else ""


def next_commands(
    check: Check,
    files: Sequence[str],
    model: str,
    mapping: Sequence[str],
    max_length: int,
    reading: Sequence[str] = (),
) -> list[tuple[str, str]]:
    """Propose what to do with the files next: a label and a command line each.

    Args:
        check: The result of the check.
        files: The files that were checked.
        model: The model whose tokenizer was used.
        mapping: Column and role names, as ``--map`` has them.
        max_length: Maximum tokens of a row.
        reading: Further flags of how the rows were read.
    """
    if any(file.problem for file in check.files):
        return []
    flags = [*files, "--model", model, *(word for pair in mapping for word in ("--map", pair)), *reading]
    train = ["dpo" if check.pairs else "sft", "--data", *flags, "--max-length", str(max_length)]
    if not check.usable:
        train += ["--on-bad-row", "skip"]
    look = command("data", "preview", *flags)
    commands = [] if check.pairs else [("look", look)]
    if not check.learned:
        return commands
    if not any(good is False for _, good in check.labels):  # sft would learn the bad answers, too
        commands.append(("train", command(*train)))
    if columns := {column for column, _ in check.labels}:
        renamed = [word for column in columns - {"label"} for word in ("--map", f"label={column}")]
        commands.append(("kto", command("kto", *train[1:], *renamed)))
    return commands


def facts(check: Check) -> dict[str, Any]:
    """Return the whole check as values for JSON. Lengths are numbers of tokens, counts numbers of rows."""
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
    """Count the rows in ranges of lengths.

    The ranges have even widths. If a few rows are far longer than most, each range is twice as wide as the one before.

    Returns:
        The first and the last length of each range (`None`: no upper limit), and the number of its rows.
    """
    if not lengths.rows:
        return []
    most = lengths.quantile(0.99)
    longest = max(lengths.rows)
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
