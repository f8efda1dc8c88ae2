"""The student's and the teacher's tokenizers, and each side's tokens of a conversation."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hymba_tune.config import Learn
from hymba_tune.data import Conversation, Encoded, Message, with_chat_template
from hymba_tune.data.chat import Rendered, render, tokenize
from hymba_tune.data.formats import Example
from hymba_tune.distill.ends import find_end, tokens_after_answers
from hymba_tune.distill.spelling import Spelling, read_spelling
from hymba_tune.errors import ConfigError, DataError


@dataclass(frozen=True)
class Side:
    """The student's or the teacher's tokenizer, with the spelling of its tokens.

    Attributes:
        tokenizer: The tokenizer, whose end-of-sequence token is the end token of answers.
        spelling: The spelling of its tokens; those of ``ends`` spell `END`.
        end: The id of the token that ends an answer.
        text_end: The token that ends a plain text, to which no chat template applies.
    """

    tokenizer: PreTrainedTokenizerBase
    spelling: Spelling
    end: int
    text_end: str

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer or a text, that of answers first."""
        text_end: int = self.tokenizer.get_vocab()[self.text_end]
        return (self.end,) if text_end == self.end else (self.end, text_end)

    def end_of(self, rendered: Rendered) -> str:
        """The token that ends a rendered example's answers, or its text."""
        return self.text_end if rendered.plain else str(self.tokenizer.eos_token)


@dataclass(frozen=True)
class TokenizerPair:
    """Both sides, and the teacher's additional system message.

    Attributes:
        student: The student's side.
        teacher: The teacher's side.
        teacher_system: A system message for conversations that have none, on the teacher's side only.
    """

    student: Side
    teacher: Side
    teacher_system: str | None = None


def make_pair(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    teacher_end: str | None = None,
    teacher_system: str | None = None,
    teacher_template: Mapping[str, object] | None = None,
) -> TokenizerPair:
    """Create a pair of copies of two tokenizers.

    Args:
        student: A fast tokenizer, which gets Hymba's chat template if it has none. It ends answers with its
            end-of-sequence token.
        teacher: A fast tokenizer, which gets Hymba's chat template if it has none. It ends answers with the token that
            its chat template writes there.
        teacher_end: The teacher's end token; None finds it in the chat template.
        teacher_system: A system message for conversations without one, on the teacher's side only. Some templates write
            a default one.
        teacher_template: Values for the teacher's chat template, such as ``{"date_string": "26 Jul 2024"}``. Some
            templates write today's date without it, so the same data would give different rows on another day.

    Raises:
        ConfigError: If an end token does not exist or cannot be found, or a value has an invalid name.
        DataError: If a tokenizer's tokens do not determine the bytes of a text.
    """
    teacher = _with_template_values(with_chat_template(teacher), teacher_template or {})
    end = teacher_end or find_end(teacher)
    if end != teacher.eos_token and end in tokens_after_answers(teacher):
        # The template must still write its own end-of-sequence token after the tokenizer's has changed.
        teacher = _with_template_values(teacher, {"eos_token": teacher.eos_token})
    return TokenizerPair(_side(student, student.eos_token, "student"), _side(teacher, end, "teacher"), teacher_system)


def _side(tokenizer: PreTrainedTokenizerBase, end: str | None, whose: str) -> Side:
    vocabulary = tokenizer.get_vocab()
    token = vocabulary.get(end)
    if end is None or token is None:
        raise ConfigError(
            f"The {whose}'s tokenizer has no token {end!r} to end an answer with.",
            expected="the token that its chat template writes after an answer",
        )
    text_end = tokenizer.eos_token if tokenizer.eos_token in vocabulary else end
    tokenizer = copy.deepcopy(with_chat_template(tokenizer))
    tokenizer.eos_token = end  # rendering ends answers with it
    return Side(tokenizer, read_spelling(tokenizer, {token, vocabulary[text_end]}), token, text_end)


def _with_template_values(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, object]) -> PreTrainedTokenizerBase:
    """Return a copy whose chat template begins by setting these values."""
    if bad := [name for name in values if not name.isidentifier()]:
        raise ConfigError(
            f"{bad[0]!r} cannot be the name of a value in a chat template.", expected="a name: date_string"
        )
    # Each is on its own line, which the template engine removes: the rest is rendered as before.
    lines = [f"{{% set {name} = {json.dumps(value)} %}}\n" for name, value in values.items()]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "".join(lines) + tokenizer.get_chat_template()
    return tokenizer


class Answer(NamedTuple):
    """One answer in a row of tokens: ``[begin, end)`` with its end token, and its bytes."""

    begin: int
    end: int
    content: bytes


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """An example in one side's tokens."""

    ids: list[int]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Unaligned:
    """An example that cannot be aligned.

    Attributes:
        reason: The category of the reason.
        what: The reason in full.
        bytes: The bytes of its answers, as far as they are known.
    """

    reason: str
    what: str
    bytes: int = 0


def for_teacher(example: Example, system: str | None) -> Example:
    """Return the example, with a system message if it is a conversation that has none."""
    return with_system(example, system) if isinstance(example, Conversation) else example


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """Return the conversation with this system message, if there is one and the conversation has none."""
    if system is None or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def tokenize_examples(
    examples: Sequence[Example], side: Side, learn: Learn = Learn.all
) -> list[TokenizedRow | Unaligned]:
    """Tokenize examples on one side, and find the answers among the tokens."""
    rendered = [_render(example, side, learn) for example in examples]
    texts = [text for text in rendered if isinstance(text, Rendered)]
    encoded = iter(tokenize(texts, side.tokenizer) if texts else ())
    return [text if isinstance(text, Unaligned) else find_answers(text, next(encoded), side) for text in rendered]


def _render(example: Example, side: Side, learn: Learn) -> Rendered | Unaligned:
    try:
        rendered = render(example, side.tokenizer, learn)
        if rendered.plain:
            text = rendered.text.removesuffix(side.tokenizer.eos_token) + side.text_end
            rendered = replace(rendered, text=text, learned=((0, len(text)),))
        rendered.text.encode()
    except DataError as error:
        return Unaligned("template", error.what)
    except UnicodeEncodeError as error:
        return Unaligned("half a character", f"{error.object[error.start]!r} at character {error.start + 1:,}")
    return rendered


def find_answers(rendered: Rendered, encoded: Encoded, side: Side) -> TokenizedRow | Unaligned:
    """Find the answers among the tokens of a rendered example."""
    spans = encoded.spans
    if any(end >= start for (_, end), (start, _) in pairwise(spans)):
        return Unaligned("template", "two answers follow each other with nothing between them")
    answers = []
    for (begin, end), (start, stop) in zip(spans, rendered.learned, strict=True):
        content = rendered.text[start:stop].removesuffix(side.end_of(rendered))
        # The beginning-of-sequence token of a plain text is not part of it.
        begin += begin == 0 and encoded.input_ids[0] == side.tokenizer.bos_token_id
        answers.append(Answer(begin, end, (content if rendered.plain else content.strip()).encode()))
    return TokenizedRow(encoded.input_ids, answers)
