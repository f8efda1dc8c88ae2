"""From sources to rows of token ids on disk, and the account of what became of every row on the way."""

from __future__ import annotations

import errno
import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import TextIO

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hymba_tune.config import Learn, OnBadRow
from hymba_tune.data import cache
from hymba_tune.data.chat import IGNORED, Encoded, fit
from hymba_tune.data.encoding import Reading, encoded_batches, read_example, readings
from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.report import DataReport, Dropped, SourceCounts
from hymba_tune.data.rows import Place, RowError, listing
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

LOOK_AHEAD = 10_000  # rows, a second or two, to say whether a bad row is the only one
SCHEMA = pa.schema({"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()), "place": pa.string()})
ROWS, DROPPED, REPORT = "rows.arrow", "dropped.jsonl", "report.json"
"""Files of an entry of the cache; the report is written last."""


def build_dataset(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = OnBadRow.stop,
    learn: Learn = Learn.all,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Dataset, DataReport]:
    """Encode all rows of the sources, a batch in memory at a time.

    Args:
        sources: Read one after the other. Of those with a weight below 1, that share is drawn; larger weights are for
            `mix_rows`.
        tokenizer: With a chat template, if there are conversations.
        max_length: Tokens a row may have.
        mapping: ``--map``: see `Names.parse`.
        on_bad_row: Whether the first row that cannot be used stops everything, or is listed in the report.
        learn: Which answers are learned.
        seed: Of the draws.
        cache_dir: Where encoded rows are kept, and found again when the same data comes with the same settings;
            usually `cache_folder`. If not given, a folder that is removed when Python ends.
        progress: Called with the number of rows read so far, after every batch.

    Returns:
        The rows, memory-mapped, with int32 lists ``input_ids`` and ``labels`` as in `Encoded`, and the ``place`` they
        were read from, in the order of the sources; and the report on them.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If a source cannot be read, no row can be used, or the disk is full.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    settings = {"max_length": max_length, "mapping": dict(mapping or {}), "on_bad_row": on_bad_row, "learn": learn}
    key = cache.entry_key(sources, tokenizer, seed=seed, **settings) if cache_dir else None
    if cache_dir and key and (found := _load(cache_dir / key)):
        return found
    folder = cache.writable(cache_dir)
    rows = readings(sources, tokenizer, mapping=mapping, learn=learn, seed=seed)
    try:
        with cache.unfinished(folder) as unfinished:
            entry = Path(unfinished) / "entry"
            entry.mkdir()
            report = _write(entry, rows, sources, tokenizer, max_length, on_bad_row, progress)
            entry = cache.keep(entry, folder, key or report.fingerprint)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"Cannot write the encoded rows to {folder}: the disk is full.",
            fix="free some of it (hymba-tune data clear), or set XDG_CACHE_HOME to another disk's folder",
        ) from error
    return Dataset.from_file(str(entry / ROWS)), replace(report, dropped_file=entry / DROPPED)


def _load(entry: Path) -> tuple[Dataset, DataReport] | None:
    try:
        report = DataReport.load(entry / REPORT, entry / DROPPED)
        rows = Dataset.from_file(str(entry / ROWS))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, pa.ArrowException):  # torn by a crash of the machine
        shutil.rmtree(entry, ignore_errors=True)
        return None
    cache.touch(entry)
    return rows, report


def _write(
    entry: Path,
    rows: Iterator[Reading],
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    on_bad_row: OnBadRow,
    progress: Callable[[int], None] | None,
) -> DataReport:
    report = DataReport(sources=[SourceCounts(source.name, source.weight) for source in sources])
    digest = hashlib.sha256()
    with (
        (entry / DROPPED).open("w", encoding="utf-8") as dropped,
        pa.OSFile(str(entry / ROWS), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as writer,
    ):
        for batch in encoded_batches(rows, tokenizer):
            kept: list[tuple[Place, Encoded]] = []
            for number, reading in enumerate(batch):
                if reading.problem and on_bad_row is OnBadRow.stop:
                    raise stopped(reading, chain(batch[number + 1 :], rows))
                kept += [(reading.row.place, row) for row in fit_reading(reading, max_length, report, dropped)]
            for _, row in kept:
                digest.update(array("i", [len(row.input_ids), *row.input_ids, *row.labels]).tobytes())
            columns = {
                "input_ids": [row.input_ids for _, row in kept],
                "labels": [row.labels for _, row in kept],
                "place": [str(place) for place, _ in kept],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, SCHEMA))
            if progress:
                progress(report.rows)
    if not report.learned:
        raise nothing_left(report, "learn", "with an answer that begins")
    for counts in report.sources:
        if counts.weight > 1:
            digest.update(f"{counts.kept} x {counts.weight}".encode())
    report.fingerprint = digest.hexdigest()
    report.save(entry / REPORT)
    return report


def fit_reading(reading: Reading, max_length: int, report: DataReport, dropped: TextIO) -> list[Encoded]:
    """The rows that a reading gives at this length, counted in the report, or listed as dropped."""
    counts, place = report.sources[reading.source], reading.row.place
    report.rows += 1
    counts.rows += 1
    if reading.problem:
        report.drop(Dropped(place, "bad row", reading.problem.what), dropped)
        return []
    assert reading.encoded
    assert reading.rendered
    size = len(reading.encoded.input_ids)
    rows = fit(reading.encoded, max_length, split=reading.rendered.plain)
    if not rows:
        report.drop(Dropped(place, "too long", too_long(reading.encoded, max_length)), dropped)
        return []
    report.cut += size > max_length
    report.texts += reading.rendered.plain
    report.conversations += not reading.rendered.plain
    report.tokens += sum(len(row.input_ids) for row in rows)
    report.learned += sum(row.learned for row in rows)
    report.longest = max(report.longest, *(len(row.input_ids) for row in rows))
    counts.kept += len(rows)
    return rows


def too_long(encoded: Encoded, max_length: int) -> str:
    """Why nothing of an encoded row can be learned at this length."""
    first = next(index for index, label in enumerate(encoded.labels) if label != IGNORED)
    size = len(encoded.input_ids)
    return f"its first answer begins at token {first + 1:,} of {size:,}, past --max-length {max_length:,}"


def stopped(reading: Reading, after: Iterator[Reading]) -> RowError:
    """The error of the first row that cannot be used, with how many such rows follow it in its file."""
    assert reading.problem
    same_file = takewhile(lambda other: other.source == reading.source, after)
    bad = [other.problem is not None for other in islice(same_file, LOOK_AHEAD)]
    return RowError(reading.row.place, reading.problem, extent=extent_of(bad))


def extent_of(bad: list[bool]) -> str:
    """How many bad rows there are, from the first one on and as far as was looked ahead."""
    count = f"{1 + sum(bad)} such rows" if any(bad) else "the only one"
    return f"{count} in the file" if len(bad) < LOOK_AHEAD else f"{count} among {LOOK_AHEAD:,} rows"


def nothing_left(report: DataReport, purpose: str, needed: str) -> DataError:
    """The error of data of which no row can be used, for what it was wanted, and what a row needs."""
    first = report.first_dropped
    what = f" The first, {first.place}: {first.what}." if first else ""
    return DataError(
        f"Nothing to {purpose} in {listing(source.name for source in report.sources)}: of {report.rows:,} rows, "
        f"{report.too_long:,} are too long and {report.bad_rows:,} bad.{what}",
        expected=f"at least one row {needed} within --max-length",
        fix="a larger --max-length" if report.too_long else "mend the rows, or name their columns with --map",
    )


def sample_prompts(
    sources: Sequence[Source], count: int | None, mapping: Mapping[str, str] | None = None
) -> list[tuple[Conversation, str]]:
    """The first conversations of the sources, each as what comes before its last answer, and that answer.

    Args:
        sources: Read only as far as needed; bad rows and plain texts are passed over.
        count: The most conversations to return; None for all.
        mapping: As for `build_dataset`.
    """
    samples = (_before_last_answer(talk) for source in sources for talk in _conversations(source, mapping or {}))
    return list(islice(samples, count))


def _conversations(source: Source, mapping: Mapping[str, str]) -> Iterator[Conversation]:
    names = Names.parse({**mapping, **source.mapping})
    for row in source:
        with suppress(DataError):
            example = read_example(row, names)
            if isinstance(example, Conversation):
                yield example


def _before_last_answer(conversation: Conversation) -> tuple[Conversation, str]:
    messages = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return replace(conversation, messages=messages[:last]), messages[last].content
