"""Reads sources into rows on disk, tokenized on both sides and aligned.

Rows are truncated like all training data: a conversation at its end, a text into further rows. Each row has only those
of the teacher's tokens that it needs.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from hymba_tune.config import KeptDataOptions
from hymba_tune.data import DataReport, TrainingData, cache_folder, open_sources, sample_prompts
from hymba_tune.data.building import IDS, RowSchema, build
from hymba_tune.data.chat import Encoded, fit
from hymba_tune.data.dataset import fit_reading
from hymba_tune.data.encoding import ExampleReading, readings
from hymba_tune.data.rows import SourceRow
from hymba_tune.data.sources import Source
from hymba_tune.data.training import Working, opened, read_sources
from hymba_tune.distill.alignment import Alignment, align_rows
from hymba_tune.distill.alignment_report import CAUSES, AlignmentReport
from hymba_tune.distill.pair import (
    TokenizedRow,
    TokenizerPair,
    Unaligned,
    find_answers,
    for_teacher,
    swallowed,
    tokenize_examples,
)
from hymba_tune.distill.tables import pair_key
from hymba_tune.errors import DataError

FLAGS = pa.list_(pa.bool_())
COLUMNS = {
    "input_ids": IDS,
    "labels": IDS,
    "row": IDS,
    "teacher_tokens": IDS,
    "at": IDS,
    "teacher_at": IDS,
    "spelled": IDS,
    "first": FLAGS,
    "crossing": FLAGS,
    "spans": IDS,
}
"""The columns of a row; ``row`` repeats its number at each token, so that packing keeps it."""


@dataclass
class AlignedReport(DataReport):
    """The report on encoded, dropped and aligned rows.

    Attributes:
        alignment: The counts of aligned rows and tokens.
    """

    alignment: AlignmentReport = field(default_factory=AlignmentReport)

    def __post_init__(self) -> None:
        if isinstance(self.alignment, Mapping):  # read from a file
            self.alignment = AlignmentReport.load(self.alignment)

    def counts(self) -> dict[str, Any]:
        """Return the report for ``run.json``, without the list of dropped rows."""
        rows = DataReport(**{one.name: getattr(self, one.name) for one in fields(DataReport)})
        return rows.counts() | {"alignment": self.alignment.as_json()}


@dataclass(frozen=True)
class AlignedData(TrainingData[DataReport]):
    """The data of a run of distillation. The report's fingerprint covers the tokens of both sides.

    Attributes:
        rows: Every row of ``--data``, held-out ones among them, then of ``--eval-data``; see `alignment`. A row's
            ``row`` is its index here.
        alignment: The counts of aligned rows and tokens.
    """

    rows: Dataset
    alignment: AlignmentReport


def alignment(row: Mapping[str, Any]) -> Alignment:
    """Read the alignment of a row from its columns."""
    return Alignment(
        student_ids=row["input_ids"],
        teacher_ids=row["teacher_tokens"],
        student=np.array(row["at"], np.int64),
        teacher=np.array(row["teacher_at"], np.int64),
        spelled=np.array(row["spelled"], np.int64),
        first=np.array(row["first"], np.bool_),
        crossing=np.array(row["crossing"], np.bool_),
        spans=np.array(row["spans"], np.int64).reshape(-1, 4),
    )


def read_rows(
    options: KeptDataOptions,
    pair: TokenizerPair,
    *,
    context: int | None,
    seed: int,
    prompts: int,
    working: Working,
    normalize: str | None = None,
    instead: Path | None = None,
) -> AlignedData:
    """Read everything that ``--data`` and ``--eval-data`` name, or load its aligned rows from the cache.

    Args:
        options: The data, and how its rows are read.
        pair: The two tokenizers.
        context: The maximum number of teacher tokens in a row; longer rows are dropped.
        seed: The seed of the rows that are sampled and held out.
        prompts: The number of prompts to return, of the evaluation data if there is any, else of the data.
        working: Shows the progress.
        normalize: The Unicode form that texts get on both sides, if any; see `normalized`.
        instead: A file of messages that replaces ``--data``. The data that its sources hold out themselves stays.

    Raises:
        DataError: If data cannot be used.
        ConfigError: If weights, caps or names do not fit the data.
    """
    builder = _Builder(pair, options, context, seed, normalize)
    sources, given = opened(options)
    if instead is not None:
        sources = open_sources([str(instead)])
    sources, given = normalized(sources, normalize), normalized(given, normalize)
    data = read_sources(
        options,
        sources,
        given,
        builder.build,
        sample_prompts,
        seed=seed,
        prompts=prompts,
        working=working,
        doing="reading and aligning",
    )
    rows, held_out = builder.built[0], data.held_out
    if given and held_out is not None:
        held_out = _numbered(held_out, len(rows))
        rows = concatenate_datasets([rows, held_out])
    return AlignedData(**{**vars(data), "held_out": held_out}, rows=rows, alignment=builder.counts)


def normalized(sources: Sequence[Source], form: str | None) -> list[Source]:
    """Return the sources with all texts of their rows in a Unicode form; None leaves them as they are."""
    return [_in_form(source, form.upper()) if form else source for source in sources]


def _in_form(source: Source, form: str) -> Source:
    def composed(value: Any) -> Any:
        if isinstance(value, str):
            return unicodedata.normalize(form, value)  # type: ignore[arg-type]
        if isinstance(value, Mapping):
            return {name: composed(inner) for name, inner in value.items()}
        return [*map(composed, value)] if isinstance(value, list) else value

    def each(rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
        return (replace(row, value=composed(row.value)) for row in rows)

    return replace(
        source,
        read=lambda: each(source.read()),
        read_columns=lambda choose: each(source.only(choose).read()),
    )


def _numbered(rows: Dataset, first: int) -> Dataset:
    """Return the rows with new numbers that begin at ``first``."""
    numbers = [[first + index] * len(ids) for index, ids in enumerate(rows["input_ids"])]
    return rows.remove_columns("row").add_column("row", pa.array(numbers, IDS)).select_columns(rows.column_names)


@dataclass(frozen=True)
class _Builder:
    """Encodes sources; see `read_rows`. ``built`` has the rows, ``counts`` the counts of their alignment."""

    pair: TokenizerPair
    options: KeptDataOptions
    context: int | None
    seed: int
    normalize: str | None
    counts: AlignmentReport = field(default_factory=AlignmentReport)
    built: list[Dataset] = field(default_factory=list)

    def build(self, sources: Sequence[Source], progress: Callable[[int], None]) -> tuple[Dataset, AlignedReport]:
        """Build the numbered, memory-mapped rows of the sources, and the report on them."""
        options, tokenizer = self.options, self.pair.student.tokenizer
        found = AlignmentReport()
        kind = RowSchema(
            columns=COLUMNS,
            report=AlignedReport,
            fit=partial(self._fit, count(), found),
            fingerprinted=_numbers,
            purpose=("train on", "with an answer that both tokenizers spell, and that begins"),
        )
        read = readings(sources, tokenizer, learn=options.learn, seed=self.seed)
        try:
            rows, report = build(
                kind,
                read,
                sources,
                tokenizer,
                self._settings(),
                on_bad_row=options.on_bad_row,
                cache_dir=cache_folder() if options.cache else None,
                progress=progress,
            )
        except DataError as error:
            if not found.rows or found.rows > found.dropped.total():
                raise
            fix = f"likely, {CAUSES[found.dropped.most_common(1)[0][0]]}"
            raise DataError(error.what, expected="rows that align on both sides", fix=fix) from error
        self.built.append(rows)
        self.counts.merge(report.alignment)
        return rows, report

    def _settings(self) -> dict[str, Any]:
        """Return everything that determines the rows, besides the sources and the student's tokenizer."""
        pair, options, teacher = self.pair, self.options, self.pair.teacher.tokenizer
        return {
            "pair": pair_key(pair),
            "teacher": [teacher.chat_template, teacher.special_tokens_map],
            "system": [pair.teacher_system, pair.teacher_system_as],
            "limits": [pair.teacher_outputs, self.context, options.max_length],
            "options": [options.learn, self.seed, self.normalize],
            "aligning": _own_code(),
        }

    def _fit(
        self, numbers: Iterator[int], found: AlignmentReport, some: Sequence[ExampleReading], report: AlignedReport
    ) -> Iterator[list[dict[str, Any]] | str | DataError]:
        aligned = self._align(some)
        found.add(aligned, self.pair, [reading.row.place for reading in some])
        report.alignment = found
        for reading, row in zip(some, aligned, strict=True):
            parts = self._parts(reading, row)
            if isinstance(parts, DataError):
                yield parts
                continue
            rows = fit_reading(reading, self.options.max_length, report)
            if isinstance(rows, str):
                yield rows
                continue
            both = zip(rows, parts, numbers, strict=False)  # the numbers are infinite
            yield [_as_columns(one, part) | {"row": [number] * len(one.input_ids)} for one, part, number in both]

    def _align(self, some: Sequence[ExampleReading]) -> list[Alignment | Unaligned]:
        students = [self._student(reading) for reading in some]
        shown = [for_teacher(reading.example, self.pair) for reading in some if reading.example]
        teachers = tokenize_examples(shown, self.pair.teacher, self.options.learn)
        return align_rows(students, teachers, self.pair)

    def _student(self, reading: ExampleReading) -> TokenizedRow | Unaligned:
        (encoded,), (rendered,) = reading.encoded, reading.rendered
        found = find_answers(rendered, encoded, self.pair.student)
        missing = swallowed(reading.example, rendered, self.pair.student) if reading.example else None
        if missing is None or isinstance(found, Unaligned):
            return found
        return replace(missing, bytes=sum(len(answer.content) for answer in found.answers))

    def _parts(self, reading: ExampleReading, row: Alignment | Unaligned) -> list[Alignment] | DataError:
        """Return the alignment of each row of a reading, or the reason why it cannot be used."""
        if isinstance(row, Unaligned):
            return DataError(f"not aligned ({row.reason}): {row.in_full}")
        (encoded,), (rendered,) = reading.encoded, reading.rendered
        if rendered.weights:
            return DataError(
                f"one of its answers has weight {min(rendered.weights):g}",
                expected="0 or 1: distillation has no partial weights",
                fix="round it",
            )
        bos = self.pair.teacher.tokenizer.bos_token_id
        rows = fit(encoded, self.options.max_length, split=rendered.plain)
        parts = [cut(row, one.begin, one.begin + len(one.input_ids), bos) for one in rows]
        longest = max((len(part.teacher_ids) for part in parts), default=0)
        if self.context is not None and longest > self.context:
            return DataError(f"the teacher's context is {self.context:,} tokens, and this row takes {longest:,}")
        return parts


