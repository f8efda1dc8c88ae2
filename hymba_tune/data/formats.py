"""Parses rows in any of the known formats into one common form."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hymba_tune.data.messages import (
    MEDIA,
    ROLE_PREFIX,
    ROLES,
    Message,
    holds_messages,
    read_messages,
    turn,
    with_context_first,
)
from hymba_tune.data.rows import listing
from hymba_tune.data.values import is_empty, kind_of, parse_written, read_text, without_nulls
from hymba_tune.errors import ConfigError, DataError, did_you_mean, nearest

LIKELY_PROMPTS = ("prompt", "question", "instruction", "query", "input", "problem")
LIKELY_ANSWERS = ("completion", "answer", "response", "output", "solution", "target")
LIKELY_SYSTEMS = ("system_prompt", "system_message")
LIKELY_CONTEXTS = ("context", "passage", "paragraph", "document")
LIKELY_TEXTS = ("content", "body", "article", "document", "passage", "story", "page", "raw_content")
LIKELY_LABELS = ("label", "kto_tag")
"""Columns that judge an answer, if they hold true or false."""
KTO = "hymba-tune kto trains on single answers with labels"
JUDGMENTS = (True, False, 1, 0, "true", "false", "1", "0")
PAIR = ("chosen", "rejected")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns with the scores of the two answers of a pair; only their equality is used."""
MEDIA_MARKS = ("<image>", "<video>", "<audio>")


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
        _check_media(fields, [text])
        return Text(text)
    conversation = _conversation(form.turns(fields, names), fields, names)
    _check_media(fields, (message.content for message in conversation.messages))
    return conversation


EXTRAS = ("system", "tools", "functions", "contexts")
"""Columns that every format of conversations reads; ``functions`` is an older name of ``tools``."""


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
    optional: tuple[str, ...] = EXTRAS

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields that the format reads."""
        return self.required + self.optional


def _messages_turns(fields: Fields, names: Names) -> list[Message]:
    return _turns(fields["messages"], "messages", names)


def _sharegpt_turns(fields: Fields, names: Names) -> list[Message]:
    return _turns(fields["conversations"], "conversations", names)


def _prompt_turns(fields: Fields, names: Names) -> list[Message]:
    roles = {"prompt": "user", "completion": "assistant"}
    turns: list[Message] = []
    for name, role in roles.items():
        value = messages_in(fields[name])
        messages = [turn(role, value, names.column(name))] if isinstance(value, str) else _turns(value, name, names)
        if name == "prompt":
            # Answers inside the prompt are context: no loss on them.
            messages = [replace(message, weight=float(message.role != "assistant")) for message in messages]
        turns += messages
    return [*_history(fields, names), *turns]


def _alpaca_turns(fields: Fields, names: Names) -> list[Message]:
    question = read_text(fields["instruction"], names.column("instruction"))
    context = read_text(fields.get("input", ""), names.column("input"))
    if context.strip():
        question = f"{question}\n\n{context}"
    answer = turn("assistant", fields["output"], names.column("output"))
    return [*_history(fields, names), Message("user", question), answer]


def _history(fields: Fields, names: Names) -> Iterator[Message]:
    """Yield the earlier turns of Alpaca's ``history``: pairs of a question and an answer."""
    value = _written(fields.get("history"))
    if is_empty(value):
        return
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        what = f"{names.column('history')} is {kind_of(value)}, but not one of pairs"
        raise DataError(what, expected='a list such as [["question", "answer"]]')
    for number, (question, answer) in enumerate(value, start=1):
        where = f"pair {number} of {names.column('history')}"
        yield turn("user", question, where)
        yield turn("assistant", answer, where)


# Stanford's Alpaca also has a "text" column, and UltraChat a "prompt" next to its "messages": the fuller format wins.
FORMATS = (
    Format("messages", ("messages",), _messages_turns),
    Format("ShareGPT", ("conversations",), _sharegpt_turns),
    Format("prompt and completion", ("prompt", "completion"), _prompt_turns, ("history", *EXTRAS)),
    Format("Alpaca", ("instruction", "output"), _alpaca_turns, ("input", "history", *EXTRAS)),
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
        fix=_suggestion(fields),
    )


def judgment_column(fields: Mapping[str, object]) -> str:
    """Return the column that says whether a row's answer is good or bad; empty if there is none."""
    return next((name for name in LIKELY_LABELS if name in fields and is_good(fields[name]) is not None), "")


def is_good(value: object) -> bool | None:
    """Return whether a label says that an answer is good; `None` if it says neither."""
    plain = value.strip().lower() if isinstance(value, str) else value
    return plain in (True, 1, "true", "1") if plain in JUDGMENTS else None


def has_format(columns: Collection[str]) -> bool:
    """Return whether a row with these columns has a known format."""
    return any({*required} <= {*columns} for required in (*(form.required for form in FORMATS), PAIR))


