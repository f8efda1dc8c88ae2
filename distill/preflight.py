"""Whether a teacher fits a student and their data: measured on a few rows before all of them are asked about."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets

from hymba_tune.distill.alignment import AlignmentReport, matched_vocabulary
from hymba_tune.distill.cache import Columns, encode, write_shard
from hymba_tune.distill.pair import TokenizerPair
from hymba_tune.distill.rows import alignment
from hymba_tune.distill.target_maker import CaptureStats, TargetMaker
from hymba_tune.errors import TrainingError
from hymba_tune.pages import duration

SAMPLE_ROWS = 48
SAMPLE_TOKENS = 1 << 14
"""Of the teacher's: where rows are long, fewer are enough."""
READ_ROWS = 10_000
SELDOM = 0.5
"""Probability of the end token below which a teacher rather goes on than stops."""
CAUSES = {
    "bytes differ": "a chat template that trims or rewrites answers (--teacher-chat-template), or a tokenizer that "
    "changes text before it parts it",
    "template": "a chat template that refuses such conversations (--teacher-chat-template alpaca takes most)",
    "half a character": "text that was cut within a character, or read in the wrong encoding",
}
"""Of rows that are not aligned, by the reason that most of them have."""


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Attributes:
        aligned: How the two sides' tokens lie to each other, of all rows.
        vocabulary: Share of the student's vocabulary that is in the teacher's as well.
        kept: What the sample has shown of the teacher.
        places: The student's tokens of all rows, for which there are to be targets.
        bytes_a_token: That each of them takes on disk.
        seconds: That the teacher needs for all rows.
        end: The token that the teacher ends an answer with.
    """

    aligned: AlignmentReport
    vocabulary: float
    kept: CaptureStats
    places: int
    bytes_a_token: float
    seconds: float
    end: str

    @property
    def bytes(self) -> int:
        """That all targets take on disk, about."""
        return round(self.places * self.bytes_a_token)

    def check(self, *, min_aligned: float, min_probability: float, min_end: float) -> None:
        """Refuse to go on below these floors.

        Args:
            min_aligned: Share of the rows, and of their bytes.
            min_probability: The teacher's, of its own next tokens.
            min_end: The teacher's, of its end token after an answer.

        Raises:
            TrainingError: With the likely cause.
        """
        check_aligned(self.aligned, min_aligned)
        if self.kept.mean_own < min_probability:
            raise TrainingError(
                f"The teacher gives its own next token a probability of {self.kept.mean_own:.3f} on average.",
                expected=f"{min_probability:g} or more, as a model that knows such texts has",
                fix="likely, it was trained with another chat template (--teacher-chat-template) or end of answers "
                "(--teacher-end), its weights and its tokenizer are of two models, or it knows little of this data; "
                f"if it is the last, --min-teacher-probability {self.kept.mean_own * 0.9:.2g}",
            )
        if self.kept.ends and self.kept.mean_end < min_end:
            raise TrainingError(
                f"After an answer, the teacher gives its end token {self.end} a probability of "
                f"{self.kept.mean_end:.2g} on average: the student would learn not to stop.",
                expected=f"{min_end:g} or more",
                fix="--teacher-end TOKEN, if the teacher ends its answers with another one; a teacher that was trained "
                "on conversations; or, to learn this all the same, --min-end-probability 0",
            )

    def lines(self) -> dict[str, str]:
        """The same for people: a label and a line each."""
        return alignment_lines(self.aligned, self.vocabulary) | {
            "kept": f"{self.kept.mean_mass:.1%} of the teacher's probability finds a piece · "
            f"{self.kept.known / max(self.kept.places, 1):.1%} of the tokens have a target",
            "sanity": f"the teacher gives its own next token p = {self.kept.mean_own:.2f} on average",
            **end_line(self.kept, self.end),
            "targets": f"{_short(self.places)} tokens × {self.bytes_a_token:.0f} B = {in_bytes(self.bytes)} · "
            f"about {duration(self.seconds)}",
        }


def look(
    maker: TargetMaker, rows: datasets.Dataset, aligned: AlignmentReport, pair: TokenizerPair, *, wide: bool
) -> Preflight:
    """Ask a teacher about a few rows, spread over all of them.

    Args:
        maker: Of the targets.
        rows: As `read_rows` gives them.
        aligned: Of them.
        pair: Both sides.
        wide: Whether a piece takes four bytes.
    """
    tokens, places = _sizes(rows)
    chosen, read = list[int](), 0
    step = max(1, len(rows) // SAMPLE_ROWS)
    for row in range(0, len(rows), step):
        if len(chosen) == SAMPLE_ROWS or (chosen and read > SAMPLE_TOKENS):
            break
        chosen.append(row)
        read += tokens[row]
    started, kept, encoded = time.monotonic(), CaptureStats(), list[Columns]()
    for _, taught in maker([alignment(row) for row in rows.select(chosen)]):
        kept.add(taught.kept)
        encoded.append(encode(taught.targets, wide))
    seconds = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.arrow"
        write_shard(path, encoded, kept)
        size = path.stat().st_size
    return Preflight(
        aligned=aligned,
        vocabulary=matched_vocabulary(pair),
        kept=kept,
        places=sum(places),
        bytes_a_token=size / max(kept.places, 1),
        seconds=seconds * sum(tokens) / max(read, 1),
        end=str(pair.teacher.tokenizer.eos_token),
    )


def _sizes(rows: datasets.Dataset) -> tuple[list[int], list[int]]:
    """Of each row, the tokens that the teacher reads, and those of the student's that it is asked about."""
    tokens: list[int] = []
    places: list[int] = []
    columns = rows.select_columns(["teacher_tokens", "at"]).with_format("arrow")
    for begin in range(0, len(rows), READ_ROWS):
        table = columns[begin : begin + READ_ROWS]
        tokens += table["teacher_tokens"].combine_chunks().value_lengths().to_pylist()
        places += table["at"].combine_chunks().value_lengths().to_pylist()
    return tokens, places


