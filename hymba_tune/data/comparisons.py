"""From sources to answers that are compared: pairs, or answers judged one by one, as far as rendered texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hymba_tune.config import Learn
from hymba_tune.data.chat import IGNORED, Encoded, render
from hymba_tune.data.encoding import Reading, drawn
from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.preferences import FIELDS, parse_pair, parse_unpaired
from hymba_tune.data.rows import SourceRow
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Comparison(Reading):
    """Two answers to one prompt, or a single one that is judged.

    Attributes:
        talks: Conversations that end with them, the better answer first.
        good: Whether a single answer is a good one.
        tie: Whether the row scores two answers the same.
    """

    talks: tuple[Conversation, ...] = ()
    good: bool = True
    tie: bool = False


def comparisons(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    paired: bool,
    mapping: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Iterator[Comparison]:
    """Every comparison of the sources, one source after the other.

    Args:
        sources: Of those with a weight below 1, that share of the rows is drawn.
        tokenizer: With a chat template.
        paired: Whether rows are pairs, or judged answers; for those a pair counts as two.
        mapping: ``--map``: see `Names.parse`. A source's own mapping comes on top.
        seed: Of the draws.

    Raises:
        DataError: If a source cannot be read.
        ConfigError: If a mapping names a field or role that does not exist.
    """
    names = [Names.parse({**(mapping or {}), **source.mapping}, FIELDS) for source in sources]
    for number, source in enumerate(sources):
        for row in drawn(source, seed + number):
            try:
                for one in read_comparisons(row, names[number], paired=paired, source=number):
                    one.rendered = [render(talk, tokenizer, Learn.last) for talk in one.talks]
                    yield one
            except DataError as problem:
                yield Comparison(number, row, problem=problem)


def read_comparisons(row: SourceRow, names: Names, *, paired: bool, source: int = 0) -> list[Comparison]:
    """What a row compares.

    Raises:
        DataError: If it could not be read, or compares nothing.
    """
    if row.error:
        raise row.error
    if paired:
        pair = parse_pair(row.value, names)
        return [Comparison(source, row, talks=(pair.chosen, pair.rejected), tie=pair.tie)]
    judged = parse_unpaired(row.value, names)
    return [Comparison(source, row, talks=(one.conversation,), good=one.good) for one in judged]


def split_answers(whole: Sequence[Encoded]) -> tuple[list[int], list[list[int]]]:
    """Conversations that begin alike, taken apart.

    Args:
        whole: Encoded conversations of which only the last answer is learned.

    Returns:
        Token ids of the prompt that they share, and of each answer, up to its end-of-sequence token. Where tokens
        reach across the border between the two, they belong to the answers.
    """
    learned = [[index for index, label in enumerate(one.labels) if label != IGNORED] for one in whole]
    ids = [one.input_ids[: positions[-1] + 1] for one, positions in zip(whole, learned, strict=True)]
    start = min(positions[0] for positions in learned)
    start = len(os.path.commonprefix([one[:start] for one in ids]))
    return ids[0][:start], [one[start:] for one in ids]
