from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset

from hymba_tune.data import split_dataset
from hymba_tune.data.report import SourceCounts
from hymba_tune.errors import DataError


def numbered(count: int) -> Dataset:
    return Dataset.from_dict({"row": list(range(count))})


def test_parts_are_the_whole_in_order() -> None:
    train, held_out = split_dataset(numbered(40), 0.25, seed=3)
    assert held_out is not None
    assert (len(train), len(held_out)) == (30, 10)
    parts = [part["row"][:] for part in (train, held_out)]
    assert parts == [sorted(part) for part in parts]
    assert sorted(parts[0] + parts[1]) == list(range(40))


def test_seed_decides() -> None:
    draws = [split_dataset(numbered(40), 0.25, seed=seed)[1].to_list() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("rows", "fraction", "max_rows", "sizes"),
    [(40, 0.5, 3, (37, 3)), (5, 0.05, 500, (4, 1)), (2, 0.99, 500, (1, 1))],
)
def test_sizes(rows: int, fraction: float, max_rows: int, sizes: tuple[int, int]) -> None:
    train, held_out = split_dataset(numbered(rows), fraction, seed=0, max_rows=max_rows)
    assert held_out is not None
    assert (len(train), len(held_out)) == sizes


def test_nothing_is_held_out_of_nothing() -> None:
    dataset = numbered(1)
    assert split_dataset(dataset, 0.0, seed=0) == (dataset, None)
    with pytest.raises(DataError, match=r"there is only 1 row(.|\n)*--eval-split 0"):
        split_dataset(dataset, 0.5, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_weights_above_one_repeat_rows_that_are_trained_on_only(fraction: float) -> None:
    sources = [SourceCounts("a", 0.5, kept=100), SourceCounts("b", 2.5, kept=200), SourceCounts("c", 3.0, kept=100)]
    train, held_out = split_dataset(numbered(400), fraction, seed=0, sources=sources)
    times = Counter(train["row"][:])
    held = set(held_out["row"][:]) if held_out is not None else set()
    assert len(held) == 400 * fraction
    assert times.keys() == set(range(400)) - held
    assert {times[row] for row in range(100) if row not in held} == {1}
    assert {times[row] for row in range(300, 400) if row not in held} == {3}
    halves = [times[row] for row in range(100, 300) if row not in held]
    assert set(halves) == {2, 3}
    assert 0.4 < halves.count(3) / len(halves) < 0.6
    again, _ = split_dataset(numbered(400), fraction, seed=0, sources=sources)
    assert again["row"][:] == train["row"][:]
