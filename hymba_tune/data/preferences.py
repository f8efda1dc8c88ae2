"""Which answer is better: from rows of preferences in any of the known formats to conversations that can be compared.

The conversations themselves are read by `hymba_tune.data.formats.parse`: a pair is two rows of it that share a prompt.
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
"""Columns in which data sets say how good the answers of a pair are; only whether they are equal counts here."""
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
EXPECTED = "chosen + rejected (with prompt, unless both are whole conversations)"
EXPECTED_JUDGED = "prompt + completion + label, messages + label, or chosen + rejected"
GOOD, BAD = (True, 1, "true", "1"), (False, 0, "false", "0")


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two conversations that differ in their last message, an answer.

    Attributes:
        chosen: With the better answer.
        rejected: With the worse one.
        tie: Whether the row scores both the same.
    """

    chosen: Conversation
    rejected: Conversation
    tie: bool = False


@dataclass(frozen=True, slots=True)
class UnpairedPreference:
    """A conversation whose last message is an answer, and whether it is a good one."""

    conversation: Conversation
    good: bool


class IdenticalPairError(DataError):
    """The answers of a pair are the same."""


def parse_pair(row: object, names: Names | None = None) -> PreferencePair:
    """Recognize a pair by its columns.

    ``chosen`` and ``rejected`` are answers to ``prompt``, as texts or as messages, or whole conversations: lists of
    messages (as in UltraFeedback), or texts with ``Human:`` and ``Assistant:`` before each turn (as in HH-RLHF).

    Args:
        row: What a reader gave.
        names: The user's names of columns and roles.

    Raises:
        IdenticalPairError: If both answers are the same.
        DataError: If it is no pair. The text says what is wrong with it and leaves the place to the caller.
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
            fix="take the row out",
        )
    _check_same_prompt(chosen, rejected)
    tie = any(fields.get(one) is not None and fields.get(one) == fields.get(other) for one, other in SCORES)
    return PreferencePair(chosen, rejected, tie)


def parse_unpaired(row: object, names: Names | None = None) -> list[UnpairedPreference]:
    """Recognize an answer and its label, or a pair, which is one good answer and a bad one.

    The label is true or false, or 1 or 0, of the answer in ``completion``, or of the last one of ``messages``.

    Raises:
        DataError: As `parse_pair`, or if there is no label.
    """
    names = names or Names()
    fields = _fields(row, names)
    if "chosen" in fields and "rejected" in fields:
        pair = parse_pair(row, names)
        return [UnpairedPreference(pair.chosen, True), UnpairedPreference(pair.rejected, False)]
    if "label" not in fields:
        what = f"it has no {names.column('label')} (but {listing(fields)})"
        raise DataError(what, expected=EXPECTED_JUDGED, fix=_other_verb(fields) or "--map label=COLUMN")
    side = "completion" if "completion" in fields else "messages"
    if side not in fields:
        raise DataError(f"it has no {names.column('completion')} (but {listing(fields)})", expected=EXPECTED_JUDGED)
    return [UnpairedPreference(_conversation(fields, side, names), _label(fields["label"], names))]


def _other_verb(fields: Mapping[str, object]) -> str:
    """Which verb such rows are for, if they are for one."""
    if "label" in fields:
        return "hymba-tune kto learns from judged answers"
    answers = {"messages", "conversations", "completion", "output", "text"} & fields.keys()
    return "hymba-tune sft learns from answers that are all good" if answers else ""


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
    """The conversation that ends with the answer in a column."""
    fields = {name: _turns_of_text(value) if name in ("prompt", side) else value for name, value in fields.items()}
    answer, prompt = fields[side], fields.get("prompt")
    if isinstance(answer, list) and (prompt is None or _is_whole(answer)):
        wanted = {"messages": side}
    elif prompt is None:
        raise DataError(f"it has no {names.column('prompt')} (but {listing(fields)})", expected=EXPECTED)
    else:
        wanted = {"prompt": "prompt", "completion": side}
    # `parse` reads it, and speaks of the user's own columns where something is wrong.
    shown = Names({name: names.columns.get(column, column) for name, column in wanted.items()}, names.roles)
    row = {name: fields[name] for name in ("system", "tools", "contexts") if name in fields}
    row |= {shown.columns[name]: fields[column] for name, column in wanted.items()}
    conversation = parse(row, shown)
    assert isinstance(conversation, Conversation)
    if conversation.messages[-1].role != "assistant":
        raise DataError(f"{names.column(side)} does not end with an answer", expected="a last message by the assistant")
    return conversation


def _is_whole(messages: list[object]) -> bool:
    """Whether messages are a conversation rather than the answer that ends one."""
    first = messages[0] if messages else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) not in ("assistant", "gpt")


def _turns_of_text(value: object) -> object:
    """A text with ``Human:`` and ``Assistant:`` before its turns, as messages; anything else as it is."""
    if not isinstance(value, str) or not re.match(r"\s*Human:", value):
        return value
    parts = HH_TURN.split("\n\n" + value.strip())
    turns = [
        {"role": HH_ROLES[role], "content": text.strip()} for role, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()  # a prompt that leaves off where the answer begins
    return turns


def _check_same_prompt(chosen: Conversation, rejected: Conversation) -> None:
    if replace(chosen, messages=chosen.messages[:-1]) == replace(rejected, messages=rejected.messages[:-1]):
        return
    both = zip(chosen.messages, rejected.messages, strict=False)
    first = next((number for number, (one, other) in enumerate(both, start=1) if one != other), 1)
    raise DataError(
        f"its conversations part at message {first}, before their last answers",
        expected="one prompt with two answers",
        fix="cut both after the message where they part",
    )
