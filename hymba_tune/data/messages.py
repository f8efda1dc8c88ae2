"""The messages of a conversation: their roles, contents and loss weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hymba_tune.data.rows import listing
from hymba_tune.data.values import is_empty, kind_of, parse_json, read_text, shown, without_nulls
from hymba_tune.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
CALL_ROLE = "function_call"
"""ShareGPT's role of an assistant's message that is one tool call, as JSON."""
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    CALL_ROLE: "assistant",
}
"""Roles of ShareGPT and of OpenAI's API under other names."""
LIKELY_ROLES = {"bot": "assistant", "chatbot": "assistant", "model": "assistant", "ai": "assistant"}
ROLE_PREFIX = "role."
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
REASONING_KEYS = frozenset({"reasoning_content", "reasoning", "thinking"})
TRAIN_KEYS = ("train", "training")
"""Axolotl's names of the flag whether there is loss on a message."""
SHOWN_KEYS = frozenset(
    {"role", "content", "from", "value", "tool_calls", "function_call", "weight", *TRAIN_KEYS, *REASONING_KEYS}
)
"""Keys of a message that have a meaning; the model does not see the others."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Keys of messages and names of columns with what a text model cannot see."""
REFUSED_KEYS = {
    **dict.fromkeys(MEDIA, "remove the row, or the key"),
    "train_detail": "train or weight for the whole message",
    "training_detail": "train or weight for the whole message",
}
"""Keys of a message that change its meaning and that cannot be read, and what to do about them."""
NO_ARGUMENTS = ("", "null", "None")
"""What servers write for the arguments of a tool call that has none."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: One of `ROLES`.
        content: The text. Tool calls and reasoning are part of it.
        weight: Loss weight of its tokens if it is an answer, from 0 (no loss) to 1.
    """

    role: str
    content: str
    weight: float = 1.0

    @property
    def learned(self) -> bool:
        """Whether there is loss on it, if it is an answer."""
        return self.weight > 0


def holds_messages(value: object) -> bool:
    """Return whether a value is a list of messages: objects that all have a role and a content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and any(item.keys() >= {*keys} for keys in MESSAGE_KEYS) for item in value)
    )


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


def with_context_first(messages: Sequence[Message]) -> list[Message]:
    """Decide about messages before the first question: system messages stay first, a greeting becomes context.

    An answer that comes before any question answers nothing, so there is no loss on it. The same holds for training,
    for ``chat --from`` and for the server.

    Args:
        messages: The messages of a conversation.

    Returns:
        The messages; answers before the first question have weight 0.

    Raises:
        DataError: If a system message follows others, or if there is nothing but answers.
    """
    roles = [message.role for message in messages]
    body = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    if "system" in roles[body:]:
        number = roles.index("system", body) + 1
        raise DataError(f"message {number} is a system message after others", expected="system messages first")

    question = next((index for index, role in enumerate(roles) if role in ("user", "tool")), None)
    if question is None:
        if roles and not body:
            raise DataError("it has an answer but no question", expected="a message from the user before the answer")
        return list(messages)
    return [
        replace(message, weight=0.0) if index < question and message.role == "assistant" else message
        for index, message in enumerate(messages)
    ]


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
    for key, fix in REFUSED_KEYS.items():
        if not is_empty(item.get(key)):
            raise DataError(f'{where} has "{key}", which cannot be used', expected="text", fix=fix)

    keys = MESSAGE_KEYS["from" in item]
    calls = list(_tool_calls(item, where))
    for key in keys:
        if item.get(key) is None and not (calls and key == keys[1]):
            detail = "it is null" if key in item else f"but {listing(item)}"
            raise DataError(f'{where} has no "{key}" ({detail})', expected=listing(keys))

    own_role = read_text(item[keys[0]], f"the role of {where}")
    role = _role(own_role, where, roles)
    content = _content(item.get(keys[1]), where)
    if own_role.strip().lower() == CALL_ROLE and own_role not in roles:
        calls, content = list(_written_calls(content, where)), ""
    if calls and role != "assistant":
        raise DataError(f"{where} has tool calls, but is from the {role}", expected="tool calls in answers only")

    text = "\n".join([content, *calls]) if content.strip() else "\n".join(calls)
    message = turn(role, text if calls else content, where, _weight(item, role, where))
    return replace(message, content=_reasoning(item, role, where, message.content) + message.content)


def turn(role: str, content: object, where: str, weight: float = 1.0) -> Message:
    """Create a message of a known role.

    Raises:
        DataError: If ``content`` is not text, or an answer is empty.
    """
    text = read_text(content, where)
    if role == "assistant" and not text.strip():
        raise DataError(f"{where} is an empty answer", expected="text to train on", fix="write the answer or remove it")
    return Message(role, text, weight)


def known_role(role: str, roles: Mapping[str, str]) -> str:
    """Return the role of `ROLES` for a name in any case; an unknown name is returned unchanged."""
    plain = role.strip().lower()
    return roles.get(role) or OTHER_ROLES.get(plain, plain)


def _role(role: str, where: str, roles: Mapping[str, str]) -> str:
    known = known_role(role, roles)
    if known in ROLES:
        return known
    likely = LIKELY_ROLES.get(known)
    mapped = shlex.join(["--map", f"{ROLE_PREFIX}{role}={likely}"]) if likely and "=" not in role else ""
    raise DataError(
        f'{where} has role "{shown(role)}"',
        expected=f"one of: {listing(ROLES)}",
        fix=f"rename the role, or {mapped}" if mapped else f"rename the role, or --map {ROLE_PREFIX}NAME=ROLE",
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
            what = f'of type "{shown(part_type)}"' if part_type else kind_of(part)
            expected = 'parts such as {"type": "text", "text": "…"}'
            raise DataError(f"part {number} of {where} is {what}", expected=expected)
        texts.append(read_text(part.get("text"), f"part {number} of {where}"))
    return "".join(texts)


def _reasoning(item: Mapping[str, Any], role: str, where: str, content: str) -> str:
    """Return the text that shows the reasoning before an answer; empty if there is none."""
    key = next((key for key in item if key in REASONING_KEYS and not is_empty(item[key])), None)
    if key is None:
        return ""
    if role != "assistant":
        raise DataError(f'{where} has "{key}", but is from the {role}', expected="reasoning in answers only")
    reasoning = read_text(item[key], f'"{key}" of {where}').strip()
    if not reasoning or reasoning in content:
        return ""  # some files hold it both in the content and beside it
    if "<think>" in content:
        raise DataError(
            f'{where} has "{key}" and other reasoning in its content',
            expected="one of them",
            fix=f"remove {key}, or what is between <think> and </think>",
        )
    return f"<think>\n{reasoning}\n</think>\n\n"


def _tool_calls(item: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield the tool calls of ``tool_calls``, or the one of the older ``function_call``."""
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list):
        raise DataError(f"the tool calls of {where} are {kind_of(calls)}", expected="a list of calls")
    written = [_tool_call(call, where) for call in calls]
    if not is_empty(older := item.get("function_call")):
        call = _tool_call(older, where)
        if written and call not in written:
            raise DataError(f'{where} has other calls in "function_call" than in "tool_calls"', expected="one of them")
        written = written or [call]
    yield from written


