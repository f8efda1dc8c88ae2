"""Rows that ask: a prompt, with or without an answer that is known."""

from __future__ import annotations

from collections.abc import Mapping

from hymba_tune.data.formats import Conversation, Names
from hymba_tune.data.messages import Message, kind_of, read_messages, turn
from hymba_tune.errors import DataError

FIELDS = ("prompt", "messages", "system")


def parse_prompt(row: object, names: Names) -> Conversation:
    """What a row asks: its ``prompt`` (a text or messages), or its ``messages`` without an answer at their end.

    Args:
        row: What a reader gave.
        names: The user's names of columns and roles.

    Raises:
        DataError: If it asks nothing; the text leaves the place to the caller.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {kind_of(row)}", expected='an object such as {"prompt": "…"}')
    fields = names.rename(row)
    asked = fields.get("prompt", fields.get("messages"))
    if asked is None:
        raise DataError(
            f"it has neither a prompt nor messages (but {', '.join(map(str, fields))})", fix="--map prompt=COLUMN"
        )
    if isinstance(asked, list):
        messages = read_messages(asked, names.roles)
    else:
        messages = [turn("user", asked, names.column("prompt"))]
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise DataError("it asks nothing", expected="a message from the user")
    system = fields.get("system")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Conversation(tuple(messages))
