"""From a row in any of the known formats to the one form that everything after works on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hymba_tune.data.messages import (
    ROLE_PREFIX,
    ROLES,
    Message,
    kind_of,
    read_messages,
    read_text,
    turn,
    without_nulls,
)
from hymba_tune.data.rows import listing
from hymba_tune.errors import ConfigError, DataError, did_you_mean, nearest

LIKELY_PROMPTS = ("prompt", "question", "instruction", "query", "input", "problem", "user")
LIKELY_ANSWERS = ("completion", "answer", "response", "output", "solution", "target", "assistant")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, the answers among them to be learned, with what Hymba's template can show the model beside them.

    Attributes:
        messages: System messages, if any, come first.
        tools: Descriptions of tools, as JSON objects.
        contexts: Passages to answer from.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it to be learned."""

    text: str


Example = Conversation | Text
Fields = dict[str, object]


@dataclass(frozen=True)
class Names:
    """What a user's columns and roles are called, where that differs from the formats.

    Attributes:
        columns: From the formats' name of a field to the user's column.
        roles: From the user's name of a role to one of `ROLES`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, mapping: Mapping[str, str], fields: Sequence[str] = ()) -> Names:
        """Take ``--map`` apart: ``{"prompt": "question", "role.bot": "assistant"}``.

        Args:
            mapping: As given.
            fields: What columns may be named; those of `FORMATS` if not given.

        Raises:
            ConfigError: If a field or a role is none that the formats know.
        """
        roles = {key.removeprefix(ROLE_PREFIX): to for key, to in mapping.items() if key.startswith(ROLE_PREFIX)}
        columns = {key: to for key, to in mapping.items() if not key.startswith(ROLE_PREFIX)}
        for key, to in roles.items():
            _known(f"--map {ROLE_PREFIX}{key}={to}", to, ROLES)
        for key, to in columns.items():
            _known(f"--map {key}={to}", key, fields or [*dict.fromkeys(n for form in FORMATS for n in form.fields)])
        return cls(columns, roles)

    def rename(self, row: Mapping[str, object]) -> Fields:
        """The row under the formats' names; null fields, which tables are full of, count as absent."""
        for name, column in self.columns.items():
            if column not in row:
                near = nearest(column, row)
                raise DataError(
                    f"--map {name}={column} names no column",
                    expected=f"one of: {listing(row)}",
                    fix=f"--map {name}={near}" if near else "",
                )
        taken = set(self.columns.values())
        fields = {key: value for key, value in row.items() if key not in taken}
        fields |= {name: row[column] for name, column in self.columns.items()}
        return {key: value for key, value in fields.items() if value is not None}

    def column(self, name: str) -> str:
        """What the user calls a field, in quotes."""
        return f'"{self.columns.get(name, name)}"'


def _known(flag: str, name: str, names: Sequence[str]) -> None:
    if name in names:
        return
    raise ConfigError(
        f'{flag}: "{name}" is not known.', expected=f"one of: {listing(names)}", fix=did_you_mean(name, names)
    )


def parse(row: object, names: Names | None = None) -> Example:
    """Recognize a row's format by its fields and bring it to the common form.

    Args:
        row: What a reader gave; anything but an object is an error.
        names: The user's names of columns and roles.

    Returns:
        The same example for the same data, whichever format it came in.

    Raises:
        DataError: If the row fits no format or breaks the rules of its own. The text says what is wrong with it and
            leaves the place to the caller.
    """
    names = names or Names()
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {kind_of(row)}", expected='an object such as {"prompt": "…", "completion": "…"}')
    fields = names.rename(row)
    form = recognize(fields, names)
    if form.turns is None:
        text = read_text(fields["text"], names.column("text"))
        if not text.strip():
            raise DataError(f"{names.column('text')} is empty", expected="text to learn", fix="take the row out")
        return Text(text)
    return _conversation(form.turns(fields, names), fields, names)


