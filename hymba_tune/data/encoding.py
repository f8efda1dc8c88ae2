"""From sources to token ids, a batch of rows in memory at a time, each with what became of it on the way."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hymba_tune.config import Learn
from hymba_tune.data.chat import Encoded, Rendered, render, tokenize
from hymba_tune.data.formats import Example, Names, parse
from hymba_tune.data.rows import SourceRow
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256
BATCH_CHARS = 2**20  # what bounds memory where rows are megabytes long


@dataclass(slots=True)
class Reading:
    """A row and how far it came: to rendered texts, and tokens; or to the problem that it ended with.

    Attributes:
        source: Number of the source, from 0.
        row: As it was read.
        rendered: What it says, as texts.
        encoded: The same as tokens, at any length.
        problem: Why they are missing.
    """

    source: int
    row: SourceRow
    rendered: Sequence[Rendered] = ()
    encoded: Sequence[Encoded] = ()
    problem: DataError | None = None


@dataclass(slots=True)
class ExampleReading(Reading):
    """A row with one text.

    Attributes:
        example: What it says.
    """

    example: Example | None = None


R = TypeVar("R", bound=Reading)


def readings(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mapping: Mapping[str, str] | None = None,
    learn: Learn = Learn.all,
    seed: int = 0,
) -> Iterator[ExampleReading]:
    """Every row of the sources, one source after the other, as far as a rendered text.

    Args:
        sources: Of those with a weight below 1, that share of the rows is drawn.
        tokenizer: With a chat template, if there are conversations.
        mapping: ``--map``: see `Names.parse`. A source's own mapping comes on top.
        learn: Which answers are learned.
        seed: Of the draws.

    Raises:
        DataError: If a source cannot be read.
        ConfigError: If a mapping names a field or role that does not exist.
    """
    names = [Names.parse({**(mapping or {}), **source.mapping}) for source in sources]
    for number, source in enumerate(sources):
        for row in drawn(source, seed + number):
            reading = ExampleReading(number, row)
            try:
                reading.example = read_example(row, names[number])
                reading.rendered = (render(reading.example, tokenizer, learn),)
            except DataError as problem:
                reading.problem = problem
            yield reading


def drawn(source: Source, seed: int) -> Iterator[SourceRow]:
    """Rows of a source; where its weight is below 1, that share of them, the same ones for the same seed."""
    draw = random.Random(seed)
    return (row for row in source if source.weight >= 1 or draw.random() < source.weight)


def read_example(row: SourceRow, names: Names) -> Example:
    """What a row says.

    Raises:
        DataError: If it could not be read, or fits no format.
    """
    if row.error:
        raise row.error
    return parse(row.value, names)


def encoded_batches(rows: Iterable[R], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[R]]:
    """The rows in batches, those that were rendered also tokenized: together, which is faster than one by one."""
    for batch in _batches(rows):
        if texts := [text for reading in batch for text in reading.rendered]:
            encoded = iter(tokenize(texts, tokenizer))
            for reading in batch:
                reading.encoded = [next(encoded) for _ in reading.rendered]
        yield batch


def _batches(rows: Iterable[R]) -> Iterator[list[R]]:
    batch: list[R] = []
    chars = 0
    for reading in rows:
        batch.append(reading)
        chars += sum(len(text.text) for text in reading.rendered)
        if len(batch) >= BATCH_ROWS or chars > BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
