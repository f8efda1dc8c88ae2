"""Checks data files: everything that a run would report, and oddities that a run accepts silently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from hymba_tune.config import Learn
from hymba_tune.data.chat import fit
from hymba_tune.data.check_counts import KINDS, OTHERS, Check, FileCheck, general
from hymba_tune.data.checking_pairs import check_pairs, holds_pairs
from hymba_tune.data.duplicates import SeenRows
from hymba_tune.data.encoding import ExampleReading, encoded_batches, readings
from hymba_tune.data.formats import Conversation, Names, recognize
from hymba_tune.data.messages import SHOWN_KEYS
from hymba_tune.data.sources import Source
from hymba_tune.errors import DataError

if TYPE_CHECKING:  # importing transformers imports torch
    from transformers import PreTrainedTokenizerBase

TWO_QUESTIONS = "two messages from the user in a row"
TWO_ANSWERS = "two answers in a row"
NO_ANSWER_LAST = "the last message is not an answer, so it has no loss"
EMPTY_QUESTION = "an empty message from the user"
ODDITIES = {
    TWO_QUESTIONS: "merge them, or insert the missing answer",
    TWO_ANSWERS: "merge them, or insert the missing question",
    NO_ANSWER_LAST: "remove it, or add the answer",
    EMPTY_QUESTION: "fill it in, or remove the row",
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
    for oddity in _oddities(reading):
        check.notes.add(oddity, str(place), ODDITIES[oddity])
    check.hidden.update(_hidden_keys(reading, names, known=check.hidden))
    _count_tokens(reading, check)


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


def _oddities(reading: ExampleReading) -> Iterator[str]:
    """Yield the `ODDITIES` of a row."""
    if not isinstance(reading.example, Conversation):
        return
    messages = reading.example.messages
    roles = [message.role for message in messages]
    if ("user", "user") in pairwise(roles):
        yield TWO_QUESTIONS
    if ("assistant", "assistant") in pairwise(roles):
        yield TWO_ANSWERS
    if roles[-1] != "assistant":
        yield NO_ANSWER_LAST
    if any(message.role == "user" and not message.content.strip() for message in messages):
        yield EMPTY_QUESTION


def _hidden_keys(reading: ExampleReading, names: Names, known: Mapping[str, int]) -> set[str]:
    """Return the columns, and the keys of messages, that have a value which the model does not see."""
    row = reading.row.value
    assert isinstance(row, Mapping)
    fields = names.rename(row)
    form = recognize(fields, names)
    hidden = {str(key) for key, value in fields.items() if value and key not in form.fields}
    for name in form.required:
        messages = fields[name]
        for message in messages if isinstance(messages, list) else []:
            hidden |= {f"{name}[].{key}" for key, value in message.items() if value and key not in SHOWN_KEYS}
    return {key if key in known or len(known) < KINDS else OTHERS for key in hidden}
