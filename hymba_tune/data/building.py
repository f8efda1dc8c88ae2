"""Builds rows of token ids on disk, of any schema: a batch in memory at a time, each row counted, the result cached."""

from __future__ import annotations

import errno
import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TextIO, TypeVar

import pyarrow as pa
from datasets import Dataset

from hymba_tune.config import OnBadRow
from hymba_tune.data import cache
from hymba_tune.data.encoding import R, Reading, encoded_batches
from hymba_tune.data.report import DataReport, SourceCounts
from hymba_tune.data.rows import RowError, listing
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError
from hymba_tune.files import is_whole

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

D = TypeVar("D", bound=DataReport)
LOOK_AHEAD = 10_000  # rows to read after a bad one, to count others: a second or two
IDS = pa.list_(pa.int32())
ROWS, DROPPED, REPORT = "rows.arrow", "dropped.jsonl", "report.json"
"""Files of a cache entry; the report is written last."""


@dataclass(frozen=True)
class RowSchema(Generic[R, D]):
    """The columns of encoded rows, and how readings become such rows.

    Attributes:
        columns: Columns and their types, without ``place``, the location that a row was read from.
        report: Class of the report on such rows.
        fit: Yields for each reading without a problem, in their order, its rows (and counts them in the report); or the
            reason why no row fits, as text; or a `DataError` if the reading cannot be used.
        fingerprinted: Returns the numbers of a row that enter the fingerprint.
        purpose: What the rows are for, and what a row needs for that, as words of an error message:
            ``("train on", "with an answer that begins")``.
    """

    columns: Mapping[str, pa.DataType]
    report: type[D]
    fit: Callable[[Sequence[R], D], Iterable[list[dict[str, Any]] | str | DataError]]
    fingerprinted: Callable[[dict[str, Any]], list[int]]
    purpose: tuple[str, str]

    @property
    def schema(self) -> pa.Schema:
        """The columns of the file."""
        return pa.schema({**self.columns, "place": pa.string()})


def build(
    kind: RowSchema[R, D],
    rows: Iterator[R],
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    *,
    on_bad_row: OnBadRow,
    cache_dir: Path | None,
    progress: Callable[[int], None] | None,
) -> tuple[Dataset, D]:
    """Encode all rows, or load them from the cache.

    Args:
        kind: The schema of the encoded rows.
        rows: The rendered readings of the sources, in the order of the sources.
        sources: The sources that the readings come from.
        tokenizer: The model's tokenizer.
        settings: All other settings that affect the encoded rows; see `cache.entry_key`.
        on_bad_row: Whether the first row that cannot be used raises an error, or is listed in the report.
        cache_dir: Folder of the cache. Without one, a temporary folder that is removed when Python ends.
        progress: Called after every batch with the number of rows read so far.

    Returns:
        The rows, memory-mapped, and the report on them.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If no row can be used, or the disk is full.
    """
    settings = {**settings, "on_bad_row": on_bad_row, "columns": list(kind.columns)}
    key = cache.entry_key(sources, tokenizer, **settings) if cache_dir else None
    if cache_dir and key and (cached := _load(kind, cache_dir / key)):
        return cached

    folder = cache.writable(cache_dir)
    report = kind.report(sources=[SourceCounts(source.name, source.weight) for source in sources])
    try:
        with cache.unfinished(folder) as unfinished:
            entry = Path(unfinished) / "entry"
            entry.mkdir()
            report.fingerprint = _write(kind, entry, rows, tokenizer, report, on_bad_row, progress)
            report.save(entry / REPORT)
            entry = cache.store(entry, folder, key or report.fingerprint)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"Cannot write the encoded rows to {folder}: the disk is full.",
            fix="free disk space (hymba-tune data clear), or set XDG_CACHE_HOME to a folder on another disk",
        ) from error

    return Dataset.from_file(str(entry / ROWS)), replace(report, dropped_file=entry / DROPPED)


