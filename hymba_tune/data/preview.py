"""Rows as the model reads them, with the spans with loss marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from hymba_tune.config import Learn
from hymba_tune.data.chat import Rendered, tokenize
from hymba_tune.data.checking_pairs import holds_pairs
from hymba_tune.data.comparisons import Comparison, comparisons, split_answers
from hymba_tune.data.encoding import Reading, readings
from hymba_tune.data.rows import RowLocation
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

SegmentKind = Literal["context", "loss", "chosen", "rejected"]
Segment = tuple[str, SegmentKind]


@dataclass(frozen=True)
class Preview:
    """One row.

    Attributes:
        place: Where the row was read.
        segments: Its text in order, each segment with or without loss; of a pair the prompt, then both answers.
        tokens: All tokens; of a pair, those of the prompt with the longer answer.
        learned: Tokens with loss; of a pair, those of each answer.
        problem: The error of a row that cannot be used, which has no text.
    """

    place: RowLocation
    segments: tuple[Segment, ...] = ()
    tokens: int = 0
    learned: tuple[int, ...] = ()
    problem: DataError | None = None


def previews(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    mapping: Mapping[str, str] | None = None,
    learn: Learn = Learn.all,
) -> Iterator[Preview]:
    """Yield a preview of every row of the sources; rows are read only as far as the caller iterates.

    Args:
        sources: The sources, read one after the other.
        tokenizer: The tokenizer, with a chat template if there are conversations.
        mapping: Column and role names, as for `Names.parse`.
        learn: Which answers the loss covers.

    Raises:
        DataError: If a source cannot be read.
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    for source in sources:
        if holds_pairs(source, mapping or {}):
            for pair in comparisons([source], tokenizer, paired=True, mapping=mapping):
                yield _pair(pair, tokenizer)
        else:
            for reading in readings([source], tokenizer, mapping=mapping, learn=learn):
                yield _row(reading, tokenizer)


def _row(reading: Reading, tokenizer: PreTrainedTokenizerBase) -> Preview:
    if reading.problem:
        return Preview(reading.row.place, problem=reading.problem)
    (rendered,) = reading.rendered
    (encoded,) = tokenize([rendered], tokenizer)
    return Preview(reading.row.place, tuple(_segments(rendered)), len(encoded.labels), (encoded.learned,))


def _pair(pair: Comparison, tokenizer: PreTrainedTokenizerBase) -> Preview:
    if pair.problem:
        return Preview(pair.row.place, problem=pair.problem)
    chosen, rejected = pair.rendered
    start, _ = chosen.learned[-1]
    segments: tuple[Segment, ...] = (
        (chosen.text[:start], "context"),
        (chosen.text[slice(*chosen.learned[-1])], "chosen"),
        (rejected.text[slice(*rejected.learned[-1])], "rejected"),
    )
    prompt, answers = split_answers(tokenize([chosen, rejected], tokenizer))
    sizes = tuple(map(len, answers))
    return Preview(pair.row.place, segments, len(prompt) + max(sizes), sizes)


def _segments(rendered: Rendered) -> Iterator[Segment]:
    """Cut a text where spans with loss begin and end."""
    bounds = [0, *(bound for span in rendered.learned for bound in span), len(rendered.text)]
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            yield rendered.text[start:end], "loss" if index % 2 else "context"


def shortened(segments: Sequence[Segment], limit: int) -> Iterator[Segment]:
    """Yield the segments without the middle of those that are longer than ``limit`` characters."""
    for text, kind in segments:
        left_out = len(text) - limit
        if left_out > 0:
            text = f"{text[: limit // 2]} … {left_out:,} characters … {text[-(limit // 2) :]}"
        yield text, kind
