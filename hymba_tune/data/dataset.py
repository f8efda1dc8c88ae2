"""Encodes sources as rows of token ids on disk, with a report on what became of every row."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from datasets import Dataset

from hymba_tune.config import Learn, OnBadRow
from hymba_tune.data.building import IDS, RowSchema, build
from hymba_tune.data.chat import IGNORED, Encoded, fit
from hymba_tune.data.encoding import ExampleReading, read_example, readings
from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.report import DataReport
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

LOSS_WEIGHTS = "loss_weights"


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
        sources: The sources, read one after the other. Of one with a weight below 1, that share of the rows is drawn;
            `split_rows` applies larger weights.
        tokenizer: The tokenizer, with a chat template if there are conversations.
        max_length: Maximum tokens of a row.
        mapping: Column and role names, as for `Names.parse`.
        on_bad_row: Whether the first row that cannot be used raises an error, or is listed in the report.
        learn: Which answers the loss covers.
        seed: Random seed of the draws.
        cache_dir: Folder of the cache, usually `cache_folder`; the same data with the same settings is loaded from it.
            Without one, a temporary folder that is removed when Python ends.
        progress: Called after every batch with the number of rows read so far.

    Returns:
        The rows, memory-mapped, in the order of the sources: int32 lists ``input_ids`` and ``labels`` as in `Encoded`,
        and the ``place`` that the row was read from. If any row is weighted, also ``loss_weights``, null for the
        others. And the report on the rows.

    Raises:
        RowError: At the first row that cannot be used, if ``on_bad_row`` is ``stop``.
        DataError: If a source cannot be read, no row can be used, or the disk is full.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    settings = {"max_length": max_length, "mapping": dict(mapping or {}), "learn": learn, "seed": seed}
    rows, report = build(
        RowSchema(
            columns={"input_ids": IDS, "labels": IDS, LOSS_WEIGHTS: pa.list_(pa.float32())},
            report=DataReport,
            fit=partial(_fit, max_length),
            fingerprinted=_numbers,
            purpose=("train on", "with an answer that begins"),
        ),
        readings(sources, tokenizer, mapping=mapping, learn=learn, seed=seed),
        sources,
        tokenizer,
        settings,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
        progress=progress,
    )
    return rows if report.weighted else rows.remove_columns(LOSS_WEIGHTS), report


def _numbers(row: Mapping[str, Any]) -> list[int]:
    """Return the numbers of a row for the fingerprint; weights enter by their bits."""
    weights = array("i", array("f", row[LOSS_WEIGHTS] or ()).tobytes())
    return [len(row["input_ids"]), *row["input_ids"], *row["labels"], *weights]


def fit_reading(reading: ExampleReading, max_length: int, report: DataReport) -> list[Encoded] | str:
    """Cut a reading into rows and count them in the report.

    Args:
        reading: A reading without a problem.
        max_length: Maximum tokens of a row.
        report: The report to count in.

    Returns:
        The rows, or the reason why there are none.
    """
    (encoded,) = reading.encoded
    (rendered,) = reading.rendered
    size = len(encoded.input_ids)
    rows = fit(encoded, max_length, split=rendered.plain)
    if not rows:
        first = next(index for index, label in enumerate(encoded.labels) if label != IGNORED)
        return f"its first answer begins at token {first + 1:,} of {size:,}, past --max-length {max_length:,}"

    report.cut += size > max_length and not rendered.plain
    report.texts += rendered.plain
    report.conversations += not rendered.plain
    report.tokens += sum(len(row.input_ids) for row in rows)
    report.learned += sum(row.learned for row in rows)
    report.longest = max(report.longest, *(len(row.input_ids) for row in rows))
    report.weighted += sum(row.loss_weights is not None for row in rows)
    report.special += bool(reading.special)
    return rows


def _fit(
    max_length: int, readings: Sequence[ExampleReading], report: DataReport
) -> Iterator[list[dict[str, Any]] | str]:
    for reading in readings:
        rows = fit_reading(reading, max_length, report)
        yield rows if isinstance(rows, str) else [_as_columns(row) for row in rows]


def _as_columns(row: Encoded) -> dict[str, Any]:
    return {"input_ids": row.input_ids, "labels": row.labels, LOSS_WEIGHTS: row.loss_weights}


def sample_prompts(
    sources: Sequence[Source], count: int | None, mapping: Mapping[str, str] | None = None
) -> list[tuple[Conversation, str]]:
    """Return the first conversations of the sources, each as the messages before its last answer, and that answer.

    Args:
        sources: The sources, read only as far as necessary. Bad rows and plain texts are skipped.
        count: Maximum number of conversations; `None` for all.
        mapping: Column and role names, as for `Names.parse`.
    """
    conversations = chain.from_iterable(_conversations(source, mapping or {}) for source in sources)
    return list(islice(map(before_last_answer, conversations), count))


def _conversations(source: Source, mapping: Mapping[str, str]) -> Iterator[Conversation]:
    names = Names.parse({**mapping, **source.mapping})
    for row in source:
        with suppress(DataError):
            example = read_example(row, names)
            if isinstance(example, Conversation):
                yield example


def before_last_answer(conversation: Conversation) -> tuple[Conversation, str]:
    """Return a conversation up to its last answer, and that answer."""
    messages = conversation.messages
    last = max(index for index, message in enumerate(messages) if message.role == "assistant")
    return replace(conversation, messages=messages[:last]), messages[last].content
