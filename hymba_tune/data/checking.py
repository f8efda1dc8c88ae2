"""Checks data files: everything that a run would report, and oddities that a run accepts silently."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from hymba_tune.config import Learn
from hymba_tune.data.chat import fit
from hymba_tune.data.check_counts import KINDS, OTHERS, Check, FileCheck, general, note_special_tokens
from hymba_tune.data.checking_pairs import check_pairs, holds_pairs
from hymba_tune.data.duplicates import SeenRows
from hymba_tune.data.encoding import ExampleReading, encoded_batches, readings
from hymba_tune.data.formats import (
    LIKELY_LABELS,
    Conversation,
    Example,
    Names,
    is_good,
    judgment_column,
    messages_in,
    recognize,
)
from hymba_tune.data.messages import REASONING_KEYS, SHOWN_KEYS
from hymba_tune.data.rows import SourceRow
from hymba_tune.data.sources import Source
from hymba_tune.data.values import is_empty
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

TWO_QUESTIONS = "two messages from the user in a row"
TWO_ANSWERS = "two answers in a row"
NO_ANSWER_LAST = "the last message is not an answer, so it has no loss"
EMPTY_QUESTION = "an empty message from the user"
GREETING = "it begins with an answer, which is context without loss"
REASONING = "its reasoning is read as <think>…</think> before the answer"
NO_LABEL = "its label is null"
LABELED_BAD = "its label says that the answer is bad, which sft would learn"
ODDITIES = {
    TWO_QUESTIONS: "merge them, or insert the missing answer",
    TWO_ANSWERS: "merge them, or insert the missing question",
    NO_ANSWER_LAST: "remove it, or add the answer",
    EMPTY_QUESTION: "fill it in, or remove the row",
    GREETING: "",
    REASONING: "",
    NO_LABEL: "fill it in; hymba-tune kto trains on answers with labels",
    LABELED_BAD: "train with hymba-tune kto",
}
"""What a run accepts although it is rarely intended, and what to do about it."""


def check_sources(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    mapping: Mapping[str, str] | None = None,
    learn: Learn = Learn.all,
    progress: Callable[[int], None] | None = None,
) -> Check:
    """Read all rows and count them.

    Memory grows by 20 bytes per row and by nothing else.

    Args:
        sources: The sources, read one after the other. One that cannot be read does not stop the check of the others.
        tokenizer: The model's tokenizer, with a chat template.
        max_length: Maximum tokens of a row.
        mapping: Column and role names, as for `Names.parse`.
        learn: Which answers the loss covers.
        progress: Called with the number of rows read so far.

    Raises:
        ConfigError: If ``mapping`` names a field or role that does not exist.
    """
    check = Check(max_length)
    seen = SeenRows()
    mapping = mapping or {}
    for source in sources:
        file = FileCheck(source.name)
        check.files.append(file)
        try:
            if holds_pairs(source, mapping):
                check_pairs(source, tokenizer, mapping, check, file, seen, progress)
                continue
            names = Names.parse({**mapping, **source.mapping})
            for batch in encoded_batches(readings([source], tokenizer, mapping=mapping, learn=learn), tokenizer):
                for reading in batch:
                    _count(reading, names, check, file, seen)
                if progress:
                    progress(check.rows)
        except DataError as problem:
            file.problem = problem
    check.duplicates = seen.find()
    return check


def _count(reading: ExampleReading, names: Names, check: Check, file: FileCheck, seen: SeenRows) -> None:
    place = reading.row.place
    check.rows += 1
    file.rows += 1
    file.formats[_format_of(reading, names)] += 1
    if reading.problem:
        check.bad_rows += 1
        problem = reading.problem
        check.problems.add(general(problem.what), f"{place}: {problem.what}", problem.details["to fix"])
        return

    assert reading.example
    seen.add(reading.example, place)
    note_special_tokens(reading.special, place, check)
    _note_columns(reading.example, reading.row, names, check)
    _count_tokens(reading, check)


def _note_columns(example: Example, row: SourceRow, names: Names, check: Check) -> None:
    """Note the oddities of a row, its label, and the columns and keys that the model does not see."""
    value = cast(Mapping[str, object], row.value)
    fields = names.rename(value)
    form = recognize(fields, names)
    keys = {(name, key) for name in form.required for key in _message_keys(fields[name])}

    oddities = [*_oddities(example, {key for _, key in keys})]
    if isinstance(example, Conversation):
        if label := judgment_column(fields):
            check.labels[label, is_good(fields[label])] += 1
            oddities += [] if is_good(fields[label]) else [LABELED_BAD]
        oddities += [NO_LABEL] if any(value.get(name, 0) is None for name in LIKELY_LABELS) else []
    for oddity in oddities:
        check.notes.add(oddity, str(row.place), ODDITIES[oddity])

    hidden = {str(key) for key, value in fields.items() if not is_empty(value) and key not in form.fields}
    hidden |= {f"{name}[].{key}" for name, key in keys if key not in SHOWN_KEYS}
    check.hidden.update(key if key in check.hidden or len(check.hidden) < KINDS else OTHERS for key in hidden)


def _count_tokens(reading: ExampleReading, check: Check) -> None:
    (encoded,) = reading.encoded
    (rendered,) = reading.rendered
    size = len(encoded.input_ids)
    rows = fit(encoded, check.max_length, split=rendered.plain)
    tokens = sum(len(row.input_ids) for row in rows)
    check.lengths.rows[size] += 1
    check.too_long += not rows
    check.tokens += tokens
    check.learned += sum(row.learned for row in rows)
    if rows and size > check.max_length:
        check.continued += rendered.plain
        check.cut += not rendered.plain
        check.tokens_lost += size - tokens


def _format_of(reading: ExampleReading, names: Names) -> str:
    if not isinstance(reading.row.value, Mapping):
        return "unreadable"
    try:
        return recognize(names.rename(reading.row.value), names).name
    except DataError:
        return "unknown"


def _oddities(example: Example, keys: Collection[str]) -> Iterator[str]:
    """Yield the `ODDITIES` of a row whose messages have these keys."""
    if not isinstance(example, Conversation):
        return
    messages = example.messages
    roles = [message.role for message in messages]
    if ("user", "user") in pairwise(roles):
        yield TWO_QUESTIONS
    if ("assistant", "assistant") in pairwise(roles):
        yield TWO_ANSWERS
    if roles[-1] != "assistant":
        yield NO_ANSWER_LAST
    if any(message.role == "user" and not message.content.strip() for message in messages):
        yield EMPTY_QUESTION
    if roles[0] == "assistant":
        yield GREETING
    if not REASONING_KEYS.isdisjoint(keys):
        yield REASONING


def _message_keys(value: object) -> Iterator[str]:
    """Yield the keys of messages that have a value."""
    messages = messages_in(value)
    for message in messages if isinstance(messages, list) else []:
        if isinstance(message, Mapping):
            yield from (str(key) for key, value in message.items() if not is_empty(value))