def check_aligned(aligned: AlignmentReport, least: float) -> None:
    """Refuse rows too few of which could be aligned.

    Raises:
        TrainingError: With the likely cause.
    """
    if aligned.share >= least:
        return
    (reason, count) = aligned.dropped.most_common(1)[0]
    raise TrainingError(
        f"Only {aligned.share:.1%} of the data is spelled alike by both tokenizers: of {aligned.rows:,} rows "
        f"{count:,} are dropped ({reason}).",
        expected=f"{least:.0%} or more",
        fix=f"likely, {CAUSES[reason]}; or --min-aligned {aligned.share * 0.99:.2g}",
    )


def alignment_lines(aligned: AlignmentReport, vocabulary: float) -> dict[str, str]:
    """How the tokens lie to each other, for people."""
    rows, places = aligned.rows - aligned.dropped.total(), max(aligned.positions.total(), 1)
    dropped = " · ".join(f"{count:,} dropped: {reason}" for reason, count in aligned.dropped.most_common())
    kinds = {"shared": "at shared boundaries", "inside": "inside a teacher token", "crossing": "across two"}
    return {
        "aligned": f"{rows:,} of {aligned.rows:,} rows, {aligned.share:.1%} of the bytes"
        + (f" ({dropped})" if dropped else ""),
        "matched": f"{vocabulary:.1%} of the student's vocabulary, {aligned.matched / places:.1%} of what it writes",
        "tokens": " · ".join(f"{aligned.positions[kind] / places:.1%} {words}" for kind, words in kinds.items()),
    }


def end_line(kept: CaptureStats, end: str) -> dict[str, str]:
    """How likely the teacher is to end an answer where the data does, for people; nothing if no answer has an end."""
    said = f"after an answer, the teacher gives its end token {end} p = {kept.mean_end:.3f} on average"
    said += " · low: the student learns to go on where the data stops" * (kept.mean_end < SELDOM)
    return {"p(end)": said} if kept.ends else {}


def _short(count: float) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,.0f}"


def in_bytes(size: float) -> str:
    """Bytes as a person reads them: ``3.5 MB``, ``1.2 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
