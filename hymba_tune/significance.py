"""Whether one model is better than another on the same rows: exact and paired tests that assume no distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

LEVEL = 0.05
"""The largest p-value that counts as a difference: at most 5 % of equally good models are called different."""
ENUMERATED = 12
"""The most differences of which all choices of signs are tried; of more, a sample is."""
SAMPLED = 10_000
"""The number of sampled choices of signs."""
BLOCK = 100
"""The number of them that are in memory at a time."""
METHOD = (
    "Better and worse are said at a p-value of at most 0.05, by a two-sided test on the same rows: for losses and "
    "rewards a permutation test that flips the signs of the differences, for right answers an exact sign test of those "
    "that only one of the two has (McNemar's)."
)
"""The tests in words, for pages and documentation."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test.

    Attributes:
        word: ``better``, ``worse``, ``the same`` where no row differs, ``too few to say``, or ``not finite`` where a
            loss is infinite or no number.
        n: The number of rows, pairs or questions.
        p: The p-value.
    """

    word: str
    n: int
    p: float

    @property
    def better(self) -> bool | None:
        """Whether it is better; None if that cannot be said."""
        return {"better": True, "worse": False}.get(self.word)

    def __str__(self) -> str:
        return f"{self.word} (n = {self.n:,})"

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> Self:
        """Return the outcome that a file holds."""
        return cls(str(facts["word"]), int(facts["n"]), float(facts["p"]))


def compare_sums(before: Sequence[float], after: Sequence[float], *, n: int | None = None) -> Outcome:
    """Test whether the sum of losses has fallen: a paired permutation test.

    If neither is better, each difference is as likely to have the other sign. The p-value is the share of the choices
    of signs whose sum is at least as far from 0 as the sum seen.

    Args:
        before: The loss of each part of the data: a row, or the sum over a batch.
        after: The losses of the same parts, in the same order.
        n: The number of rows. The default is the number of parts.
    """
    differences = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    rows = len(differences) if n is None else n
    differences = differences[differences != 0]
    if not len(differences):
        return Outcome("the same", rows, 1.0)
    if not np.isfinite(differences).all():
        return Outcome("not finite", rows, 1.0)
    seen = abs(differences.sum()) * (1 - 1e-9)
    size = len(differences)
    if size <= ENUMERATED:
        bits = np.arange(2**size)[:, None] >> np.arange(size) & 1
        p = float((abs((2 * bits - 1) @ differences) >= seen).mean())
    else:
        generator = np.random.default_rng(0)
        as_far = 0
        for _ in range(SAMPLED // BLOCK):
            signs = 2 * generator.integers(0, 2, (BLOCK, size), dtype=np.int8) - 1
            as_far += int((abs(signs @ differences) >= seen).sum())
        p = (as_far + 1) / (SAMPLED + 1)
    return _tested(differences.sum() > 0, p, rows)


def compare_counts(gained: int, lost: int, *, n: int) -> Outcome:
    """Test whether more answers are right than before: an exact sign test (McNemar's) of those that changed.

    Args:
        gained: The number that are right now and were wrong before.
        lost: The number that are wrong now and were right before.
        n: The number of all answers.
    """
    if not gained + lost:
        return Outcome("the same", n, 1.0)
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(max(gained, lost), changed + 1))
    return _tested(gained > lost, min(1.0, 2 * tail / 2**changed), n)


def _tested(better: bool, p: float, n: int) -> Outcome:
    word = "too few to say" if p > LEVEL else "better" if better else "worse"
    return Outcome(word, n, p)
