"""Parses rows in any of the known formats into one common form."""

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
    """Messages with loss on the answers, and the tools and contexts that Hymba's template can show to the model.

    Attributes:
        messages: The messages; system messages, if any, come first.
        tools: Descriptions of tools, as JSON objects.
        contexts: Passages to answer from.
    """

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text with loss on all of it."""

    text: str


Example = Conversation | Text
Fields = dict[str, object]


@dataclass(frozen=True)
class Names:
    """The user's names of columns and roles that differ from those of the formats.

    Attributes:
        columns: Maps the formats' name of a field to the user's column.
        roles: Maps the user's name of a role to one of `ROLES`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, mapping: Mapping[str, str], fields: Sequence[str] = ()) -> Names:
        """Parse the pairs of ``--map``: ``{"prompt": "question", "role.bot": "assistant"}``.

        Args:
            mapping: The pairs of ``--map``.
            fields: Fields that may be mapped; by default those of `FORMATS`.

        Raises:
            ConfigError: If the formats know no such field or role.
        """
        roles = {key.removeprefix(ROLE_PREFIX): to for key, to in mapping.items() if key.startswith(ROLE_PREFIX)}
        columns = {key: to for key, to in mapping.items() if not key.startswith(ROLE_PREFIX)}
        for key, to in roles.items():
            _check_known(f"--map {ROLE_PREFIX}{key}={to}", to, ROLES)
        known = fields or [*dict.fromkeys(name for form in FORMATS for name in form.fields)]
        for key, to in columns.items():
            _check_known(f"--map {key}={to}", key, known)
        return cls(columns, roles)

    def rename(self, row: Mapping[str, object]) -> Fields:
        """Return the row's fields under the formats' names, without null fields, which tables often have.

        Raises:
            DataError: If the row lacks a mapped column.
        """
        for name, column in self.columns.items():
            if column not in row:
                near = nearest(column, row)
                raise DataError(
                    f'--map {name}={column}: it has no column "{column}"',
                    expected=f"one of: {listing(row)}",
                    fix=f"--map {name}={near}" if near else "",
                )
        mapped = set(self.columns.values())
        fields = {key: value for key, value in row.items() if key not in mapped}
        fields |= {name: row[column] for name, column in self.columns.items()}
        return {key: value for key, value in fields.items() if value is not None}

    def column(self, name: str) -> str:
        """Return the user's name of a field, in quotes."""
        return f'"{self.columns.get(name, name)}"'


