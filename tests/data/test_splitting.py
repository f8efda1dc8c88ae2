from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hymba_tune.data.report import SourceCounts, short_names
from hymba_tune.data.splitting import first_rows, rows_by_source, split_rows
from hymba_tune.errors import DataError


def of(*kept: int) -> list[SourceCounts]:
    return [SourceCounts(f"data/{name}.jsonl", kept=count) for name, count in zip("abc", kept, strict=False)]


def test_parts_make_up_all_rows_in_order() -> None:
    train, held_out = split_rows(of(30, 10), 0.25, seed=3)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted([*train, *held_out]) == list(range(40))
    assert all((np.diff(part) > 0).all() for part in (train, held_out))


def test_same_seed_draws_the_same_rows() -> None:
    draws = [split_rows(of(40), 0.25, seed=seed)[1].tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("rows", "fraction", "max_rows", "sizes"),
    [(40, 0.5, 3, (37, 3)), (5, 0.05, 500, (4, 1)), (2, 0.99, 500, (1, 1))],
)
def test_number_of_held_out_rows(rows: int, fraction: float, max_rows: int, sizes: tuple[int, int]) -> None:
    train, held_out = split_rows(of(rows), fraction, seed=0, max_rows=max_rows)
    assert (len(train), len(held_out)) == sizes


def test_single_row_cannot_be_split() -> None:
    train, held_out = split_rows(of(1), 0.0, seed=0)
    assert (train.tolist(), held_out.tolist()) == ([0], [])
    with pytest.raises(DataError, match=r"there is only 1 row(.|\n)*--eval-split 0"):
        split_rows(of(1), 0.5, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_weights_above_one_repeat_rows_that_are_trained_on_only(fraction: float) -> None:
    sources = [SourceCounts("a", 0.5, kept=100), SourceCounts("b", 2.5, kept=200), SourceCounts("c", 3.0, kept=100)]
    train, held_out = split_rows(sources, fraction, seed=0)
    times = Counter(train.tolist())
    held = set(held_out.tolist())
    assert len(held) == 400 * fraction
    assert times.keys() == set(range(400)) - held
    assert {times[row] for row in range(100) if row not in held} == {1}
    assert {times[row] for row in range(300, 400) if row not in held} == {3}
    halves = [times[row] for row in range(100, 300) if row not in held]
    assert set(halves) == {2, 3}
    assert 0.4 < halves.count(3) / len(halves) < 0.6
    assert split_rows(sources, fraction, seed=0)[0].tolist() == train.tolist()


@pytest.mark.parametrize(
    ("kept", "max_rows", "indices"),
    [
        ((10,), 4, [0, 1, 2, 3]),
        ((10,), 40, list(range(10))),
        ((4, 4), 5, [0, 1, 2, 4, 5]),
        ((10, 1, 2), 7, [0, 1, 2, 3, 10, 11, 12]),
        ((3, 0, 3), 4, [0, 1, 3, 4]),
    ],
)
def test_first_rows_of_every_source_are_selected(kept: tuple[int, ...], max_rows: int, indices: list[int]) -> None:
    assert first_rows(of(*kept), max_rows).tolist() == indices


def test_rows_are_counted_by_source() -> None:
    assert rows_by_source(of(3, 0, 4), np.array([0, 2, 3, 5, 6])) == {"a.jsonl": 2, "c.jsonl": 3}
    assert rows_by_source(of(3, 4), np.array([4])) == {"b.jsonl": 1}
    assert rows_by_source(of(3), np.arange(0)) == {}


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["x/a.jsonl", "y/b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["x/a.jsonl", "y/a.jsonl"], ["x/a.jsonl", "y/a.jsonl"]),
        (["x/a.jsonl", "x/a.jsonl"], ["x/a.jsonl (1)", "x/a.jsonl (2)"]),
    ],
)
def test_short_names_are_distinct(names: list[str], short: list[str]) -> None:
    assert short_names([SourceCounts(name) for name in names]) == short
