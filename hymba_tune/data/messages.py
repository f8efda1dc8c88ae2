"""The messages of a conversation: their roles, contents and loss weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hymba_tune.data.rows import listing
from hymba_tune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
LIKELY_ROLES = {"developer": "system", "function": "tool", "observation": "tool"}
ROLE_PREFIX = "role."
SHOWN_KEYS = frozenset({"role", "content", "from", "value", "tool_calls", "weight"})
"""Keys of a message that have a meaning; the model does not see the others."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: One of `ROLES`.
        content: The text. Tool calls are part of it, in Hymba's notation.
        weight: Loss weight of its tokens if it is an answer, from 0 (no loss) to 1.
    """

    role: str
    content: str
    weight: float = 1.0

    @property
    def learned(self) -> bool:
        """Whether there is loss on it, if it is an answer."""
        return self.weight > 0


def read_messages(items: list[object], roles: Mapping[str, str], where: str = "") -> list[Message]:
    """Read a list of messages of a data file.

    Args:
        items: Objects with ``role`` and ``content``, or with ``from`` and ``value``.
        roles: Maps the user's names of roles to those of `ROLES`.
        where: Name of the list in error messages; it follows the number of a message.

    Raises:
        DataError: At the first message that cannot be used.
    """
    return [read_message(item, f"message {number}{where}", roles) for number, item in enumerate(items, start=1)]


def read_message(item: object, where: str, roles: Mapping[str, str]) -> Message:
    """Read one message.

    Args:
        item: An object with ``role`` and ``content``, or with ``from`` and ``value``.
        where: Name of the message in error messages.
        roles: Maps the user's names of roles to those of `ROLES`.

    Raises:
        DataError: If the message cannot be used.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {kind_of(item)}", expected='an object such as {"role": "user", "content": "…"}')
    keys = ("from", "value") if "from" in item else ("role", "content")
    calls = list(_tool_calls(item, where))
    for key in keys:
        if item.get(key) is None and not (calls and key == keys[1]):
            detail = "it is null" if key in item else f"but {listing(item)}"
            raise DataError(f'{where} has no "{key}" ({detail})', expected=listing(keys))

    role = _role(read_text(item[keys[0]], f"the role of {where}"), where, roles)
    if calls and role != "assistant":
        raise DataError(f"{where} has tool calls, but is from the {role}", expected="tool calls in answers only")

    content = _content(item.get(keys[1]), where)
    text = "\n".join([content, *calls]) if content.strip() else "\n".join(calls)
    return turn(role, text if calls else content, where, _weight(item, role, where))


def turn(role: str, content: object, where: str, weight: float = 1.0) -> Message:
    """Create a message of a known role.

    Raises:
        DataError: If ``content`` is not text, or an answer is empty.
    """
    text = read_text(content, where)
    if role == "assistant" and not text.strip():
        raise DataError(f"{where} is an empty answer", expected="text to train on", fix="write the answer or remove it")
    return Message(role, text, weight)


def read_text(value: object, where: str) -> str:
    """Check that a value is text that UTF-8 can encode, and return it.

    Raises:
        DataError: If it is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} is {kind_of(value)}", expected="text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where} has half a character ({half})", expected="whole surrogate pairs") from None
    return value


def kind_of(value: object) -> str:
    """Name the type of a JSON value in words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def without_nulls(value: Any) -> Any:
    """Remove null values from objects: Arrow gives every object the same keys and fills the missing ones with null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _role(role: str, where: str, roles: Mapping[str, str]) -> str:
    known = {**SHAREGPT_ROLES, **roles}.get(role, role)
    if known in ROLES:
        return known
    raise DataError(
        f'{where} has role "{role}"',
        expected=f"one of: {listing(ROLES)}",
        fix=f"rename the role, or --map {ROLE_PREFIX}{role}={LIKELY_ROLES.get(role, 'assistant')}",
    )


def _content(value: object, where: str) -> str:
    """Text, or a list of parts that are all texts."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return read_text(value, where)
    texts = []
    for number, part in enumerate(value, start=1):
        part_type = part.get("type", "text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part_type != "text":
            what = f'of type "{part_type}"' if part_type else kind_of(part)
            expected = 'parts such as {"type": "text", "text": "…"}'
            raise DataError(f"part {number} of {where} is {what}", expected=expected)
        texts.append(read_text(part.get("text"), f"part {number} of {where}"))
    return "".join(texts)


def _tool_calls(item: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield tool calls in Hymba's notation: ``<toolcall> {"name": …, "arguments": …} </toolcall>``."""
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"the tool calls of {where} are {kind_of(calls)}", expected="a list of calls")
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"a tool call of {where} names no function",
                expected='calls such as {"function": {"name": "add", "arguments": "{}"}}',
            )
        hymba_call = {"name": function["name"], "arguments": _arguments(function.get("arguments"), where)}
        yield f"<toolcall> {json.dumps(hymba_call, ensure_ascii=False)} </toolcall>"


def _arguments(value: object, where: str) -> object:
    if not isinstance(value, str):
        return without_nulls(value) if value is not None else {}
    try:
        return json.loads(value)
    except ValueError:
        raise DataError(f"the arguments of a tool call of {where} are not JSON", expected='such as {"a": 1}') from None


def _weight(item: Mapping[str, Any], role: str, where: str) -> float:
    weight = item.get("weight")
    if weight is None:
        return 1.0
    if not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise DataError(
            f"{where} has weight {weight}",
            expected="a number from 0 (no loss on the answer) to 1 (as without a weight)",
            fix="divide all weights by the largest one",
        )
    if weight and role != "assistant":
        raise DataError(f"{where} has weight {weight}, but is from the {role}", expected="weights on answers only")
    return float(weight) if role == "assistant" else 1.0
