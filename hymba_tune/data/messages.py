"""One message of a conversation: its role, what it says, and whether it is learned."""

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
"""What a message may hold that has a meaning here; the model is not shown the rest."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: One of `ROLES`.
        content: What is said. Calls of tools are written out in it, as Hymba writes them.
        weight: How much each of its tokens counts in the loss, if it is an answer: from 0, only read, to 1.
    """

    role: str
    content: str
    weight: float = 1.0

    @property
    def learned(self) -> bool:
        """Whether it is learned at all, if it is an answer."""
        return self.weight > 0


def read_messages(items: list[object], roles: Mapping[str, str], where: str = "") -> list[Message]:
    """A list of messages as data files hold it.

    Args:
        items: Objects with ``role`` and ``content``, or with ``from`` and ``value``.
        roles: From a user's names of roles to those of `ROLES`.
        where: What the list is called in messages, after the number of a message.

    Raises:
        DataError: At the first message that cannot be used.
    """
    return [read_message(item, f"message {number}{where}", roles) for number, item in enumerate(items, start=1)]


def read_message(item: object, where: str, roles: Mapping[str, str]) -> Message:
    """One of them.

    Raises:
        DataError: If it cannot be used.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is {kind_of(item)}", expected='an object such as {"role": "user", "content": "…"}')
    keys = ("from", "value") if "from" in item else ("role", "content")
    calls = list(_tool_calls(item, where))
    for key in keys:
        if item.get(key) is None and not (calls and key == keys[1]):
            aside = "it is null" if key in item else f"but {listing(item)}"
            raise DataError(f'{where} has no "{key}" ({aside})', expected=listing(keys))
    role = _role(read_text(item[keys[0]], f"the role of {where}"), where, roles)
    if calls and role != "assistant":
        raise DataError(f"{where} has tool calls, but is from the {role}", expected="tool calls in answers only")
    content = _content(item.get(keys[1]), where)
    text = "\n".join([content, *calls]) if content.strip() else "\n".join(calls)
    return turn(role, text if calls else content, where, _weight(item, role, where))


def turn(role: str, content: object, where: str, weight: float = 1.0) -> Message:
    """A message whose role is known; an answer must say something.

    Raises:
        DataError: If ``content`` is no text, or an empty answer.
    """
    text = read_text(content, where)
    if role == "assistant" and not text.strip():
        raise DataError(f"{where} is an empty answer", expected="text to learn", fix="write the answer, or take it out")
    return Message(role, text, weight)


def read_text(value: object, where: str) -> str:
    """A text that can be written as UTF-8.

    Raises:
        DataError: If it is something else.
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
    """What a JSON value is, in words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}")


def without_nulls(value: Any) -> Any:
    """Arrow fills every object up to the same keys; what it filled in is not data."""
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
    """Calls as Hymba writes them: ``<toolcall> {"name": …, "arguments": …} </toolcall>``."""
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
        written = {"name": function["name"], "arguments": _arguments(function.get("arguments"), where)}
        yield f"<toolcall> {json.dumps(written, ensure_ascii=False)} </toolcall>"


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
            expected="a number from 0 (read, not learned) to 1 (learned as answers without a weight are)",
            fix="divide all weights by the largest one",
        )
    if weight and role != "assistant":
        raise DataError(f"{where} has weight {weight}, but is from the {role}", expected="weights on answers only")
    return float(weight) if role == "assistant" else 1.0