def _written_calls(content: str, where: str) -> Iterator[str]:
    """Yield the tool calls that a content holds as JSON: one call, or a list of calls."""
    try:
        value = parse_json(content)
    except ValueError:
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise DataError(f"{where} holds no tool call", expected='such as {"name": "add", "arguments": {}}')
    yield from (_tool_call(call, where) for call in calls)


def _tool_call(call: object, where: str) -> str:
    """Return a tool call in Hymba's notation: ``<toolcall> {"name": …, "arguments": …} </toolcall>``."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"a tool call of {where} names no function",
            expected='calls such as {"function": {"name": "add", "arguments": "{}"}}',
        )
    hymba_call = {"name": function["name"], "arguments": _arguments(function.get("arguments"), where)}
    return f"<toolcall> {json.dumps(hymba_call, ensure_ascii=False)} </toolcall>"


def _arguments(value: object, where: str) -> object:
    if value is None or (isinstance(value, str) and value.strip() in NO_ARGUMENTS):
        return {}
    what = f"the arguments of a tool call of {where}"
    try:
        arguments = parse_json(value) if isinstance(value, str) else without_nulls(value)
    except ValueError:
        raise DataError(f"{what} are not JSON", expected='such as {"a": 1}') from None
    if not isinstance(arguments, dict):
        raise DataError(f"{what} are {kind_of(arguments)}", expected='an object such as {"a": 1}')
    return arguments


def _weight(item: Mapping[str, Any], role: str, where: str) -> float:
    weight = _given_weight(item, where)
    if weight is None:
        return 1.0
    if weight and role != "assistant":
        raise DataError(
            f"{where} has {_weight_key(item)}, but is from the {role}", expected="weights and train on answers only"
        )
    return weight if role == "assistant" else 1.0


def _given_weight(item: Mapping[str, Any], where: str) -> float | None:
    """Return the weight, or that of axolotl's flag ``train``; `None` if there is neither."""
    weight = item.get("weight")
    if weight is not None and (not isinstance(weight, int | float) or not 0 <= weight <= 1):
        raise DataError(
            f"{where} has weight {shown(weight)}",
            expected="a number from 0 (no loss on the answer) to 1 (as without a weight)",
            fix="divide all weights by the largest one",
        )
    flags = {key: item[key] for key in TRAIN_KEYS if item.get(key) is not None}
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise DataError(f'"{key}" of {where} is {kind_of(flag)}', expected="true or false")
    wanted = {*flags.values(), *(() if weight is None else (weight > 0,))}
    if len(wanted) > 1:
        raise DataError(f"{where} has flags that contradict each other", expected="one of weight and train")
    if weight is None:
        return float(wanted.pop()) if wanted else None
    return float(weight)


def _weight_key(item: Mapping[str, Any]) -> str:
    weight = item.get("weight")
    return "train: true" if weight is None else f"weight {weight}"
