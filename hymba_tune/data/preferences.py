"""Parses rows of preferences in any of the known formats into pairs of conversations, or conversations with a label.

`hymba_tune.data.formats.parse` reads the conversations themselves: a pair is parsed as two rows with the same prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hymba_tune.data.formats import Conversation, Names, parse
from hymba_tune.data.messages import kind_of
from hymba_tune.data.rows import listing
from hymba_tune.errors import DataError

FIELDS = ("prompt", "chosen", "rejected", "completion", "messages", "label", "system", "tools", "contexts")
"""Columns that these formats read."""
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns with the scores of the two answers of a pair; only their equality is used."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
EXPECTED = "chosen + rejected (with prompt, unless both are whole conversations)"
EXPECTED_UNPAIRED = "prompt + completion + label, messages + label, or chosen + rejected"
GOOD = (True, 1, "true", "1")
BAD = (False, 0, "false", "0")


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
    """The answers of a pair are the same."""


def parse_pair(row: object, names: Names | None = None) -> PreferencePair:
    """Recognize a pair by its columns.

    ``chosen`` and ``rejected`` are answers to ``prompt``, as texts or as messages, or whole conversations: lists of
    messages (as in UltraFeedback), or texts with ``Human:`` and ``Assistant:`` before each turn (as in HH-RLHF).

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
            raise DataError(what, expected=EXPECTED, fix=_other_verb(fields) or f"--map {side}=COLUMN")

    chosen, rejected = (_conversation(fields, side, names) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise IdenticalPairError(
            f"{names.column('chosen')} and {names.column('rejected')} are the same",
            expected="two different answers",
            fix="remove the row",
        )
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
        what = f"it has no {names.column('label')} (but {listing(fields)})"
        raise DataError(what, expected=EXPECTED_UNPAIRED, fix=_other_verb(fields) or "--map label=COLUMN")
    side = "completion" if "completion" in fields else "messages"
    if side not in fields:
        raise DataError(f"it has no {names.column('completion')} (but {listing(fields)})", expected=EXPECTED_UNPAIRED)
    return [UnpairedPreference(_conversation(fields, side, names), _label(fields["label"], names))]


def _other_verb(fields: Mapping[str, object]) -> str:
    """Name the verb that trains on rows with these fields; empty if none does."""
    if "label" in fields:
        return "hymba-tune kto trains on single answers with labels"
    answers = {"messages", "conversations", "completion", "output", "text"} & fields.keys()
    return "hymba-tune sft trains on answers that are all good" if answers else ""


def _fields(row: object, names: Names) -> dict[str, object]:
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {kind_of(row)}", expected=f"an object with {EXPECTED}")
    return names.rename(row)


def _label(value: object, names: Names) -> bool:
    value = value.strip().lower() if isinstance(value, str) else value
    if value not in (*GOOD, *BAD):
        raise DataError(f"{names.column('label')} is {value!r}", expected="true or false (or 1 or 0)")
    return value in GOOD


def _conversation(fields: dict[str, object], side: str, names: Names) -> Conversation:
    """Parse the conversation that ends with the answer in the column ``side``."""
    fields = {name: _turns_of_text(value) if name in ("prompt", side) else value for name, value in fields.items()}
    answer = fields[side]
    prompt = fields.get("prompt")
    if isinstance(answer, list) and (prompt is None or _is_whole(answer)):
        columns = {"messages": side}
    elif prompt is None:
        raise DataError(f"it has no {names.column('prompt')} (but {listing(fields)})", expected=EXPECTED)
    else:
        columns = {"prompt": "prompt", "completion": side}

    # With the user's own columns in the row and its names, the errors of `parse` name them.
    user_names = Names({name: names.columns.get(column, column) for name, column in columns.items()}, names.roles)
    row = {name: fields[name] for name in ("system", "tools", "contexts") if name in fields}
    row |= {user_names.columns[name]: fields[column] for name, column in columns.items()}
    conversation = parse(row, user_names)
    assert isinstance(conversation, Conversation)
    if conversation.messages[-1].role != "assistant":
        raise DataError(f"{names.column(side)} does not end with an answer", expected="a last message by the assistant")
    return conversation


def _is_whole(messages: list[object]) -> bool:
    """Return whether messages are a whole conversation rather than only its answer."""
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt")


def _turns_of_text(value: object) -> object:
    """Turn a text with ``Human:`` and ``Assistant:`` before its turns into messages; keep any other value."""
    if not isinstance(value, str) or not re.match(r"\s*Human:", value):
        return value
    parts = HH_TURN.split("\n\n" + value.strip())
    turns = [
        {"role": HH_ROLES[role], "content": text.strip()} for role, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()  # a prompt that ends where the answer begins
    return turns


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
