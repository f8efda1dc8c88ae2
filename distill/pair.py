"""The student's and the teacher's tokenizers, and each side's tokens of a conversation."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from hymba_tune.config import Learn
from hymba_tune.data import Conversation, Encoded, Message, with_chat_template
from hymba_tune.data.chat import Rendered, render, tokenize
from hymba_tune.data.formats import Example
from hymba_tune.distill.ends import find_end, tokens_after_answers
from hymba_tune.distill.spelling import Spelling, describe, read_spelling
from hymba_tune.errors import ConfigError, DataError

SHOWN = 40
"""Characters of a text that a message shows."""


@dataclass(frozen=True)
class Side:
    """The student's or the teacher's tokenizer, with the spelling of its tokens.

    Attributes:
        whose: ``student`` or ``teacher``, for messages.
        tokenizer: The tokenizer, whose end-of-sequence token is the end token of answers.
        spelling: The spelling of its tokens; those of ``ends`` spell `END`.
        end: The id of the token that ends an answer.
        text_end: The token that ends a plain text, to which no chat template applies.
    """

    whose: str
    tokenizer: PreTrainedTokenizerBase
    spelling: Spelling
    end: int
    text_end: str

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer or a text, that of answers first."""
        text_end: int = self.tokenizer.get_vocab()[self.text_end]
        return (self.end,) if text_end == self.end else (self.end, text_end)

    @cached_property
    def key(self) -> str:
        """The SHA-256 of its ``tokenizer.json`` and the end tokens."""
        return hashlib.sha256(json.dumps([describe(self.tokenizer), *self.ends], sort_keys=True).encode()).hexdigest()

    def end_of(self, rendered: Rendered) -> str:
        """The token that ends a rendered example's answers, or its text."""
        return self.text_end if rendered.plain else str(self.tokenizer.eos_token)


@dataclass(frozen=True)
class TokenizerPair:
    """Both sides, and how the teacher reads conversations.

    Attributes:
        student: The student's side.
        teacher: The teacher's side.
        teacher_system: A system message for conversations that have none, on the teacher's side only.
        teacher_system_as: The role in which the teacher reads system messages; ``user`` puts them before the first
            question.
        teacher_outputs: The number of tokens that the teacher has an output for; None if unknown.
    """

    student: Side
    teacher: Side
    teacher_system: str | None = None
    teacher_system_as: str = "system"
    teacher_outputs: int | None = None


