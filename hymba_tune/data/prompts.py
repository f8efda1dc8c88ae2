"""Parses rows with a prompt, with or without a reference answer."""

from __future__ import annotations

from collections.abc import Mapping

from hymba_tune.data.formats import Conversation, Names, messages_in
from hymba_tune.data.messages import Message, read_messages, turn, with_context_first
from hymba_tune.data.values import kind_of
from hymba_tune.errors import DataError

FIELDS = ("prompt", "messages", "conversations", "system")


def parse_prompt(row: object, names: Names) -> Conversation:
    """Parse the prompt of a row: its ``prompt`` (a text or messages), or its ``messages`` without final answers.

    Args:
        row: The value that a reader returned.
        names: The user's names of columns and roles.

    Raises:
        DataError: If it has no prompt. The message does not contain the place of the row, which the caller knows.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"the row is {kind_of(row)}", expected='an object such as {"prompt": "…"}')
    fields = names.rename(row)
    prompt = messages_in(next((fields[name] for name in FIELDS[:3] if name in fields), None))
    if prompt is None:
        raise DataError(
            f"it has neither a prompt nor messages (but {', '.join(map(str, fields))})", fix="--map prompt=COLUMN"
        )
    if isinstance(prompt, list):
        messages = read_messages(prompt, names.roles)
    else:
        messages = [turn("user", prompt, names.column("prompt"))]

    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise DataError("it has no message from the user with text", expected="a question or an instruction")

    system = fields.get("system")
    if isinstance(system, str) and system.strip() and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return Conversation(tuple(with_context_first(messages)))
