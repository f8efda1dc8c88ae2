"""Parses rows of preferences in any of the known formats into pairs of conversations, or conversations with a label.

`hymba_tune.data.formats.parse` reads the conversations themselves: a pair is parsed as two rows with the same prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hymba_tune.data.formats import (
    EXTRAS,
    FORMATS,
    KTO,
    LIKELY_LABELS,
    LIKELY_PROMPTS,
    SCORES,
    Conversation,
    Names,
    is_good,
    judgment_column,
    map_flags,
    messages_in,
    parse,
    suggested_map,
)
from hymba_tune.data.messages import MEDIA, known_role
from hymba_tune.data.rows import listing
from hymba_tune.data.values import kind_of, shown
from hymba_tune.errors import DataError

PROMPTS = ("prompt", "messages", "conversations", "instruction")
"""Columns that hold the prompt of a pair; the first that a row has counts."""
FIELDS = (
    *("prompt", "chosen", "rejected", "completion", "messages", "label", "conversations", "instruction", "output"),
    *("input", "history", *EXTRAS),
)
"""Columns that these formats read."""
JUDGED = {*LIKELY_LABELS, "score", "rating", "reward", "rank", "feedback", "vote", "votes", "quality"}
"""Columns whose presence says that answers may be bad."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
EXPECTED = "chosen + rejected (with prompt, unless both are whole conversations)"
EXPECTED_UNPAIRED = "prompt + completion + label, messages + label, or chosen + rejected"


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two conversations that differ in their last message, an answer.

    Attributes:
        chosen: The conversation with the better answer.
        rejected: The conversation with the worse answer.
        tie: Whether the row has the same score for both answers.
    """

    chosen: Conversation
    rejected: Conversation
    tie: bool = False


@dataclass(frozen=True, slots=True)
class UnpairedPreference:
    """A conversation that ends with an answer, and a label.

    Attributes:
        conversation: The conversation.
        good: Whether the answer is labeled good.
    """

    conversation: Conversation
    good: bool


class IdenticalPairError(DataError):
    """The answers of a pair are the same.

    Args:
        answers: The two answers, by the names of their columns.
    """

    def __init__(self, answers: str = "its two answers, as the model reads them,") -> None:
        super().__init__(f"{answers} are the same", expected="two different answers", fix="remove the row")


def parse_pair(row: object, names: Names | None = None) -> PreferencePair:
    """Recognize a pair by its columns.

    ``chosen`` and ``rejected`` are answers to ``prompt`` (or to ``messages``, ``conversations`` or ``instruction``), as
    texts, as a message or as messages; or whole conversations: lists of messages (as in UltraFeedback), objects with
    ``messages`` (as in LMFlow), or texts with ``Human:`` and ``Assistant:`` before each turn (as in HH-RLHF).

    Args:
        row: The value that a reader returned.
        names: The user's names of columns and roles.

    Raises:
        IdenticalPairError: If both answers are the same.
        DataError: If it is not a pair. The message does not contain the place of the row, which the caller knows.
    """
    names = names or Names()
    fields = _fields(row, names)
    for side in ("chosen", "rejected"):
        if side not in fields:
            what = f"it has no {names.column(side)} (but {listing(fields)})"
            raise DataError(what, expected=EXPECTED, fix=_other_verb(row, fields) or f"--map {side}=COLUMN")

    chosen, rejected = (_conversation(fields, side, names) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise IdenticalPairError(f"{names.column('chosen')} and {names.column('rejected')}")
    _check_same_prompt(chosen, rejected)

    tie = any(fields.get(one) is not None and fields.get(one) == fields.get(other) for one, other in SCORES)
    return PreferencePair(chosen, rejected, tie)


def parse_unpaired(row: object, names: Names | None = None) -> list[UnpairedPreference]:
    """Recognize an answer with a label, or a pair, which counts as a good and a bad answer.

    The label is true or false, or 1 or 0. It belongs to the answer in ``completion``, or to the last of ``messages``.

    Args:
        row: The value that a reader returned.
        names: The user's names of columns and roles.

    Raises:
        DataError: If the row is neither. The message does not contain the place of the row, which the caller knows.
    """
    names = names or Names()
    fields = _fields(row, names)
    if "chosen" in fields and "rejected" in fields:
        pair = parse_pair(row, names)
        return [UnpairedPreference(pair.chosen, True), UnpairedPreference(pair.rejected, False)]

    if "label" not in fields:
        raise _without_label(row, fields, names)
    form = next((form for form in FORMATS if fields.keys() >= {*form.required}), None)
    if form is None or form.turns is None:
        what = f"it has no {names.column('completion')} (but {listing(fields)})"
        raise DataError(what, expected=EXPECTED_UNPAIRED, fix=suggested_map(fields))
    columns = {name: name for name in form.fields if name in fields}
    return [UnpairedPreference(_parse(fields, columns, names), _label(fields["label"], names))]


def _without_label(row: object, fields: dict[str, object], names: Names) -> DataError:
    """Build the error of a row without a label, or with a null one."""
    if isinstance(row, Mapping) and names.columns.get("label", "label") in row:
        what, fix = f"{names.column('label')} is null", "fill it in, or remove the row"
        return DataError(what, expected="true or false (or 1 or 0)", fix=fix)
    column = judgment_column(fields)
    fix = map_flags({"label": column}) if column else _other_verb(row, fields) or "--map label=COLUMN"
    return DataError(f"it has no {names.column('label')} (but {listing(fields)})", expected=EXPECTED_UNPAIRED, fix=fix)


def _other_verb(row: object, fields: Mapping[str, object]) -> str:
    """Name the verb that trains on rows with these fields; empty if that is not sure."""
    if column := judgment_column(fields):
        return KTO if column == "label" else f"{KTO}, here with {map_flags({'label': column})}"
    has_answer = any(fields.keys() >= {*form.required} for form in FORMATS)
    is_judged = isinstance(row, Mapping) and not JUDGED.isdisjoint(row)
    return "hymba-tune sft trains on answers that are all good" if has_answer and not is_judged else ""


def _fields(row: object, names: Names) -> dict[str, object]:
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {kind_of(row)}", expected=f"an object with {EXPECTED}")
    return names.rename(row)


def _label(value: object, names: Names) -> bool:
    good = is_good(value)
    if good is None:
        raise DataError(f"{names.column('label')} is {shown(repr(value))}", expected="true or false (or 1 or 0)")
    return good


def _conversation(fields: Mapping[str, object], side: str, names: Names) -> Conversation:
    """Parse the conversation that ends with the answer in the column ``side``."""
    own = fields[side]
    if isinstance(own, Mapping) and "messages" in own:  # each of LMFlow's answers has its system message and tools
        return _parse(own, {name: name for name in ("messages", *EXTRAS) if name in own}, Names(roles=names.roles))
    answer = messages_in(_turns_of_text(fields[side]))
    if isinstance(answer, list) and _ends_empty(answer):
        raise DataError(f"{names.column(side)} is an empty answer", expected="text to train on", fix="remove the row")

    prompt = next((name for name in PROMPTS if name in fields), None)
    if isinstance(answer, list) and (prompt is None or _is_whole(answer, names)):
        columns = {"messages": side}
    elif prompt is None:
        likely = next((name for name in LIKELY_PROMPTS if isinstance(fields.get(name), str)), "COLUMN")
        what = f"it has no {names.column('prompt')} (but {listing(fields)})"
        raise DataError(what, expected=EXPECTED, fix=f"--map prompt={likely}")
    elif prompt == "instruction":
        columns = {"instruction": "instruction", "input": "input", "output": side}
    else:
        columns = {"prompt": prompt, "completion": side}
        if prompt != "prompt":
            _check_prompt(fields[prompt], names.column(prompt), names)
    columns |= {name: name for name in (EXTRAS if "messages" in columns else ("history", *EXTRAS))}
    return _parse(fields, {name: column for name, column in columns.items() if column in fields}, names)


def _parse(fields: Mapping[str, object], columns: Mapping[str, str], names: Names) -> Conversation:
    """Parse a row as a conversation that ends with an answer.

    Args:
        fields: The row's fields.
        columns: Maps the names of a format's fields to names in ``fields``.
        names: The user's names, so that errors name the user's own columns.
    """
    row: dict[str, object] = {name: fields[name] for name in MEDIA if name in fields}
    user_columns = {name: names.columns.get(column, column) for name, column in columns.items()}
    for name, column in columns.items():
        turns = _turns_of_text(fields[column])
        if name == "prompt" and isinstance(turns, list) and _ends_empty(turns):
            turns = turns[:-1]  # a prompt that ends where the answer begins
        row[user_columns[name]] = turns
    conversation = parse(row, Names(user_columns, names.roles))
    assert isinstance(conversation, Conversation)
    if conversation.messages[-1].role != "assistant":
        answer = next(name for name in ("messages", "conversations", "completion", "output") if name in columns)
        what = f'"{user_columns[answer]}" does not end with an answer'
        raise DataError(what, expected="a last message by the assistant")
    return conversation


def _is_whole(messages: list[object], names: Names) -> bool:
    """Return whether messages are a whole conversation rather than only its answer."""
    return any(_role_of(message, names) in ("system", "user") for message in messages)


def _check_prompt(value: object, column: str, names: Names) -> None:
    """Check that a conversation is only a prompt, whose answers are in other columns."""
    messages = messages_in(value)
    if isinstance(messages, list) and messages and _role_of(messages[-1], names) == "assistant":
        raise DataError(
            f"{column} ends with an answer, as if there were a third one",
            expected="the messages before the two answers",
            fix="remove its last message",
        )


def _role_of(message: object, names: Names) -> str:
    role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    return known_role(role, names.roles) if isinstance(role, str) else ""


def _turns_of_text(value: object) -> object:
    """Turn a text with ``Human:`` and ``Assistant:`` before its turns into messages; keep any other value."""
    if not isinstance(value, str) or not re.match(r"\s*Human:", value):
        return value
    parts = HH_TURN.split("\n\n" + value.strip())
    return [
        {"role": HH_ROLES[role], "content": text.strip()} for role, text in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _ends_empty(messages: list[object]) -> bool:
    return messages[-1:] == [{"role": "assistant", "content": ""}]


def _check_same_prompt(chosen: Conversation, rejected: Conversation) -> None:
    if replace(chosen, messages=chosen.messages[:-1]) == replace(rejected, messages=rejected.messages[:-1]):
        return
    both = zip(chosen.messages, rejected.messages, strict=False)
    first = next((number for number, (one, other) in enumerate(both, start=1) if one != other), 1)
    raise DataError(
        f"its conversations differ from message {first} on, before their last answers",
        expected="one prompt with two answers",
        fix="cut both after the first message that differs",
    )
