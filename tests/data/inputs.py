"""Sources of rows in memory, for the tests of the data layer."""

from __future__ import annotations

from collections.abc import Sequence

from hymba_tune.data import RowLocation, Source, SourceRow


def source(rows: Sequence[object], name: str = "support.jsonl") -> Source:
    """A source of these rows, whose places are the lines of a file that does not exist."""
    return Source(
        name, lambda: iter(SourceRow(RowLocation(name, number), row) for number, row in enumerate(rows, start=1))
    )


def numbered(count: int) -> Source:
    """A source of questions and answers that count up."""
    return source([{"prompt": f"Count to {number}.", "completion": str(number)} for number in range(count)])
