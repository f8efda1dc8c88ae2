"""Selects encoded rows: which are held out, and how often the others are repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from hymba_tune.data.report import SourceCounts, short_names
from hymba_tune.errors import DataError


def split_rows(
    sources: Sequence[SourceCounts], fraction: float, *, seed: int, max_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a random share of the rows.

    Args:
        sources: Counts of the sources in the order of the rows, as in the report. Rows of a source with a weight above
            1 are repeated that often, unless they are held out.
        fraction: Share of the rows to hold out, in ``[0, 1)``; 0 holds out nothing.
        seed: Random seed; the same seed draws the same rows.
        max_rows: Maximum number of rows to hold out; further rows are trained on.

    Returns:
        Indices of the training rows and of the held-out rows, both ascending. At least one row is held out unless
        ``fraction`` is 0.

    Raises:
        DataError: If there are fewer than two rows to split.
    """
    rows = sum(source.kept for source in sources)
    train = np.arange(rows)
    held_out = np.arange(0)
    if fraction > 0:
        if rows < 2:
            raise DataError(
                f"Cannot hold out evaluation data: there is only {rows} row.",
                expected="at least 2 rows",
                fix="--eval-data FILE, or --eval-split 0 for no evaluation",
            )
        count = min(max(1, round(rows * fraction)), rows - 1, max_rows or rows)
        held_out = np.sort(random.Random(seed).sample(range(rows), count))
        train = np.delete(train, held_out)
    return _repeated(train, sources, seed), held_out


def _repeated(rows: np.ndarray, sources: Sequence[SourceCounts], seed: int) -> np.ndarray:
    """Repeat rows by the weights of their sources: 2.5 repeats each row twice, and a random half once more."""
    if all(source.weight <= 1 for source in sources):
        return rows
    draws = np.random.default_rng(seed).random(len(rows))
    weights = np.repeat([max(1.0, source.weight) for source in sources], [source.kept for source in sources])[rows]
    times = np.floor(weights + draws).astype(int)
    return np.repeat(rows, times)


def first_rows(sources: Sequence[SourceCounts], max_rows: int) -> np.ndarray:
    """Return the indices of the first rows of each source: equally many, more of large sources if others are small.

    Args:
        sources: Counts of the sources in the order of the rows.
        max_rows: Maximum number of rows of all sources together.
    """
    counts = np.zeros(len(sources), dtype=int)
    left = max_rows
    # Smallest first, so that what a small source lacks is divided among the larger ones.
    for nth, index in enumerate(sorted(range(len(sources)), key=lambda index: sources[index].kept)):
        counts[index] = min(sources[index].kept, -(-left // (len(sources) - nth)))
        left -= counts[index]

    starts = np.cumsum([0, *(source.kept for source in sources)])
    return np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=False)])


def rows_by_source(sources: Sequence[SourceCounts], rows: np.ndarray) -> dict[str, int]:
    """Count the rows of each source, in the order of the sources and without those that have none.

    Args:
        sources: Counts of the sources in the order of the rows.
        rows: Indices of the rows to count, ascending.
    """
    ends = np.cumsum([source.kept for source in sources])
    counts = np.diff(np.searchsorted(rows, ends), prepend=0).tolist()
    return {name: count for name, count in zip(short_names(sources), counts, strict=True) if count}