def make_pair(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    teacher_end: str | None = None,
    teacher_system: str | None = None,
    teacher_system_as: str = "system",
    teacher_template: Mapping[str, object] | None = None,
    teacher_outputs: int | None = None,
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
        teacher_system_as: ``system``, or ``user`` for a template without a system role; see `TokenizerPair`.
        teacher_template: Values for the teacher's chat template, such as ``{"date_string": "26 Jul 2024"}``. Some
            templates write today's date without it, so the same data would give different rows on another day.
        teacher_outputs: The number of tokens that the teacher has an output for, if known.

    Raises:
        ConfigError: If an end token does not exist or cannot be found, or a value has an invalid name.
        DataError: If a tokenizer's tokens do not determine the bytes of a text.
    """
    teacher = _with_template_values(with_chat_template(teacher), teacher_template or {})
    end = teacher_end or find_end(teacher)
    if end != teacher.eos_token and end in tokens_after_answers(teacher):
        # The template must still write its own end-of-sequence token after the tokenizer's has changed.
        teacher = _with_template_values(teacher, {"eos_token": teacher.eos_token})
    return TokenizerPair(
        _side(student, student.eos_token, "student"),
        _side(teacher, end, "teacher"),
        teacher_system,
        teacher_system_as,
        teacher_outputs,
    )


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
    return Side(whose, tokenizer, read_spelling(tokenizer, {token, vocabulary[text_end]}), token, text_end)


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

    @property
    def in_full(self) -> str:
        """The reason in full, with the bytes."""
        return self.what + f" ({self.bytes:,} bytes of answers)" * bool(self.bytes)


def for_teacher(example: Example, pair: TokenizerPair) -> Example:
    """Return the example as the teacher reads it; see `conversation_for_teacher`."""
    return conversation_for_teacher(example, pair) if isinstance(example, Conversation) else example


def conversation_for_teacher(conversation: Conversation, pair: TokenizerPair) -> Conversation:
    """Return the conversation with the teacher's system message if it has none, in the role that the pair says."""
    if pair.teacher_system is not None and conversation.messages[0].role != "system":
        messages = Message("system", pair.teacher_system), *conversation.messages
        conversation = replace(conversation, messages=messages)
    return _with_system_in_question(conversation) if pair.teacher_system_as == "user" else conversation


def _with_system_in_question(conversation: Conversation) -> Conversation:
    """Return the conversation with its system messages before the first question, in the same message."""
    system = [message.content.strip() for message in conversation.messages if message.role == "system"]
    first, *others = (message for message in conversation.messages if message.role != "system")
    if not system:
        return conversation
    if first.role != "user":
        first, others = Message("user", ""), [first, *others]
    content = "\n\n".join(filter(None, [*system, first.content]))
    return replace(conversation, messages=(replace(first, content=content), *others))


def left_out(example: Example, text: str) -> str | None:
    """Find what a chat template has left out of a conversation.

    Args:
        example: The example.
        text: The example as the template has rendered it.

    Returns:
        The first message, context or tool that is not in the text; None if all are. A text may be written as JSON.
        Answers are not checked, because `render` locates them.
    """
    if not isinstance(example, Conversation):
        return None
    named = [(f"message {n} ({m.role})", m.content.strip()) for n, m in enumerate(example.messages, start=1)]
    named += [(f"context {n}", context.strip()) for n, context in enumerate(example.contexts, start=1)]
    parts = [part for _, part in named]
    if not _in_order(parts, text):
        together = "\0".join(parts)  # a short text may also occur within another
        for name, part in sorted(named, key=lambda named: -len(named[1])):  # the text that is missing itself first
            written = {part, json.dumps(part, ensure_ascii=False)[1:-1]}
            missing = bool(part) and sum(map(text.count, written)) < together.count(part)
            if missing and not name.endswith("(assistant)"):
                return f"{name}: {shorten(part)}"
    for n, tool in enumerate(example.tools, start=1):
        function = tool.get("function", tool)
        called = function.get("name") if isinstance(function, dict) else None
        if isinstance(called, str) and called not in text:
            return f"tool {n}: {shorten(called)}"
    return None


def _in_order(parts: Sequence[str], text: str) -> bool:
    """Return whether a text has all parts, one after the other."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def shorten(text: str) -> str:
    """Return the beginning of a text in quotes, with all but ASCII as escapes, which show how it is encoded."""
    return ascii(text[:SHOWN]) + "…" * (len(text) > SHOWN)


def tokenize_examples(
    examples: Sequence[Example], side: Side, learn: Learn = Learn.all
) -> list[TokenizedRow | Unaligned]:
    """Tokenize examples on one side, and find the answers among the tokens.

    An example is unaligned if the chat template refuses it or leaves out a text of it, or if it has half a character.
    """
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
        return Unaligned("template", f"for the {side.whose}, {error.what}")
    except UnicodeEncodeError as error:
        return Unaligned("half a character", f"{error.object[error.start]!r} at character {error.start + 1:,}")
    return swallowed(example, rendered, side) or rendered


def swallowed(example: Example, rendered: Rendered, side: Side) -> Unaligned | None:
    """Return why an example cannot be used on a side whose chat template leaves out a text of it; see `left_out`."""
    missing = left_out(example, rendered.text)
    return Unaligned("text left out", f"the {side.whose}'s chat template leaves out {missing}") if missing else None


def without_output(teacher_ids: Sequence[int], pair: TokenizerPair) -> str | None:
    """Return why the teacher cannot read a row; None if it has an output for each token."""
    largest = max(teacher_ids)
    if pair.teacher_outputs is None or largest < pair.teacher_outputs:
        return None
    token = shorten(str(pair.teacher.tokenizer.convert_ids_to_tokens(largest)))
    return (
        f"the teacher's tokenizer writes {token} (id {largest:,}), and the teacher has {pair.teacher_outputs:,} outputs"
    )


def find_answers(rendered: Rendered, encoded: Encoded, side: Side) -> TokenizedRow | Unaligned:
    """Find the answers among the tokens of a rendered example."""
    spans = encoded.spans
    if any(end >= start for (_, end), (start, _) in pairwise(spans)):
        what = f"the {side.whose}'s chat template writes two answers with nothing between them"
        return Unaligned("template", what)
    answers = []
    for (begin, end), (start, stop) in zip(spans, rendered.learned, strict=True):
        content = rendered.text[start:stop].removesuffix(side.end_of(rendered))
        # The beginning-of-sequence token of a plain text is not part of it.
        begin += begin == 0 and encoded.input_ids[0] == side.tokenizer.bos_token_id
        answers.append(Answer(begin, end, (content if rendered.plain else content.strip()).encode()))
    return TokenizedRow(encoded.input_ids, answers)
