"""Which encoded rows are held out, and how often the others are taken."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from hymba_tune.data.report import SourceCounts
from hymba_tune.errors import DataError


def split_dataset(
    dataset: Dataset, fraction: float, *, seed: int, max_rows: int | None = None, sources: Sequence[SourceCounts] = ()
) -> tuple[Dataset, Dataset | None]:
    """Hold out a share of the rows, drawn at random; both parts keep their order.

    Args:
        dataset: As `build_dataset` gives it.
        fraction: Share of the rows to hold out, in ``[0, 1)``; 0 holds out nothing.
        seed: The same seed draws the same rows.
        max_rows: The most rows to hold out; what exceeds it stays in the first part.
        sources: As in the dataset's report. Rows of sources with a weight above 1 stand that often in the first part,
            and never in both.

    Returns:
        The rows to train on, and the held-out ones, at least one, or `None` if ``fraction`` is 0.

    Raises:
        DataError: If there are fewer than two rows to part.
    """
    rows = len(dataset)
    kept, held_out = np.arange(rows), None
    if fraction > 0:
        if rows < 2:
            raise DataError(
                f"Cannot hold out evaluation data: there is only {rows} row.",
                expected="at least 2 rows",
                fix="--eval-data FILE, or --eval-split 0 to do without",
            )
        count = min(max(1, round(rows * fraction)), rows - 1, max_rows or rows)
        drawn = np.sort(random.Random(seed).sample(range(rows), count))
        kept, held_out = np.delete(kept, drawn), dataset.select(drawn)
    taken = _repeated(kept, sources, seed)
    return dataset if len(taken) == rows and held_out is None else dataset.select(taken), held_out


def _repeated(rows: np.ndarray, sources: Sequence[SourceCounts], seed: int) -> np.ndarray:
    """The rows as often as their sources' weights say: 2.5 takes each twice, and a drawn half of them once more."""
    if all(source.weight <= 1 for source in sources):
        return rows
    draws = np.random.default_rng(seed).random(len(rows))
    weights = np.repeat([max(1.0, source.weight) for source in sources], [source.kept for source in sources])[rows]
    times = np.floor(weights + draws).astype(int)
    return np.repeat(rows, times)