@cache
def _own_code() -> str:
    """Return the SHA-256 of the code that aligns rows."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _numbers(row: Mapping[str, Any]) -> list[int]:
    """Return the content of a row as numbers, without its own number."""
    columns = [np.array(row[name], np.int32).tolist() for name in COLUMNS if name != "row"]
    return [number for column in columns for number in (len(column), *column)]


def cut(row: Alignment, begin: int, end: int, bos: int | None = None) -> Alignment:
    """Return the part of an aligned row with ``[begin, end)`` of the student's tokens.

    The teacher's part begins at the same text, after the beginning-of-sequence token if it has one, and ends with the
    last token that has a target.
    """
    spans = row.spans[(row.spans[:, 0] > begin) & (row.spans[:, 1] <= end)]
    inside = (row.student > begin) & (row.student < end)
    start, head = 0, row.teacher_ids[:0]
    if begin:
        start = int(row.teacher[np.searchsorted(row.student, begin)]) if row.student[-1] >= begin else 0
        head = row.teacher_ids[:1] if row.teacher_ids[0] == bos and start else head
        known = start + (not head)  # nothing predicts the first token of a row
        inside &= row.teacher >= known
        spans = spans[spans[:, 2] >= known]
    stop = max([start, *(row.teacher[inside][-1:] + 1), *spans[-1:, 3]])
    moved = start - len(head)
    return Alignment(
        student_ids=row.student_ids[begin:end],
        teacher_ids=[*head, *row.teacher_ids[start:stop]],
        student=row.student[inside] - begin,
        teacher=row.teacher[inside] - moved,
        spelled=row.spelled[inside],
        first=row.first[inside],
        crossing=row.crossing[inside],
        spans=spans - np.array([begin, begin, moved, moved], np.int64),
    )


def _as_columns(row: Encoded, part: Alignment) -> dict[str, Any]:
    return {
        "input_ids": row.input_ids,
        "labels": row.labels,
        "teacher_tokens": part.teacher_ids,
        "at": part.student,
        "teacher_at": part.teacher,
        "spelled": part.spelled,
        "first": part.first,
        "crossing": part.crossing,
        "spans": part.spans.reshape(-1),
    }
