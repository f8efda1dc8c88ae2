"""Reads, renders and tokenizes the rows of sources, a batch in memory at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from hymba_tune.config import Learn
from hymba_tune.data.chat import Encoded, Rendered, render, tokenize
from hymba_tune.data.formats import Conversation, Example, Names, needed_columns, parse
from hymba_tune.data.messages import Message
from hymba_tune.data.prompts import parse_prompt
from hymba_tune.data.rows import SourceRow
from hymba_tune.data.sources import Source
from hymba_tune.data.special_tokens import SpecialTokens
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 256
BATCH_CHARS = 2**20  # bounds memory if rows are megabytes long
NO_ANSWER = "?"
"""What stands for an answer that is still to be generated."""


@dataclass(slots=True)
class Reading:
    """A row with its rendered texts and tokens, or with the problem that prevents them.

    Attributes:
        source: Number of the source, from 0.
        row: The row as it was read.
        rendered: Its rendered texts.
        encoded: The same texts as tokens, at any length.
        problem: The error that prevents them, if any.
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
        example: The parsed row; `None` if it could not be parsed.
        special: The special tokens inside its text, which the model reads as the real ones.
    """

    example: Example | None = None
    special: Sequence[str] = ()


R = TypeVar("R", bound=Reading)


def read_example(row: SourceRow, names: Names) -> Example:
    """Parse a row.

    Raises:
        DataError: If the row could not be read, or matches no format.
    """
    if row.error:
        raise row.error
    return parse(row.value, names)


def read_question(row: SourceRow, names: Names) -> Example:
    """Parse a row for which an answer will be generated; one that ends with a question gets `NO_ANSWER` as its answer.

    Raises:
        DataError: If the row could not be read, or matches no format.
    """
    try:
        example = read_example(row, names)
    except DataError as problem:
        if row.error:
            raise
        try:
            example = parse_prompt(row.value, names)
        except DataError:
            raise problem from None
    if isinstance(example, Conversation) and example.messages[-1].role == "user":
        return replace(example, messages=(*example.messages, Message("assistant", NO_ANSWER)))
    return example


def readings(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mapping: Mapping[str, str] | None = None,
    learn: Learn = Learn.all,
    seed: int = 0,
    parse_row: Callable[[SourceRow, Names], Example] = read_example,
) -> Iterator[ExampleReading]:
    """Read and render every row of the sources, one source after the other.

    Args:
        sources: The sources. Of one with a weight below 1, that share of the rows is drawn.
        tokenizer: The tokenizer, with a chat template if there are conversations.
        mapping: Column and role names, as for `Names.parse`. A source's own mapping takes precedence.
        learn: Which answers the loss covers.
        seed: Random seed of the draws.
        parse_row: Parses a row, such as `read_example` or `read_question`.

    Raises:
        DataError: If a source cannot be read.
        ConfigError: If a mapping names a field or role that does not exist.
    """
    names = [Names.parse({**(mapping or {}), **source.mapping}) for source in sources]
    special = SpecialTokens.of(tokenizer)
    for number, source in enumerate(sources):
        for row in drawn(source.only(partial(needed_columns, names[number])), seed + number):
            reading = ExampleReading(number, row)
            try:
                example = parse_row(row, names[number])
                reading.example = special.escape(example) if source.escape else example
                reading.special = special.find(reading.example)
                reading.rendered = (render(reading.example, tokenizer, learn),)
            except DataError as problem:
                reading.problem = problem
            yield reading


def drawn(source: Source, seed: int) -> Iterator[SourceRow]:
    """Yield the rows of a source; if its weight is below 1, a random share of them that depends on the seed."""
    draw = random.Random(seed)
    return (row for row in source if source.weight >= 1 or draw.random() < source.weight)


def encoded_batches(rows: Iterable[R], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[R]]:
    """Yield the rows in batches with the rendered texts tokenized: together, which is faster than one by one."""
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
