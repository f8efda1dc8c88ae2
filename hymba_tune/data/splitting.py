"""Which encoded rows are held out, and how often the others are taken."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from hymba_tune.data.report import SourceCounts, short_names
from hymba_tune.errors import DataError


def split_rows(
    sources: Sequence[SourceCounts], fraction: float, *, seed: int, max_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a share of the rows, drawn at random.

    Args:
        sources: What each gave, as in the report on the rows, in their order. Rows of one with a weight above 1 are
            trained on that often, and never held out as well.
        fraction: Share of the rows to hold out, in ``[0, 1)``; 0 holds out nothing.
        seed: The same seed draws the same rows.
        max_rows: The most rows to hold out; what exceeds it is trained on.

    Returns:
        Indices of the rows to train on and of the held-out ones, at least one unless ``fraction`` is 0, both ascending.

    Raises:
        DataError: If there are fewer than two rows to part.
    """
    rows = sum(source.kept for source in sources)
    kept, held_out = np.arange(rows), np.arange(0)
    if fraction > 0:
        if rows < 2:
            raise DataError(
                f"Cannot hold out evaluation data: there is only {rows} row.",
                expected="at least 2 rows",
                fix="--eval-data FILE, or --eval-split 0 to do without",
            )
        count = min(max(1, round(rows * fraction)), rows - 1, max_rows or rows)
        held_out = np.sort(random.Random(seed).sample(range(rows), count))
        kept = np.delete(kept, held_out)
    return _repeated(kept, sources, seed), held_out


def _repeated(rows: np.ndarray, sources: Sequence[SourceCounts], seed: int) -> np.ndarray:
    """The rows as often as their sources' weights say: 2.5 takes each twice, and a drawn half of them once more."""
    if all(source.weight <= 1 for source in sources):
        return rows
    draws = np.random.default_rng(seed).random(len(rows))
    weights = np.repeat([max(1.0, source.weight) for source in sources], [source.kept for source in sources])[rows]
    times = np.floor(weights + draws).astype(int)
    return np.repeat(rows, times)


def first_rows(sources: Sequence[SourceCounts], max_rows: int) -> np.ndarray:
    """Indices of the first rows of each source, as many of each; what small sources lack is made up by larger ones.

    Args:
        sources: What each gave, in the order of the rows.
        max_rows: The most rows, of all sources together.
    """
    taken = np.zeros(len(sources), dtype=int)
    left = max_rows
    for nth, index in enumerate(sorted(range(len(sources)), key=lambda index: sources[index].kept)):
        taken[index] = min(sources[index].kept, -(-left // (len(sources) - nth)))
        left -= taken[index]
    starts = np.cumsum([0, *(source.kept for source in sources)])
    return np.concatenate([start + np.arange(count) for start, count in zip(starts, taken, strict=False)])


def rows_by_source(sources: Sequence[SourceCounts], rows: np.ndarray) -> dict[str, int]:
    """How many rows are of each source, in their order; those of which there are none are left out.

    Args:
        sources: What each gave, in the order of the rows.
        rows: Indices of some, ascending.
    """
    ends = np.cumsum([source.kept for source in sources])
    counts = np.diff(np.searchsorted(rows, ends), prepend=0).tolist()
    return {name: count for name, count in zip(short_names(sources), counts, strict=True) if count}
