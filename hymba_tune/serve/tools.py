"""Tool calls in Hymba's notation: read from an answer, and enforced by a grammar."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from hymba_tune.data.values import parse_json
from hymba_tune.generate.constraints import json_rule
from hymba_tune.serve.requests import BaseRequest, ChatRequest, Function, ToolChoice

OPEN = "<toolcall>"
CLOSE = "</toolcall>"
HEADER = "%llguidance {}\n"
CALL = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
LAST_CALL = re.compile(f"{OPEN}(.*?)(?:{CLOSE}|$)", re.DOTALL)


def split_calls(text: str, *, finished: bool) -> tuple[str, list[dict[str, str]]]:
    """Separate the tool calls of an answer from its text.

    Args:
        text: The answer so far.
        finished: Whether nothing follows. Until then, the text ends before a call that is not complete.

    Returns:
        The text without calls, and the ``name`` and ``arguments`` (as JSON) of each call. What is marked as a call but
        is none stays in the text.
    """
    content, calls, end = "", [], 0
    for found in (LAST_CALL if finished else CALL).finditer(text):
        call = _read_call(found[1])
        content += text[end : found.start()] if call else text[end : found.end()]
        calls += [call] if call else []
        end = found.end()
    rest = text[end:]
    return content + (rest if finished else rest.partition(OPEN)[0]), calls


def _read_call(text: str) -> dict[str, str] | None:
    try:
        call = parse_json(text.strip())
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}


def call_entry(call: dict[str, str]) -> dict[str, Any]:
    """A tool call in OpenAI's format."""
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}


def content_grammar(request: BaseRequest) -> str | None:
    """The grammar of the texts of a request without tools, in llguidance's variant of Lark; None for any text.

    Raises:
        DataError: If a schema is nested too deeply.
    """
    rule = _content_rule(request)
    return rule and f"{HEADER}start: {rule}"


def _content_rule(request: BaseRequest) -> str | None:
    form = request.response_format
    if form is None or form.schema_of_answer is None:
        return None
    return json_rule(form.schema_of_answer, lenient=not form.strict)


def answer_grammar(request: ChatRequest) -> str | None:
    """The grammar of the answers to a request, as for `content_grammar`.

    Raises:
        DataError: If a schema is nested too deeply.
    """
    functions = [tool.function for tool in request.usable_tools]
    if not functions:
        return content_grammar(request)
    if isinstance(request.tool_choice, ToolChoice):
        functions = [one for one in functions if one.name == request.tool_choice.function.name]

    many = request.parallel_tool_calls
    rules = "\n".join(_call_rules(functions, many=many))
    if request.tool_choice != "auto":
        return f"{HEADER}start: calls\n{rules}"
    if content := _content_rule(request):
        return f"{HEADER}start: calls | content\ncontent: {content}\n{rules}"
    if any(one.strict for one in functions):
        # What follows the mark is a call, wherever in a text the mark is.
        start = f"start: (mark body){'*' if many else '?'} TEXT"
        return f'{HEADER}{start}\nmark[lazy]: TEXT "{OPEN}"\nTEXT: /(.|\\n)*/\n{rules}'
    return None


def _call_rules(functions: Sequence[Function], *, many: bool) -> list[str]:
    """The rules ``calls`` and ``body``, for one call or several."""
    rules = [f"calls: call{' (NEWLINE call)*' if many else ''}", f'call: "{OPEN}" body', 'NEWLINE: "\\n"']
    names = " | ".join(f"call_{number}" for number in range(len(functions)))
    rules.append(f'body: " " ({names}) " {CLOSE}"')
    for number, one in enumerate(functions):
        begin = json.dumps(f'{{"name": {json.dumps(one.name)}, "arguments": ')
        rules.append(f'call_{number}: {begin} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: {json_rule({'type': 'object', **one.parameters}, lenient=not one.strict)}")
    return rules
