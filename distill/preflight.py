"""Checks on a few rows that a teacher fits the student and the data, before the pass over all rows."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets

from hymba_tune.distill.alignment_report import (
    AlignmentReport,
    alignment_lines,
    check_aligned,
    matched_vocabulary,
)
from hymba_tune.distill.cache import Columns, encode, write_shard
from hymba_tune.distill.pair import TokenizerPair
from hymba_tune.distill.rows import alignment
from hymba_tune.distill.target_maker import CaptureStats, TargetMaker
from hymba_tune.errors import TrainingError
from hymba_tune.formatting import duration, format_bytes

SAMPLE_ROWS = 48
SAMPLE_TOKENS = 1 << 14
"""Teacher tokens after which no further row is tried."""
READ_ROWS = 10_000
SELDOM = 0.5
"""Mean probability of the end token below which the line says that it is low."""


@dataclass(frozen=True)
class Preflight:
    """The result of the check.

    Attributes:
        aligned: The alignment of all rows.
        vocabulary: The share of the student's vocabulary that the teacher's vocabulary has too.
        stats: The statistics of the teacher's pass over the sample.
        places: The student tokens of all rows that need a target.
        bytes_a_token: The size of a target on disk.
        seconds: The estimated time of the teacher's pass over all rows.
        end: The token that ends the teacher's answers.
    """

    aligned: AlignmentReport
    vocabulary: float
    stats: CaptureStats
    places: int
    bytes_a_token: float
    seconds: float
    end: str

    @property
    def bytes(self) -> int:
        """The estimated size of all targets on disk."""
        return round(self.places * self.bytes_a_token)

    def check(self, *, min_aligned: float, min_probability: float, min_end: float) -> None:
        """Check the result against the minimum values of the settings.

        Args:
            min_aligned: The minimum share of the rows, and of their bytes, that must be aligned.
            min_probability: The minimum mean probability of the reference token.
            min_end: The minimum mean probability of the teacher's end token after an answer.

        Raises:
            TrainingError: If a value is lower. The message names the likely cause.
        """
        check_aligned(self.aligned, min_aligned)
        if self.stats.mean_own < min_probability:
            raise TrainingError(
                f"The teacher gives its own next token a probability of {self.stats.mean_own:.3f} on average.",
                expected=f"{min_probability:g} or more, as for a model that knows such texts",
                fix="likely, the teacher was trained with another chat template (--teacher-chat-template) or end token "
                "(--teacher-end), its weights and its tokenizer belong to two models, or it knows little of this data; "
                f"in the last case, --min-teacher-probability {self.stats.mean_own * 0.9:.2g}",
            )
        if self.stats.ends and self.stats.mean_end < min_end:
            raise TrainingError(
                f"After an answer, the teacher gives its end token {self.end} a probability of "
                f"{self.stats.mean_end:.2g} on average: the student would learn not to stop.",
                expected=f"{min_end:g} or more",
                fix="--teacher-end TOKEN, if the teacher ends its answers with another token; a teacher trained "
                "on conversations; or, to train anyway, --min-end-probability 0",
            )

    def lines(self) -> dict[str, str]:
        """Return the result as lines for the screen, by label."""
        return alignment_lines(self.aligned, self.vocabulary) | {
            "kept": f"{self.stats.mean_mass:.1%} of the teacher's probability maps to student tokens · "
            f"{self.stats.known / max(self.stats.places, 1):.1%} of the tokens have a target",
            "sanity": f"the teacher gives its own next token p = {self.stats.mean_own:.2f} on average",
            **end_line(self.stats, self.end),
            "targets": f"{_short(self.places)} tokens × {self.bytes_a_token:.0f} B = {format_bytes(self.bytes)} · "
            f"about {duration(self.seconds)}",
        }


def run_preflight(
    maker: TargetMaker, rows: datasets.Dataset, aligned: AlignmentReport, pair: TokenizerPair, *, wide: bool
) -> Preflight:
    """Compute the targets of a few rows, spread over the data.

    Args:
        maker: Computes the targets.
        rows: The rows from `read_rows`.
        aligned: The alignment of the rows.
        pair: The two tokenizers.
        wide: Whether a token takes four bytes on disk.
    """
    tokens, places = _sizes(rows)
    chosen: list[int] = []
    read = 0
    step = max(1, len(rows) // SAMPLE_ROWS)
    for row in range(0, len(rows), step):
        if len(chosen) == SAMPLE_ROWS or (chosen and read > SAMPLE_TOKENS):
            break
        chosen.append(row)
        read += tokens[row]

    stats = CaptureStats()
    encoded: list[Columns] = []
    started = time.monotonic()
    for _, batch in maker([alignment(row) for row in rows.select(chosen)]):
        stats.add(batch.stats)
        encoded.append(encode(batch.targets, wide))
    seconds = time.monotonic() - started

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.arrow"
        write_shard(path, encoded, stats)
        size = path.stat().st_size
    return Preflight(
        aligned=aligned,
        vocabulary=matched_vocabulary(pair),
        stats=stats,
        places=sum(places),
        bytes_a_token=size / max(stats.places, 1),
        seconds=seconds * sum(tokens) / max(read, 1),
        end=str(pair.teacher.tokenizer.eos_token),
    )


def _sizes(rows: datasets.Dataset) -> tuple[list[int], list[int]]:
    """Return, for each row, the number of teacher tokens and the number of student tokens that need a target."""
    tokens: list[int] = []
    places: list[int] = []
    columns = rows.select_columns(["teacher_tokens", "at"]).with_format("arrow")
    for begin in range(0, len(rows), READ_ROWS):
        table = columns[begin : begin + READ_ROWS]
        tokens += table["teacher_tokens"].combine_chunks().value_lengths().to_pylist()
        places += table["at"].combine_chunks().value_lengths().to_pylist()
    return tokens, places


def end_line(stats: CaptureStats, end: str) -> dict[str, str]:
    """Return the line on the teacher's mean probability of its end token; nothing if no answer has an end token."""
    line = f"after an answer, the teacher gives its end token {end} p = {stats.mean_end:.3f} on average"
    if stats.mean_end < SELDOM:
        line += " · low: the student learns to go on where the data stops"
    return {"p(end)": line} if stats.ends else {}


def _short(count: float) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,.0f}"