def needed_columns(names: Names, columns: Sequence[str]) -> Collection[str]:
    """Return the columns of a table that matter to a row of any format; all of them if their format is unknown."""
    known = {
        *PAIR,
        *MEDIA,
        *LIKELY_LABELS,
        *(name for form in FORMATS for name in form.fields),
        *(name for pair in SCORES for name in pair),
    }
    needed = {*known.intersection(columns), *names.columns.values()}
    return needed if has_format({*needed, *names.columns}) else columns


def _suggestion(fields: Fields) -> str:
    """Propose what to do with a row that matches no format; an answer that may be bad is not proposed to `sft`."""
    if {*PAIR} <= fields.keys():
        return "hymba-tune dpo trains on pairs of a better and a worse answer"
    if column := judgment_column(fields):
        return f"{KTO}, here with {suggested_map(fields)} {map_flags({'label': column})}".rstrip()
    return suggested_map(fields, plain=True)


def suggested_map(fields: Mapping[str, object], *, plain: bool = False) -> str:
    """Propose names for a row's columns, as far as their names and values leave no doubt.

    Args:
        fields: The row's fields.
        plain: Whether the row may be plain text.
    """
    lists = [name for name, value in fields.items() if holds_messages(_written(value))]
    if len(lists) == 1:
        return map_flags({"messages": lists[0]})

    texts = [name for name, value in fields.items() if isinstance(value, str) and value.strip()]
    prompt = next((name for name in LIKELY_PROMPTS if name in texts), None)
    answer = next((name for name in LIKELY_ANSWERS if name in texts and name != prompt), None)
    context = next((name for name in LIKELY_CONTEXTS if name in texts), None)
    system = next((name for name in LIKELY_SYSTEMS if name in texts and "system" not in fields), "system")
    if prompt and answer and context:  # the one format that shows a context after the question
        return map_flags({"system": system, "instruction": prompt, "input": context, "output": answer})
    if plain and not prompt and not answer and len(texts) == 1 and texts[0] in LIKELY_TEXTS:
        return map_flags({"text": texts[0]})
    return map_flags({"system": system, "prompt": prompt or "COLUMN", "completion": answer or "COLUMN"})


def map_flags(columns: Mapping[str, str]) -> str:
    """Return the flags of ``--map`` that name these columns, quoted for the shell; none for those with equal names."""
    return " ".join(shlex.join(["--map", f"{name}={column}"]) for name, column in columns.items() if name != column)


def _check_media(fields: Fields, texts: Iterable[str]) -> None:
    """Refuse a row whose text refers to an image, a video or a sound in another column."""
    column = next((name for name in MEDIA if not is_empty(fields.get(name))), None)
    if column and any(mark in text for text in texts for mark in MEDIA_MARKS):
        raise DataError(
            f'its text refers to "{column}", which the model cannot see',
            expected="text only",
            fix="remove the row",
        )


def _conversation(messages: list[Message], fields: Fields, names: Names) -> Conversation:
    system = read_text(fields.get("system", ""), names.column("system"))
    if system.strip() and (not messages or messages[0].role != "system"):
        messages = [Message("system", system), *messages]
    if not any(message.role == "assistant" for message in messages):
        raise DataError(
            "it has no message from the assistant",
            expected="an answer to train on",
            fix="remove the row, or let a teacher answer it: hymba-tune distill --loss seq auto",
        )
    if not _has_learned(messages):
        raise DataError("all its answers have weight 0", expected="an answer to train on", fix="remove the row")
    messages = with_context_first(messages)
    if not _has_learned(messages):
        what = "it has no answer to train on after its first question"
        raise DataError(what, expected="an answer to a question", fix="remove the row")
    return Conversation(
        tuple(messages),
        tuple(_list_of(dict, fields, "tools" if "tools" in fields else "functions", names)),
        tuple(_list_of(str, fields, "contexts", names)),
    )


def _has_learned(messages: Sequence[Message]) -> bool:
    return any(message.role == "assistant" and message.learned for message in messages)


def _turns(value: object, name: str, names: Names) -> list[Message]:
    is_whole = name in ("messages", "conversations")
    value = _written(value)
    if not isinstance(value, list):
        expected = "a list of messages" if is_whole else "text, or a list of messages"
        raise DataError(f"{names.column(name)} is {kind_of(value)}", expected=expected)
    return read_messages(value, names.roles, "" if is_whole else f" of {names.column(name)}")


def messages_in(value: object) -> object:
    """Return the messages that a value holds: one object, or a list written as text. Else the value itself."""
    value = [value] if isinstance(value, Mapping) else value
    written = _written(value)
    return written if holds_messages(written) else value


def _list_of(item_type: type, fields: Fields, name: str, names: Names) -> list[Any]:
    value = _written(fields.get(name) or [])
    if isinstance(value, list):
        value = [item for item in value if item != ""]  # LMFlow's way to write that there is none
    if not isinstance(value, list) or not all(isinstance(item, item_type) for item in value):
        expected = "a list of objects" if item_type is dict else "a list of texts"
        raise DataError(f"{names.column(name)} is {kind_of(value)}", expected=expected)
    return [without_nulls(item) for item in value]


def _written(value: object) -> object:
    """Return the list or object that a text holds; any other value as it is."""
    return parse_written(value) if isinstance(value, str) else value
