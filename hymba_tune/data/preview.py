"""Rows as the model reads them, with what is learned told apart."""

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

Kind = Literal["read", "learned", "chosen", "rejected"]


@dataclass(frozen=True)
class Preview:
    """One row.

    Attributes:
        place: Where it stands.
        pieces: Its text, in order, each piece read or learned; of a pair the prompt, then both answers.
        tokens: All tokens; of a pair, those of the prompt with the longer answer.
        learned: Those that are learned; of a pair, those of each answer.
        problem: What is wrong with it; there is no text then.
    """

    place: RowLocation
    pieces: tuple[tuple[str, Kind], ...] = ()
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
    """Every row of the sources in turn, as far as they are asked for.

    Args:
        sources: Read one after the other.
        tokenizer: With a chat template, if there are conversations.
        mapping: ``--map``: see `Names.parse`.
        learn: Which answers are learned.

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
    return Preview(reading.row.place, tuple(_pieces(rendered)), len(encoded.labels), (encoded.learned,))


def _pair(pair: Comparison, tokenizer: PreTrainedTokenizerBase) -> Preview:
    if pair.problem:
        return Preview(pair.row.place, problem=pair.problem)
    chosen, rejected = pair.rendered
    start, _ = chosen.learned[-1]
    pieces: list[tuple[str, Kind]] = [(chosen.text[:start], "read")]
    pieces += [(chosen.text[slice(*chosen.learned[-1])], "chosen")]
    pieces += [(rejected.text[slice(*rejected.learned[-1])], "rejected")]
    prompt, answers = split_answers(tokenize([chosen, rejected], tokenizer))
    sizes = tuple(map(len, answers))
    return Preview(pair.row.place, tuple(pieces), len(prompt) + max(sizes), sizes)


def _pieces(rendered: Rendered) -> Iterator[tuple[str, Kind]]:
    """The text, cut where learning begins and ends."""
    bounds = [0, *(bound for span in rendered.learned for bound in span), len(rendered.text)]
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            yield rendered.text[start:end], "learned" if index % 2 else "read"


def shortened(pieces: Sequence[tuple[str, Kind]], limit: int) -> Iterator[tuple[str, Kind]]:
    """The pieces with the middle of each taken out that is longer than ``limit`` characters."""
    for text, kind in pieces:
        left_out = len(text) - limit
        if left_out > 0:
            text = f"{text[: limit // 2]} … {left_out:,} characters … {text[-(limit // 2) :]}"
        yield text, kind