@dataclass(frozen=True)
class Format:
    """What a format is called, which fields make it, and how they become messages (`None`: they are plain text)."""

    name: str
    required: tuple[str, ...]
    turns: Callable[[Fields, Names], list[Message]] | None
    optional: tuple[str, ...] = ("system", "tools", "contexts")

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field that it reads."""
        return self.required + self.optional


def _messages_turns(fields: Fields, names: Names) -> list[Message]:
    return _turns(_from_json(fields["messages"]), "messages", names)


def _sharegpt_turns(fields: Fields, names: Names) -> list[Message]:
    return _turns(_from_json(fields["conversations"]), "conversations", names)


def _prompt_turns(fields: Fields, names: Names) -> list[Message]:
    sides = {"prompt": "user", "completion": "assistant"}
    turns: list[Message] = []
    for name, role in sides.items():
        side = fields[name]
        said = [turn(role, side, names.column(name))] if isinstance(side, str) else _turns(side, name, names)
        # An answer that stands in the prompt is there to be read.
        turns += said if name == "completion" else [replace(m, weight=float(m.role != "assistant")) for m in said]
    return turns


def _alpaca_turns(fields: Fields, names: Names) -> list[Message]:
    question = read_text(fields["instruction"], names.column("instruction"))
    context = read_text(fields.get("input", ""), names.column("input"))
    if context.strip():
        question = f"{question}\n\n{context}"
    return [Message("user", question), turn("assistant", fields["output"], names.column("output"))]


# Stanford's Alpaca also has a "text" column, and UltraChat a "prompt" beside its "messages": the fuller format wins.
FORMATS = (
    Format("messages", ("messages",), _messages_turns),
    Format("ShareGPT", ("conversations",), _sharegpt_turns),
    Format("prompt and completion", ("prompt", "completion"), _prompt_turns),
    Format("Alpaca", ("instruction", "output"), _alpaca_turns, ("input", "system", "tools", "contexts")),
    Format("text", ("text",), None, ()),
)


def recognize(fields: Fields, names: Names) -> Format:
    """The format that a row's fields make.

    Raises:
        DataError: If they make none.
    """
    mapped = set(names.columns)
    forms = [form for form in FORMATS if mapped <= set(form.fields)] or FORMATS
    for form in forms:
        if fields.keys() >= set(form.required):
            return form
    columns = [names.columns.get(name, name) for name in fields]
    begun = next((form.required for form in forms if fields.keys() & set(form.required)), None)
    if begun:
        missing = next(name for name in begun if name not in fields)
        what = f"it has no {names.column(missing)} (but {listing(columns)})"
    else:
        what = f"its columns fit no format ({listing(columns) or 'it has none'})"
    raise DataError(
        what,
        expected="; ".join(" + ".join(form.required) for form in forms),
        fix=_suggested_map(fields),
    )


def _suggested_map(fields: Fields) -> str:
    if {"chosen", "rejected"} <= fields.keys():
        return "hymba-tune dpo learns from pairs of a better and a worse answer"
    lists = [
        name for name, value in fields.items() if isinstance(value, list) and isinstance(next(iter(value), None), dict)
    ]
    if lists:
        return f"--map messages={lists[0]}"
    prompt = next((name for name in LIKELY_PROMPTS if name in fields), None)
    answer = next((name for name in LIKELY_ANSWERS if name in fields and name != prompt), None)
    if len(fields) == 1 and not prompt:
        return f"--map text={next(iter(fields))}"
    flags = {"prompt": prompt or "COLUMN", "completion": answer or "COLUMN"}
    return " ".join(f"--map {name}={column}" for name, column in flags.items() if name != column)


def _conversation(messages: list[Message], fields: Fields, names: Names) -> Conversation:
    body = next((index for index, message in enumerate(messages) if message.role != "system"), len(messages))
    for number, message in enumerate(messages[body:], start=body + 1):
        if message.role == "system":
            raise DataError(f"message {number} is a system message after others", expected="system messages first")
    system = read_text(fields.get("system", ""), names.column("system"))
    if system.strip() and body == 0:
        messages = [Message("system", system), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise DataError("it has no message from the assistant", expected="an answer to learn", fix="take the row out")
    if not any(message.role == "assistant" and message.learned for message in messages):
        raise DataError("none of its answers is learned", expected="one without weight 0", fix="take the row out")
    if messages[0].role == "assistant":
        raise DataError("it begins with an answer", expected="a message from the user first", fix="take the answer out")
    return Conversation(
        tuple(messages),
        tuple(_list_of(dict, fields, "tools", names)),
        tuple(_list_of(str, fields, "contexts", names)),
    )


def _turns(value: object, name: str, names: Names) -> list[Message]:
    alone = name in ("messages", "conversations")
    if not isinstance(value, list):
        expected = "a list of messages" if alone else "text, or a list of messages"
        raise DataError(f"{names.column(name)} is {kind_of(value)}", expected=expected)
    return read_messages(value, names.roles, "" if alone else f" of {names.column(name)}")


def _list_of(item_type: type, fields: Fields, name: str, names: Names) -> list[Any]:
    value = _from_json(fields.get(name) or [])
    if not isinstance(value, list) or not all(isinstance(item, item_type) for item in value):
        expected = "a list of objects" if item_type is dict else "a list of texts"
        raise DataError(f"{names.column(name)} is {kind_of(value)}", expected=expected)
    return [without_nulls(item) for item in value]


def _from_json(value: object) -> object:
    """Tables without nested columns carry lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