def _load(kind: RowSchema[R, D], entry: Path) -> tuple[Dataset, D] | None:
    if not entry.is_dir():
        return None
    try:
        if not is_whole(entry):
            raise ValueError("a checksum differs")
        report = kind.report.load(entry / REPORT, entry / DROPPED)
        rows = Dataset.from_file(str(entry / ROWS))
    except (OSError, ValueError, TypeError, pa.ArrowException):  # a crash, or a disk that lost bytes
        shutil.rmtree(entry, ignore_errors=True)
        return None
    cache.touch(entry)
    return rows, report


def _write(
    kind: RowSchema[R, D],
    entry: Path,
    rows: Iterator[R],
    tokenizer: PreTrainedTokenizerBase,
    report: D,
    on_bad_row: OnBadRow,
    progress: Callable[[int], None] | None,
) -> str:
    """Write the rows and the list of dropped rows, and return the fingerprint of the rows."""
    digest = hashlib.sha256()
    schema = kind.schema
    with (
        (entry / DROPPED).open("w", encoding="utf-8") as dropped,
        pa.OSFile(str(entry / ROWS), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for batch in encoded_batches(rows, tokenizer):
            for number, reading in enumerate(batch):
                if reading.problem and on_bad_row is OnBadRow.stop:
                    raise stopped(reading, chain(batch[number + 1 :], rows))

            encoded = list(_encoded_rows(kind, batch, report, dropped))
            for row in encoded:
                digest.update(array("i", kind.fingerprinted(row)).tobytes())
            columns = {name: [row[name] for row in encoded] for name in schema.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
            if progress:
                progress(report.rows)

    if not report.learned:
        raise _nothing_left(report, *kind.purpose)
    # Weights below 1 act when rows are read; those above 1 repeat rows only later, so the tokens do not show them.
    for counts in report.sources:
        if counts.weight > 1:
            digest.update(f"{counts.kept} x {counts.weight}".encode())
    return digest.hexdigest()


def stopped(bad: Reading, after: Iterable[Reading]) -> RowError:
    """Build the error of the first row that cannot be used, with the number of such rows after it.

    If no row of a file can be used, skipping them is not proposed.

    Args:
        bad: The reading with the problem.
        after: The readings after it; read only as far as `LOOK_AHEAD`, and not beyond its source.
    """
    assert bad.problem
    same_file = takewhile(lambda other: other.source == bad.source, after)
    are_bad = [other.problem is not None for other in islice(same_file, LOOK_AHEAD)]
    count = f"{1 + sum(are_bad)} such rows" if any(are_bad) else "the only one"
    extent = f"{count} in the file" if len(are_bad) < LOOK_AHEAD else f"{count} among {LOOK_AHEAD:,} rows"
    nothing_left = bad.row.place.number == 1 and all(are_bad)
    return RowError(bad.row.place, bad.problem, extent="" if nothing_left else extent)


def _encoded_rows(kind: RowSchema[R, D], batch: list[R], report: D, dropped: TextIO) -> Iterator[dict[str, Any]]:
    """Yield the encoded rows of a batch, and count every reading in the report."""
    outcomes = iter(kind.fit([reading for reading in batch if not reading.problem], report))
    for reading in batch:
        place = reading.row.place
        counts = report.sources[reading.source]
        report.rows += 1
        counts.rows += 1

        rows = reading.problem or next(outcomes)
        if isinstance(rows, DataError):
            report.drop_bad(place, rows, dropped)
        elif isinstance(rows, str):
            report.drop_long(place, rows, dropped)
        else:
            counts.kept += len(rows)
            yield from (row | {"place": str(place)} for row in rows)


def _nothing_left(report: DataReport, purpose: str, needed: str) -> DataError:
    """Build the error of data without a usable row."""
    first = report.first_dropped
    what = f" The first, {first.place}: {first.what}." if first else ""
    return DataError(
        f"Nothing to {purpose} in {listing(source.name for source in report.sources)}: of {report.rows:,} rows, "
        f"{report.too_long:,} are too long and {report.bad_rows:,} bad.{what}",
        expected=f"at least one row {needed} within --max-length",
        fix="a larger --max-length" if report.too_long else (first and first.fix) or "fix the rows",
    )
