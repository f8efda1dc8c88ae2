"""What a check of data finds and counts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from hymba_tune.data.duplicates import Duplicates
from hymba_tune.errors import DataError

EXAMPLES = 3
"""Places that are kept of each kind of finding."""
KINDS = 40
"""Kinds of findings that are told apart; the rest is counted together, so that memory has a bound."""
OTHERS = "something else"
NUMBERS, ASIDES = re.compile(r"(?<![-\w])\d[\d,.]*"), re.compile(r" \([^()]*\)")


def general(what: str) -> str:
    """A problem without numbers and asides, by which rows are counted together."""
    return NUMBERS.sub("N", ASIDES.sub("", what))


@dataclass
class Finding:
    """Something that is so in some rows.

    Attributes:
        what: In general: numbers and names are left out.
        rows: How many.
        examples: The first of them: where, and what it is there.
        fix: What to do about it.
    """

    what: str
    rows: int = 0
    examples: list[str] = field(default_factory=list)
    fix: str = ""


class Findings(dict[str, Finding]):
    """Findings by what they are, in the order in which they were met."""

    def add(self, what: str, example: str, fix: str = "") -> None:
        """Count one more."""
        what = what if what in self or len(self) < KINDS else OTHERS
        finding = self.setdefault(what, Finding(what, fix=fix))
        finding.rows += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)


@dataclass
class FileCheck:
    """One file: its rows by format, and why it cannot be read to its end, if so."""

    name: str
    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    problem: DataError | None = None


@dataclass
class Lengths:
    """Tokens a row, before anything is cut.

    Attributes:
        rows: How many rows have a length, by length.
    """

    rows: Counter[int] = field(default_factory=Counter)

    def quantile(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        sizes, counts = self.table()
        return int(sizes[np.searchsorted(np.cumsum(counts), share * counts.sum())]) if len(sizes) else 0

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths that occur, ascending, and how often."""
        sizes = np.array(sorted(self.rows))
        return sizes, np.array([self.rows[size] for size in sizes.tolist()])


@dataclass
class PairCounts:
    """What only preferences have.

    Attributes:
        rows: PairCounts that can be used.
        ties: Those whose row scores both answers the same.
        identical: Rows whose answers are the same; they are bad rows as well.
        chosen_longer: PairCounts whose better answer has more tokens.
        rejected_longer: PairCounts whose worse answer has more tokens.
    """

    rows: int = 0
    ties: int = 0
    identical: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0


@dataclass
class Check:
    """What the files hold.

    Attributes:
        max_length: The length that cuts and drops are counted at.
        files: One by one.
        rows: Rows read.
        bad_rows: Rows that would stop a run.
        problems: Why, by kind.
        notes: What is odd, but does not stop a run.
        hidden: Columns, and keys of messages, that the model is not shown, and in how many rows they hold something.
        lengths: Tokens a row.
        tokens: Tokens that are trained on.
        learned: Those of them that carry loss.
        cut: Conversations that lose their end.
        continued: Texts that go on in further rows.
        tokens_lost: Tokens cut off.
        too_long: Rows dropped, because their answers begin past the length.
        duplicates: Rows that say the same.
        pairs: Of preferences only.
    """

    max_length: int
    files: list[FileCheck] = field(default_factory=list)
    rows: int = 0
    bad_rows: int = 0
    problems: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)
    hidden: Counter[str] = field(default_factory=Counter)
    lengths: Lengths = field(default_factory=Lengths)
    tokens: int = 0
    learned: int = 0
    cut: int = 0
    continued: int = 0
    tokens_lost: int = 0
    too_long: int = 0
    duplicates: Duplicates = field(default_factory=lambda: Duplicates(0, [], 0))
    pairs: PairCounts | None = None

    @property
    def usable(self) -> bool:
        """Whether a run would go through."""
        return not self.bad_rows and not any(file.problem for file in self.files) and self.learned > 0
