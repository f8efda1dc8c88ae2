"""OpenAI's responses: a request in their format as a chat, and its answer as items, whole or in events.

Nothing is stored: a client sends the earlier items again.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from hymba_tune.serve.requests import ApiError, ChatRequest, Fields, reject_unknown
from hymba_tune.serve.responses import AnswerStream, usage

SAMPLING = ("model", "temperature", "top_p", "stream", "parallel_tool_calls")
"""Fields that have the same names in chats."""
DEFAULTS = {"truncation": "disabled", "service_tier": "auto"}
"""Fields that may have no other values than these."""


class TextOptions(Fields):
    """The form of an answer."""

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})


class ResponsesRequest(Fields):
    """A request for a response."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    stream: bool = False
    text: TextOptions = Field(default_factory=TextOptions)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _reject_unknown_fields(self) -> ResponsesRequest:
        extra = self.model_extra or {}
        reject_unknown({name: value for name, value in extra.items() if value != DEFAULTS.get(name)})
        return self

    def as_chat(self) -> ChatRequest:
        """The same request for a chat.

        Raises:
            ApiError: If an item has no counterpart in a chat.
        """
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        for item in items:
            _add_item(messages, item)
        form = self.text.format
        chat = {name: getattr(self, name) for name in SAMPLING}
        chat |= {"messages": messages, "max_completion_tokens": self.max_output_tokens}
        chat |= {"tools": [_nested(tool, "tool") for tool in self.tools]}
        choice = self.tool_choice
        chat |= {"tool_choice": _nested(choice, "tool_choice") if isinstance(choice, dict) else choice}
        chat |= {"response_format": {"type": form.get("type"), "json_schema": form if "schema" in form else None}}
        return ChatRequest.model_validate(chat)


def _nested(tool: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A function as chats have it: its fields are in an object of their own."""
    if tool.get("type") != "function":
        raise ApiError(400, f"{what}: only functions are supported.", param=what)
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _add_item(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Add an input item to the messages of a chat; the calls of one answer are one message."""
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        if isinstance(content, list):
            content = [
                part | {"type": "text"}
                if isinstance(part, dict) and part.get("type") in ("input_text", "output_text")
                else part
                for part in content
            ]
        messages.append({"role": item.get("role"), "content": content})
    elif kind == "function_call":
        call = {"type": "function", "function": {name: item.get(name) for name in ("name", "arguments")}}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = item.get("output")
        text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
        messages.append({"role": "tool", "content": text})
    else:
        raise ApiError(400, f"input: items of type {kind!r} are not supported.", param="input")


class ItemWriter:
    """Writes an answer as items.

    Args:
        request: The request.
        name: The model's name.
        stream: The answer.
    """

    def __init__(self, request: ResponsesRequest, name: str, stream: AnswerStream) -> None:
        self._stream = stream
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": name,
            "error": None,
            "metadata": {},
            **request.model_dump(
                include={"instructions", "temperature", "top_p", "tools", "tool_choice", "parallel_tool_calls", "text"}
            ),
        }
        self._output: list[dict[str, Any]] = []
        self._message: int | None = None
        """The index of the message among the items, once there is text."""
        self._number = 0

    def body(self) -> dict[str, Any]:
        """The response so far."""
        reason = self._stream.finish_reason
        status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
        totals = usage(len(self._stream.generation.prompt), [self._stream.generation])
        return self._head | {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if reason == "length" else None,
            "output": self._output,
            "usage": {
                "input_tokens": totals["prompt_tokens"],
                "input_tokens_details": totals["prompt_tokens_details"],
                "output_tokens": totals["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": totals["total_tokens"],
            },
        }

    def begin(self) -> Iterator[str]:
        """The first events."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self.body())

    def changes(self) -> Iterator[str]:
        """The events of what is new."""
        earlier = len(self._stream.calls)
        text = self._stream.next()
        if text:
            yield from self._write(text)
        for call in self._stream.calls[earlier:]:
            yield from self._call(call)
        if self._stream.finish_reason:
            yield from self._end()

    def failure(self, error: ApiError) -> str:
        """The event of an error."""
        facts = error.body["error"]
        return self._event("error", **{name: facts[name] for name in ("code", "message", "param")})

    def _write(self, text: str) -> Iterator[str]:
        if self._message is None:
            self._message = len(self._output)
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": []}
            self._output.append(item | {"status": "in_progress"})
            yield self._item_event("response.output_item.added", self._message)
            self._output[-1]["content"].append(content)
            yield self._text_event("response.content_part.added", part=content)
        self._output[self._message]["content"][0]["text"] += text
        yield self._text_event("response.output_text.delta", delta=text, logprobs=[])

    def _call(self, call: Mapping[str, Any]) -> Iterator[str]:
        index, function = len(self._output), call["function"]
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"]}
        item |= {"name": function["name"], "arguments": "", "status": "in_progress"}
        self._output.append(item)
        yield self._item_event("response.output_item.added", index)
        place = {"item_id": item["id"], "output_index": index}
        yield self._event("response.function_call_arguments.delta", **place, delta=function["arguments"])
        item |= {"arguments": function["arguments"], "status": "completed"}
        named = {"name": item["name"], "arguments": item["arguments"]}
        yield self._event("response.function_call_arguments.done", **place, **named)
        yield self._item_event("response.output_item.done", index)

    def _end(self) -> Iterator[str]:
        body = self.body()
        if self._message is not None:
            item = self._output[self._message]
            (content,) = item["content"]
            item["status"] = body["status"]
            yield self._text_event("response.output_text.done", text=content["text"], logprobs=[])
            yield self._text_event("response.content_part.done", part=content)
            yield self._item_event("response.output_item.done", self._message)
        yield self._event(f"response.{body['status']}", response=body)

    def _text_event(self, kind: str, **fields: Any) -> str:
        assert self._message is not None
        place = {"item_id": self._output[self._message]["id"], "output_index": self._message, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _item_event(self, kind: str, index: int) -> str:
        return self._event(kind, output_index=index, item=self._output[index])

    def _event(self, kind: str, **fields: Any) -> str:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"


async def stream_items(changes: AsyncGenerator[None, None], writer: ItemWriter) -> AsyncIterator[str]:
    """Yield the events of a response.

    Args:
        changes: Yields after each change of the generation.
        writer: Writes its answer.
    """
    try:
        for event in writer.begin():
            yield event
        ended = False
        async for _ in changes:
            for event in () if ended else writer.changes():
                yield event
            ended = writer.body()["status"] != "in_progress"
    except ApiError as error:  # the status is already sent
        yield writer.failure(error)
    finally:
        await changes.aclose()
