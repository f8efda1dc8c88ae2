"""Counts of how the data aligns, with the rows that do not, and what to do about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from hymba_tune.distill.alignment import Alignment
from hymba_tune.distill.pair import TokenizerPair, Unaligned
from hymba_tune.distill.spelling import END
from hymba_tune.errors import TrainingError

CAUSES = {
    "bytes differ": "a chat template that trims or rewrites answers (--teacher-chat-template), or a tokenizer that "
    "changes text before it splits it",
    "Unicode form": "text in another Unicode form than a tokenizer's (--normalize nfc composes it for both sides)",
    "template": "a chat template that refuses such conversations (--teacher-system-as user, if it has no system role; "
    "--teacher-chat-template alpaca accepts most)",
    "text left out": "a chat template that does not show such messages (--teacher-system-as user for the teacher's "
    "system messages; else --teacher-chat-template or --chat-template with another template)",
    "no output": "a tokenizer with more tokens than its model has outputs: remove the added tokens from its "
    "tokenizer.json, or these rows",
    "half a character": "text that was cut within a character, or read in the wrong encoding",
}
"""The likely cause why rows are not aligned, by their reason."""


@dataclass
class AlignmentReport:
    """Counts of aligned and dropped rows, and of the positions of their tokens.

    Attributes:
        rows: The number of rows.
        dropped: The rows that are not aligned, by reason.
        bytes: The bytes of the aligned rows' answers.
        lost: The bytes of the other rows' answers, as far as they are known.
        positions: The student's tokens by position: they begin at a ``shared`` boundary or ``inside`` a teacher token
            and end within it, or they are ``crossing`` into the next one.
        matched: The student's tokens whose bytes are also one teacher token.
        spans: The number of smallest spans whose ends are boundaries on both sides.
        first: The first dropped row of each reason: its place, the reason in full, and its bytes.
    """

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    lost: int = 0
    positions: Counter[str] = field(default_factory=Counter)
    matched: int = 0
    spans: int = 0
    first: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of the rows that are aligned, or of their bytes if that is lower."""
        rows = self.rows - self.dropped.total()
        return min(rows / max(self.rows, 1), self.bytes / max(self.bytes + self.lost, 1))

    @classmethod
    def load(cls, counts: Mapping[str, Any]) -> Self:
        """Read a report from `as_json`."""
        counters = {name: Counter(counts[name]) for name in ("dropped", "positions")}
        return cls(**{**counts, **counters})

    def as_json(self) -> dict[str, Any]:
        """Return the report as values for JSON."""
        return vars(self) | {"dropped": dict(self.dropped), "positions": dict(self.positions)}

    def add(self, aligned: Sequence[Alignment | Unaligned], pair: TokenizerPair, places: Sequence[object] = ()) -> None:
        """Add the counts of a batch.

        Args:
            aligned: The rows.
            pair: The two tokenizers.
            places: Where each row was read; by default its number.
        """
        whole = set(pair.teacher.spelling.tokens)
        for number, row in enumerate(aligned):
            self.rows += 1
            if isinstance(row, Unaligned):
                self.dropped[row.reason] += 1
                self.lost += row.bytes
                place = places[number] if places else f"row {self.rows:,}"
                self.first.setdefault(row.reason, f"{place}: {row.in_full}")
                continue
            token_bytes = [pair.student.spelling.tokens[row.student_ids[index]] for index in row.student]
            self.bytes += sum(len(token) for token in token_bytes if token != END)
            self.matched += sum(token in whole for token in token_bytes)
            self.positions["crossing"] += int(row.crossing.sum())
            self.positions["shared"] += int(((row.spelled == 0) & ~row.crossing).sum())
            self.positions["inside"] += int(((row.spelled > 0) & ~row.crossing).sum())
            self.spans += len(row.spans)

    def merge(self, other: AlignmentReport) -> None:
        """Add the counts of other rows."""
        for name, value in vars(other).items():
            if name != "first":
                setattr(self, name, getattr(self, name) + value)
        self.first = {**other.first, **self.first}


def matched_vocabulary(pair: TokenizerPair) -> float:
    """Return the share of the student's vocabulary whose bytes are also one teacher token."""
    whole = {token for token in pair.teacher.spelling.tokens if token}
    return sum(token in whole for token in pair.student.spelling.tokens) / len(pair.student.spelling)


def check_aligned(aligned: AlignmentReport, least: float) -> None:
    """Check that enough of the data is aligned.

    Raises:
        TrainingError: If the share is lower. The message names the likely cause.
    """
    if aligned.share >= least:
        return
    (reason, count) = aligned.dropped.most_common(1)[0]
    first = f" The first, {aligned.first[reason]}." if reason in aligned.first else ""
    raise TrainingError(
        f"Only {aligned.share:.1%} of the data aligns: of {aligned.rows:,} rows {count:,} are dropped ({reason})."
        f"{first}",
        expected=f"{least:.0%} or more",
        fix=f"likely, {CAUSES[reason]}; or --min-aligned {aligned.share * 0.99:.2g}",
    )


def alignment_lines(aligned: AlignmentReport, vocabulary: float) -> dict[str, str]:
    """Return the alignment as lines for the screen, by label."""
    rows, places = aligned.rows - aligned.dropped.total(), max(aligned.positions.total(), 1)
    dropped = " · ".join(f"{count:,} dropped: {reason}" for reason, count in aligned.dropped.most_common())
    kinds = {"shared": "at shared boundaries", "inside": "inside a teacher token", "crossing": "across two"}
    return {
        "aligned": f"{rows:,} of {aligned.rows:,} rows, {aligned.share:.1%} of the bytes"
        + (f" ({dropped})" if dropped else ""),
        "matched": f"{vocabulary:.1%} of the student's vocabulary, {aligned.matched / places:.1%} of what it writes",
        "tokens": " · ".join(f"{aligned.positions[kind] / places:.1%} {words}" for kind, words in kinds.items()),
        **({"dropped": f"first {next(iter(aligned.first.values()))}"} if aligned.first else {}),
    }
