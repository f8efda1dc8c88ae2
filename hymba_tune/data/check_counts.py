"""The findings and counts of a data check."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hymba_tune.data.duplicates import Duplicates
from hymba_tune.data.rows import RowLocation
from hymba_tune.errors import DataError

EXAMPLES = 3
"""Example places that are stored for each kind of finding."""
KINDS = 40
"""Kinds of findings that are counted separately; all others are counted together, so that memory has a bound."""
OTHERS = "something else"
NUMBERS = re.compile(r"(?<![-\w])\d+(?:[.,]\d+)*")
ASIDES = re.compile(r" \([^()]*\)")


def general(what: str) -> str:
    """Remove numbers and parentheses from a problem, so that rows with the same kind of problem count together."""
    return NUMBERS.sub("N", ASIDES.sub("", what))


@dataclass
class Finding:
    """A property that some rows share.

    Attributes:
        what: The property in general words, without numbers and names.
        rows: The number of such rows.
        examples: The first of them: their places, and the property in detail.
        fix: What to do about it.
    """

    what: str
    rows: int = 0
    examples: list[str] = field(default_factory=list)
    fix: str = ""


class Findings(dict[str, Finding]):
    """Findings by their general words, in the order of their first rows."""

    def add(self, what: str, example: str, fix: str = "") -> None:
        """Count one more row."""
        what = what if what in self or len(self) < KINDS else OTHERS
        finding = self.setdefault(what, Finding(what, fix=fix))
        finding.rows += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)


@dataclass
class FileCheck:
    """A file that was checked.

    Attributes:
        name: The file's name as the user gave it.
        rows: Rows read.
        formats: Rows by format.
        problem: The error that stopped the reading, if any.
    """

    name: str
    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    problem: DataError | None = None


@dataclass
class Lengths:
    """Row lengths in tokens, before rows are cut.

    Attributes:
        rows: Number of rows by length.
    """

    rows: Counter[int] = field(default_factory=Counter)

    def quantile(self, share: float) -> int:
        """Return the length that this share of the rows does not exceed."""
        sizes, counts = self.table()
        return int(sizes[np.searchsorted(np.cumsum(counts), share * counts.sum())]) if len(sizes) else 0

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths that occur, ascending, and the number of rows with each."""
        sizes = np.array(sorted(self.rows))
        return sizes, np.array([self.rows[size] for size in sizes.tolist()])


@dataclass
class PairCounts:
    """Counts of preference pairs.

    Attributes:
        rows: Pairs that can be used.
        ties: Pairs whose row has the same score for both answers.
        identical: Rows whose answers are the same; they also count as bad rows.
        chosen_longer: Pairs whose chosen answer has more tokens.
        rejected_longer: Pairs whose rejected answer has more tokens.
    """

    rows: int = 0
    ties: int = 0
    identical: int = 0
    chosen_longer: int = 0
    rejected_longer: int = 0


@dataclass
class Check:
    """The result of checking data files.

    Attributes:
        max_length: Maximum tokens of a row, for the counts of cut and dropped rows.
        files: The files, one by one.
        rows: Rows read.
        bad_rows: Rows that would stop a run.
        problems: The problems of the bad rows, by kind.
        notes: Oddities that do not stop a run.
        hidden: Columns and keys of messages that the model does not see, with the number of rows that have a value.
        labels: Rows whose answer is labeled, by the label's column and by whether it is good.
        lengths: Row lengths in tokens.
        tokens: Tokens that are trained on.
        learned: Tokens with loss among them.
        cut: Conversations that lose their end.
        continued: Texts that continue in further rows.
        tokens_lost: Tokens that are cut off.
        too_long: Rows dropped because their answers begin past the maximum length.
        duplicates: Rows with the same content.
        pairs: Counts of preference pairs, if the files hold pairs.
    """

    max_length: int
    files: list[FileCheck] = field(default_factory=list)
    rows: int = 0
    bad_rows: int = 0
    problems: Findings = field(default_factory=Findings)
    notes: Findings = field(default_factory=Findings)
    hidden: Counter[str] = field(default_factory=Counter)
    labels: Counter[tuple[str, bool | None]] = field(default_factory=Counter)
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
        """Whether a run can train on the files."""
        return not self.bad_rows and not any(file.problem for file in self.files) and self.learned > 0


def note_special_tokens(tokens: Iterable[str], place: RowLocation, check: Check) -> None:
    """Note the special tokens, and the markers of turns, that the texts of a row contain."""
    for token in dict.fromkeys(tokens):
        what = f"its text contains {token}, which the model reads as a special token"
        check.notes.add(what, str(place), "--escape-special-tokens, or remove it")