def _check_known(flag: str, name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    raise ConfigError(
        f'{flag}: "{name}" is not known.', expected=f"one of: {listing(known)}", fix=did_you_mean(name, known)
    )


def parse(row: object, names: Names | None = None) -> Example:
    """Recognize a row's format by its fields and parse it.

    Args:
        row: The value that a reader returned; must be a mapping.
        names: The user's names of columns and roles.

    Returns:
        The example; the same data gives the same example in every format.

    Raises:
        DataError: If the row matches no format or breaks the rules of its format. The message does not contain the
            place of the row, which the caller knows.
    """
    names = names or Names()
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {kind_of(row)}", expected='an object such as {"prompt": "…", "completion": "…"}')
    fields = names.rename(row)
    form = recognize(fields, names)
    if form.turns is None:
        text = read_text(fields["text"], names.column("text"))
        if not text.strip():
            raise DataError(f"{names.column('text')} is empty", expected="text to train on", fix="remove the row")
        return Text(text)
    return _conversation(form.turns(fields, names), fields, names)


@dataclass(frozen=True)
class Format:
    """A format of rows.

    Attributes:
        name: Name of the format.
        required: Fields that a row of this format has.
        turns: Turns the fields into messages; `None` for plain text.
        optional: Further fields that the format reads.
    """

    name: str
    required: tuple[str, ...]
    turns: Callable[[Fields, Names], list[Message]] | None
    optional: tuple[str, ...] = ("system", "tools", "contexts")

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that the format reads."""
        return self.required + self.optional


def _messages_turns(fields: Fields, names: Names) -> list[Message]:
    return _turns(_from_json(fields["messages"]), "messages", names)


def _sharegpt_turns(fields: Fields, names: Names) -> list[Message]:
    return _turns(_from_json(fields["conversations"]), "conversations", names)


def _prompt_turns(fields: Fields, names: Names) -> list[Message]:
    roles = {"prompt": "user", "completion": "assistant"}
    turns: list[Message] = []
    for name, role in roles.items():
        value = fields[name]
        messages = [turn(role, value, names.column(name))] if isinstance(value, str) else _turns(value, name, names)
        if name == "prompt":
            # Answers inside the prompt are context: no loss on them.
            messages = [replace(message, weight=float(message.role != "assistant")) for message in messages]
        turns += messages
    return turns


def _alpaca_turns(fields: Fields, names: Names) -> list[Message]:
    question = read_text(fields["instruction"], names.column("instruction"))
    context = read_text(fields.get("input", ""), names.column("input"))
    if context.strip():
        question = f"{question}\n\n{context}"
    return [Message("user", question), turn("assistant", fields["output"], names.column("output"))]


# Stanford's Alpaca also has a "text" column, and UltraChat a "prompt" next to its "messages": the fuller format wins.
FORMATS = (
    Format("messages", ("messages",), _messages_turns),
    Format("ShareGPT", ("conversations",), _sharegpt_turns),
    Format("prompt and completion", ("prompt", "completion"), _prompt_turns),
    Format("Alpaca", ("instruction", "output"), _alpaca_turns, ("input", "system", "tools", "contexts")),
    Format("text", ("text",), None, ()),
)


def recognize(fields: Fields, names: Names) -> Format:
    """Recognize the format of a row by its fields.

    Raises:
        DataError: If they match no format.
    """
    mapped = set(names.columns)
    forms = [form for form in FORMATS if mapped <= set(form.fields)] or FORMATS
    for form in forms:
        if fields.keys() >= set(form.required):
            return form

    columns = [names.columns.get(name, name) for name in fields]
    incomplete = next((form.required for form in forms if fields.keys() & set(form.required)), None)
    if incomplete:
        missing = next(name for name in incomplete if name not in fields)
        what = f"it has no {names.column(missing)} (but {listing(columns)})"
    else:
        what = f"its columns match no format ({listing(columns) or 'it has none'})"
    raise DataError(
        what,
        expected="; ".join(" + ".join(form.required) for form in forms),
        fix=_suggested_map(fields),
    )


def _suggested_map(fields: Fields) -> str:
    if {"chosen", "rejected"} <= fields.keys():
        return "hymba-tune dpo trains on pairs of a better and a worse answer"
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
        raise DataError("it has no message from the assistant", expected="an answer to train on", fix="remove the row")
    if not any(message.role == "assistant" and message.learned for message in messages):
        raise DataError("all its answers have weight 0", expected="an answer to train on", fix="remove the row")
    if messages[0].role == "assistant":
        raise DataError("it begins with an answer", expected="a message from the user first", fix="remove the answer")
    return Conversation(
        tuple(messages),
        tuple(_list_of(dict, fields, "tools", names)),
        tuple(_list_of(str, fields, "contexts", names)),
    )


def _turns(value: object, name: str, names: Names) -> list[Message]:
    is_whole = name in ("messages", "conversations")
    if not isinstance(value, list):
        expected = "a list of messages" if is_whole else "text, or a list of messages"
        raise DataError(f"{names.column(name)} is {kind_of(value)}", expected=expected)
    return read_messages(value, names.roles, "" if is_whole else f" of {names.column(name)}")


def _list_of(item_type: type, fields: Fields, name: str, names: Names) -> list[Any]:
    value = _from_json(fields.get(name) or [])
    if not isinstance(value, list) or not all(isinstance(item, item_type) for item in value):
        expected = "a list of objects" if item_type is dict else "a list of texts"
        raise DataError(f"{names.column(name)} is {kind_of(value)}", expected=expected)
    return [without_nulls(item) for item in value]


def _from_json(value: object) -> object:
    """Parse a text as JSON if it is any: tables without nested columns hold lists as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
