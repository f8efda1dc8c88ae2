from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from hymba_tune.significance import LEVEL, Outcome, compare_counts, compare_sums


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("rows", "trials"), [(7, 1000), (40, 400)])
def test_models_that_are_equally_good_are_seldom_called_better(seed: int, rows: int, trials: int) -> None:
    """Two models that differ by noise on each row, with rows of very different difficulty."""
    rng = np.random.default_rng(seed)
    losses = rng.exponential(3.0, (trials, rows, 1)) + rng.standard_t(3, (trials, rows, 2)) * rng.exponential(
        1.0, (trials, rows, 1)
    )
    outcomes = [compare_sums(*one.T).word for one in losses]
    assert outcomes.count("better") <= LEVEL * trials
    assert outcomes.count("worse") <= LEVEL * trials
    right = rng.random((trials, rows, 2)) < rng.random((trials, rows, 1))
    counts = [(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in right.transpose(0, 2, 1)]
    assert [compare_counts(*one, n=rows).word for one in counts].count("better") <= LEVEL * trials


def test_a_model_is_the_same_as_itself() -> None:
    losses = [1.0, 2.0, 3.0]
    assert compare_sums(losses, losses) == Outcome("the same", 3, 1.0)
    assert compare_counts(0, 0, n=56) == Outcome("the same", 56, 1.0)


@pytest.mark.parametrize("rows", [6, 12, 13, 300])
def test_a_gain_on_every_row_is_better(rows: int) -> None:
    before = [2.0 + i / 100 for i in range(rows)]
    after = [loss - 0.1 for loss in before]
    better, worse = compare_sums(before, after), compare_sums(after, before)
    assert (better.word, worse.word) == ("better", "worse")
    assert (better.better, worse.better) == (True, False)
    assert better.p == pytest.approx(2 / 2**rows if rows <= 12 else 2e-4, rel=1)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_five_rows_are_too_few(rows: int) -> None:
    assert compare_sums([3.0] * rows, [1.0] * rows).word == "too few to say"
    assert compare_counts(rows, 0, n=rows).better is None


def test_p_values_are_exact() -> None:
    assert compare_sums([1, 1, 1], [0, 0, 0]).p == pytest.approx(2 / 8)
    assert compare_sums([3, 1, 0], [0, 0, 1]).p == pytest.approx(6 / 8)  # all but 3 - 1 - 1, with either sign
    assert compare_counts(9, 1, n=100).p == pytest.approx(22 / 1024)
    assert compare_counts(3, 3, n=100).p == 1


def test_losses_that_are_no_numbers_are_no_verdict() -> None:
    assert compare_sums([1.0] * 20, [float("nan")] * 20).word == "not finite"


def test_many_rows_need_little_memory() -> None:
    rows = np.random.default_rng(0).normal(size=20_000)
    tracemalloc.start()
    compare_sums(rows, rows + 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_it_is_written_with_its_size() -> None:
    assert str(compare_sums([3.0] * 1200, [2.0] * 1200, n=2400)) == "better (n = 2,400)"
    assert Outcome.of_facts({"word": "worse", "n": 7, "p": 0.01}) == Outcome("worse", 7, 0.01)
