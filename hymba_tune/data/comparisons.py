"""Reads sources of preferences, pairs or unpaired answers, up to rendered texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hymba_tune.config import Learn
from hymba_tune.data.chat import IGNORED, Encoded, render
from hymba_tune.data.encoding import Reading, drawn
from hymba_tune.data.formats import Conversation, Names, needed_columns
from hymba_tune.data.preferences import FIELDS, IdenticalPairError, parse_pair, parse_unpaired
from hymba_tune.data.rows import SourceRow
from hymba_tune.data.sources import Source
from hymba_tune.data.special_tokens import SpecialTokens
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Comparison(Reading):
    """Two answers to one prompt, or a single answer with a label.

    Attributes:
        conversations: The conversations that end with the answers, the chosen one first.
        good: Whether a single answer is labeled good.
        tie: Whether the row has the same score for both answers.
    """

    conversations: tuple[Conversation, ...] = ()
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
    """Yield every comparison of the sources, one source after the other.

    Args:
        sources: The sources. Of one with a weight below 1, that share of the rows is drawn.
        tokenizer: A tokenizer with a chat template.
        paired: Whether to read pairs, or single answers with labels; a pair then counts as two of these.
        mapping: Column and role names, as for `Names.parse`. A source's own mapping takes precedence.
        seed: Random seed of the draws.

    Raises:
        DataError: If a source cannot be read.
        ConfigError: If a mapping names a field or role that does not exist.
    """
    names = [Names.parse({**(mapping or {}), **source.mapping}, FIELDS) for source in sources]
    special = SpecialTokens.of(tokenizer) if any(source.escape for source in sources) else None
    for number, source in enumerate(sources):
        for row in drawn(source.only(partial(needed_columns, names[number])), seed + number):
            try:
                for comparison in read_comparisons(row, names[number], paired=paired, source=number):
                    if special and source.escape:
                        comparison.conversations = tuple(map(special.escape_conversation, comparison.conversations))
                    texts = [render(conversation, tokenizer, Learn.last) for conversation in comparison.conversations]
                    if len(texts) == 2 and texts[0].text == texts[1].text:  # a template trims what differs
                        raise IdenticalPairError
                    comparison.rendered = texts
                    yield comparison
            except DataError as problem:
                yield Comparison(number, row, problem=problem)


def read_comparisons(row: SourceRow, names: Names, *, paired: bool, source: int = 0) -> list[Comparison]:
    """Read the comparisons of a row.

    Args:
        row: The row.
        names: Names of its columns and roles.
        paired: Whether to read a pair, or single answers with labels.
        source: Number of the row's source.

    Raises:
        DataError: If the row could not be read, or holds no preference.
    """
    if row.error:
        raise row.error
    if paired:
        pair = parse_pair(row.value, names)
        return [Comparison(source, row, conversations=(pair.chosen, pair.rejected), tie=pair.tie)]
    answers = parse_unpaired(row.value, names)
    return [Comparison(source, row, conversations=(answer.conversation,), good=answer.good) for answer in answers]


@dataclass(frozen=True)
class FittedAnswers:
    """A prompt and its answers as tokens, cut to the maximum length.

    Attributes:
        prompt: The prompt's tokens.
        answers: The answers' tokens, as far as they fit after the prompt.
        uncut: The answers' tokens in full.
        unusable: The reason why cut answers cannot be trained on; empty if they can be.
    """

    prompt: list[int]
    answers: list[list[int]]
    uncut: list[list[int]]
    unusable: str = ""


def fit_answers(conversations: Sequence[Encoded], max_length: int) -> FittedAnswers:
    """Cut the answers to one prompt to the maximum length.

    Args:
        conversations: Encoded conversations, as for `split_answers`.
        max_length: Maximum tokens of the prompt with an answer.
    """
    prompt, uncut = split_answers(conversations)
    answers = [answer[: max(0, max_length - len(prompt))] for answer in uncut]
    reason = ""
    if not all(answers):
        size = len(prompt) + max(map(len, uncut))
        reason = f"its answer begins at token {len(prompt) + 1:,} of {size:,}, past --max-length {max_length:,}"
    elif len(answers) == 2 and answers[0] == answers[1]:
        # The tokenizer may normalize both to the same tokens.
        cut = uncut[0] != uncut[1]
        reason = f"its answers differ only past --max-length {max_length:,}" if cut else "its answers have equal tokens"
    return FittedAnswers(prompt, answers, uncut, reason)


def split_answers(conversations: Sequence[Encoded]) -> tuple[list[int], list[list[int]]]:
    """Split conversations with the same prompt into the prompt and the answers.

    Args:
        conversations: Encoded conversations with loss on the last answer only.

    Returns:
        Token ids of the shared prompt, and of each answer up to its end-of-sequence token. A token that contains the
        border between the two belongs to the answers.
    """
    answer_positions = [[i for i, label in enumerate(row.labels) if label != IGNORED] for row in conversations]
    ids = [row.input_ids[: positions[-1] + 1] for row, positions in zip(conversations, answer_positions, strict=True)]
    start = min(positions[0] for positions in answer_positions)
    # Tokens before the first label may differ as well, since tokenization near the border depends on the answer.
    start = len(os.path.commonprefix([row[:start] for row in ids]))
    return ids[0][:start], [row[start:] for row in ids]
